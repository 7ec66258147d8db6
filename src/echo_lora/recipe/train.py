"""Training: from a recipe to an output folder with the adapter and the record of how it was made.

    output/
      adapter/       the plain PEFT adapter, tokenizer with chat template, model card
      checkpoints/   for `resume`
      logs/          what experiment trackers write, if the recipe names some
      loss.png       the losses over the steps
      recipe.yaml    the recipe, with its defaults; `echo-lora train` takes it
      run.json       recipe, versions, seeds, metrics; written last, so it marks a finished run

The adapter's initial weights depend only on `seeds.initialisation` and the adapter's shape: they are the same with and
without the echo.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors import SafetensorError
from transformers import PrinterCallback, TrainerCallback, TrainerState

from echo_lora import __version__
from echo_lora.adapter.card import model_card
from echo_lora.adapter.export import save_verified
from echo_lora.adapter.files import adapter_hash, adapter_tensors
from echo_lora.data.prepared import PreparedData
from echo_lora.data.stream import RowStream
from echo_lora.environment import MemoryWatch, is_main_process, process_count, versions
from echo_lora.errors import EchoCheckpointError, EchoConfigError, EchoError, EchoInterrupt
from echo_lora.files import locked, write_file, write_text
from echo_lora.method import losses
from echo_lora.models import canonical
from echo_lora.progress import PATIENCE, Steps, progress_console, stage
from echo_lora.recipe.build import (
    add_adapter,
    is_saved_as_lora,
    load_base,
    parameter_counts,
    recipe_key,
    training_arguments,
    whole_model,
)
from echo_lora.recipe.load import recipe_text
from echo_lora.recipe.needs import require_packages
from echo_lora.recipe.prepare import prepare, prepare_stream
from echo_lora.recipe.record import (
    RECIPE_FILE,
    RUN_FILE,
    STARTED,
    RunResult,
    claim_folder,
    plot_losses,
    resume_hint,
    tidy_folder,
)
from echo_lora.recipe.rows import join, prompts_are_alpaca, prompts_are_chats
from echo_lora.recipe.schema import Recipe
from echo_lora.recipe.trackers import tracking
from echo_lora.training.checkpoint import last_complete_checkpoint, step_of
from echo_lora.training.processes import process_group, together
from echo_lora.training.sft import EchoSFTTrainer

_ABOUT_RECIPE = f"""# The recipe of this run, with the defaults of echo-lora {__version__}.
# resume: echo-lora train THIS_FILE --resume
# repeat: echo-lora train THIS_FILE --set output=ANOTHER_FOLDER"""

SHOWN_METRICS = ("loss", *losses.SHOWN, "routing_p", "eval_loss", "learning_rate")


def run(recipe: Recipe, *, resume: bool = False, command: str | None = None) -> RunResult:
    """Train the recipe's adapter and write its output folder.

    resume: continue from the newest complete checkpoint in the output folder; the recipe must be the same. command:
    what the user ran, without --resume, for the message of an interruption. After an EchoError, or an EchoInterrupt at
    Ctrl-C, only complete checkpoints remain; files that are not the run's own are never touched. In several processes,
    every one calls this; the first writes the output.
    """
    require_packages(recipe, trains=True)
    recipe = recipe.model_copy(update={"model": canonical(recipe.model)})
    output = Path(recipe.output)
    with process_group(), ExitStack() as stack:
        with together():
            if is_main_process():
                stack.enter_context(_claimed(output, resume, command))
        return _run(recipe, output, output / "checkpoints", resume)


@contextmanager
def _claimed(output: Path, resume: bool, command: str | None) -> Iterator[None]:
    """The output folder, for this run alone. Afterwards only complete files remain."""
    checkpoints = output / "checkpoints"
    with locked(output):
        is_new = not output.exists()
        claim_folder(output, checkpoints, resume)
        try:
            yield
        except KeyboardInterrupt as error:
            raise EchoInterrupt(f"{str(error) or 'Interrupted.'} {resume_hint(checkpoints, command)}") from error
        finally:
            tidy_folder(output, checkpoints, is_new)


