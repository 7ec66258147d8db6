"""From a recipe to a trained adapter and the folder that proves where it came from.

    output/
      adapter/       the plain PEFT adapter, tokenizer with chat template, model card
      checkpoints/   what `resume` goes on from
      loss.png       the losses over the steps
      run.json       recipe, versions, seeds, metrics; written last, so that it stands for a finished run

The adapter's initial weights depend on `seeds.initialisation` and the adapter's shape alone: with and without
the echo they are the same numbers.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError
from torch import nn
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import set_seed
from trl import SFTConfig

from echo_lora.base_models import (
    canonical,
    empty_model,
    has_position_table,
    load_base_model,
    load_config,
    load_tokenizer,
)
from echo_lora.checkpoint import (
    complete_checkpoints,
    has_complete_checkpoint,
    last_complete_checkpoint,
    remove_unfinished,
)
from echo_lora.config import nearest
from echo_lora.data import PreparedData, refuse_unfit_tokens
from echo_lora.environment import MemoryWatch, versions
from echo_lora.errors import EchoCheckpointError, EchoConfigError, EchoError, EchoInterrupt, EchoModelError
from echo_lora.export import adapter_hash, model_card, save_verified
from echo_lora.files import locked, refuse_existing, remove_empty, remove_files, remove_leftovers, write_file
from echo_lora.inject import unmatched_targets
from echo_lora.model import EchoModel, get_echo_model
from echo_lora.progress import progress_console, stage
from echo_lora.rows import check_rows, join, prepare_part
from echo_lora.schema import Recipe
from echo_lora.sft import EchoSFTTrainer

logger = logging.getLogger(__name__)

RUN_FILE = "run.json"
STARTED = "started.json"  # in checkpoints/, the recipe: the folder is a run's own, and may be tidied
# What decides the result of a training, by the trainer's keys, and the recipe's keys for it.
RECIPE_KEYS = {
    "adapter.lora_alpha": "lora.alpha",
    "adapter.lora_dropout": "lora.dropout",
    "adapter.r": "lora.r",
    "adapter.target_modules": "lora.target_modules",
    "adapter.use_dora": "method",
    "adapter.use_rslora": "method",
    "base.attn_implementation": "attn_implementation",
    "base.dtype": "dtype",
    "base.quantization": "quantization",
    "base.sha256": "model",
    "data.sha256": "data",
    "echo.routing_seed": "seeds.routing",
    "training.batches": "training.batch_size, training.gradient_accumulation",
    "training.data_seed": "seeds.data_order",
    "training.lr_scheduler_type": "training.schedule",
    "training.max_steps": "training.steps",
    "training.num_train_epochs": "training.epochs",
    "training.optim": "training.optimizer",
    "training.seed": "seeds.initialisation",
}
SHOWN_METRICS = ("loss", "ce_off", "ce_on", "distillation", "ce_prompt", "routing_p", "eval_loss", "learning_rate")


@dataclass(frozen=True)
class RunResult:
    """What a finished run is; `run.json` holds the same fields."""

    output: str
    recipe: dict[str, Any]
    versions: dict[str, str]
    device: str
    rows: list[str]  # what was trained on, as lines
    steps: int
    resumed_at: int  # the step that this process started from; 0 for a run in one piece
    seconds: float  # of training, in this process
    peak_memory: int  # bytes: of the process on a CPU, of torch's tensors on a GPU
    deployed_parameters: int  # of the adapter
    echo_parameters: int  # trained beside it and thrown away
    data_sha256: str  # of the training rows, tokenised
    initial_adapter_sha256: str
    adapter_sha256: str
    final: dict[str, float]  # the last value of every metric
    history: list[dict[str, float]]

    @property
    def adapter(self) -> Path:
        return Path(self.output) / "adapter"

    @classmethod
    def read(cls, output: str | Path) -> RunResult:
        """The result of a finished run. Raises EchoCheckpointError if the folder holds none."""
        path = Path(output) / RUN_FILE
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            return cls(**fields | {"output": str(output)})  # the folder may have been moved
        except (OSError, ValueError, TypeError) as error:
            raise EchoCheckpointError(
                f"{path} is not the record of a finished run: {error}. Name the output folder of `echo-lora train`."
            ) from error


def run(recipe: Recipe, *, resume: bool = False) -> RunResult:
    """Train the recipe's adapter and write its output folder.

    resume: go on from the newest complete checkpoint in the output folder; the recipe must be the same.
    Raises an EchoError, and then leaves nothing behind but complete checkpoints; EchoInterrupt at a Ctrl-C. Files in
    the folder that are not the run's own stay.
    """
    if os.environ.get("WORLD_SIZE", "1").strip() not in ("", "0", "1"):
        raise EchoConfigError(
            f"a recipe trains in one process, but WORLD_SIZE = {os.environ['WORLD_SIZE']}. Use EchoSFTTrainer in a "
            "script, or unset the variable."
        )
    require_packages(recipe)
    recipe = recipe.model_copy(update={"model": canonical(recipe.model)})
    output = Path(recipe.output)
    checkpoints = output / "checkpoints"
    with locked(output):
        is_new = not output.exists()
        _claim(output, checkpoints, resume)
        try:
            return _run(recipe, output, checkpoints, resume)
        except KeyboardInterrupt as error:
            raise EchoInterrupt(f"{str(error) or 'Interrupted.'} {_way_on(checkpoints)}") from error
        finally:
            _tidy(output, checkpoints, is_new)


def _run(recipe: Recipe, output: Path, checkpoints: Path, resume: bool) -> RunResult:
    if not resume:
        started = json.dumps(recipe.to_dict(), indent=2)
        write_file(checkpoints / STARTED, lambda path: path.write_text(started, encoding="utf-8"))
    result, model, tokenizer = train(recipe, checkpoints, resume=resume)
    with stage("Saving the adapter and reading it back"):
        card = model_card(dataclasses.asdict(result), recipe.build_echo_config() if recipe.echo else None)
        save_verified(model, result.adapter, tokenizer=tokenizer, card=card, overwrite=True)
        write_file(output / "loss.png", lambda path: plot_losses(result.history, path))
        record = json.dumps(dataclasses.asdict(result), indent=2)
        write_file(output / RUN_FILE, lambda path: path.write_text(record, encoding="utf-8"))
    return result


def require_packages(recipe: Recipe) -> None:
    """Raises EchoConfigError if the recipe asks for a package that is not installed."""
    needs: dict[str, str] = {f"training.report_to = {name}": name for name in recipe.training.report_to}
    if "8bit" in recipe.training.optimizer:
        needs[f"training.optimizer = {recipe.training.optimizer}"] = "bitsandbytes"
    for key, package in needs.items():
        if find_spec(package) is None:
            raise EchoConfigError(f"{key} needs the package {package}. Run `pip install {package}`, or leave it out.")


def lora_config(recipe: Recipe) -> LoraConfig:
    """The PEFT configuration of the recipe's adapter."""
    return LoraConfig(
        r=recipe.lora.r,
        lora_alpha=recipe.lora.alpha,
        lora_dropout=recipe.lora.dropout,
        target_modules=recipe.lora.target_modules,
        use_dora=recipe.method == "dora",
        use_rslora=recipe.method == "rslora",
        task_type="CAUSAL_LM",
    )


