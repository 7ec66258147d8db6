"""The dry run: what training would do and cost.

The dry run builds the model on torch's meta device, where tensors have shapes but no data: it counts parameters, and
the bytes that autograd would keep, on the real modules, without loading any weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from echo_lora.data.prepared import PreparedData
from echo_lora.environment import gigabytes, peak_memory
from echo_lora.errors import EchoModelError
from echo_lora.method.config import EchoConfig
from echo_lora.method.losses import CHUNK_ELEMENTS
from echo_lora.method.model import EchoModel
from echo_lora.method.routing import routing_probability
from echo_lora.method.targets import decoder_layers, listed
from echo_lora.models import empty_model
from echo_lora.progress import stage
from echo_lora.recipe.build import add_adapter, parameter_counts
from echo_lora.recipe.needs import require_packages
from echo_lora.recipe.prepare import prepare, sample_of, summary_of
from echo_lora.recipe.schema import Recipe

# Bytes per trainable parameter: float32 weight and gradient, and the optimizer's state.
STATE_BYTES = {"adamw_bnb_8bit": 10, "paged_adamw_8bit": 10, "adafactor": 9, "sgd": 8}

ADAM_BYTES = 16

QUANTISED_SHARE = {"4bit": 0.55 / 4, "8bit": 1.05 / 4}  # of the float32 bytes, quantisation constants included


# Tensors of a chunk's logits that exist at a time, in float32, without and with the echo-on pass: on a GPU those of
# losses.terms_and_gradient, on a CPU fitted to the sweeps of scripts/scaling.py. So is what the C library keeps of
# freed memory there, in pieces that the next tensor doesn't fit into. A training has more libraries loaded than a plan.
LOGITS = {"cpu": {False: 4, True: 5}, "cuda": {False: 5, True: 13}}
FRAGMENTATION = 1.3
TRAINING_LIBRARIES = 70_000_000


@dataclass(frozen=True)
class Memory:
    """Estimated bytes at the peak of training, without kernel workspaces."""

    base: int  # the base's weights
    states: int  # adapter and echo: weights, gradients, optimizer
    activations: int | None  # what the passes keep for the longest batch; None if it can't be measured
    process: int  # Python and its libraries, on a CPU

    @property
    def total(self) -> int:
        return self.base + self.states + (self.activations or 0) + self.process

    def parts(self) -> str:
        activations = "unknown" if self.activations is None else gigabytes(self.activations)
        parts = f"base {gigabytes(self.base)}, trained {gigabytes(self.states)}, activations {activations}"
        return parts + (f", libraries {gigabytes(self.process)}" if self.process else "")


@dataclass(frozen=True)
class Plan:
    """What `train` would do, and what it would cost."""

    model: str
    method: str
    echo_kind: str | None  # None without the echo
    source_layers: list[str]
    target_layers: dict[str, list[str]]  # the modules in each that receive the echo
    without_echo: dict[str, str]  # adapted modules that receive no echo, and why
    base_parameters: int
    deployed_parameters: int  # of the adapter, which is saved
    echo_parameters: int  # of the echo, which is discarded
    rows: list[str]
    steps: int
    mean_routing: float  # p̄, over the planned steps
    why_full: str | None  # why the echo-on pass can't share the prefix; None if it does
    cost: float  # arithmetic relative to the same adapter without the echo
    memory: Memory

    @property
    def trainable_parameters(self) -> int:
        return self.deployed_parameters + self.echo_parameters

    def pairs(self) -> dict[str, str]:
        """Labels and values for the terminal."""
        pairs = {"model": self.model, "method": f"{self.method}, echo {self.echo_kind or 'off'}"}
        if self.echo_kind is not None:
            pairs |= {
                "source layers": ", ".join(self.source_layers),
                "target layers": "\n".join(f"{name}: {', '.join(to)}" for name, to in self.target_layers.items()),
                **({"without echo": listed(self.without_echo)} if self.without_echo else {}),
                "echo-on pass": f"in full: {self.why_full}" if self.why_full else "on the answer only",
            }
        routed = f", {self.mean_routing:.0%} of them routed" if self.echo_kind else ""
        return pairs | {
            "trainable": f"{self.trainable_parameters:,} parameters, beside {self.base_parameters:,} frozen",
            "of the echo": f"{self.echo_parameters:,}, discarded after training",
            "deployed": f"{self.deployed_parameters:,}",
            "rows": "\n".join(self.rows),
            "steps": f"{self.steps}{routed}",
            "peak memory": f"about {gigabytes(self.memory.total)} (an estimate)\n{self.memory.parts()}",
            "cost": f"{self.cost:.2f} x the arithmetic of the same adapter without echo (an estimate)",
        }


def plan(recipe: Recipe) -> Plan:
    """The dry run. Raises the errors that training would raise before its first step."""
    require_packages(recipe, trains=True)
    with stage("Reading rows", line=False):
        prepared = prepare(sample_of(recipe))[1]["train"]
    with stage("Building the model without weights", line=False):
        base, model = on_meta(recipe)
    config = recipe.build_echo_config()
    sources, targets = _named_layers(base, model, config) if isinstance(model, EchoModel) else ([], {})
    steps = step_count(recipe, sum(len(data.rows) for data in prepared))
    # both schedules are linear in the step
    mean_routing = (routing_probability(config, 0, steps) + routing_probability(config, steps - 1, steps)) / 2
    reason = model.why_full() if isinstance(model, EchoModel) else None
    if config.echo_step == "full":
        reason = "echo_config.echo_step is full"
    if recipe.echo and config.echo_step == "shared_prefix" and reason is not None:
        raise EchoModelError(f"echo_config.echo_step = shared_prefix is impossible: {reason}. Use auto.")
    deployed, echo = parameter_counts(model)
    with stage("Measuring what a step keeps", line=False):
        memory = _memory(recipe, model, shape_of(prepared), recipe.training.batch_size, reason is None)
    return Plan(
        model=recipe.model,
        method=recipe.method,
        echo_kind=config.echo_kind if recipe.echo else None,
        source_layers=sources,
        target_layers=targets,
        without_echo=model.without_echo if isinstance(model, EchoModel) else {},
        base_parameters=sum(p.numel() for p in model.parameters() if not p.requires_grad),
        deployed_parameters=deployed,
        echo_parameters=echo,
        rows=summary_of(recipe, prepared),
        steps=steps,
        mean_routing=mean_routing,
        why_full=reason if recipe.echo else None,
        cost=_cost(prepared, mean_routing, reason is None) if recipe.echo else 1.0,
        memory=memory,
    )


def on_meta(recipe: Recipe) -> tuple[PreTrainedModel, PeftModel]:
    """The recipe's base and its model with adapter and echo, all without weights. Raises an EchoError."""
    base = empty_model(recipe.model, recipe.dtype, recipe.attn_implementation, recipe.trust_remote_code)
    with torch.device("meta"):
        model = add_adapter(recipe, base)
    model.train()
    if recipe.training.gradient_checkpointing:
        _checkpoint(model)
    return base, model


