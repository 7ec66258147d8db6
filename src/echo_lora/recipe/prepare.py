"""Rows that can be trained on, and their preview. Nothing here imports PEFT, TRL or a trainer."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from echo_lora.data.check import refuse_unfit_tokens
from echo_lora.data.prepared import PreparedData
from echo_lora.data.preview import Segment, preview_segments
from echo_lora.data.stream import RowStream
from echo_lora.models import empty_model, has_position_table, load_config, load_tokenizer
from echo_lora.progress import stage
from echo_lora.recipe.needs import require_packages
from echo_lora.recipe.rows import check_rows, prepare_split, training_parts
from echo_lora.recipe.schema import Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NAMED_ROWS = 20  # dropped rows to list on the screen; run.json lists all
SAMPLE = 1000  # rows of each file of a stream that preview and plan look at


class Limits(NamedTuple):
    """What the model has embeddings for."""

    vocabulary: int
    positions: int | None
    has_table: Callable[[], bool]  # whether positions come from an embedding table


@dataclass(frozen=True)
class Preview:
    """Some rows, split into prompt, boundary, answer and ignored tokens, and the statistics of all rows."""

    rows: list[tuple[str, list[Segment]]]  # source and number of the row, and its tokens
    summary: list[str]


def preview(recipe: Recipe, count: int = 3) -> Preview:
    """The first `count` training rows of each source. Raises EchoDataError for a row that can't be trained on."""
    require_packages(recipe)
    with stage("Reading rows", line=False):
        tokenizer, parts = prepare(sample_of(recipe))
    return preview_of(recipe, tokenizer, parts["train"], count)


def preview_of(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, prepared: list[PreparedData], count: int) -> Preview:
    """The preview of training rows that are prepared already."""
    return Preview(
        rows=[
            (f"{data.source}: row {row.row}", preview_segments(row, tokenizer))
            for data in prepared
            for row in data.rows[:count]
        ],
        summary=summary_of(recipe, prepared),
    )


def sample_of(recipe: Recipe) -> Recipe:
    """The recipe itself; of one that streams, a recipe of the first rows of each file."""
    if not recipe.data.stream:
        return recipe
    limit = min(recipe.data.limit or SAMPLE, SAMPLE)
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"limit": limit})})


def summary_of(recipe: Recipe, prepared: list[PreparedData]) -> list[str]:
    """What the rows are, as lines of text."""
    lines = [line for data in prepared for line in data.summary(named=NAMED_ROWS)]
    note = f"data.stream: these are the first {SAMPLE} rows of each file at most; the others are checked as they come"
    return [*lines, note] if recipe.data.stream else lines


def prepare(
    recipe: Recipe, splits: tuple[str, ...] = ("train", "validation")
) -> tuple[PreTrainedTokenizerBase, dict[str, list[PreparedData]]]:
    """The tokenizer and the rows of data.train and data.validation, checked as far as possible without weights.

    Cheap checks come first: the form of all rows, then their tokens, then the model's embeddings. Raises EchoDataError.
    """
    check_rows(recipe, splits)
    tokenizer = load_tokenizer(recipe.model, recipe.trust_remote_code)
    prepared = {split: prepare_split(recipe, tokenizer, split) for split in splits}
    vocabulary, positions, has_table = limits_of(recipe)
    for data in itertools.chain(*prepared.values()):
        refuse_unfit_tokens(data.dataset, data.source, vocabulary=vocabulary, positions=positions, has_table=has_table)
    return tokenizer, prepared


def limits_of(recipe: Recipe) -> Limits:
    """What the recipe's model has embeddings for. Raises EchoModelError."""
    config = load_config(recipe.model, recipe.trust_remote_code).get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    return Limits(
        config.vocab_size,
        positions,
        lambda: has_position_table(
            empty_model(recipe.model, trust_remote_code=recipe.trust_remote_code), positions or 0
        ),
    )


def prepare_stream(recipe: Recipe) -> tuple[PreTrainedTokenizerBase, RowStream, list[PreparedData]]:
    """The tokenizer, the stream of training rows, none of which has been read, and the validation rows.

    Raises EchoDataError.
    """
    tokenizer, prepared = prepare(recipe, ("validation",))
    data, training = recipe.data, recipe.training
    stream = RowStream(
        parts=training_parts(recipe),
        tokenizer=tokenizer,
        max_length=data.max_length,
        on_overlength=data.on_overlength,
        chat=data.chat,
        train_on_prompt=data.train_on_prompt,
        ignore_columns=data.ignore_columns,
        **limits_of(recipe)._asdict(),
        buffer=data.shuffle_buffer,
        seed=recipe.seeds.data_order,
        rows_per_step=training.batch_size * training.gradient_accumulation,
    )
    return tokenizer, stream, prepared["validation"]
