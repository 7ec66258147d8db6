"""The echo: from deep hidden states to one signal per target module.             (equations 2 and 3)

    z   = norm( mean over source layers s of stopgrad(h^s) at the boundary )           one per row
    e   = W2 tanh(W1 z)                                                                projection
    g   = sigmoid(U2 tanh(U1 z) + c)                                                   gate
    δ_m = λ_m · (g ⊙ e)                                                                one per target module m

W2 and U2 start at zero, W1 and U1 do not. The echo starts at zero and learns: at site `output` W2 has a gradient from
the first routed step, W1, λ, U2 and c from the second, U1 from the third; at `lora_input` each one step later, because
B starts at zero, and with `standardize` too, because z is zero in the first step. (If W1 and W2 both start at zero, as
in [R], neither ever gets one.) No branch has biases before its gate: where z is zero, so is the echo.

Shapes: `B` rows, `d` hidden width of the model, `width` features of the target module.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from echo_lora.errors import EchoDataError
from echo_lora.method.config import EchoConfig


def echo_representation(hidden: list[Tensor], standardize: Standardize | None = None) -> Tensor:
    """z of equation 2: the mean of the source layers' boundary states, normalised without affine parameters.

    hidden: h^s, one (B, d) tensor per source layer, any float dtype; detached by `step.reading`, unless
    `source_gradient`. standardize: None for LayerNorm over each row [R]. Returns (B, d) float32.
    """
    mean = torch.stack([h.to(hidden[0].device, torch.float32) for h in hidden]).mean(0)  # (layers, B, d) → (B, d)
    return F.layer_norm(mean, mean.shape[-1:]) if standardize is None else standardize(mean)  # (B, d)


class Standardize(nn.Module):
    """Standardises each coordinate of z by its mean and standard deviation over the rows of earlier steps.      [O]

    The boundary states of different rows are nearly equal, and LayerNorm keeps what they share; this keeps how a row
    differs from the others. Mean and variance are running averages over the rows of routed training steps, of all
    processes, with a memory of about 20 steps. The rows of a step count from the next step on, so that z does not
    depend on how a step is split into micro-batches; in the first step z is zero. Checkpoints save all of it.
    """

    MEMORY = 0.05  # weight of the newest step, after the first 1 / 0.05 steps
    LIMIT = 5.0  # deviations: a coordinate that has hardly varied so far must not blow up

    mean: Tensor  # (d,)
    variance: Tensor  # (d,)
    steps: Tensor
    new_rows: Tensor  # number, mean and sum of squared deviations of the current step's rows
    new_mean: Tensor  # (d,)
    new_squares: Tensor  # (d,)

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        # not persistent: accelerate's FSDP2 fails on entries of a state_dict that are not parameters
        for name in ("mean", "variance", "new_mean", "new_squares"):
            self.register_buffer(name, torch.zeros(hidden_size), persistent=False)
        for name in ("steps", "new_rows"):
            self.register_buffer(name, torch.zeros(1), persistent=False)

    def forward(self, states: Tensor) -> Tensor:
        """states: (B, d) float32. Returns (B, d) float32, within ±LIMIT."""
        if self.training and torch.is_grad_enabled():
            self._record(states)
        z = (states - self.mean.to(states)) / (self.variance.to(states) + 1e-5).sqrt()
        return z.clamp(-self.LIMIT, self.LIMIT) * self.variance.any().to(z)  # zero until there is a variance

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Standardize:
        """Casting the model moves the statistics but keeps them in float32, which their small changes need."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)

    @torch.no_grad()
    def _record(self, states: Tensor) -> None:
        """Add these rows, of all processes, to the current step's. states: (B, d)."""
        x = states.to(self.mean)
        counts = x.isfinite().all(1, keepdim=True)  # (B, 1): a float16 step that overflows is skipped, and its rows
        rows = _over_processes(counts.sum(0).to(x))  # (1,)
        mean = _over_processes(x.where(counts, 0.0).sum(0)) / rows.clamp(min=1)  # (d,)
        squares = _over_processes((x - mean).where(counts, 0.0).square().sum(0))  # (d,)
        shift, share = mean - self.new_mean, rows / (self.new_rows + rows).clamp(min=1)  # (d,), (1,)
        self.new_squares += squares + shift.square() * self.new_rows * share
        self.new_mean += share * shift
        self.new_rows += rows

    @torch.no_grad()
    def end_step(self) -> None:
        """Update the statistics with the rows of the step that ended, if it had any."""
        has_rows = (self.new_rows > 0).to(self.mean)  # (1,): a factor, because a branch would wait for the device
        weight = has_rows * (1 / (self.steps + 1)).clamp(min=self.MEMORY)  # (1,)
        shift = self.new_mean - self.mean  # (d,)
        self.mean += weight * shift
        # the variance of a mixture includes the distance of the two means
        self.variance.copy_(
            (1 - weight) * (self.variance + weight * shift.square())
            + weight * self.new_squares / self.new_rows.clamp(min=1)
        )
        self.steps += has_rows
        for buffer in (self.new_rows, self.new_mean, self.new_squares):
            buffer.zero_()