def _checkpoint(model: PeftModel) -> None:
    model.activation_checkpointing_enable()
    model.enable_input_require_grads()


def _named_layers(
    base: PreTrainedModel, model: EchoModel, config: EchoConfig
) -> tuple[list[str], dict[str, list[str]]]:
    prefix, layers = decoder_layers(base)
    sources = [f"{prefix}.{index}" for index in config.resolve_source_layers(len(layers))]
    targets: dict[str, list[str]] = {}
    for index in config.resolve_target_layers(len(layers)):
        layer = f"{prefix}.{index}"
        names = [name for name in model._injector.modules if name.startswith(f"{layer}.")]
        targets[layer] = [name.removeprefix(f"{layer}.") for name in names]
    return sources, targets


def step_count(recipe: Recipe, rows: int) -> int:
    """Number of optimizer steps of a training on so many rows."""
    training = recipe.training
    if training.steps is not None:
        return training.steps
    batches = math.ceil(rows / training.batch_size)
    epochs = 1.0 if training.epochs is None else training.epochs
    return math.ceil(epochs * math.ceil(batches / training.gradient_accumulation))


class Shape(NamedTuple):
    """What the memory of a batch depends on: the longest prompt and answer in tokens, and the number of rows."""

    prompt: int
    answer: int
    rows: int


def shape_of(prepared: list[PreparedData]) -> Shape:
    rows = [row for data in prepared for row in data.rows]
    answer = max(len(row.labels) - row.answer_start for row in rows)
    return Shape(max(row.answer_start for row in rows), answer, len(rows))


class PeakMemory:
    """The memory of training, as in the plan, for one batch size after another.

    The model is built once, without weights. Raises EchoModelError.
    """

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        _, self.model = on_meta(recipe)
        self.shares_prefix = not isinstance(self.model, EchoModel) or self.model.why_full() is None

    def __call__(self, shape: Shape, batch_size: int) -> Memory:
        return _memory(self.recipe, self.model, shape, batch_size, self.shares_prefix)

    def checkpoint(self) -> None:
        """From here on with gradient checkpointing."""
        _checkpoint(self.model)


def _cost(prepared: list[PreparedData], mean_routing: float, shares_prefix: bool) -> float:
    """(P + (1 + p̄)·A) / (P + A) with a shared prefix, 1 + p̄ with two full passes. [O]"""
    if not shares_prefix:
        return 1 + mean_routing
    P = sum(row.answer_start for data in prepared for row in data.rows)
    A = sum(len(row.labels) - row.answer_start for data in prepared for row in data.rows)
    return (P + (1 + mean_routing) * A) / (P + A)


