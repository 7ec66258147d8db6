"""Callbacks: the routing clock, and what the stock Trainer needs besides the loss."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerState

from echo_lora.errors import EchoConfigError, EchoModelError
from echo_lora.method.model import EchoModel
from echo_lora.training.checkpoint import checkpoint_folder
from echo_lora.training.optimizer import refuse_shared_rate, warming_up
from echo_lora.training.state import restore_echo, save_echo
from echo_lora.training.support import refuse_arguments, refuse_deepspeed


class _Clock(TrainerCallback):
    """Sets an EchoModel's routing clock, and its echo's learning rate during warm-up."""

    def __init__(self) -> None:
        self._optimizer_step = ExitStack()

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        if isinstance(model, EchoModel):
            model.set_routing_clock(state.global_step, state.max_steps)

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        if isinstance(model, EchoModel) and model.echo_enabled and not model.is_stepping:
            raise EchoModelError(
                f"step {state.global_step + 1} was trained without the echo: the model got no labels (as from a "
                "Trainer with compute_loss_func), or the adapter that carries the echo was not active. Let the model "
                "compute the loss, or set model.echo_enabled = False."
            )
        if isinstance(model, EchoModel) and model.echo_enabled and hasattr(kwargs["optimizer"], "param_groups"):
            clock = state.global_step, state.max_steps
            self._optimizer_step.enter_context(warming_up(kwargs["optimizer"], model, *clock))

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self._optimizer_step.close()


class EchoCallback(_Clock):
    """What an EchoModel needs in the stock Trainer: the routing clock, and its echo in checkpoints.

    Raises EchoConfigError for settings under which the stock Trainer would not train the echo as configured,
    EchoModelError after a step that was trained without the echo, and EchoCheckpointError where a resume, or loading
    the best checkpoint, would restore the adapter without its echo.
    """

    def resumed_from(self, args: Any, state: TrainerState) -> Path:
        """The checkpoint that Trainer has loaded."""
        return checkpoint_folder(args.output_dir, state)

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        if not isinstance(model, EchoModel):
            return
        model.end_step()  # a resume may have loaded a checkpoint of another step
        if not model.echo_enabled:
            return
        refuse_arguments(args)
        refuse_deepspeed(args.deepspeed, model)
        if args.max_grad_norm and model.echo_config.gradient_clipping == "apart":
            raise EchoConfigError(
                "gradient_clipping='apart' is not supported by the stock Trainer, which clips all gradients by one "
                "norm. Use EchoTrainer or EchoSFTTrainer, set max_grad_norm=0, or gradient_clipping='together'."
            )
        if not (args.deepspeed and model.echo_config.echo_lr_multiplier == 1):  # DeepSpeed's optimizer hides parameters
            refuse_shared_rate(
                kwargs["optimizer"],
                model,
                "Use EchoTrainer, or pass the stock Trainer optimizers=(optimizer, None) after "
                "separate_echo(optimizer, model), or set echo_lr_multiplier=1.0.",
            )
        name = model.active_adapters[0]
        if args.load_best_model_at_end and name != "default":
            raise EchoConfigError(
                f"load_best_model_at_end=True is not supported by the stock Trainer for the adapter {name!r}: it only "
                "loads an adapter named 'default'. Use EchoTrainer or EchoSFTTrainer, or leave the adapter's name out."
            )
        if args.enable_jit_checkpoint:
            raise EchoConfigError(
                "enable_jit_checkpoint=True is not supported by the stock Trainer: the checkpoint it saves at a signal "
                "would lack the echo. Use EchoTrainer or EchoSFTTrainer."
            )
        if state.global_step:  # a resume: Trainer has loaded an adapter, but does not say from which checkpoint
            restore_echo(model, self.resumed_from(args, state))
            model.end_step()

    def on_save(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        model, folder = kwargs["model"], checkpoint_folder(args.output_dir, state)
        if isinstance(model, EchoModel) and model.echo_enabled:  # a hyperparameter search saves elsewhere
            save_echo(model, folder, should_save=args.should_save and folder.is_dir())

    def on_train_end(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        best = state.best_model_checkpoint if args.load_best_model_at_end else None
        if isinstance(model, EchoModel) and model.echo_enabled and best is not None:
            restore_echo(model, Path(best))


class Watch(_Clock):
    """Forwards to the trainer the events that it has no method for."""

    def __init__(self, trainer: Any) -> None:
        super().__init__()
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if self.trainer._echo_model is not None:
            self.trainer._echo_model.end_step()
        self.trainer._begin()

    def on_step_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        model = self.trainer._unwrapped(kwargs["model"])
        super().on_step_begin(args, state, control, model=model)
        self.trainer._rows_of_step.clear()
        self.trainer._losses_of_step.clear()

    def on_pre_optimizer_step(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        model = self.trainer._unwrapped(kwargs["model"])
        super().on_pre_optimizer_step(args, state, control, **kwargs | {"model": model})
        if not args.max_grad_norm:  # otherwise they were checked before clipping
            self.trainer._check_gradients()

    def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().on_optimizer_step(*args, **kwargs)
        self.trainer._meter.end_step()