def _run(recipe: Recipe, output: Path, checkpoints: Path, resume: bool) -> RunResult:
    if not resume and is_main_process():
        started = json.dumps(recipe.to_dict(), indent=2)
        write_text(checkpoints / STARTED, started)
        write_text(output / RECIPE_FILE, f"{_ABOUT_RECIPE}\n{recipe_text(recipe)}")
    result, model, tokenizer = train(recipe, checkpoints, resume=resume)
    tensors = adapter_tensors(model, model.active_adapters[0])  # in every process: each may hold a part
    with stage("Saving the adapter and reading it back"), together():
        if is_main_process():
            _save(recipe, result, whole_model(recipe, model, tensors), tokenizer)
    return result


def _save(recipe: Recipe, result: RunResult, model: PeftModel, tokenizer: Any) -> None:
    output = Path(recipe.output)
    card = model_card(dataclasses.asdict(result), recipe.build_echo_config() if recipe.echo else None)
    save_verified(
        model, result.adapter, tokenizer=tokenizer, card=card, overwrite=True, as_lora=is_saved_as_lora(model)
    )
    write_file(output / "loss.png", lambda path: plot_losses(result.history, path))
    record = json.dumps(dataclasses.asdict(result), indent=2)
    write_text(output / RUN_FILE, record)


def train(recipe: Recipe, checkpoints: Path, *, resume: bool) -> tuple[RunResult, PeftModel, Any]:
    """Train the recipe's adapter, with checkpoints in this folder. Raises an EchoError.

    Returns the result, the trained model, which still has its echo networks, and its tokenizer.
    """
    with stage(f"Reading rows with the tokenizer of {recipe.model}"), together():
        rows = _rows_of(recipe)
        is_chat, is_alpaca = prompts_are_chats(recipe), prompts_are_alpaca(recipe)
    for line in rows.found:
        progress_console().print(line, markup=False)
    with stage(f"Loading {recipe.model}"), together():
        model = add_adapter(recipe, load_base(recipe))
    progress = _Progress()
    last = last_complete_checkpoint(checkpoints) if resume else None
    watch = MemoryWatch()
    with tracking(recipe, checkpoints.parent):
        trainer = _trainer(recipe, model, rows, checkpoints, progress)
        started = time.perf_counter()
        try:
            with watch, _explained(trainer, checkpoints), _loading(last, progress):
                trainer.train(resume_from_checkpoint=None if last is None else str(last))
        finally:
            progress.close()
    seconds = time.perf_counter() - started
    history = [
        {name: value for name, value in entry.items() if isinstance(value, (int, float))}
        for entry in trainer.state.log_history
    ]
    deployed, echo = parameter_counts(model)
    assert trainer.initial_adapter_hash is not None
    # remove the autocast of training.bf16: the model is scored and verified as users will load it
    trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)
    result = RunResult(
        output=str(checkpoints.parent),
        recipe=recipe.to_dict(),
        versions=versions(),
        device=str(model.device),
        processes=process_count(),
        rows=rows.summary(),
        steps=trainer.state.global_step,
        resumed_at=0 if last is None else step_of(last) or 0,
        seconds=seconds,
        peak_memory=watch.peak,
        deployed_parameters=deployed,
        echo_parameters=echo,
        data_sha256=trainer.configuration()["data.sha256"],
        initial_adapter_sha256=trainer.initial_adapter_hash,
        adapter_sha256=adapter_hash(model, model.active_adapters[0]),
        final={name: value for entry in history for name, value in entry.items() if not name.startswith("train_")},
        history=history,
        is_alpaca=is_alpaca,
        is_chat=is_chat,
    )
    return result, model, rows.tokenizer


@dataclasses.dataclass
class _Rows:
    """The rows of a run: training rows are a list or a stream."""

    tokenizer: Any
    train: list[PreparedData]
    validation: list[PreparedData]
    stream: RowStream | None = None

    @property
    def found(self) -> list[str]:
        """The format of each file, and why, as lines of text."""
        if self.stream is not None:
            named = [(part.source, part.format.reason) for part in self.stream.parts]
        else:
            named = [(data.source, data.format) for data in self.train]
        return [f"{source}: {reason}" for source, reason in named if reason]

    def summary(self) -> list[str]:
        if self.stream is not None:
            return self.stream.summary()
        return [line for data in self.train for line in data.summary()]


def _rows_of(recipe: Recipe) -> _Rows:
    if not recipe.data.stream:
        tokenizer, prepared = prepare(recipe)
        return _Rows(tokenizer, prepared["train"], prepared["validation"])
    if process_count() > 1:
        raise EchoConfigError(
            "data.stream reads rows in one process: several would not train on those of one. Leave it out, or start "
            "one process."
        )
    tokenizer, stream, validation = prepare_stream(recipe)
    return _Rows(tokenizer, [], validation, stream)


