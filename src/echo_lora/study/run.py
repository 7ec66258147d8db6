"""One run of a study: train, score, measure forgetting, and write it all as one record.

A run does not depend on other runs; it can be done on any machine that sees the study's folder. If it is interrupted,
it resumes from its newest checkpoint. Once its record is written, it is not repeated. A lock keeps two processes from
doing the same run.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from peft import PeftModel

from echo_lora.adapter.export import save_verified
from echo_lora.environment import commit
from echo_lora.errors import EchoDataError, EchoTrainingError
from echo_lora.evaluate import score
from echo_lora.method.model import EchoModel
from echo_lora.models import load_tokenizer
from echo_lora.recipe.build import is_saved_as_lora, load_base
from echo_lora.recipe.needs import require_packages
from echo_lora.recipe.rows import evaluation_rows
from echo_lora.recipe.schema import Recipe
from echo_lora.recipe.train import train
from echo_lora.study.design import GeneralText, RunKey, Study, recipe_of
from echo_lora.study.records import record_path, write_record
from echo_lora.training.checkpoint import clear_checkpoints, has_complete_checkpoint

COMMIT = commit()  # of the code that this process imported: the working tree may change before its last run

WINDOW = 512  # tokens of general text that the model reads at a time


def execute(study: Study, key: RunKey, *, wait: bool = False) -> bool:
    """Do one run and write its record; False if another process is doing it and `wait` is not set.

    Raises an EchoError; checkpoints are kept.
    """
    path = record_path(study.output, key)
    if path.is_file():
        return True
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name("lock"))  # the system releases it when the process ends, however it ends
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except Timeout:
        return False
    try:
        if not path.is_file():
            write_record(path, _record(study, key, path.parent))
            clear_checkpoints(path.with_name("checkpoints"))
    finally:
        lock.release()
    return True


def _record(study: Study, key: RunKey, folder: Path) -> dict[str, Any]:
    recipe = recipe_of(study, key)
    require_packages(recipe, trains=True, scores=True)
    if recipe.training.report_to and recipe.training.run_name is None:  # the folder's name is only that of a seed
        name = f"{Path(study.output).name} {key}"
        recipe = recipe.model_copy(update={"training": recipe.training.model_copy(update={"run_name": name})})
    checkpoints = folder / "checkpoints"
    resume = has_complete_checkpoint(checkpoints)
    if not resume:
        clear_checkpoints(checkpoints)
    part = "validation" if key.stage == "tuning" else study.score_on
    # tuning on the loss needs no answers
    answers = key.stage == "confirmation" or study.tune_on == "accuracy"
    tokenizer = load_tokenizer(recipe.model, recipe.trust_remote_code)
    tasks = evaluation_rows(recipe, tokenizer, part) if answers else []  # before training, since they may be invalid
    ids = [] if study.general is None else general_ids(tokenizer, study.general)
    try:
        result, model, _ = train(recipe, checkpoints, resume=resume)
    except EchoTrainingError as error:
        if key.stage == "confirmation":
            raise
        return {
            **dataclasses.asdict(key),
            "recipe": recipe.to_dict(),
            "diverged": str(error),
            "scores": [],
            "history": [],
        }
    as_lora = is_saved_as_lora(model)
    save_verified(model, folder / "adapter", tokenizer=tokenizer, overwrite=True, as_lora=as_lora)
    keeps_echo = study.arms[key.arm].keep_echo_on and isinstance(model, EchoModel) and key.stage == "confirmation"
    scores = []
    for echo in (False, True) if keeps_echo else (False,):
        if tasks:
            with model.keeping_echo() if echo else nullcontext():
                results = score(model, tokenizer, tasks, batch_size=recipe.evaluation.batch_size, progress=False)
            scores += [{"part": part, "echo": echo, "seconds": r.seconds, "result": r.to_dict()} for r in results]
    made = dataclasses.asdict(result)
    del made["output"], made["final"]  # the folder may be moved; the last values are in the history
    return {
        **dataclasses.asdict(key),
        **made,
        "commit": COMMIT,
        "threads": torch.get_num_threads(),
        "questions_sha256": hashlib.sha256(
            json.dumps([[task.name, rows] for task, rows in tasks], sort_keys=True).encode()
        ).hexdigest(),
        "scores": scores,
        # without such an adapter the model is not the base, so it is measured as saved
        "general": measure_forgetting(_as_saved(recipe, folder) if as_lora else model, ids) if ids else None,
    }


def _as_saved(recipe: Recipe, folder: Path) -> PeftModel:
    base = load_base(recipe)
    return PeftModel.from_pretrained(base, str(folder / "adapter"), torch_device=str(base.device))


def general_ids(tokenizer: Any, text: GeneralText) -> list[int]:
    """The tokens of the general text that are scored. Raises EchoDataError if it is too short."""
    words = Path(text.file).read_text(encoding="utf-8")
    ids = tokenizer(words, add_special_tokens=False, verbose=False)["input_ids"][: text.tokens]
    if len(ids) < text.tokens:
        raise EchoDataError(
            f"{text.file} has {len(ids)} tokens, fewer than general.tokens = {text.tokens}. Lower general.tokens."
        )
    return ids


def measure_forgetting(model: PeftModel, ids: list[int]) -> dict[str, float]:
    """Loss on a general text, in nats per token, without and with the adapter: {"before", "after", "tokens"}.

    The text is read in windows of 512 tokens; the first token of each is not predicted.
    """
    was_training = model.training
    model.eval()
    try:
        with model.disable_adapter():
            before = _nats(model, ids)
        return {"before": before, "after": _nats(model, ids), "tokens": len(ids)}
    finally:
        model.train(was_training)


@torch.no_grad()
def _nats(model: PeftModel, ids: list[int]) -> float:
    total, count = 0.0, 0
    for start in range(0, len(ids) - 1, WINDOW):
        window = torch.tensor([ids[start : start + WINDOW]], device=model.device)  # (1, tokens)
        if window.shape[1] > 1:
            total += model(input_ids=window, labels=window).loss.item() * (window.shape[1] - 1)
            count += window.shape[1] - 1
    return total / count