def _over_processes(x: Tensor) -> Tensor:
    """The sum of x over all processes, in place."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(x)
    return x


def apply_control(z: Tensor, kind: str) -> Tensor:
    """z, or what a control replaces it with; (B, d) float32 in and out. [O]

    `real` and `shallow` keep z (they read different layers), `zero` leaves two passes and distillation without any
    echo, `noise` draws a random vector of the same norm, `shuffled` gives every row the z of another one. Raises
    EchoDataError if `shuffled` has only one row.
    """
    if kind == "zero":
        return torch.zeros_like(z)
    if kind == "noise":
        noise = F.layer_norm(torch.randn_like(z), z.shape[-1:])  # (B, d)
        # (B, d), stop-gradient: only the size of z is kept, and it must not train the source layers
        return noise * z.detach().norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
    if kind == "shuffled":
        if len(z) < 2:
            raise EchoDataError(
                "echo_kind='shuffled' gives each row the echo of another row, but this batch has a single row. "
                "Use at least 2 rows per device batch, and drop the last incomplete batch."
            )
        return z.roll(1, dims=0)  # (B, d)
    return z


class EchoBranch(nn.Module):
    """The parameters of equation 3 for one target module, in float32: projection e, gate g and scale λ_m.

    `EchoNetworks` computes with those of all modules at once.
    """

    def __init__(self, hidden_size: int, width: int, config: EchoConfig) -> None:
        super().__init__()
        k = config.bottleneck
        self.W1 = nn.Linear(hidden_size, k, bias=False)
        self.W2 = nn.Linear(k, width, bias=False)
        self.U1 = nn.Linear(hidden_size, k, bias=False)
        self.U2 = nn.Linear(k, width, bias=True)  # its bias is c
        self.scale = nn.Parameter(torch.full((1,), float(config.scale_init)))  # λ_m; FSDP2 can't shard a 0-d tensor
        for first in (self.W1, self.U1):
            nn.init.kaiming_normal_(first.weight, nonlinearity="tanh")
        for last in (self.W2, self.U2):
            nn.init.zeros_(last.weight)
        nn.init.constant_(self.U2.bias, config.gate_bias_init)


class EchoNetworks(nn.Module):
    """One EchoBranch per target module. Trained with the adapter, never saved with it.

    widths: the number of features of each target module, by its full name in the base model. The initial weights are
    drawn from torch's global generator without advancing it, so what is drawn later, such as dropout, is the same with
    and without the echo.
    """

    def __init__(self, hidden_size: int, widths: dict[str, int], config: EchoConfig) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            self.branches = nn.ModuleDict(
                {_key(name): EchoBranch(hidden_size, width, config) for name, width in widths.items()}
            )
        self._names_of_width: dict[int, list[str]] = {}
        for name, width in widths.items():
            self._names_of_width.setdefault(width, []).append(name)
        self.standardize = Standardize(hidden_size) if config.normalization == "standardize" else None

    def branch(self, name: str) -> nn.Module:
        """The branch that feeds the module with this name."""
        return self.branches[_key(name)]

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint saves: the parameters, and the statistics of `standardize`; not copies."""
        return self.state_dict() | dict(self.named_buffers())

    def forward(self, z: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """δ (B, width) by module name, and for the logs the means of δ's norm and of the gate over rows and modules.

        z: (B, d) float32. The two means are float32 scalars without gradient. The branches of equal width (M of them)
        are stacked, because on a GPU their many small products would take longer to launch than to compute. [O]
        """
        deltas: dict[str, Tensor] = {}
        norms, gates = [], []
        # autocast would round the echo to 16 bits, although its parameters are float32
        with torch.autocast(z.device.type, enabled=False):
            for names in self._names_of_width.values():
                delta, gate = projection_and_gate([self.branches[_key(name)] for name in names], z)  # (M, B, width)
                deltas.update(zip(names, delta.unbind(0), strict=True))
                norms.append(delta.detach().norm(dim=-1).mean(1))  # (M,), stop-gradient: a metric
                gates.append(gate.detach().mean((1, 2)))  # (M,), stop-gradient: a metric
        return deltas, torch.cat(norms).mean(), torch.cat(gates).mean()


def projection_and_gate(branches: list[Any], z: Tensor) -> tuple[Tensor, Tensor]:
    """Equation 3 for M branches of one width. z: (B, d). Returns δ (M, B, width) and the gate, in (0, 1)."""
    # the source layers may be on another device; float32 unless the model was cast
    z = z.to(branches[0].W1.weight).expand(len(branches), *z.shape)  # (M, B, d)
    W1, W2, U1, U2 = (
        torch.stack([getattr(branch, name).weight for branch in branches]).mT for name in ("W1", "W2", "U1", "U2")
    )  # (M, d, bottleneck), (M, bottleneck, width), and the same
    c = torch.stack([branch.U2.bias[None] for branch in branches])  # (M, 1, width)
    scale = torch.stack([branch.scale[:, None] for branch in branches])  # λ_m: (M, 1, 1)
    projection = torch.bmm(torch.tanh(torch.bmm(z, W1)), W2)  # e: (M, B, width)
    gate = torch.sigmoid(torch.baddbmm(c, torch.tanh(torch.bmm(z, U1)), U2))  # g: (M, B, width), in (0, 1)
    return scale * gate * projection, gate  # (M, B, width), (M, B, width)


def _key(name: str) -> str:
    return name.replace(".", "/")  # keys of a ModuleDict can't contain dots
