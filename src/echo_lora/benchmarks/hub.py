"""The benchmarks on the hub, converted to the columns of local files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from echo_lora.benchmarks.folder import Splits, check_columns
from echo_lora.benchmarks.protocols import Row, answer_of, instruction_of
from echo_lora.errors import EchoDataError


@dataclass(frozen=True)
class HubDataset:
    """Where the hub has a benchmark, and how its rows are converted."""

    path: str
    splits: Mapping[str, Sequence[tuple[str | None, str]]]  # our split → (configuration, split) pairs on the hub
    native: Callable[[Row], tuple[str, list[str], int]] | None = None  # row → question, choices, label


def _lettered(row: Row, question: str) -> tuple[str, list[str], int]:
    choices = row["choices"]
    return row[question], list(choices["text"]), list(choices["label"]).index(row["answerKey"].strip())


_SIZES = ("xs", "s", "m", "l", "xl", "debiased")


def _splits(configuration: str | None, test: str = "test") -> dict[str, list[tuple[str | None, str]]]:
    return {"train": [(configuration, "train")], "test": [(configuration, test)]}


# LLM-Adapters' test split is the validation split of these sets, whose test labels are not public.
_TRAIN_AND_VALIDATION = _splits(None, test="validation")

HUB = {
    "boolq": HubDataset(
        "google/boolq",
        _TRAIN_AND_VALIDATION,
        lambda row: (row["question"], ["true", "false"], 0 if row["answer"] else 1),
    ),
    "piqa": HubDataset(
        "baber/piqa", _TRAIN_AND_VALIDATION, lambda row: (row["goal"], [row["sol1"], row["sol2"]], int(row["label"]))
    ),
    "social_i_qa": HubDataset(
        "lighteval/siqa",
        _TRAIN_AND_VALIDATION,
        lambda row: (
            f"{row['context']} {row['question']}",
            [row[f"answer{letter}"] for letter in "ABC"],
            int(row["label"]) - 1,
        ),
    ),
    "hellaswag": HubDataset(
        "Rowan/hellaswag",
        _TRAIN_AND_VALIDATION,
        lambda row: (f"{row['activity_label']}: {row['ctx']}", list(row["endings"]), int(row["label"])),
    ),
    "winogrande": HubDataset(
        "allenai/winogrande",
        {"train": [(f"winogrande_{size}", "train") for size in _SIZES], "test": [("winogrande_xl", "validation")]},
        lambda row: (row["sentence"], [row["option1"], row["option2"]], int(row["answer"]) - 1),
    ),
    **{
        name: HubDataset("allenai/ai2_arc", _splits(name), lambda row: _lettered(row, "question"))
        for name in ("ARC-Easy", "ARC-Challenge")
    },
    "openbookqa": HubDataset("allenai/openbookqa", _splits("main"), lambda row: _lettered(row, "question_stem")),
    "gsm8k": HubDataset("openai/gsm8k", _splits("main")),
    "mmlu": HubDataset("cais/mmlu", {split: [("all", split)] for split in ("dev", "validation", "test")}),
    "humaneval": HubDataset("openai/openai_humaneval", {"test": [(None, "test")]}),
}


def from_hub(name: str) -> Splits:
    """The splits of a benchmark. Raises EchoDataError if they can't be downloaded or have other columns."""
    hub = HUB[name]
    splits: Splits = {}
    for split, sources in hub.splits.items():
        raw: list[Row] = []
        for configuration, hub_split in sources:
            for index, row in enumerate(_load(hub.path, configuration, hub_split)):
                try:
                    raw.append(_from_native(name, hub, row) | _size_of(name, split, configuration))
                except (KeyError, ValueError, TypeError) as error:
                    raise EchoDataError(
                        f"{hub.path} ({hub_split}): row {index} no longer has the columns of {name}: "
                        f"{type(error).__name__}: {error}. Import a local copy."
                    ) from error
        where = f"{hub.path}:{sources[0][1]}"
        check_columns(name, raw, where)
        splits[split] = where, raw
    return splits


def _from_native(name: str, hub: HubDataset, row: Row) -> Row:
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


def _size_of(name: str, split: str, configuration: str | None) -> Row:
    """The column `part` of winogrande/train: the size it comes from, because the sizes overlap."""
    if name != "winogrande" or split != "train":
        return {}
    return {"part": str(configuration).removeprefix("winogrande_")}


def _load(path: str, configuration: str | None, split: str) -> Iterable[Row]:
    import datasets

    try:
        return datasets.load_dataset(path, configuration, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise EchoDataError(
            f"{path} ({split}) can't be downloaded: {error}. Try again, or import a local copy without --hub."
        ) from error
