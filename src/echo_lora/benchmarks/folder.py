"""Benchmark files in the formats of LLM-Adapters and lm-evaluation-harness, read from a local folder and checked."""

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
from echo_lora.evaluate.tasks import is_index
from echo_lora.text import is_text

_STEMS = {"train": ["train"], "validation": ["validation", "val"], "test": ["test", "test_public"], "dev": ["dev"]}

COLUMNS = {
    "gsm8k": ("question", "answer"),
    "mmlu": ("subject", "question", "choices", "answer"),
    "humaneval": ("task_id", "prompt", "canonical_solution", "test", "entry_point"),
}

_INSTRUCTION_COLUMNS = ("instruction", "output", "answer")


Splits = dict[str, tuple[str, list[Row]]]  # split → its source and raw rows


def from_folder(source: Path, name: str) -> Splits:
    """The splits of a benchmark in `source/name`. Raises EchoDataError for missing or ambiguous files and bad rows."""
    folder = source / name
    splits: Splits = {}
    for split, stems in _STEMS.items():
        files = [folder / (stem + suffix) for stem in stems for suffix in (".json", ".jsonl", ".parquet")]
        files = [file for file in files if os.path.isfile(file)]
        if len(files) > 1:
            names = " and ".join(file.name for file in files)
            raise EchoDataError(f"{folder} has {names}, which are both the {split} split. Keep one.")
        if files:
            raw = read_rows(files[0])
            check_columns(name, raw, str(files[0]))
            splits[split] = str(files[0].relative_to(source)), raw
    if not splits:
        raise EchoDataError(f"{folder} has no train or test file (.json, .jsonl or .parquet). Add one.")
    if name == "mmlu":
        if "dev" not in splits:
            raise EchoDataError(f"{folder} has no dev file, which holds the few-shot examples of each prompt. Add it.")
        subjects = {row["subject"] for row in splits["dev"][1]}
        for where, raw in splits.values():
            for index, row in enumerate(raw):
                if row["subject"] not in subjects:
                    raise EchoDataError(
                        f"{source / where}: row {index} has subject = {row['subject']!r}, for which the dev file has "
                        "no few-shot examples. Add them, or remove the row."
                    )
    return splits


def check_columns(name: str, raw: list[Row], where: str) -> None:
    """Raise EchoDataError, with the row, if rows are not those of the benchmark `name`. where: their source."""
    columns = COLUMNS.get(name, _INSTRUCTION_COLUMNS)
    for index, row in enumerate(raw):
        missing = [column for column in columns if row.get(column) is None]
        if missing:
            raise EchoDataError(
                f"{where}: row {index} has no {missing[0]}. Present: {', '.join(row)}. Is this the file of {name}?"
            )
        for column in columns:
            if (column, name) not in (("answer", "mmlu"), ("choices", "mmlu")) and not is_text(row[column]):
                raise EchoDataError(
                    f"{where}: row {index} has {column} = {row[column]!r}, which must be text that is not blank. "
                    "Correct the row, or remove it."
                )
        problem = _PROBLEMS.get(name, _problem_of_instruction)(name, row)
        if problem is not None:
            raise EchoDataError(f"{where}: row {index} has {problem}. Correct the row, or remove it.")


def _problem_of_instruction(name: str, row: Row) -> str | None:
    """What is not as in the files of LLM-Adapters, where the output states the answer in a sentence."""
    pattern = BENCHMARKS[name].scored["answer_pattern"] if name in BENCHMARKS else re.escape(row["answer"])
    answer, output = row["answer"], row["output"]
    if row.get("input"):
        return f"input = {row['input']!r}, which {name} never has"
    if not re.fullmatch(pattern, answer):
        return f"answer = {answer!r}, but {name} has {pattern}"
    stated = re.search(pattern, output)
    if stated is None or stated[0] != answer or not output.rstrip().endswith(answer):
        return f"answer = {answer!r}, but output = {output!r} states another one"
    if name not in BENCHMARKS or all(row.get(column) is None for column in ("question", "choices", "label")):
        return None
    question, choices = row.get("question"), row.get("choices")
    label: Any = row.get("label")
    if not is_text(question) or not isinstance(choices, list) or not all(map(is_text, choices)):
        return f"question = {question!r} and choices = {choices!r}, which must be text and a list of texts"
    if not is_index(label, len(choices)) or answer_of(name, choices, label) != answer:
        return f"label = {label!r}, which does not give answer = {answer!r} with choices = {choices!r}"
    return None


def _problem_of_solution(name: str, row: Row) -> str | None:
    if read_number(row["answer"]) == UNREADABLE:
        return f"answer = {row['answer']!r}, which holds no number"
    return None


def _problem_of_choice(name: str, row: Row) -> str | None:
    choices, answer = row["choices"], row["answer"]
    if not isinstance(choices, list) or len(choices) != len(LETTERS) or not all(map(is_text, choices)):
        return f"choices = {choices!r}, which must be a list of {len(LETTERS)} texts"
    if not is_index(answer, len(choices)):
        return f"answer = {answer!r}, which must be the index of a choice: 0 to {len(choices) - 1}"
    return None


def _problem_of_program(name: str, row: Row) -> str | None:
    entry = row["entry_point"]
    if not entry.isidentifier() or not re.search(rf"\bdef {entry}\b", row["prompt"]):
        return f"entry_point = {entry!r}, which is not a function of its prompt"
    return None


_PROBLEMS: dict[str, Callable[[str, Row], str | None]] = {
    "gsm8k": _problem_of_solution,
    "mmlu": _problem_of_choice,
    "humaneval": _problem_of_program,
}