def add_adapter(recipe: Recipe, base: PreTrainedModel) -> PeftModel:
    """The base with the recipe's adapter, freshly initialised, and with the echo if the recipe wants it.

    Raises EchoModelError if the base can't carry it.
    """
    set_seed(recipe.seeds.initialisation)
    width = getattr(base.config.get_text_config(), "hidden_size", None)
    if width is not None and recipe.lora.r > width:
        raise EchoModelError(
            f"lora.r = {recipe.lora.r} is above the width of {recipe.model}, {width}, and no update has a higher rank. "
            "Lower it."
        )
    linear = [name for name, module in base.named_modules() if isinstance(module, nn.Linear)]
    config = lora_config(recipe)
    try:
        if recipe.echo:
            model: PeftModel = get_echo_model(base, config, recipe.build_echo_config())
        else:
            model = get_peft_model(base, config)
    except (ValueError, re.error) as error:  # PEFT's, for modules that are not there or can't carry an adapter
        if isinstance(error, EchoError):
            raise
        raise EchoModelError(
            f"lora.target_modules = {recipe.lora.target_modules} does not fit {recipe.model}: {error} "
            "Name linear modules of this model, or use all-linear."
        ) from error
    if unmatched := unmatched_targets(model, recipe.lora.target_modules, "default"):
        ends = {name.rpartition(".")[2] for name in (*linear, *model.base_model.targeted_module_names)}
        raise EchoModelError(
            f"lora.target_modules names {unmatched[0]!r}, and no module of {recipe.model} that gets an adapter has a "
            f"name that ends so.{nearest(unmatched[0], sorted(ends))} Correct it, or leave it out."
        )
    return model


