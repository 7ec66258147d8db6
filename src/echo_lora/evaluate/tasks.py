"""Evaluation tasks, their rows, and the lm-evaluation-harness task files written for them.

A row holds raw text. Its prompt is complete, chat template included; nothing is added to it.

    generate   {"prompt": "…", "answer": "…"}                       exact match with the answer read by a pattern
    number     {"prompt": "…", "answer": "…"}                       equal as numbers; see `answers.py`
    code       {"prompt": "…", "test": "…", "entry_point": "…"}     prompt and answer, run as a program, pass the test
    choice     {"prompt": "…", "choices": ["…", "…"], "label": 0}   the choice of highest log-likelihood is the label

A row may name its `group`, such as a subject. Other fields are not written to the task files.
"""

from __future__ import annotations

import ast
import codeop
import json
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from itertools import islice
from pathlib import Path
from textwrap import shorten
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from echo_lora.errors import EchoConfigError, EchoDataError, nearest, problem_text
from echo_lora.evaluate.answers import (
    FIRST_LINE,
    UNREADABLE,
    plain_number,
    process_code,
    process_code_unsandboxed,
    read_numbers,
    search_beams,
)
from echo_lora.files import write_text
from echo_lora.text import check_unicode

TASK_VERSION = 1.0  # increment when the same answers would get other scores
Kind = Literal["choice", "generate", "number", "code"]
# "none" is lm-eval's name for unfiltered responses
FILTER = {"generate": "extract", "number": "extract", "code": "none", "choice": "none"}
METRIC = {"generate": "exact_match", "number": "exact_match", "code": "pass_at_1", "choice": "acc"}


class EvalTask(BaseModel, extra="forbid", frozen=True):
    """One evaluation task. Construction raises EchoConfigError, which names the wrong field."""

    name: str = Field(pattern=r"^[A-Za-z0-9_-]{1,100}$", description="name in results: letters, digits, _ and -")
    file: str | None = Field(None, description="JSONL file with one row per line; none if rows come from elsewhere")
    kind: Kind = Field(
        "generate",
        description="choice: compare given choices by likelihood; generate, number, code: generate an answer, and read "
        "it by a pattern, as a number, or run it as a program",
    )
    answer_pattern: str | None = Field(
        None,
        min_length=1,
        max_length=1000,
        description="regular expression that reads the answer: its first match, or the first group "
        "that matched; default: the first line",
    )
    max_new_tokens: int = Field(32, ge=1, le=1_000_000, description="longest generated answer; higher is slower")
    num_beams: int = Field(
        1, ge=1, le=1000, description="beams of the search for an answer; 1: greedy search; more is slower"
    )
    stop: list[Annotated[str, Field(min_length=1)]] = Field(
        [], description="strings that end an answer, besides the tokenizer's end of sequence"
    )
    limit: int | None = Field(None, ge=1, le=1_000_000_000, description="score only this many first rows; default: all")

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise EchoConfigError(_explain(values.get("name"), error)) from None

    @field_validator("answer_pattern")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except (re.error, OverflowError, RecursionError) as error:
            raise ValueError(f"must be a valid regular expression: {error}") from None
        return pattern

    @model_validator(mode="after")
    def _agrees(self) -> EvalTask:
        if self.kind != "generate" and self.answer_pattern:
            raise ValueError(f"answer_pattern works with kind 'generate' only, not with {self.kind!r}; leave it out")
        for name in ("stop", "num_beams"):
            if self.kind == "choice" and getattr(self, name) != EvalTask.model_fields[name].default:
                raise ValueError(f"{name} works with generated answers only, not with kind 'choice'; leave it out")
        return self


def write_task(
    task: EvalTask, rows: Iterable[Mapping[str, Any]], folder: str | Path, *, allow_unsandboxed: bool = False
) -> Path:
    """Write `<name>.jsonl` and `<name>.yaml` to `folder`, each atomically; return the path of the latter.

    Run it with `lm_eval run --include_path FOLDER --tasks NAME …`. allow_unsandboxed: let a task of kind code run
    without a sandbox where none works. Raises EchoDataError for a row that can't be scored, EchoCheckpointError if the
    folder can't be written.
    """
    path = Path(folder).absolute() / f"{task.name}.yaml"
    data = path.with_suffix(".jsonl")
    write_text(data, "".join(json.dumps(row) + "\n" for row in check_rows(task, rows)))
    configuration = _configuration(task, data, allow_unsandboxed)
    write_text(path, yaml.dump(configuration, Dumper=_Dumper, sort_keys=False, allow_unicode=True))
    return path


