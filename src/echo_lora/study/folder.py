"""A study's folder: its design, the records of its runs, and what is still missing."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from echo_lora.errors import EchoDataError, EchoError
from echo_lora.files import write_file
from echo_lora.study.design import RunKey, Study, confirmation_keys, tuning_keys
from echo_lora.study.records import RUNS_FILE, STUDY_FILE, problem_of_run, read_runs, write_archive
from echo_lora.study.run import read_record

KNOWN = ("runs", RUNS_FILE)  # what a study's folder may hold before its file is written


def done_run(study: Study, key: RunKey) -> dict[str, Any]:
    record = read_record(study, key)
    if record is None:
        raise EchoError(f"the run {key} has no record in {study.output}. Call compare again to have it done.")
    return record


def gather(study: Study, about: dict[str, Any]) -> None:
    """Write the study's file, and the records there are in one."""
    write_json(Path(study.output) / STUDY_FILE, about)
    keys = tuning_keys(study) + (confirmation_keys(study, about["chosen"]) if "chosen" in about else [])
    records = [record for key in keys if (record := read_record(study, key)) is not None]
    _check_pairing(records)
    text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    write_archive(Path(study.output) / RUNS_FILE, text)


def _check_pairing(records: Iterable[dict[str, Any]]) -> None:
    """Runs that are compared began alike and answered the same questions. Raises EchoError.

    In a seed, adapters of one kind started from the same weights; arms with one `data` section saw the same rows; all
    were asked the same questions; the base knew the general text equally well.
    """
    first: dict[str, tuple[dict[str, Any], Any]] = {}
    for record in records:
        if "diverged" in record:
            continue
        recipe, general = record["recipe"], record["general"] or {}
        alike = {
            "start from the same adapter": (
                [record["seed"], recipe["method"], recipe["model"], recipe["lora"]],
                record["initial_adapter_sha256"],
            ),
            "train on the same rows": ([recipe["data"], recipe["model"]], record["data_sha256"]),
            "answer the same questions": ([record["stage"]], record["questions_sha256"]),
            "have the same base": ([recipe["model"]], f"{general.get('before', 0.0):.4f}"),
        }
        for what, (group, value) in alike.items():
            other, expected = first.setdefault(json.dumps([what, group], sort_keys=True), (record, value))
            if value != expected:
                raise EchoError(
                    f"arms {other['arm']} (seed {other['seed']}) and {record['arm']} (seed {record['seed']}) did not "
                    f"{what}, so they are not paired. Has something changed between their runs? Remove the older ones "
                    "and compare again."
                )


def gathered(study: Study) -> list[tuple[RunKey, dict[str, Any]]]:
    """Runs that are known from the gathered records alone, as after a clone.

    A record names its run, and the run its folder: names that are none of the design's are not turned into paths.
    Raises EchoDataError for such a record, and for one that is not a run's.
    """
    path = Path(study.output) / RUNS_FILE
    rates = [dict(zip(study.arms, chosen, strict=True)) for chosen in zip(*map(study.rates, study.arms), strict=True)]
    keys = [*tuning_keys(study), *(key for chosen in rates for key in confirmation_keys(study, chosen))]
    found = []
    for number, record in read_runs(path):
        problem = problem_of_run(record)
        key = None if problem else next((key for key in keys if asdict(key).items() <= record.items()), None)
        if key is None:
            raise EchoDataError(
                f"{path}:{number}: {problem or 'it is the record of none of the runs of this study'}. Remove the line, "
                "or choose another output."
            )
        found.append((key, record))
    return found


def write_json(path: Path, value: dict[str, Any]) -> None:
    text = json.dumps(value, indent=2, ensure_ascii=False)
    write_file(path, lambda file: file.write_text(text + "\n", encoding="utf-8"))
