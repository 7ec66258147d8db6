"""`score`: run lm-evaluation-harness on a model and count correct answers."""

from __future__ import annotations

import dataclasses
import logging
import math
import random
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from echo_lora.environment import require_package
from echo_lora.errors import EchoConfigError, EchoModelError
from echo_lora.evaluate.answers import UNREADABLE, macro_accuracy
from echo_lora.evaluate.programs import sandbox_command
from echo_lora.evaluate.tasks import FILTER, METRIC, TASK_VERSION, EvalTask, check_rows, location, write_task

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class TaskResult:
    """A model's correct answers and predictions on one task."""

    task: str
    kind: str
    metric: str  # lm-eval's: "acc" for kind choice, "exact_match" for generate and number, "pass_at_1" for code
    filter: str  # lm-eval's name of the filter that read the responses
    correct: int
    total: int
    accuracy: float  # over rows: the micro average where rows have groups
    low: float  # the 95 % Wilson interval of the accuracy
    high: float
    unreadable: float  # share of answers in which nothing was found; 0 for kind choice
    seconds: float  # spent in the model
    lm_eval_version: str
    task_version: float
    correct_per_row: list[bool]  # in the order of the rows, for paired statistics
    predictions: list[str]  # "" where unreadable
    macro_accuracy: float | None = None  # the unweighted mean of the groups' accuracies; None without groups

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def score(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Iterable[tuple[EvalTask, Iterable[Mapping[str, Any]]]],
    *,
    batch_size: int = 16,
    seed: int = 0,
    progress: bool = True,
    run_generated_code: bool = False,
    allow_unsandboxed: bool = False,
) -> list[TaskResult]:
    """Score `model` on each task's rows, without sampling and without few-shot examples.

    tasks: pairs of a task and its rows, which `tasks.py` describes. seed: torch's, for models that draw random numbers
    in eval mode. progress: show bars on a terminal. run_generated_code: allow tasks of kind code, which run what the
    model writes in the sandbox of `programs.py`. allow_unsandboxed: run it without one where none works.
    Returns one result per task, in order. Downloads nothing; training modes, padding token and random states are
    restored. Raises EchoDataError for a row that can't be scored or is too long, EchoConfigError if lm-eval is missing,
    for a duplicate task name or code that may not run, EchoModelError for NaN log-likelihoods.
    """
    require_package("lm-eval", "scoring")
    tasks = list(tasks)
    _check_names([task.name for task, _ in tasks])
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise EchoConfigError(f"batch_size = {batch_size!r} must be an integer of at least 1. Correct it.")
    require_permission([task for task, _ in tasks], run_generated_code, allow_unsandboxed)
    if tokenizer.eos_token_id is None:
        raise EchoModelError("The tokenizer has no eos_token, so answers would never end. Set tokenizer.eos_token.")
    documents = [(task, check_rows(task, rows)) for task, rows in tasks]

    import torch
    from lm_eval.evaluator import evaluate
    from lm_eval.tasks import TaskManager

    from echo_lora.evaluate.lm import RenderedPromptLM

    shows_progress = progress and sys.stderr.isatty()
    with (
        TemporaryDirectory(prefix="echo-lora-") as folder,
        _quiet(shows_progress),
        _untouched(model, tokenizer),
    ):
        lm = RenderedPromptLM(model, tokenizer, batch_size=batch_size, shows_progress=shows_progress)
        for task, rows in documents:
            for index, row in enumerate(rows):
                answer = row["choices"] if task.kind == "choice" else task.max_new_tokens
                lm.check_fits(location(task, index), row["prompt"], answer)
            write_task(task, rows, folder, allow_unsandboxed=allow_unsandboxed)
        loaded = TaskManager(include_path=folder, include_defaults=False).load([task.name for task, _ in tasks])
        torch.manual_seed(seed)
        # not simple_evaluate, which also runs pip and git and prints git's complaints
        samples = evaluate(lm, loaded, bootstrap_iters=0, confirm_run_unsafe_code=run_generated_code)["samples"]
    return [_result(task, samples[task.name], lm.seconds[task.name]) for task, _ in documents]