def _trainer(
    recipe: Recipe,
    model: PeftModel,
    rows: _Rows,
    checkpoints: Path,
    progress: _Progress,
) -> EchoSFTTrainer:
    try:
        arguments = training_arguments(recipe, checkpoints)
    except (ValueError, ImportError) as error:  # for example, bf16 on hardware without it
        raise EchoConfigError(f"transformers rejects the recipe's training section: {error} Correct it.") from error
    try:
        trainer = EchoSFTTrainer(
            model=model,
            args=arguments,
            train_dataset=join(rows.train) if rows.stream is None else rows.stream.dataset(),
            eval_dataset=join(rows.validation) if recipe.training.evaluate_every is not None else None,
            processing_class=rows.tokenizer,
            callbacks=[progress],
            answer_weight=recipe.training.answer_weight,
            loraplus_lr_ratio=recipe.training.loraplus_lr_ratio,
        )
    except (ValueError, ImportError) as error:  # accelerate's, which also reads environment variables
        if isinstance(error, EchoError):
            raise
        raise EchoConfigError(
            f"the trainer can't be created: {error} Correct the recipe, or accelerate's environment variables."
        ) from error
    trainer.remove_callback(PrinterCallback)
    trainer.name_of_key = recipe_key
    trainer.row_stream = rows.stream
    return trainer


@contextmanager
def _explained(trainer: EchoSFTTrainer, checkpoints: Path) -> Iterator[None]:
    """Raises EchoInterrupt with the step at Ctrl-C, and EchoCheckpointError if the disk can't be written."""
    try:
        yield
    except KeyboardInterrupt as error:
        state = trainer.state
        raise EchoInterrupt(f"Interrupted after step {state.global_step} of {state.max_steps}.") from error
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch reports a full disk as a RuntimeError that names its source file
        if isinstance(error, RuntimeError) and not re.search(r"PytorchStreamWriter|inline_container", str(error)):
            raise
        raise EchoCheckpointError(
            f"{checkpoints} could not be written at step {trainer.state.global_step}: {error}. Free disk space, then "
            "resume; complete checkpoints are kept."
        ) from error


@contextmanager
def _loading(checkpoint: Path | None, progress: _Progress) -> Iterator[None]:
    """Raises EchoCheckpointError for any error before the first step of a resume: the checkpoint can't be loaded."""
    try:
        yield
    except Exception as error:
        if checkpoint is None or progress.has_begun or isinstance(error, EchoError):
            raise
        raise EchoCheckpointError(
            f"the run can't resume from {checkpoint}: {type(error).__name__}: {error}. Remove it, then resume: this "
            "uses an earlier checkpoint, if there is one."
        ) from error


class _Progress(TrainerCallback):
    """Steps and metrics of a training run."""

    def __init__(self) -> None:
        self.steps: Steps | None = None
        self.has_begun = False  # whether a step has started, so the checkpoint is loaded
        self.waiting_since: float | None = None  # when an evaluation began that nobody has been told about

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        self.steps = Steps("Training", state.max_steps, state.global_step)
        if not self.steps.is_bar:
            self.steps.say(f"Training {state.max_steps - state.global_step} steps on {kwargs['model'].device} ...")

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.has_begun = True

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self.steps is not None:
            self.steps.advance(state.global_step)

    def on_prediction_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        now = time.monotonic()
        self.waiting_since = self.waiting_since or now
        if self.steps is not None and now - self.waiting_since > PATIENCE:
            self.steps.note("evaluating")
            if not self.steps.is_bar:
                self.steps.say(f"step {state.global_step}/{state.max_steps}  evaluating ...")
            self.waiting_since = math.inf

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        self.waiting_since = None

    def on_log(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        logs: dict[str, float] = kwargs["logs"]
        shown = [f"{name} {logs[name]:.4g}" for name in SHOWN_METRICS if name in logs]
        if self.steps is None or not shown or "train_runtime" in logs:
            return
        if "loss" in logs:
            self.steps.note(f"loss {logs['loss']:.4g}")
        timing = "" if self.steps.is_bar else f"  {self.steps.timing()}"
        self.steps.say(f"step {state.global_step}/{state.max_steps}  {'  '.join(shown)}{timing}")

    def close(self) -> None:
        """Remove the bar; errors end training without an event."""
        if self.steps is not None:
            self.steps.close()
