"""What is read from an answer, and whether it is right: the functions that lm-evaluation-harness calls by name.

    number     after the first `####` (GSM8K's mark), or else the last one; without `$` and thousands commas, equal as
               numbers: 1,200.0 is 1200
    code       prompt and answer are one program, which has to pass the test; see `programs.py`
    grouped    accuracy over rows (micro), and the mean of the groups' accuracies (macro)

One more function mends lm-eval's search with several beams.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any

from echo_lora.evaluate.programs import passes

UNREADABLE = ""  # the prediction where nothing is found to read; no answer is empty
FIRST_LINE = r"\S.*"
_NUMBER = r"(?:-\$?|\$-?)?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)"


def read_number(text: str) -> str:
    """The number of a worked solution in its plain form, or UNREADABLE."""
    marked = re.search(rf"####\s*({_NUMBER})", text)
    found = [marked[1]] if marked else re.findall(_NUMBER, text)
    return (plain_number(found[-1]) if found else None) or UNREADABLE


def plain_number(text: str) -> str | None:
    """One way to write each number: no `$`, no commas, no needless zeros. None if the text is none."""
    if not re.fullmatch(_NUMBER, text):
        return None
    plain = format(Decimal(text.replace("$", "").replace(",", "")), "f")
    if "." in plain:
        plain = plain.rstrip("0").rstrip(".")
    return "0" if plain == "-0" else plain


def macro_accuracy(is_correct: Iterable[float], groups: Iterable[str]) -> float:
    """The unweighted mean of the groups' accuracies."""
    by_group: dict[str, list[float]] = {}
    for correct, group in zip(is_correct, groups, strict=True):
        by_group.setdefault(group, []).append(float(correct))
    return sum(sum(of) / len(of) for of in by_group.values()) / len(by_group)


# ------------------------------------------------------------------------------------------- called by lm-eval


def read_numbers(responses: Sequence[Sequence[str]], documents: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """A filter: the number of each response."""
    return [[read_number(text) for text in of_row] for of_row in responses]


def search_beams(model: Any, input_ids: Any, generation_config: Any, **kwargs: Any) -> Any:
    """transformers' `custom_generate` for several beams: its own search, without lm-eval's stops.

    Those look at the first rows of all candidates, whose they don't know, and end every search once each of these rows
    has met a stop, an end of sequence too. Without them the end of sequence ends a beam; text stops cut the finished
    answer. input_ids: (B · num_beams, T), each row repeated; kwargs: attention_mask alike, and what is not needed.
    """
    beams, mask = generation_config.num_beams, kwargs.get("attention_mask")
    return model.generate(
        input_ids[::beams],
        attention_mask=(input_ids.new_ones(input_ids.shape) if mask is None else mask)[::beams],  # None: all are ones
        generation_config=generation_config,
    )


def process_generated(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Exact match, and whether there was nothing to read."""
    return {"exact_match": float(results[0] == document["answer"]), "unreadable": float(results[0] == UNREADABLE)}


def process_choice(document: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, Any]:
    """Whether the choice of highest log-likelihood is the labelled one, alone and with its group."""
    values = [value for value, _ in results]
    is_correct = float(values.index(max(values)) == document["label"])
    return {"acc": is_correct, "macro_acc": (document["group"], is_correct)}


def aggregate_groups(pairs: Sequence[tuple[str, float]]) -> float:
    """The aggregation of `macro_acc`."""
    return macro_accuracy([correct for _, correct in pairs], [group for group, _ in pairs])


def process_code(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Whether the program passes its test. It is run in a sandbox: lm-eval asks for a confirmation first."""
    return _passed(document, results[0], allow_unsandboxed=False)


def process_code_unsandboxed(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """`process_code` that does without a sandbox where none works."""
    return _passed(document, results[0], allow_unsandboxed=True)


def _passed(document: Mapping[str, Any], answer: str, *, allow_unsandboxed: bool) -> dict[str, float]:
    parts = document["prompt"], answer, document["test"], document["entry_point"]
    return {"pass_at_1": float(passes(*parts, allow_unsandboxed=allow_unsandboxed))}
