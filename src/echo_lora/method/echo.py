"""The echo itself: from deep hidden states to one signal per target module.      (equations 2 and 3)

    z   = norm( mean over source layers of h at the boundary )                         one per row
    e   = W2 tanh(W1 z)                                                                projection
    g   = sigmoid(U2 tanh(U1 z) + c)                                                   gate
    δ_m = λ_m · (g ⊙ e)                                                                one per target module m

W2 and U2 start at zero, W1 and U1 do not: the echo starts neutral, and W2 has a gradient at once, W1, λ and
the gate one step later. (Starting both W1 and W2 at zero, as [R] does, leaves them there for ever.)

Shapes: `B` rows, `d` hidden width of the model, `width` features of the target module.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from echo_lora.errors import EchoDataError
from echo_lora.method.config import EchoConfig


def echo_representation(hidden: list[Tensor], standardize: Standardize | None = None) -> Tensor:
    """z: the mean of the boundary states of the source layers, normalised without affine parameters.

    hidden: one (B, d) tensor per source layer, any float dtype; whether they carry gradient is decided where they are
    read. Returns (B, d) float32. standardize: None normalises each row over its coordinates, LayerNorm [R].
    """
    mean = torch.stack([h.to(hidden[0].device, torch.float32) for h in hidden]).mean(0)  # (B, d)
    return F.layer_norm(mean, mean.shape[-1:]) if standardize is None else standardize(mean)  # (B, d)


class Standardize(nn.Module):
    """Each coordinate minus its mean, over its deviation, in the rows of earlier steps.                [O]

    Boundary states of different rows are nearly equal, and after LayerNorm still are: what is left here is how a row
    differs from the others. Mean and variance follow the rows of routed training steps, over all processes, with a
    memory of about 20 steps. A step's own rows count from the next step on, so that z does not depend on how the step
    is split; before the first, z is zero. All of it is part of the echo's state in a checkpoint.
    """

    MEMORY = 0.05  # weight of the newest step, once there have been 1 / 0.05
    LIMIT = 5.0  # deviations: a coordinate that hardly varied so far must not blow up

    mean: Tensor
    variance: Tensor
    steps: Tensor
    new_rows: Tensor  # number, mean and sum of squared deviations of the rows of the step under way
    new_mean: Tensor
    new_squares: Tensor

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        # not persistent: accelerate's FSDP2 shards whatever a state_dict names, and fails at what is no parameter
        for name in ("mean", "variance", "new_mean", "new_squares"):
            self.register_buffer(name, torch.zeros(hidden_size), persistent=False)
        for name in ("steps", "new_rows"):
            self.register_buffer(name, torch.zeros(1), persistent=False)

    def forward(self, states: Tensor) -> Tensor:
        """states: (B, d) float32. Returns (B, d) float32, within ±LIMIT."""
        if self.training and torch.is_grad_enabled():
            self._see(states)
        z = (states - self.mean.to(states)) / (self.variance.to(states) + 1e-5).sqrt()
        return z.clamp(-self.LIMIT, self.LIMIT) * self.variance.any().to(z)  # after a first step of one row too

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Standardize:
        """A cast of the whole model moves the statistics, but leaves them in float32: their changes are small."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(move, recurse)

    @torch.no_grad()
    def _see(self, states: Tensor) -> None:
        """Join these rows, of all processes, to those of the step under way."""
        x = states.to(self.mean)
        x = x[x.isfinite().all(1)]  # a scaled float16 step that overflows is skipped; it must not stay here either
        rows = _over_processes(x.new_tensor([float(len(x))]))
        if not rows:
            return
        mean = _over_processes(x.sum(0)) / rows  # (d,)
        squares = _over_processes((x - mean).square().sum(0))  # (d,)
        away, share = mean - self.new_mean, rows / (self.new_rows + rows)
        self.new_squares += squares + away.square() * self.new_rows * share
        self.new_mean += share * away
        self.new_rows += rows

    @torch.no_grad()
    def end_step(self) -> None:
        """Let the rows of the step that ended count. Without any, nothing changes."""
        if not self.new_rows:
            return
        weight = (1 / (self.steps + 1)).clamp(min=self.MEMORY)
        away = self.new_mean - self.mean
        self.mean += weight * away
        # of a mixture, with the distance of the two means
        self.variance.copy_(
            (1 - weight) * (self.variance + weight * away.square()) + weight * self.new_squares / self.new_rows
        )
        self.steps += 1
        for buffer in (self.new_rows, self.new_mean, self.new_squares):
            buffer.zero_()