def parameter_counts(model: PeftModel) -> tuple[int, int]:
    """Trainable parameters of the adapter, and of the echo."""
    echo = sum(p.numel() for p in model.echo.parameters()) if isinstance(model, EchoModel) else 0
    return sum(p.numel() for p in model.parameters() if p.requires_grad) - echo, echo


def training_arguments(recipe: Recipe, checkpoints: Path) -> SFTConfig:
    """The recipe's `training` in the words of transformers and TRL, whose own defaults differ."""
    training = recipe.training
    # with a warm-up of 0 steps this is the constant schedule
    schedule = "constant_with_warmup" if training.schedule == "constant" else training.schedule
    return SFTConfig(
        output_dir=str(checkpoints),
        num_train_epochs=training.epochs if training.epochs is not None else 1.0,
        max_steps=training.steps if training.steps is not None else -1,
        per_device_train_batch_size=training.batch_size,
        per_device_eval_batch_size=training.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation,
        learning_rate=training.learning_rate,
        lr_scheduler_type=schedule,
        warmup_steps=training.warmup_steps,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        optim=training.optimizer,
        activation_checkpointing=training.gradient_checkpointing,
        bf16=training.bf16,
        save_steps=training.save_every,
        save_total_limit=training.keep_checkpoints,
        logging_steps=training.log_every,
        logging_first_step=True,
        eval_strategy="no" if training.evaluate_every is None else "steps",
        eval_steps=training.evaluate_every,
        report_to=training.report_to or "none",
        seed=recipe.seeds.initialisation,
        data_seed=recipe.seeds.data_order,
        max_length=None,  # rows are checked before they come here
        dataloader_pin_memory=torch.cuda.is_available(),
        disable_tqdm=True,  # _Progress shows what there is to see
    )


def recipe_key(key: str) -> str:
    """How a recipe calls what decides the result of a training, with the trainer's key, in whose terms values are."""
    section, _, name = key.partition(".")
    own = RECIPE_KEYS.get(key, f"echo_config.{name}" if section == "echo" else key)
    return key if own == key else f"{own} ({key})"


def prepare(recipe: Recipe) -> tuple[PreTrainedTokenizerBase, dict[str, list[PreparedData]]]:
    """The tokenizer and the rows of data.train and data.validation, checked as far as that goes without weights.

    What takes longer comes later: the form of all rows, their tokens, then what the model has embeddings for.
    Raises EchoDataError.
    """
    check_rows(recipe)
    tokenizer = load_tokenizer(recipe.model, recipe.trust_remote_code)
    prepared = {part: prepare_part(recipe, tokenizer, part) for part in ("train", "validation")}
    config = load_config(recipe.model, recipe.trust_remote_code).get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    for data in (data for part in prepared.values() for data in part):
        refuse_unfit_tokens(
            data.dataset,
            data.source,
            vocabulary=config.vocab_size,
            positions=positions,
            has_table=lambda: has_position_table(
                empty_model(recipe.model, trust_remote_code=recipe.trust_remote_code), positions or 0
            ),
        )
    return tokenizer, prepared


