"""`echo-lora data import`: the benchmarks from a local copy, or from the hub, as rows that recipes and lm-eval read.

    OUTPUT/<task>/train.jsonl, validation.jsonl, test.jsonl     complete prompts; see evaluate/benchmarks.py
    OUTPUT/tasks/*.yaml                                         for `lm_eval --include_path OUTPUT/tasks`
    OUTPUT/recipe.yaml                                          trains on and scores what was imported
    OUTPUT/counts.json                                          found and published numbers of rows, and every warning

A local copy is a folder with a folder for each task (train, test, validation, dev as .json, .jsonl or .parquet; `test`
may be the part `test_public`), as `dataset/` of LLM-Adapters, or their one file commonsense_170k.json.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml

from echo_lora.errors import EchoDataError
from echo_lora.evaluate.answers import UNREADABLE, read_number
from echo_lora.evaluate.benchmarks import (
    BENCHMARKS,
    COMMONSENSE,
    LETTERS,
    UNION,
    UNION_ROWS,
    Benchmark,
    Row,
    answer_of,
    benchmark_named,
    benchmark_rows,
    instruction_of,
)
from echo_lora.files import new_folder, refuse_existing
from echo_lora.sources import read_rows

TASK_FILES = Path(__file__).parent / "evaluate" / "lm_eval_tasks"
_STEMS = {
    "train": ("train",),
    "validation": ("validation", "val"),
    "test": ("test", "test_public"),
    "dev": ("dev",),
}
_COLUMNS = {
    "gsm8k": ("question", "answer"),
    "mmlu": ("subject", "question", "choices", "answer"),
    "humaneval": ("task_id", "prompt", "canonical_solution", "test", "entry_point"),
}
_INSTRUCTION_COLUMNS = ("instruction", "output", "answer")


@dataclass(frozen=True)
class Part:
    """One part of one benchmark as it was found."""

    task: str
    part: str
    source: str  # file in the local copy, or hub id
    rows: int
    published: int | None  # None where nothing is published
    repeats: int  # rows that stand in it before

    def to_dict(self) -> dict[str, Any]:
        return {"source": self.source, "rows": self.rows, "published": self.published, "repeats": self.repeats}


@dataclass(frozen=True)
class ImportReport:
    """What was imported; `warnings` name every count that is not the published one."""

    output: Path
    parts: list[Part]
    warnings: list[str]
    notes: list[str]


_Found = dict[str, tuple[str, list[Row]]]  # part → where it comes from, raw rows


def import_data(
    source: str | Path | None, output: str | Path, *, tasks: Sequence[str] = (), hold_out: int = 0
) -> ImportReport:
    """Import benchmarks from a local copy, or from the hub where `source` is None, into a new folder.

    tasks: names; default: all that are there. hold_out: rows of each train part to write to validation.jsonl instead,
    chosen by a hash of their prompt, repeats together. The folder is complete or absent.
    Raises EchoDataError for files or rows that are missing or malformed, EchoConfigError for an unknown task,
    EchoCheckpointError if the folder exists or can't be written.
    """
    refuse_existing(output)
    tasks = list(dict.fromkeys(tasks))
    for name in tasks:
        benchmark_named(name)
    parts: list[Part] = []
    warnings: list[str] = []
    notes: list[str] = []
    with new_folder(output) as folder:
        for name, found in _all_found(source, tasks):
            for part, (where, raw) in found.items():
                parts.append(_count(name, part, where, raw))
            _write_rows(folder / name, name, found, hold_out)
        for found_part in parts:
            _compare(found_part, warnings, notes)
        _compare_union(parts, warnings)
        names = list(dict.fromkeys(part.task for part in parts))
        scored = [part.task for part in parts if part.part == "test"]
        _write_tasks(folder / "tasks", Path(output).absolute(), scored)
        _write_recipe(folder, names, scored)
        counts: dict[str, Any] = {"tasks": {name: {} for name in names}, "warnings": warnings, "notes": notes}
        for found_part in parts:
            counts["tasks"][found_part.task][found_part.part] = found_part.to_dict()
        (folder / "counts.json").write_text(json.dumps(counts, indent=2) + "\n", encoding="utf-8")
    return ImportReport(Path(output), parts, warnings, notes)


# --------------------------------------------------------------------------------------------------- reading


def _all_found(source: str | Path | None, tasks: Sequence[str]) -> Iterable[tuple[str, _Found]]:
    """Each benchmark with its parts, one at a time: all of them together are large."""
    if source is None:
        yield from ((name, _from_hub(name)) for name in tasks or BENCHMARKS)
        return
    source = Path(source)
    if os.path.isfile(source):
        if tasks:
            raise EchoDataError(f"{source} is one file of all tasks, which can't be told apart. Leave --task out.")
        raw = read_rows(source)
        _check_columns(UNION, raw, str(source))
        yield UNION, {"train": (source.name, raw)}
        return
    if not os.path.isdir(source):
        raise EchoDataError(f"{source}: there is no such folder or file. Correct the path, or put the data there.")
    known = [name for name in BENCHMARKS if os.path.isdir(source / name)]
    if not known:
        raise EchoDataError(
            f"{source} has no folder of a known task. Name the folder that has {', '.join(BENCHMARKS)}."
        )
    for name in tasks or known:
        if name not in known:
            raise EchoDataError(f"{source / name}: there is no such folder. Present: {', '.join(known)}.")
        yield name, _from_folder(source, name)


def _from_folder(source: Path, name: str) -> _Found:
    found: _Found = {}
    for part, stems in _STEMS.items():
        files = [source / name / (stem + kind) for stem in stems for kind in (".json", ".jsonl", ".parquet")]
        files = [file for file in files if os.path.isfile(file)]
        if len(files) > 1:
            both = " and ".join(file.name for file in files)
            raise EchoDataError(f"{source / name} has {both}, both of them its {part} part. Keep one.")
        if files:
            raw = read_rows(files[0])
            _check_columns(name, raw, str(files[0]))
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


def _check_columns(name: str, raw: list[Row], where: str) -> None:
    columns = _COLUMNS.get(name, _INSTRUCTION_COLUMNS)
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


# --------------------------------------------------------------------------------------------------- the hub


@dataclass(frozen=True)
class _Hub:
    """Where the hub has a benchmark: the (configuration, split) pairs of each part, and how a row reads natively."""

    path: str
    parts: Mapping[str, Sequence[tuple[str | None, str]]]
    native: Callable[[Row], tuple[str, list[str], int]] | None = None  # to question, choices, label


def _lettered(row: Row, question: str) -> tuple[str, list[str], int]:
    choices = row["choices"]
    return row[question], list(choices["text"]), list(choices["label"]).index(row["answerKey"].strip())


_SIZES = ("xs", "s", "m", "l", "xl", "debiased")
_TRAIN_AND_VALIDATION = {"train": [(None, "train")], "test": [(None, "validation")]}
# What LLM-Adapters calls test is the labelled validation part of these sets, for their test labels are secret.
HUB = {
    "boolq": _Hub(
        "google/boolq",
        _TRAIN_AND_VALIDATION,
        lambda row: (row["question"], ["true", "false"], 0 if row["answer"] else 1),
    ),
    "piqa": _Hub(
        "baber/piqa",
        _TRAIN_AND_VALIDATION,
        lambda row: (row["goal"], [row["sol1"], row["sol2"]], int(row["label"])),
    ),
    "social_i_qa": _Hub(
        "lighteval/siqa",
        _TRAIN_AND_VALIDATION,
        lambda row: (
            f"{row['context']} {row['question']}",
            [row[f"answer{letter}"] for letter in "ABC"],
            int(row["label"]) - 1,
        ),
    ),
    "hellaswag": _Hub(
        "Rowan/hellaswag",
        _TRAIN_AND_VALIDATION,
        lambda row: (f"{row['activity_label']}: {row['ctx']}", list(row["endings"]), int(row["label"])),
    ),
    "winogrande": _Hub(
        "allenai/winogrande",
        {
            "train": [(f"winogrande_{size}", "train") for size in _SIZES],
            "test": [("winogrande_xl", "validation")],
        },
        lambda row: (row["sentence"], [row["option1"], row["option2"]], int(row["answer"]) - 1),
    ),
    **{
        name: _Hub(
            "allenai/ai2_arc",
            {"train": [(name, "train")], "test": [(name, "test")]},
            lambda row: _lettered(row, "question"),
        )
        for name in ("ARC-Easy", "ARC-Challenge")
    },
    "openbookqa": _Hub(
        "allenai/openbookqa",
        {"train": [("main", "train")], "test": [("main", "test")]},
        lambda row: _lettered(row, "question_stem"),
    ),
    "gsm8k": _Hub("openai/gsm8k", {"train": [("main", "train")], "test": [("main", "test")]}),
    "mmlu": _Hub("cais/mmlu", {part: [("all", part)] for part in ("dev", "validation", "test")}),
    "humaneval": _Hub("openai/openai_humaneval", {"test": [(None, "test")]}),
}


def _from_hub(name: str) -> _Found:
    hub = HUB[name]
    found: _Found = {}
    for part, places in hub.parts.items():
        raw: list[Row] = []
        for configuration, split in places:
            rows = _load(hub.path, configuration, split)
            try:
                raw += [_from_native(name, hub, row) | _part_of(name, part, configuration) for row in rows]
            except (KeyError, ValueError, TypeError) as error:
                raise EchoDataError(
                    f"{hub.path} ({split}): row {len(raw)} is not what {name} was when this was written: "
                    f"{type(error).__name__}: {error}. Import a local copy."
                ) from error
        where = f"{hub.path}:{places[0][1]}"
        _check_columns(name, raw, where)
        found[part] = where, raw
    return found


def _from_native(name: str, hub: _Hub, row: Row) -> Row:
    if hub.native is None:
        return row
    question, choices, label = hub.native(row)
    answer = answer_of(name, choices, label)
    return {
        "instruction": instruction_of(name, question, choices),
        "output": f"the correct answer is {answer}",
        "answer": answer,
        "question": question,
        "choices": choices,
        "label": label,
    }


def _part_of(name: str, part: str, configuration: str | None) -> Row:
    """The configurations of winogrande/train repeat each other; each row says where it comes from."""
    if name != "winogrande" or part != "train":
        return {}
    return {"part": str(configuration).removeprefix("winogrande_")}


def _load(path: str, configuration: str | None, split: str) -> Iterable[Row]:
    import datasets

    try:
        return datasets.load_dataset(path, configuration, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise EchoDataError(
            f"{path} ({split}) can't be had from the hub: {error}. Try again, or import a local copy without --hub."
        ) from error


# ------------------------------------------------------------------------------------------------- the counts


def _count(name: str, part: str, where: str, raw: list[Row]) -> Part:
    published = UNION_ROWS if name == UNION else BENCHMARKS[name].published.get(part)
    columns = _COLUMNS.get(name, ("instruction", "output"))
    distinct = {tuple(map(str, (row[column] for column in columns))) for row in raw}
    return Part(name, part, where, len(raw), published, len(raw) - len(distinct))


def _compare(found: Part, warnings: list[str], notes: list[str]) -> None:
    where, rows, published = found.source, found.rows, found.published
    is_whole = rows == published
    if published is not None and not is_whole:
        if found.part == "test" and rows < published:
            warnings.append(
                f"{where}: {rows:,} of {published:,} published test rows. Numbers on them are not those of the whole "
                "test set: say which they are."
            )
        else:
            warnings.append(f"{where}: {rows:,} rows, but {published:,} are published. Is the file whole?")
    known = BENCHMARKS[found.task].repeats if found.task in BENCHMARKS else None
    if found.part == "train" and is_whole and known is not None and found.repeats != known:
        warnings.append(
            f"{where}: {found.repeats:,} rows repeat others, but {known:,} do as published. Is it the file?"
        )
    elif found.part == "train" and found.repeats:
        rest = f"{rows - found.repeats:,} of {rows:,} are distinct"
        hint = "; part: xl leaves nearly all repeats out" if found.task == "winogrande" else ""
        repeat = "row repeats another" if found.repeats == 1 else "rows repeat others"
        notes.append(f"{where}: {found.repeats:,} {repeat}, as published; {rest}{hint}.")


def _compare_union(parts: list[Part], warnings: list[str]) -> None:
    rows = {part.task: part.rows for part in parts if part.part == "train" and part.task in COMMONSENSE}
    total = sum(rows.values())
    if len(rows) == len(COMMONSENSE) and total != UNION_ROWS:
        warnings.append(f"the eight train parts: {total:,} rows together, but {UNION_ROWS:,} are published.")


# --------------------------------------------------------------------------------------------------- writing


def _write_rows(folder: Path, name: str, found: _Found, hold_out: int) -> None:
    folder.mkdir()
    examples = found["dev"][1] if "dev" in found else []
    for part, (where, raw) in found.items():
        if part == "dev":
            continue
        try:
            rows = _union_rows(raw) if name == UNION else benchmark_rows(name, part, raw, examples)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise EchoDataError(
                f"{where}: a row does not read as one of {name}: {error!r}. Is this its file?"
            ) from error
        if part == "train" and hold_out:
            if "validation" in found:
                raise EchoDataError(f"{where}: {name} has a validation part of its own. Leave --hold-out out.")
            rows, held = _held_out(rows, hold_out, where)
            _write_lines(folder / "validation.jsonl", held)
        _write_lines(folder / f"{part}.jsonl", rows)


def _union_rows(raw: list[Row]) -> list[Row]:
    return benchmark_rows(COMMONSENSE[0], "train", raw)  # one template for all eight


def _held_out(rows: list[Row], count: int, where: str) -> tuple[list[Row], list[Row]]:
    """The rows without, and those with, the prompts of lowest hash; equal prompts stay together."""
    if count >= len(rows):
        raise EchoDataError(f"{where}: {count} rows can't be held out of {len(rows)}. Hold out fewer.")
    order = sorted({row["prompt"] for row in rows}, key=lambda prompt: sha256(prompt.encode()).digest())
    held = set(order[:count])
    return [row for row in rows if row["prompt"] not in held], [row for row in rows if row["prompt"] in held]


def _write_lines(path: Path, rows: list[Row]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def _write_tasks(folder: Path, output: Path, scored: list[str]) -> None:
    """The shipped task files of what was imported, with the path of its rows."""
    folder.mkdir()
    names = [*scored, "_rows", "_llm_adapters"]
    if all(name in scored for name in COMMONSENSE):
        names.append("llm_adapters_commonsense")
    for name in names:
        text = (TASK_FILES / f"{name}.yaml").read_text(encoding="utf-8")
        text = re.sub(r"IMPORTED/(\S+)", lambda match: json.dumps(str(output / match[1])), text)
        (folder / f"{name}.yaml").write_text(text, encoding="utf-8")


def _write_recipe(folder: Path, names: list[str], scored: list[str]) -> None:
    """A recipe of what was imported, in which a cutoff drops rows and says so."""
    train = [f"{name}/train.jsonl" for name in names if (folder / name / "train.jsonl").is_file()]
    held = [path.replace("train", "validation") for path in train]
    held = [path for path in held if (folder / path).is_file()]
    if not train:  # no recipe is without rows to train on
        return
    data: dict[str, Any] = {"train": train}
    if held:
        data["validation"] = held
    # prompt and completion hold these, or no one trains on them
    data["ignore_columns"] = ["question", "choices", "answer", "task_id", "canonical_solution"]
    data |= {"max_length": 256, "on_overlength": "drop"}
    tasks = [{"name": name, "data": f"{name}/test.jsonl"} | _plain(BENCHMARKS[name]) for name in scored]
    document = {"model": "packaged:smollm2-135m", "data": data, "evaluation": {"tasks": tasks}}
    head = (
        "# What was imported. Name your model, and set what else a run needs. Test rows are for the last number only.\n"
    )
    body = yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
    (folder / "recipe.yaml").write_text(head + body, encoding="utf-8")


def _plain(benchmark: Benchmark) -> dict[str, Any]:
    return json.loads(json.dumps(dict(benchmark.scored)))  # YAML must not alias lists that tasks share
