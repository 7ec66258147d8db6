"""A row as text, in segments: prompt, boundary, answer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from echo_lora.data.tokenize import IGNORED, TokenizedRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


Segment = tuple[str, Literal["prompt", "boundary", "answer", "ignored"]]


def preview_segments(row: TokenizedRow, tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
    """Text and class of each token; the texts join up to the row.

    `boundary` is the last token before the first answer token, `ignored` a later one without a label. A character made
    of several tokens is shown at the last of them.
    """
    start, shown = row.answer_start, ""
    segments: list[Segment] = []
    for i, label in enumerate(row.labels):
        text = tokenizer.decode(row.input_ids[: i + 1], clean_up_tokenization_spaces=False)
        is_whole = not text.endswith("\ufffd") or i + 1 == len(row.labels)
        piece, shown = (text[len(shown) :], text) if is_whole else ("", shown)
        if i < start:
            segments.append((piece, "boundary" if i == start - 1 else "prompt"))
        else:
            segments.append((piece, "answer" if label != IGNORED else "ignored"))
    return segments
