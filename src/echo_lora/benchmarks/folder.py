"""Benchmark files in LLM-Adapters' and lm-evaluation-harness' forms, read from a local folder."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from echo_lora.benchmarks.protocols import BENCHMARKS, LETTERS, Row, answer_of
from echo_lora.data.sources import read_rows
from echo_lora.errors import EchoDataError
from echo_lora.evaluate.answers import UNREADABLE, read_number

_STEMS = {
    "train": ("train",),
    "validation": ("validation", "val"),
    "test": ("test", "test_public"),
    "dev": ("dev",),
}

COLUMNS = {
    "gsm8k": ("question", "answer"),
    "mmlu": ("subject", "question", "choices", "answer"),
    "humaneval": ("task_id", "prompt", "canonical_solution", "test", "entry_point"),
}

_INSTRUCTION_COLUMNS = ("instruction", "output", "answer")


Found = dict[str, tuple[str, list[Row]]]  # part → where it comes from, raw rows


def from_folder(source: Path, name: str) -> Found:
    found: Found = {}
    for part, stems in _STEMS.items():
        files = [source / name / (stem + kind) for stem in stems for kind in (".json", ".jsonl", ".parquet")]
        files = [file for file in files if os.path.isfile(file)]
        if len(files) > 1:
            both = " and ".join(file.name for file in files)
            raise EchoDataError(f"{source / name} has {both}, both of them its {part} part. Keep one.")
        if files:
            raw = read_rows(files[0])
            check_columns(name, raw, str(files[0]))
            found[part] = str(files[0].relative_to(source)), raw
    if not found:
        raise EchoDataError(f"{source / name} has no train or test file (.json, .jsonl or .parquet). Put one there.")
    if name == "mmlu":
        if "dev" not in found:
            raise EchoDataError(
                f"{source / name} has no dev file, whose rows are the examples in each prompt. Put it there."
            )
        shown = {row["subject"] for row in found["dev"][1]}
        for where, raw in found.values():
            for index, row in enumerate(raw):
                if row["subject"] not in shown:
                    raise EchoDataError(
                        f"{source / where}: row {index} has subject = {row['subject']!r}, of which the dev file has no "
                        "row: there are no examples for its prompt. Add them, or remove the row."
                    )
    return found


def check_columns(name: str, raw: list[Row], where: str) -> None:
    columns = COLUMNS.get(name, _INSTRUCTION_COLUMNS)
    for index, row in enumerate(raw):
        missing = [column for column in columns if row.get(column) is None]
        if missing:
            raise EchoDataError(
                f"{where}: row {index} has no {missing[0]}. Present: {', '.join(row)}. Is this the file of {name}?"
            )
        for column in columns:
            if (column, name) not in (("answer", "mmlu"), ("choices", "mmlu")) and not _is_text(row[column]):
                raise EchoDataError(
                    f"{where}: row {index} has {column} = {row[column]!r}, which must be text that is not blank. "
                    "Correct the row, or remove it."
                )
        problem = _PROBLEMS.get(name, _problem_of_instruction)(name, row)
        if problem is not None:
            raise EchoDataError(f"{where}: row {index} has {problem}. Correct the row, or remove it.")


def _is_text(value: Any) -> bool:
    if not isinstance(value, str) or not value.strip():
        return False
    return not any("\ud800" <= character <= "\udfff" for character in value)  # half a character, which is no UTF-8


def _problem_of_instruction(name: str, row: Row) -> str | None:
    """What is not as in the files of LLM-Adapters, where the output is the answer in a sentence."""
    pattern = BENCHMARKS[name].scored["answer_pattern"] if name in BENCHMARKS else re.escape(row["answer"])
    answer, output = row["answer"], row["output"]
    if row.get("input"):
        return f"input = {row['input']!r}, which {name} never has"
    if not re.fullmatch(pattern, answer):
        return f"answer = {answer!r}, but {name} has {pattern}"
    said = re.search(pattern, output)
    if said is None or said[0] != answer or not output.rstrip().endswith(answer):
        return f"answer = {answer!r}, but output = {output!r} says another one"
    if name not in BENCHMARKS or all(row.get(column) is None for column in ("question", "choices", "label")):
        return None
    question, choices = row.get("question"), row.get("choices")
    label: Any = row.get("label")
    if not _is_text(question) or not isinstance(choices, list) or not all(map(_is_text, choices)):
        return f"question = {question!r} and choices = {choices!r}, which must be text and a list of texts"
    if not _is_index(label, len(choices)) or answer_of(name, choices, label) != answer:
        return f"label = {label!r}, which does not give answer = {answer!r} with choices = {choices!r}"
    return None


def _problem_of_solution(name: str, row: Row) -> str | None:
    if read_number(row["answer"]) == UNREADABLE:
        return f"answer = {row['answer']!r}, in which there is no number"
    return None


def _problem_of_choice(name: str, row: Row) -> str | None:
    choices, answer = row["choices"], row["answer"]
    if not isinstance(choices, list) or len(choices) != len(LETTERS) or not all(map(_is_text, choices)):
        return f"choices = {choices!r}, which must be a list of {len(LETTERS)} texts"
    if not _is_index(answer, len(choices)):
        return f"answer = {answer!r}, which must be the index of a choice: 0 to {len(choices) - 1}"
    return None


def _problem_of_program(name: str, row: Row) -> str | None:
    entry = row["entry_point"]
    if not entry.isidentifier() or not re.search(rf"\bdef {entry}\b", row["prompt"]):
        return f"entry_point = {entry!r}, which is no function of its prompt"
    return None


def _is_index(value: Any, count: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < count


_PROBLEMS: dict[str, Callable[[str, Row], str | None]] = {
    "gsm8k": _problem_of_solution,
    "mmlu": _problem_of_choice,
    "humaneval": _problem_of_program,
}