def require_permission(tasks: Iterable[EvalTask], run_generated_code: bool, allow_unsandboxed: bool) -> None:
    """Raise EchoConfigError if a task of kind code may not run its programs here."""
    for task in tasks:
        if task.kind == "code" and not run_generated_code:
            raise EchoConfigError(
                f"evaluation task {task.name!r} runs programs that the model writes. "
                "Allow it with --run-generated-code (in Python: run_generated_code=True), or leave the task out."
            )
        if task.kind == "code":
            try:
                sandbox_command(allow_unsandboxed)
            except EchoConfigError as error:
                raise EchoConfigError(
                    f"evaluation task {task.name!r} runs programs that the model writes, and {error}"
                ) from None


def _check_names(names: list[str]) -> None:
    if not names:
        raise EchoConfigError("There are no evaluation tasks. Give at least one.")
    folded = [name.casefold() for name in names]  # on some file systems `a.yaml` and `A.yaml` are one file
    for name in names:
        if (count := folded.count(name.casefold())) > 1:
            raise EchoConfigError(f"evaluation task {name!r} is given {count} times. Rename all but one.")


def _result(task: EvalTask, samples: list[dict[str, Any]], seconds: float) -> TaskResult:
    from scipy.stats import binomtest

    samples = sorted(samples, key=lambda sample: sample["doc_id"])
    predictions = [_prediction(task, sample) for sample in samples]
    correct_per_row = [bool(sample[METRIC[task.kind]]) for sample in samples]
    groups = [sample["doc"]["group"] for sample in samples if "group" in sample["doc"]]
    correct, total = sum(correct_per_row), len(correct_per_row)
    interval = binomtest(correct, total).proportion_ci(confidence_level=0.95, method="wilson")
    return TaskResult(
        task=task.name,
        kind=task.kind,
        metric=METRIC[task.kind],
        filter=FILTER[task.kind],
        correct=correct,
        total=total,
        accuracy=correct / total,
        low=float(interval.low),
        high=float(interval.high),
        unreadable=predictions.count(UNREADABLE) / total,
        seconds=seconds,
        lm_eval_version=version("lm_eval"),
        task_version=TASK_VERSION,
        correct_per_row=correct_per_row,
        predictions=predictions,
        macro_accuracy=macro_accuracy(correct_per_row, groups) if groups else None,
    )


def _prediction(task: EvalTask, sample: dict[str, Any]) -> str:
    """The answer that was read, or the choice of highest log-likelihood, the first of ties."""
    if task.kind != "choice":
        return sample["filtered_resps"][0]
    loglikelihoods = [loglikelihood for loglikelihood, _ in sample["filtered_resps"]]
    if any(math.isnan(value) for value in loglikelihoods):
        where = location(task, sample["doc_id"])
        raise EchoModelError(
            f"{where}: the model's log-likelihoods are {loglikelihoods}. Did training diverge? Score another one."
        )
    return sample["doc"]["choices"][loglikelihoods.index(max(loglikelihoods))]


@contextmanager
def _untouched(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> Iterator[None]:
    """Restore training modes, padding token and random states afterwards."""
    import torch

    modes = [(module, module.training) for module in model.modules()]
    pad_token, random_state = tokenizer.pad_token, random.getstate()
    try:
        with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
            yield
    finally:
        random.setstate(random_state)
        tokenizer.pad_token = pad_token
        for module, training in modes:
            module.training = training


@contextmanager
def _quiet(shows_progress: bool) -> Iterator[None]:
    """Limit lm-eval's log to errors. Its loop over rows has no switch for the progress bar, so the bar is replaced."""
    from lm_eval.api import task

    logger, bar = logging.getLogger("lm_eval"), task.tqdm
    level = logger.level
    logger.setLevel(logging.ERROR)
    if not shows_progress:
        task.tqdm = lambda rows, **_: rows
    try:
        yield
    finally:
        logger.setLevel(level)
        task.tqdm = bar