def train(recipe: Recipe, checkpoints: Path, *, resume: bool) -> tuple[RunResult, PeftModel, Any]:
    """Train the recipe's adapter, with checkpoints in this folder; the result, the trained model and its tokenizer.

    The model has its echo networks still. Raises an EchoError.
    """
    with stage(f"Reading rows with the tokenizer of {recipe.model}"):
        tokenizer, prepared = prepare(recipe)
    with stage(f"Loading {recipe.model}"):
        base = load_base_model(
            recipe.model, recipe.dtype, recipe.attn_implementation, recipe.quantization, recipe.trust_remote_code
        )
    model = add_adapter(recipe, base)
    try:
        arguments = training_arguments(recipe, checkpoints)
    except (ValueError, ImportError) as error:  # bf16 on hardware without it, for example
        raise EchoConfigError(f"transformers refuses the recipe's training: {error} Correct the key.") from error
    progress = _Progress()
    try:
        trainer = EchoSFTTrainer(
            model=model,
            args=arguments,
            train_dataset=join(prepared["train"]),
            eval_dataset=join(prepared["validation"]) if recipe.training.evaluate_every is not None else None,
            processing_class=tokenizer,
            callbacks=[progress],
            answer_weight=recipe.training.answer_weight,
        )
    except (ValueError, ImportError) as error:  # of accelerate, which reads its settings from the environment
        if isinstance(error, EchoError):
            raise
        raise EchoConfigError(
            f"the trainer can't be made: {error} Correct the recipe, or the environment variables of accelerate."
        ) from error
    trainer.remove_callback(PrinterCallback)
    trainer.name_of_key = recipe_key
    last = last_complete_checkpoint(checkpoints) if resume else None
    resumed_at = 0 if last is None else int(last.name.rpartition("-")[2])
    started, watch = time.perf_counter(), MemoryWatch()
    try:
        with watch, _reading(last, progress):
            trainer.train(resume_from_checkpoint=None if last is None else str(last))
    except KeyboardInterrupt as error:
        state = trainer.state
        raise EchoInterrupt(f"Interrupted after step {state.global_step} of {state.max_steps}.") from error
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch's file writer reports a full disk as a RuntimeError that names its source file
        if isinstance(error, RuntimeError) and not re.search(r"PytorchStreamWriter|inline_container", str(error)):
            raise
        raise EchoCheckpointError(
            f"{checkpoints} could not be written at step {trainer.state.global_step}: {error}. Free some space, then "
            "resume; complete checkpoints are kept."
        ) from error
    finally:
        progress.close()
    seconds = time.perf_counter() - started
    history = [_numbers(entry) for entry in trainer.state.log_history]
    deployed, echo = parameter_counts(model)
    assert trainer.initial_adapter_hash is not None
    result = RunResult(
        output=str(checkpoints.parent),
        recipe=recipe.to_dict(),
        versions=versions(),
        device=str(model.device),
        rows=[line for data in prepared["train"] for line in data.summary()],
        steps=trainer.state.global_step,
        resumed_at=resumed_at,
        seconds=seconds,
        peak_memory=watch.peak,
        deployed_parameters=deployed,
        echo_parameters=echo,
        data_sha256=trainer.configuration()["data.sha256"],
        initial_adapter_sha256=trainer.initial_adapter_hash,
        adapter_sha256=adapter_hash(model, model.active_adapters[0]),
        final={name: value for entry in history for name, value in entry.items() if not name.startswith("train_")},
        history=history,
    )
    return result, model, tokenizer


@contextmanager
def _reading(checkpoint: Path | None, progress: _Progress) -> Iterator[None]:
    """Errors before the first step are those of reading the checkpoint, whatever torch and transformers raise.

    Raises EchoCheckpointError for a checkpoint that is whole and can't be gone on from.
    """
    try:
        yield
    except Exception as error:
        if checkpoint is None or progress.has_begun or isinstance(error, EchoError):
            raise
        raise EchoCheckpointError(
            f"{checkpoint} can't be resumed from: {type(error).__name__}: {error}. Remove it, then resume: an earlier "
            "checkpoint is taken, if there is one."
        ) from error


