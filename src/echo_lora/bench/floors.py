"""The arithmetic of a step: floating-point operations of the decoder layers and of the output layer, apart.     [O]

A matrix of n weights takes, for each token that goes through it,

    2n  forward
    2n  gradient of its input, from the first layer with an adapter on
    2n  gradient of itself, if it is trained
    2n  forward again in backward, if its layer is checkpointed

The output layer is frozen and never checkpointed: 4n for each position whose logits are computed. Each variant is
counted by the passes that it runs (`passes`), each model by its own matrices (`count_weights`). A **floor** is such a
count relative to this package's LoRA step on the same rows: how long the step would take if only arithmetic took time.

Not counted: queries times keys and what follows from it, norms, embeddings, the echo's networks, which see one vector
for each row, DoRA's norms of weights, and the optimizer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import nn
from transformers.utils import is_triton_available
from trl import SFTTrainer

from echo_lora.bench.programs import VARIANTS, Batch, Case, ThreePassTrainer, recipe_of_case
from echo_lora.method.targets import decoder_layers
from echo_lora.models import empty_model
from echo_lora.recipe.build import add_adapter
from echo_lora.recipe.schema import Recipe


@dataclass(frozen=True)
class Weights:
    """Number of weights that one token is multiplied with."""

    layers: int  # in all decoder layers
    with_gradient: int  # of these, in layers that a gradient passes
    trained: int  # of these, in the adapter
    output_layer: int


@dataclass(frozen=True)
class Pass:
    """A pass of a step over its batch; tokens may be a mean over steps."""

    tokens: float  # through the decoder layers
    scored: float  # through the output layer
    has_gradient: bool = True


@dataclass(frozen=True)
class Floors:
    """Operations relative to this package's LoRA step."""

    layers: float
    output_layer: float
    both: float

    def __str__(self) -> str:
        return f"{self.layers:.2f} / {self.output_layer:.2f} / {self.both:.2f}"


def count_weights(recipe: Recipe) -> Weights:
    """The matrices of the recipe's base with its LoRA, from their shapes alone."""
    plain = recipe_of_case(Case("trl_lora", False), recipe)
    plain = plain.model_copy(update={"lora": plain.lora.model_copy(update={"init": "default"})})
    base = empty_model(recipe.model, recipe.dtype, recipe.attn_implementation, recipe.trust_remote_code)
    with torch.device("meta"):
        model = add_adapter(plain, base)
    per_token = getattr(base.config.get_text_config(), "num_experts_per_tok", None)
    layers = with_gradient = trained = 0
    for layer in decoder_layers(model.get_base_model())[1]:
        own = sum(size for size, _ in _matrices(layer, per_token))
        adapter = sum(size for size, is_trained in _matrices(layer, per_token) if is_trained)
        layers, trained = layers + own, trained + adapter
        with_gradient += own if trained else 0
    head = base.get_output_embeddings()
    scores = 0 if head is None else sum(size for size, _ in _matrices(head, None))
    return Weights(layers, with_gradient, trained, scores)


def _matrices(module: nn.Module, per_token: int | None) -> Iterator[tuple[int, bool]]:
    """Number of weights that a token meets in each matrix, and whether it is trained."""
    for parameter in module.parameters():
        if parameter.dim() == 3 and per_token is not None:  # the experts' matrices, of which a token meets few
            yield parameter[0].numel() * min(per_token, len(parameter)), parameter.requires_grad
        elif parameter.dim() > 1:
            yield parameter.numel(), parameter.requires_grad


def passes(variant: str, batch: Batch, routed: float) -> list[Pass]:
    """The passes of one step. routed: share of steps with an echo-on pass."""
    tokens, scored = batch.prompt_tokens + batch.answer_tokens, batch.supervised_tokens
    everywhere = tokens - len(batch.rows)  # the last token of a row predicts nothing
    trainer = VARIANTS[variant].trainer
    if trainer is ThreePassTrainer:
        return [Pass(tokens, tokens, has_gradient=False), Pass(tokens, tokens), Pass(tokens, tokens)]
    if trainer is SFTTrainer:
        return [Pass(tokens, scored if trl_scores_labels_only() else everywhere)]
    return [Pass(tokens, scored), Pass(routed * batch.answer_tokens, routed * scored)]


def trl_scores_labels_only() -> bool:
    """Whether TRL's output layer scores supervised positions only: on a GPU with Triton. Elsewhere it scores all."""
    return torch.cuda.is_available() and is_triton_available()


def operations(weights: Weights, case: Case, batch: Batch, routed: float) -> tuple[float, float]:
    """Floating-point operations of a step: of its decoder layers, and of its output layer."""
    layers = output_layer = 0.0
    with_gradient = 2 * weights.with_gradient * (1 + case.checkpointing) + 2 * weights.trained
    for run in passes(case.variant, batch, routed):
        layers += run.tokens * (2 * weights.layers + run.has_gradient * with_gradient)
        output_layer += run.scored * (2 + 2 * run.has_gradient) * weights.output_layer
    return layers, output_layer


def floors(weights: Weights, case: Case, batch: Batch, routed: float) -> Floors:
    """The floors of a case. A model without an output layer has the same floor for both as for its layers."""
    layers, output_layer = operations(weights, case, batch, routed)
    our_layers, our_output_layer = operations(weights, case.lora, batch, 0.0)
    return Floors(
        layers / our_layers,
        output_layer / our_output_layer if our_output_layer else 1.0,
        (layers + output_layer) / (our_layers + our_output_layer),
    )