def _over_processes(x: Tensor) -> Tensor:
    """The sum of x over all processes, in place."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(x)
    return x


def apply_control(z: Tensor, kind: str) -> Tensor:
    """z, or what a control puts in its place; (B, d) float32 in and out. [O]

    `real` and `shallow` keep z (they differ in the layers it was read from), `zero` leaves two passes and
    distillation without any echo, `noise` draws another vector of the same norm, `shuffled` gives every row
    the z of another one. Raises EchoDataError if `shuffled` has one row only.
    """
    if kind == "zero":
        return torch.zeros_like(z)
    if kind == "noise":
        noise = F.layer_norm(torch.randn_like(z), z.shape[-1:])
        return noise * z.detach().norm(dim=-1, keepdim=True) / noise.norm(dim=-1, keepdim=True)
    if kind == "shuffled":
        if len(z) < 2:
            raise EchoDataError(
                "echo_kind='shuffled' gives each row the echo of another row, but this batch has a single row. "
                "Use at least 2 rows per device batch, and drop the last incomplete batch."
            )
        return z.roll(1, dims=0)
    return z


class EchoBranch(nn.Module):
    """Projection, gate and scale of one target module, in float32. (equation 3)"""

    def __init__(self, hidden_size: int, width: int, config: EchoConfig) -> None:
        super().__init__()
        k = config.bottleneck
        self.W1 = nn.Linear(hidden_size, k, bias=False)
        self.W2 = nn.Linear(k, width, bias=False)
        self.U1 = nn.Linear(hidden_size, k, bias=False)
        self.U2 = nn.Linear(k, width, bias=True)  # its bias is c
        self.scale = nn.Parameter(torch.full((1,), float(config.scale_init)))  # FSDP2 shards no scalars
        for first in (self.W1, self.U1):
            nn.init.kaiming_normal_(first.weight, nonlinearity="tanh")
        for last in (self.W2, self.U2):
            nn.init.zeros_(last.weight)
        nn.init.constant_(self.U2.bias, config.gate_bias_init)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """z: (B, d) float32. Returns δ (B, width) and the gate (B, width), in (0, 1)."""
        z = z.to(self.W1.weight)  # float32, unless someone has cast the whole model; source layers may be elsewhere
        projection = self.W2(torch.tanh(self.W1(z)))  # (B, width)
        gate = torch.sigmoid(self.U2(torch.tanh(self.U1(z))))  # (B, width), gate in (0, 1)
        return self.scale * gate * projection, gate


class EchoNetworks(nn.Module):
    """One EchoBranch per target module. Trained beside the adapter, never saved with it.

    widths: the number of features of each target module, by its full name in the base model.
    Draws its initial weights from torch's global generator without advancing it, so that an adapter trained
    with the echo starts from the same numbers as one trained without.
    """

    def __init__(self, hidden_size: int, widths: dict[str, int], config: EchoConfig) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            self.branches = nn.ModuleDict(
                {_key(name): EchoBranch(hidden_size, width, config) for name, width in widths.items()}
            )
        self.names = list(widths)
        self.standardize = Standardize(hidden_size) if config.normalization == "standardize" else None

    def branch(self, name: str) -> nn.Module:
        """The branch that feeds the module of this name."""
        return self.branches[_key(name)]

    def tensors(self) -> dict[str, Tensor]:
        """All that a checkpoint keeps: the parameters and the statistics of `standardize`, themselves, not copies."""
        return self.state_dict() | dict(self.named_buffers())

    def forward(self, z: Tensor) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """z: (B, d) float32.

        Returns δ (B, width) by module name, the mean norm of δ over rows and modules, and the mean gate;
        the two means are float32 scalars without gradient, for the logs.
        """
        deltas, norms, gates = {}, [], []
        # autocast would round the echo to bf16 although its parameters are float32
        with torch.autocast(z.device.type, enabled=False):
            for name in self.names:
                delta, gate = self.branch(name)(z)  # (B, width), (B, width)
                deltas[name] = delta
                norms.append(delta.detach().norm(dim=-1).mean())
                gates.append(gate.detach().mean())
        return deltas, torch.stack(norms).mean(), torch.stack(gates).mean()


def _key(name: str) -> str:
    return name.replace(".", "/")  # a module name may not hold a dot
