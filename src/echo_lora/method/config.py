"""Every choice in equations 1 to 7 as a named, validated field.

[P] marks what the abstract of arXiv:2605.08177 states, [R] what a public third-party attempt does,
[O] our own decision; `docs/method.md` gives the reasons. The defaults of injection_site, scale_init, gate_bias_init and
echo_lr_multiplier were chosen by measurement: `results/echo_defaults.md`.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

from echo_lora.errors import EchoConfigError, nearest

# The paper's reference depth: layers are given for a model of 32 and scaled to other depths. [R]
REFERENCE_DEPTH = 32
REFERENCE_SOURCE_LAYERS = (24, 25, 26, 27)  # -8 ... -5
REFERENCE_TARGET_LAYERS = (4, 5, 6, 7)

# Beyond these limits memory runs out or float32 overflows.
LARGEST_RANK = LARGEST_BOTTLENECK = 65_536
LARGEST_FACTOR, TEMPERATURES = 1e6, (0.001, 1000)


def _option(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class EchoConfig:
    """How the echo is formed, injected, routed and trained.

    Frozen; use `dataclasses.replace` to derive another one. Raises EchoConfigError, which names the
    field, on construction.
    """

    source_layers: list[int] | None = _option(
        None,
        "decoder layers whose output the echo reads; negative indices count from the end; default: 24-27 of 32, scaled",
    )
    target_layers: list[int] | None = _option(
        None, "decoder layers whose LoRA modules receive the echo; default: 4-7 of 32, scaled"
    )
    normalization: Literal["layer", "standardize"] = _option(
        "layer",
        "layer: LayerNorm of each row; standardize: each coordinate by its mean and deviation in earlier steps' rows",
    )
    injection_site: Literal["output", "lora_input"] = _option(
        "output", "add the echo to the output of the adapted module, or to the input of its lora_A"
    )
    injection_mask: Literal["predictive", "answer"] = _option(
        "predictive", "inject where logits predict answer tokens, or at the answer tokens themselves"
    )
    bottleneck: int = _option(64, "hidden width of the projection and gate networks")
    scale_init: float = _option(1.0, "initial value of each target module's learned scale")
    gate_bias_init: float = _option(0.0, "initial value of the gate's bias; the gate starts at sigmoid of it")
    routing_schedule: Literal["linear", "constant"] = _option(
        "linear",
        "probability of an echo-on pass: linear from routing_start to routing_end, or constant at routing_start",
    )
    routing_start: float = _option(1.0, "probability of an echo-on pass at the first step")
    routing_end: float = _option(0.2, "probability of an echo-on pass at the last step")
    routing_seed: int = _option(0, "seed of the routing draws")
    distillation_weight: float = _option(1.0, "weight of the distillation loss")
    distillation_temperature: float = _option(2.0, "softmax temperature of teacher and student in the distillation")
    distillation_direction: Literal["on_to_off", "off_to_on"] = _option(
        "on_to_off", "which pass is the teacher; with on_to_off the echo-on pass teaches the deployed, echo-off pass"
    )
    distillation_tokens: Literal["all", "teacher_better"] = _option(
        "all", "where to distill: at all answer tokens, or only where the teacher gives the token a higher probability"
    )
    distillation_warmup: float = _option(
        0.0, "fraction of the training over which the distillation weight rises from 0"
    )
    source_gradient: bool = _option(
        False, "let the gradient of the echo-on pass flow through the echo into the source layers"
    )
    echo_on_updates: Literal["all", "echo_only"] = _option(
        "all", "what the echo-on pass trains: adapter and echo networks, or the echo networks only"
    )
    routed_loss_scale: float = _option(
        1.0, "factor on the answer losses of a routed step; 0.5 keeps them as large as in an unrouted step"
    )
    echo_lr_multiplier: float = _option(10.0, "learning rate of the echo networks relative to the adapter's")
    echo_lr_warmup: float = _option(
        0.0, "fraction of the training over which the echo networks' learning rate rises from 0, on top of the schedule"
    )
    gradient_clipping: Literal["together", "apart"] = _option(
        "together", "clip the gradients of adapter and echo networks by one joint norm, or each by its own"
    )
    echo_kind: Literal["real", "zero", "noise", "shuffled", "shallow"] = _option(
        "real", "the echo itself, or a control: zero, noise, another row's echo, or one read from the target layers"
    )
    echo_step: Literal["auto", "shared_prefix", "full"] = _option(
        "auto", "share the prefix between the two passes: where that is exact, always, or never"
    )

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(EchoConfig).items():
            _check_type(name, getattr(self, name), hint)
        for name in ("source_layers", "target_layers"):
            layers = getattr(self, name)
            if layers is None:
                continue
            if not layers:
                raise EchoConfigError(f"{name} = [] names no layer. Name at least one, or leave it out.")
            if len(set(layers)) != len(layers):
                raise EchoConfigError(f"{name} = {layers} names a layer twice. Name each layer once.")
        self._require("bottleneck", self.bottleneck >= 1, "must be at least 1")
        self._require("bottleneck", self.bottleneck <= LARGEST_BOTTLENECK, f"must be at most {LARGEST_BOTTLENECK}")
        self._require("scale_init", self.scale_init != 0, "must not be 0: no gradient would ever flow")
        self._require("routing_seed", 0 <= self.routing_seed < 2**32, "must lie in [0, 2^32)")
        for name in ("scale_init", "gate_bias_init", "distillation_weight", "echo_lr_multiplier"):
            self._require(
                name,
                abs(getattr(self, name)) <= LARGEST_FACTOR,
                f"must be at most {LARGEST_FACTOR:g} in absolute value",
            )
        for name in ("routing_start", "routing_end"):
            self._require(name, 0.0 <= getattr(self, name) <= 1.0, "is a probability and must lie in [0, 1]")
        for name in ("distillation_warmup", "echo_lr_warmup"):
            self._require(
                name, 0.0 <= getattr(self, name) <= 1.0, "is a fraction of the training and must lie in [0, 1]"
            )
        self._require("routed_loss_scale", 0 < self.routed_loss_scale <= LARGEST_FACTOR, "must lie in (0, 1e+06]")
        if self.source_gradient and self.echo_on_updates == "echo_only":
            raise EchoConfigError(
                "source_gradient = True contradicts echo_on_updates = 'echo_only': the first trains the adapter "
                "through the echo, the second keeps the echo-on pass from training it. Leave one of them out."
            )
        self._require("distillation_weight", self.distillation_weight >= 0, "must not be negative")
        self._require("distillation_temperature", self.distillation_temperature > 0, "must be positive")
        low, high = TEMPERATURES
        self._require(
            "distillation_temperature", low <= self.distillation_temperature <= high, f"must lie in [{low}, {high}]"
        )
        self._require("echo_lr_multiplier", self.echo_lr_multiplier > 0, "must be positive")

    def _require(self, name: str, holds: bool, rule: str) -> None:
        if not holds:
            raise EchoConfigError(f"{name} = {getattr(self, name)!r} {rule}.")

    # ---------------------------------------------------------------- layers

    def resolve_source_layers(self, depth: int) -> list[int]:
        """Indices of the source layers in a model of `depth` decoder layers; `shallow` reads the target layers.

        Raises EchoConfigError for a layer that does not exist.
        """
        if self.echo_kind == "shallow":
            return self.resolve_target_layers(depth)
        return _resolve_layers("source_layers", self.source_layers, REFERENCE_SOURCE_LAYERS, depth)

    def resolve_target_layers(self, depth: int) -> list[int]:
        """Indices of the layers that receive the echo. Raises EchoConfigError for a layer that does not exist."""
        return _resolve_layers("target_layers", self.target_layers, REFERENCE_TARGET_LAYERS, depth)

    @property
    def mixes_rows(self) -> bool:
        """Whether the echo of a row depends on the other rows of its batch."""
        return self.echo_kind == "shuffled"

    # ------------------------------------------------------------------ JSON

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), indent=2, sort_keys=True)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> EchoConfig:
        """Raises EchoConfigError for an unknown key and suggests the nearest one."""
        names = [f.name for f in dataclasses.fields(cls)]
        for key in values:
            if key not in names:
                raise EchoConfigError(f"unknown field {key!r} in the echo configuration.{nearest(key, names)}")
        return cls(**values)

    @classmethod
    def from_json(cls, text: str) -> EchoConfig:
        """Raises EchoConfigError if the text is not a JSON object, or as `from_dict` does."""
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise EchoConfigError(f"the echo configuration is not JSON: {error}. Write it with to_json.") from error
        if not isinstance(values, dict):
            raise EchoConfigError(f"the echo configuration is {values!r}, not a JSON object. Write it with to_json.")
        return cls.from_dict(values)


def _resolve_layers(name: str, layers: list[int] | None, reference: tuple[int, ...], depth: int) -> list[int]:
    if layers is None:  # scale the reference indices in proportion and drop repeats [O]
        return sorted({math.floor(index * depth / REFERENCE_DEPTH) for index in reference})
    resolved = []
    for index in layers:
        if not -depth <= index < depth:
            raise EchoConfigError(
                f"{name} names layer {index}, but the model has {depth} decoder layers. "
                f"Use 0 to {depth - 1}, or -{depth} to -1 counted from the end."
            )
        resolved.append(index % depth)
    if len(set(resolved)) != len(resolved):
        raise EchoConfigError(f"{name} = {layers} names a layer of the {depth} twice. Name each layer once.")
    return sorted(resolved)


def _check_type(name: str, value: Any, hint: Any) -> None:
    if get_origin(hint) is Literal:
        if value not in get_args(hint):
            allowed = ", ".join(repr(v) for v in get_args(hint))
            raise EchoConfigError(f"{name} = {value!r} is not a valid choice. Use one of {allowed}.")
    elif hint is float:
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if not is_number or not abs(value) < 1e300:  # an int can be too large for a float
            raise EchoConfigError(f"{name} = {value!r} must be a finite number.")
    elif hint is bool:
        if not isinstance(value, bool):
            raise EchoConfigError(f"{name} = {value!r} must be true or false.")
    elif hint is int:
        if not isinstance(value, int) or isinstance(value, bool):
            raise EchoConfigError(f"{name} = {value!r} must be an integer.")
    elif value is not None and not (
        isinstance(value, list) and all(isinstance(v, int) and not isinstance(v, bool) for v in value)
    ):
        raise EchoConfigError(f"{name} = {value!r} must be a list of layer indices, for example [4, 5, 6].")
