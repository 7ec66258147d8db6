"""The same benchmarks from the hub, brought into one form."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from echo_lora.benchmarks.folder import Found, check_columns
from echo_lora.benchmarks.protocols import Row, answer_of, instruction_of
from echo_lora.errors import EchoDataError

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


def from_hub(name: str) -> Found:
    hub = HUB[name]
    found: Found = {}
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
        check_columns(name, raw, where)
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