def _memory(recipe: Recipe, model: PeftModel, shape: Shape, batch_size: int, shares_prefix: bool) -> Memory:
    batch = shape._replace(rows=min(batch_size, shape.rows))
    scored = shape.prompt + shape.answer if recipe.data.train_on_prompt else shape.answer
    on_gpu = torch.cuda.is_available()
    kept = activation_bytes(model, batch, scored, "cuda" if on_gpu else "cpu", recipe.echo, shares_prefix)
    share = QUANTISED_SHARE.get(recipe.quantization or "")
    frozen = [p for p in model.parameters() if not p.requires_grad]
    base = sum(p.numel() * (p.element_size() if share is None else 4 * share) for p in frozen)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Memory(
        base=int(base),
        states=trained * STATE_BYTES.get(recipe.training.optimizer, ADAM_BYTES),
        activations=kept,
        process=0 if on_gpu else peak_memory() + TRAINING_LIBRARIES,
    )


def activation_bytes(
    model: PeftModel, batch: Shape, scored: int, device: str, has_echo: bool, shares_prefix: bool = True
) -> int | None:
    """Bytes that the passes over a batch keep, and the losses need; None if the model can't be measured.

    scored: columns of the echo-off pass with logits. device: "cuda" or "cpu", where training is to run.
    """
    P, A, B = batch
    kept = _kept_bytes(model, B, P + A, scored)
    if kept is None:
        return None
    logits = 4 * min(B * scored * model.get_input_embeddings().num_embeddings, CHUNK_ELEMENTS)
    passes = (1 + A / (P + A) if shares_prefix else 2.0) if has_echo else 1.0
    prefix = _prefix_bytes(model.get_base_model(), B, P) if has_echo and shares_prefix else 0
    total = passes * kept + prefix + LOGITS[device][has_echo] * logits
    return int(total if device == "cuda" else FRAGMENTATION * total)


def _prefix_bytes(base: PreTrainedModel, B: int, P: int) -> int:
    """Bytes of the prefix's keys and values, on top of what the passes keep.

    Without checkpointing, the echo-on pass keeps them concatenated to its own, for each query head. With checkpointing,
    they are kept for each key head, and in backward so are their gradients.
    """
    config = base.config.get_text_config()
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    if base.is_activation_checkpointing:
        heads = 2 * (getattr(config, "num_key_value_heads", None) or heads)
    return 2 * B * P * heads * width * base.dtype.itemsize * config.num_hidden_layers


def _kept_bytes(model: PeftModel, B: int, T: int, A: int) -> int | None:
    """Bytes that autograd keeps for one forward; with checkpointing, plus those of one recomputed layer."""
    base = model.get_base_model()
    kept = _saved_bytes(lambda: _forward(base, B, T, A), model)
    if kept is None or not base.is_activation_checkpointing:
        return kept
    base.activation_checkpointing_disable()
    everything = _saved_bytes(lambda: _forward(base, B, T, A), model)
    base.activation_checkpointing_enable()
    return None if everything is None else kept + everything // len(decoder_layers(base)[1])


def _forward(base: PreTrainedModel, B: int, T: int, A: int) -> None:
    ids = torch.zeros(B, T, dtype=torch.long, device="meta")
    # a 4-dimensional mask is used as is; the values of any other would be read, and meta tensors have none
    mask = torch.ones(B, 1, T, T, dtype=torch.bool, device="meta")
    base(input_ids=ids, attention_mask=mask, use_cache=False, logits_to_keep=A)


def _saved_bytes(forward: Callable[[], None], model: PeftModel) -> int | None:
    """Bytes of the tensors, except weights, saved for backward; None if the model needs values, not just shapes."""
    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    kept: dict[int, tuple[int, Tensor]] = {}  # keeps the tensor alive, so that its storage's address is not reused

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = (storage.nbytes(), tensor)
        return tensor.detach()  # stop-gradient: the graph must not keep itself

    try:
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), _FusedAttention():
            forward()
    except (RuntimeError, NotImplementedError, ValueError):  # for example, mixtures of experts route by value
        return None
    return sum(size for size, _ in kept.values())


class _FusedAttention(TorchFunctionMode):
    """Attention that keeps what fused kernels keep: query, key, value, the mask as a float, and the output.

    The meta device has none of them: there, scaled_dot_product_attention keeps scores, of length times length.
    """

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is torch.nn.functional.scaled_dot_product_attention:
            return _Attention.apply(*_query_key_value_mask(*args, **(kwargs or {})))
        return function(*args, **(kwargs or {}))


def _query_key_value_mask(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, *_: Any, **__: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    mask = attn_mask.to(query.dtype) if attn_mask is not None and attn_mask.dtype == torch.bool else attn_mask
    return query, key, value, mask


class _Attention(torch.autograd.Function):
    """Shapes of attention, on the meta device; it is never run backward."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        output = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, output, mask)
        return output
