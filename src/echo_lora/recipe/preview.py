"""Preview: a recipe's rows as the model will see them. Imports no trainer."""

from __future__ import annotations

from dataclasses import dataclass

from echo_lora.data.preview import Segment, preview_segments
from echo_lora.progress import stage
from echo_lora.recipe.needs import require_packages
from echo_lora.recipe.rows import prepare
from echo_lora.recipe.schema import Recipe

NAMED_ROWS = 20  # dropped rows to list on the screen; run.json lists all


@dataclass(frozen=True)
class Preview:
    """Some rows, split into prompt, boundary, answer and ignored tokens, and the statistics of all rows."""

    rows: list[tuple[str, list[Segment]]]  # source and number of the row, and its tokens
    summary: list[str]


def preview(recipe: Recipe, count: int = 3) -> Preview:
    """The first `count` training rows of each source. Raises EchoDataError for a row that can't be trained on."""
    require_packages(recipe)
    with stage("Reading rows", line=False):
        tokenizer, parts = prepare(recipe)
    prepared = parts["train"]
    return Preview(
        rows=[
            (f"{data.source}: row {row.row}", preview_segments(row, tokenizer))
            for data in prepared
            for row in data.rows[:count]
        ],
        summary=[line for data in prepared for line in data.summary(named=NAMED_ROWS)],
    )