def load_rows(file: str, **_metadata: Any) -> dict[str, Any]:
    """The rows of a written task, as lm-eval wants them: {"test": Dataset}.

    lm-eval's own `dataset_path: json` would turn answers that look like dates into timestamps.
    """
    from datasets import Dataset

    with open(file, encoding="utf-8") as lines:
        return {"test": Dataset.from_list([json.loads(line) for line in lines])}


def check_rows(task: EvalTask, rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows to score, with only the fields of the task's kind; answers are stripped, as predictions are.

    Raises EchoDataError, which names row and field.
    """
    check = _CHECKS[task.kind]
    documents = []
    for index, row in enumerate(islice(rows, task.limit)):
        where = location(task, index)
        if not isinstance(row, Mapping):
            raise EchoDataError(f"{where}: {shorten(repr(row), 80)} is not an object. Give one with named fields.")
        documents.append(check(task, where, row))
        if "group" in row or (index and "group" in documents[0]):
            documents[-1]["group"] = _text(where, row, "group")
    if not documents:
        raise EchoDataError(f"{task.file or task.name}: no rows to score. Give at least one.")
    if any("group" in row for row in documents) and "group" not in documents[0]:
        _field(location(task, 0), documents[0], "group")
    return documents


def location(task: EvalTask, index: int) -> str:
    """How messages name a row, counted from 0."""
    return f"{task.file or task.name}: row {index}"


def _check_generate(task: EvalTask, where: str, row: Mapping[str, Any]) -> dict[str, Any]:
    answer = _text(where, row, "answer").strip()
    if task.answer_pattern is None and "\n" in answer:
        raise EchoDataError(
            f"{where}: answer = {answer!r} has several lines, but the default pattern reads only the first. "
            f"Set answer_pattern for task {task.name!r}, or shorten the answer."
        )
    return {"prompt": _text(where, row, "prompt"), "answer": answer}


def _check_choice(task: EvalTask, where: str, row: Mapping[str, Any]) -> dict[str, Any]:
    prompt, choices, label = _text(where, row, "prompt"), _field(where, row, "choices"), _field(where, row, "label")
    is_list = isinstance(choices, list) and all(isinstance(choice, str) and choice.strip() for choice in choices)
    for choice in choices if is_list else ():
        check_unicode(choice, "choices", where)
    if not is_list or len(set(choices)) != len(choices) or len(choices) < 2:
        raise EchoDataError(f"{where}: choices = {choices!r} must be a list of at least two different texts.")
    if not is_index(label, len(choices)):
        raise EchoDataError(f"{where}: label = {label!r} must be the index of a choice. Use 0 to {len(choices) - 1}.")
    return {"prompt": prompt, "choices": choices, "label": label}


def is_index(value: Any, count: int) -> bool:
    """Whether a value is an index from 0 of one of `count` choices."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < count


def _check_number(task: EvalTask, where: str, row: Mapping[str, Any]) -> dict[str, Any]:
    answer = _text(where, row, "answer")
    number = plain_number(answer.strip())
    if number is None:
        raise EchoDataError(f"{where}: answer = {answer!r} is not a number. Write it as 12, -3.5 or 1,200.")
    return {"prompt": _text(where, row, "prompt"), "answer": number}


def _check_code(task: EvalTask, where: str, row: Mapping[str, Any]) -> dict[str, Any]:
    document = {name: _text(where, row, name) for name in ("prompt", "test", "entry_point")}
    if not document["entry_point"].isidentifier():
        raise EchoDataError(f"{where}: entry_point = {document['entry_point']!r} must be the name of a function.")
    try:
        test = ast.parse(document["test"])
    except (SyntaxError, ValueError) as error:
        raise EchoDataError(f"{where}: test is not valid Python: {error}. Correct it.") from None
    if not any(isinstance(node, ast.FunctionDef) and node.name == "check" for node in test.body):
        raise EchoDataError(f"{where}: test does not define check(candidate). Add this function.")
    if not _is_start_of_program(document["prompt"]):
        raise EchoDataError(
            f"{where}: prompt = {shorten(document['prompt'], 80)!r} is not the start of a Python program, so no answer "
            "can pass. Give the code that the answer continues, without a chat template."
        )
    return document


def _is_start_of_program(text: str) -> bool:
    with warnings.catch_warnings(action="ignore"):
        try:
            codeop.compile_command(text, symbol="exec")
        except SyntaxError as error:  # fine at the very end, where the answer continues
            lines = text.rstrip().splitlines()
            return (error.lineno or 0, error.offset or 0) >= (len(lines), len(lines[-1]) + 1)
        except (ValueError, OverflowError):
            return False
    return True


_CHECKS: dict[str, Callable[[EvalTask, str, Mapping[str, Any]], dict[str, Any]]] = {
    "generate": _check_generate,
    "number": _check_number,
    "code": _check_code,
    "choice": _check_choice,
}


def _text(where: str, row: Mapping[str, Any], name: str) -> str:
    value = _field(where, row, name)
    if not isinstance(value, str) or not value.strip():
        raise EchoDataError(f"{where}: {name} = {value!r} must be text that is not blank.")
    check_unicode(value, name, where)
    return value


def _field(where: str, row: Mapping[str, Any], name: str) -> Any:
    if name not in row:
        raise EchoDataError(f"{where}: field {name!r} is missing. Present: {', '.join(row) or 'none'}. Add it.")
    return row[name]


class _Function(str):
    """The dotted name of a function that lm-eval calls."""


class _Dumper(yaml.SafeDumper):
    pass


_Dumper.add_representer(_Function, lambda dumper, name: dumper.represent_scalar("!function", str(name)))


def _function(function: Callable[..., Any]) -> _Function:
    return _Function(f"{function.__module__}.{function.__name__}")


def _configuration(task: EvalTask, data: Path, allow_unsandboxed: bool) -> dict[str, Any]:
    """The task in lm-eval's format. A bare field name gives the field's value, which is not rendered as a template."""
    metric = {"metric": METRIC[task.kind], "aggregation": "mean", "higher_is_better": True}
    shared = {
        "task": task.name,
        "custom_dataset": _function(load_rows),
        "dataset_kwargs": {"file": str(data)},
        "test_split": "test",
        "num_fewshot": 0,
        "doc_to_text": "prompt",
        "target_delimiter": "",
        "metric_list": [metric],
        "metadata": {"version": TASK_VERSION},
    }
    if task.kind == "choice":
        return shared | {"output_type": "multiple_choice", "doc_to_choice": "choices", "doc_to_target": "label"}
    shared |= {
        "output_type": "generate_until",
        "generation_kwargs": {
            "until": list(task.stop),
            "max_gen_toks": task.max_new_tokens,
            "do_sample": False,
            **({"num_beams": task.num_beams, "custom_generate": _function(search_beams)} if task.num_beams > 1 else {}),
        },
    }
    if task.kind == "code":
        return shared | {
            "doc_to_target": "test",
            "process_results": _function(process_code_unsandboxed if allow_unsandboxed else process_code),
            "unsafe_code": True,
        }
    reader: dict[str, Any] = {
        "function": "regex",
        "regex_pattern": task.answer_pattern or FIRST_LINE,
        "fallback": UNREADABLE,
    }
    if task.kind == "number":
        reader = {"function": "custom", "filter_fn": _function(read_numbers)}
    return shared | {
        "doc_to_target": "answer",
        "filter_list": [{"name": FILTER[task.kind], "filter": [reader, {"function": "take_first"}]}],
    }


def _explain(name: Any, error: ValidationError) -> str:
    """One line per wrong field."""
    lines = []
    for problem in error.errors():
        text = f"{problem_text(problem)}."
        if problem["type"] == "extra_forbidden":
            field = str(problem["loc"][-1])
            text = f"unknown field {field!r}.{nearest(field, list(EvalTask.model_fields))}"
        lines.append(f"evaluation task {name!r}: {text}")
    return "\n".join(lines)
