"""How answers are read and marked. lm-evaluation-harness calls these functions by name; task files hold the names.

    number     the number after the first `####` (GSM8K's mark), else the last one; `$` and commas are dropped, and
               1,200.0 equals 1200
    code       prompt and answer, as one program, pass the test; see `programs.py`
    grouped    accuracy over rows (micro) and the mean of the groups' accuracies (macro)

`search_beams` corrects lm-eval's beam search.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any

from echo_lora.evaluate.programs import passes

UNREADABLE = ""  # the prediction where nothing is found; expected answers are never empty
FIRST_LINE = r"\S.*"
_NUMBER = r"(?:-\$?|\$-?)?(?:[0-9][0-9,]*(?:\.[0-9]+)?|\.[0-9]+)"


def read_number(text: str) -> str:
    """The final number of a worked solution in plain form, or UNREADABLE."""
    marked = re.search(rf"####\s*({_NUMBER})", text)
    found = [marked[1]] if marked else re.findall(_NUMBER, text)
    return (plain_number(found[-1]) if found else None) or UNREADABLE


def plain_number(text: str) -> str | None:
    """A number in canonical form: no `$`, commas or trailing zeros. None if the text is not a number."""
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
    """lm-eval filter: the number of each response."""
    return [[read_number(text) for text in of_row] for of_row in responses]


def search_beams(model: Any, input_ids: Any, generation_config: Any, **kwargs: Any) -> Any:
    """Beam search without lm-eval's stopping criteria, as `custom_generate` of transformers.

    lm-eval's criteria watch only the first B candidates, whichever rows they belong to: once each has met a stop or an
    end of sequence, all searches end. Here only the end of sequence ends a beam, and lm-eval cuts the finished answer
    at text stops. input_ids: (B · num_beams, T), each row repeated. kwargs: attention_mask of the same shape;
    others are ignored.
    """
    beams, mask = generation_config.num_beams, kwargs.get("attention_mask")
    return model.generate(
        input_ids[::beams],
        attention_mask=(input_ids.new_ones(input_ids.shape) if mask is None else mask)[::beams],  # None means all ones
        generation_config=generation_config,
    )


def process_generated(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Exact match, and whether the answer was unreadable."""
    return {"exact_match": float(results[0] == document["answer"]), "unreadable": float(results[0] == UNREADABLE)}


def process_choice(document: Mapping[str, Any], results: Sequence[tuple[float, bool]]) -> dict[str, Any]:
    """Accuracy of the choice of highest log-likelihood, alone and with its group."""
    values = [value for value, _ in results]
    is_correct = float(values.index(max(values)) == document["label"])
    return {"acc": is_correct, "macro_acc": (document["group"], is_correct)}


def aggregate_groups(pairs: Sequence[tuple[str, float]]) -> float:
    """lm-eval aggregation of `macro_acc`."""
    return macro_accuracy([correct for _, correct in pairs], [group for group, _ in pairs])


def process_code(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """Whether the program passes its test, run in a sandbox. lm-eval asks for confirmation first."""
    return _passed(document, results[0], allow_unsandboxed=False)


def process_code_unsandboxed(document: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """`process_code` without a sandbox where none works."""
    return _passed(document, results[0], allow_unsandboxed=True)


def _passed(document: Mapping[str, Any], answer: str, *, allow_unsandboxed: bool) -> dict[str, float]:
    program = document["prompt"], answer, document["test"], document["entry_point"]
    return {"pass_at_1": float(passes(*program, allow_unsandboxed=allow_unsandboxed))}