def plot_losses(history: list[dict[str, float]], path: Path) -> None:
    """Draw the losses, and the routing probability on an axis of its own, as PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    has_echo = any("ce_off" in entry for entry in history)
    terms = ("ce_off", "ce_on", "distillation", "ce_prompt", "eval_loss")
    for name in terms if has_echo else ("loss", "eval_loss"):
        points = [(entry["step"], entry[name]) for entry in history if name in entry]
        if points:
            axes.plot(*zip(*points, strict=True), label=name, marker="." if len(points) < 40 else "")
    axes.set(xlabel="optimizer step", ylabel="nats per supervised token")
    if has_echo:
        points = [(entry["step"], entry["routing_p"]) for entry in history if "routing_p" in entry]
        right = axes.twinx()
        right.plot(*zip(*points, strict=True), color="0.7", linestyle="--")
        right.set(ylabel="routing_p (dashed)", ylim=(0, 1.05))
    axes.legend()
    figure.savefig(path, format="png", dpi=120)


def _claim(output: Path, checkpoints: Path, resume: bool) -> None:
    """Make the output folder this run's own.

    Raises EchoCheckpointError if it is not free, or holds nothing to resume.
    """
    if resume:
        if os.path.exists(output / RUN_FILE):
            raise EchoCheckpointError(
                f"{output} holds a finished run; there is nothing to resume. Its adapter is in adapter/."
            )
        if not has_complete_checkpoint(checkpoints):
            last_complete_checkpoint(checkpoints)  # which says so
        return
    is_run = (checkpoints / STARTED).is_file() and not (output / RUN_FILE).exists()
    if is_run and not has_complete_checkpoint(checkpoints):  # killed before it had anything to resume from
        remove_unfinished(checkpoints)
        return
    try:
        refuse_existing(output)
    except EchoCheckpointError as error:
        hint = "To go on with its training, resume (--resume). " if is_run else ""
        raise EchoCheckpointError(f"{error} {hint}The recipe's key is output.") from None


def _tidy(output: Path, checkpoints: Path, is_new: bool) -> None:
    """Remove what an interruption left of this run: all that is unfinished, and folders of ours without more.

    What can't be removed is told and left: an error here would hide the one that ended the run.
    """
    try:
        for name in (output / "adapter", output / "loss.png", output / RUN_FILE, checkpoints / STARTED):
            remove_leftovers(name)
        remove_unfinished(checkpoints)
        own = [STARTED, "README.md"]  # the second is TRL's
        if checkpoints.is_dir() and {path.name for path in checkpoints.iterdir()} <= set(own):
            remove_files(checkpoints, own)
        if is_new:
            remove_empty(output)
    except OSError as error:
        logger.warning("%s could not be tidied: %s", output, error)


def _way_on(checkpoints: Path) -> str:
    if complete := complete_checkpoints(checkpoints):
        return f"The newest complete checkpoint is {complete[-1]}: to go on from it, repeat the command with --resume."
    return "No checkpoint was complete yet: repeat the command to start again."


def _numbers(entry: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in entry.items() if isinstance(value, (int, float))}


class _Progress(TrainerCallback):
    """Steps and metrics of a training run."""

    def __init__(self) -> None:
        self.console = progress_console()
        self.bar: Progress | None = None
        self.started = 0.0
        self.has_begun = False  # a step, so that the checkpoint has been read

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.has_begun = True

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.started = time.perf_counter()
        if self.console.is_terminal:
            columns = (TextColumn("Training"), BarColumn(20), MofNCompleteColumn(), TimeRemainingColumn())
            self.bar = Progress(
                *columns, TextColumn("{task.description}"), console=self.console, transient=True, refresh_per_second=4
            )
            self.bar.add_task("", total=state.max_steps, completed=state.global_step)
            self.bar.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        shown = [f"{name} {logs[name]:.4g}" for name in SHOWN_METRICS if logs and name in logs]
        if not shown or (logs and "train_runtime" in logs):
            return
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], description=" ".join(shown[:3]))
        else:
            seconds = time.perf_counter() - self.started
            line = f"step {state.global_step}/{state.max_steps}  {'  '.join(shown)}  {seconds:.0f} s"
            self.console.print(line, markup=False)

    def close(self) -> None:
        """Remove the bar; also after an error, which no event of the trainer tells of."""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None
