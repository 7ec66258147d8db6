"""Saving and resuming: checkpoints are verified and sealed when saved, and resumed only with the same configuration.

Under FSDP2 they look like those of a single process.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from peft import PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor
from transformers import Trainer, TrainerState
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput

from echo_lora.adapter.export import verify_adapter
from echo_lora.adapter.files import ADAPTER_FILE, adapter_tensors, compare_adapter, read_adapter, whole
from echo_lora.data.stream import RowStream
from echo_lora.errors import EchoCheckpointError
from echo_lora.files import use_umask
from echo_lora.method.model import EchoModel
from echo_lora.training.callback import EchoCallback
from echo_lora.training.checkpoint import (
    begin_checkpoint,
    checkpoint_folder,
    checkpoints_in,
    compare_configuration,
    describe_base,
    fill,
    last_complete_checkpoint,
    load_whole_optimizer_state,
    read_seal,
    remove_checkpoint,
    rotate_checkpoints,
    seal_checkpoint,
    step_of,
    whole_optimizer_state,
)
from echo_lora.training.state import ECHO_STATE, adapter_folder, dataset_hash, no_code, save_echo

# Arguments that decide what training computes; a resume must agree on them. [O]
FINGERPRINT = [
    *("learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm"),
    *("optim", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("max_steps", "num_train_epochs"),
    *("lr_scheduler_kwargs", "optim_args", "average_tokens_across_devices", "neftune_noise_alpha"),
    *("dataloader_drop_last", "train_sampling_strategy", "auto_find_batch_size"),
    *("seed", "data_seed", "bf16", "fp16"),
    *("label_smoothing_factor", "optim_target_modules"),  # in a baseline; not supported with the echo
    *("router_aux_loss_coef", "loss_type"),  # SFTConfig's
]


@contextmanager
def _keeping_dtypes(model: torch.nn.Module) -> Iterator[None]:
    """PEFT loads an adapter in float32, whatever its dtype was: on a quantised base TRL trains it in bfloat16."""
    before = {name: parameter.dtype for name, parameter in model.named_parameters() if parameter.requires_grad}
    yield
    for name, parameter in model.named_parameters():
        if parameter.dtype != before.get(name, parameter.dtype):
            parameter.data = parameter.data.to(before[name])


class CheckpointMixin(Trainer):
    """The checkpoints of EchoTrainerMixin."""

    train_dataset: Any
    answer_weight: float
    loraplus_lr_ratio: float | None
    name_of_key: Callable[[str], str]
    row_stream: RowStream | None = None  # where train_dataset comes from, if it is a recipe's stream
    initial_adapter_hash: str | None
    _given_optimizer: str | None
    _base: dict[str, Any]
    _total_train_tokens = 0  # SFTTrainer's counter, which a resume would restart at 0
    _sum_before = (0.0, 0)  # sum of `loss` before this call of train, and the step from which it is summed
    _summed_from = 0
    _sum_of_losses: Callable[[], float]

    @property
    def _echo_model(self) -> EchoModel | None:
        model = self._unwrapped(self.model)
        return model if isinstance(model, EchoModel) else None

    def _unwrapped(self, model: Any) -> Any:
        """accelerate's `unwrap_model`, which searches all modules; kept, because a step asks for it several times."""
        known = self.__dict__.setdefault("_unwrapped_models", {})  # by id, with the model, whose id is then not reused
        if id(model) not in known:
            known[id(model)] = model, self.accelerator.unwrap_model(model)
        return known[id(model)][1]

    # ------------------------------------------------------------------ saving

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """As Trainer's, plus the echo's state and a seal; older checkpoints are deleted only after that."""
        folder = checkpoint_folder(self._get_output_dir(trial=trial), self.state)
        if self.args.should_save:
            begin_checkpoint(folder)
        self.accelerator.wait_for_everyone()  # every process writes its random states into the folder
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        pushes, self.args.push_to_hub = self.args.push_to_hub, False
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit, self.args.push_to_hub = limit, pushes
        self.accelerator.wait_for_everyone()
        if self._echo_model is not None:
            save_echo(self._echo_model, folder, should_save=self.args.should_save)
        self._prove(folder)
        loss_sum = self._sum_of_losses()
        if not self.args.should_save:
            return
        seal_checkpoint(
            folder,
            configuration=self.configuration(),
            initial_adapter_sha256=self.initial_adapter_hash,
            num_tokens=self._total_train_tokens,
            loss_sum=(loss_sum, self._summed_from),
        )
        if pushes:
            self._push_from_checkpoint(str(folder))
        rotate_checkpoints(folder, limit, self.state.best_model_checkpoint)

    def _finalize_training(self, trial: Any, *args: Any) -> TrainOutput:
        """As Trainer's, which with save_total_limit=1 would remove other programs' checkpoints too."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            output = super()._finalize_training(trial, *args)
        finally:
            self.args.save_total_limit = limit
        best = self.state.best_model_checkpoint
        if limit == 1 and best is not None and self.args.should_save:
            for folder in checkpoints_in(self._get_output_dir(trial)):
                if not folder.samefile(best):
                    remove_checkpoint(folder)
        return output._replace(training_loss=output.metrics["train_loss"])  # as logged

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """As Trainer.save_model, then read back. Raises EchoCheckpointError if the saved adapter differs."""
        folder = Path(output_dir or self.args.output_dir)
        if self._is_sharded:  # transformers would also gather the base
            self._save(str(folder), state_dict=self._whole_state())
            if self.args.push_to_hub and not _internal_call:
                self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
        else:
            super().save_model(output_dir, _internal_call)
        if not _internal_call:
            self._prove(folder)

    @property
    def _is_sharded(self) -> bool:
        """Whether the adapter's tensors are sharded across processes."""
        return self.is_fsdp_enabled and isinstance(self.model, PeftModel)

    def _whole_state(self) -> dict[str, Tensor]:
        """The part of the model's `state_dict` that PEFT saves, whole. Call it in every process."""
        model = self.model
        state = model.state_dict()
        saved = [get_peft_model_state_dict(model, state_dict=state, adapter_name=name) for name in model.peft_config]
        of_adapters = {id(tensor) for tensors in saved for tensor in tensors.values()}
        return {name: whole(tensor) for name, tensor in state.items() if id(tensor) in of_adapters}

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._is_sharded:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        state = whole_optimizer_state(self.optimizer)
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _prove(self, folder: Path) -> None:
        model = self.accelerator.unwrap_model(self.model)
        if not isinstance(model, PeftModel):
            return
        name = model.active_adapters[0]
        # with a warm-up the first step has a learning rate of 0, so lora_B is still zero
        trained = self.state.global_step > 1
        tensors = adapter_tensors(model, name) if self._is_sharded else None
        if not self.args.should_save:
            return
        adapter = adapter_folder(folder, model)
        use_umask(adapter, [adapter / ADAPTER_FILE])
        if tensors is None:
            with self.accelerator.autocast():  # base and adapter may differ in dtype
                verify_adapter(model, adapter, name, trained=trained)
        else:  # one process alone can't run a sharded model
            compare_adapter(adapter, tensors, trained=trained)

    def configuration(self, step: int | None = None) -> dict[str, Any]:
        """Everything that decides the result of this run; a resume must agree on all of it.

        step: up to which a stream's rows count; default: the current one.
        """
        model = self.accelerator.unwrap_model(self.model)
        values = {f"training.{name}": getattr(self.args, name, None) for name in FINGERPRINT}
        values["training.batches"] = self._batches()
        values["training.answer_weight"] = self.answer_weight
        values["training.loraplus_lr_ratio"] = self.loraplus_lr_ratio
        values["training.given_optimizer"] = self._given_optimizer
        if isinstance(model, PeftModel):
            adapter = model.peft_config[model.active_adapters[0]].to_dict()
            values |= {f"adapter.{key}": value for key, value in adapter.items() if key != "inference_mode"}
        if self._echo_model is not None:
            values |= {f"echo.{key}": value for key, value in self._echo_model.echo_config.to_dict().items()}
        values |= {f"base.{key}": value for key, value in self._base.items()}
        values["data.sha256"] = self._data_hash if self.row_stream is None else self._stream_hash(step)
        return values

    def _batches(self) -> str:
        """How rows are batched; the same string for settings that train on the same rows in every step."""
        args, processes = self.args, self.accelerator.num_processes
        batch, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
        has_order = isinstance(self.train_dataset, Dataset) and args.train_sampling_strategy in ("random", "sequential")
        # otherwise several processes pad the last batches with rows of the first
        divides_evenly = has_order and len(self.train_dataset) % (processes * batch) == 0
        is_alone = has_order and processes == 1 and not args.dataloader_drop_last
        mixes_rows = self._echo_model is not None and self._echo_model.echo_config.mixes_rows
        if (divides_evenly or is_alone) and not (
            mixes_rows or self.is_deepspeed_enabled or args.accelerator_config.split_batches
        ):
            return f"{processes * batch * accumulation} rows a step"
        sharing = f"{accumulation} x {batch} rows a step in each of {processes} processes"
        return f"{sharing}, DeepSpeed" if self.is_deepspeed_enabled else sharing  # its checkpoints fit no other setting

    def _stream_hash(self, step: int | None) -> str:
        assert self.row_stream is not None
        return self.row_stream.sha256(
            (self.state.global_step if step is None else step) * self.row_stream.rows_per_step
        )

    @cached_property
    def _data_hash(self) -> str:
        """Cached: every checkpoint needs it."""
        return dataset_hash(self.train_dataset)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """As Trainer.train. resume_from_checkpoint=True resumes from the last complete checkpoint in output_dir.

        Raises EchoCheckpointError if there is none, if its files differ from its seal, if it was saved with
        save_only_model, or if this run's configuration differs from the checkpoint's (it lists the differences).
        """
        for callback in [c for c in self.callback_handler.callbacks if type(c) is EchoCallback]:
            self.remove_callback(callback)  # it is for the stock Trainer; this trainer does its work
        self.initial_adapter_hash = None
        self._sum_before = (0.0, 0)
        self._base = self._describe_base()
        if resume_from_checkpoint is True:
            resume_from_checkpoint = str(last_complete_checkpoint(self.args.output_dir))
        if resume_from_checkpoint:
            folder = Path(resume_from_checkpoint)
            seal = read_seal(folder)
            state = self._saved_state(folder)
            configuration = self.configuration(state.global_step)
            compare_configuration(folder, seal["configuration"], configuration, self.name_of_key)
            self.initial_adapter_hash = seal["initial_adapter_sha256"]
            self._total_train_tokens = seal["num_tokens"]
            # an older version saved none: sum from this step on
            self._sum_before = seal.get("loss_sum") or (0.0, state.global_step)
            if (ended := self._already_ended(folder, state)) is not None:
                return ended
            self._refuse_without_optimizer(folder)
        return super().train(resume_from_checkpoint=resume_from_checkpoint or None, **kwargs)

    def _refuse_without_optimizer(self, folder: Path) -> None:
        """Trainer would resume with a new optimizer and the learning rate of the first step."""
        if not self.is_deepspeed_enabled and not any(folder.glob("optimizer*")):  # DeepSpeed has its own files
            raise EchoCheckpointError(
                f"{folder} was saved with save_only_model=True: it holds no optimizer and no learning rate schedule, "
                "so the run can't resume from it. Resume from a checkpoint saved without save_only_model, or start a "
                "new run from its adapter: model.load_adapter(folder, 'default', is_trainable=True)."
            )

    def _describe_base(self) -> dict[str, Any]:
        """Called before the model is sharded; only the main process hashes the weights."""
        model = self.accelerator.unwrap_model(self.model)
        if not isinstance(model, PeftModel):
            return {}
        found = [describe_base(model) if self.accelerator.is_main_process else None]
        return broadcast_object_list(found)[0]

    def _already_ended(self, folder: Path, state: TrainerState) -> TrainOutput | None:
        """The result, if this checkpoint is of the run's last step: Trainer would keep training to the epoch's end."""
        if state.global_step < state.max_steps or self.is_deepspeed_enabled or self._is_sharded:
            return None
        self._load_from_checkpoint(str(folder))
        self.state = state
        if self.args.load_best_model_at_end and state.best_model_checkpoint:
            self._load_best_model()
        loss_sum, summed_from = self._sum_before
        return TrainOutput(state.global_step, loss_sum / max(state.global_step - summed_from, 1), {})

    def _saved_state(self, folder: Path) -> TrainerState:
        path = folder / TRAINER_STATE_NAME
        try:
            state = TrainerState.load_from_json(str(path))
            if (step := step_of(folder)) is not None and state.global_step != step:
                raise ValueError(f"it belongs to step {state.global_step!r}")
            if not all(isinstance(entry, dict) for entry in state.log_history):
                raise ValueError("its log has entries that are not mappings")
            return state
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise EchoCheckpointError(
                f"{path} is not a valid trainer state: {error}. Resume from another checkpoint."
            ) from error

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        folder = Path(resume_from_checkpoint)
        adapted = self.accelerator.unwrap_model(self.model)
        if isinstance(adapted, PeftModel) and not (adapter_folder(folder, adapted) / ADAPTER_FILE).is_file():
            raise EchoCheckpointError(  # PEFT would fall back to a pickle
                f"{adapter_folder(folder, adapted) / ADAPTER_FILE} is missing, and weights are only loaded from "
                "safetensors. Resume from another checkpoint."
            )
        if self._is_sharded:
            self._load_adapter(folder)
        else:
            with _keeping_dtypes(adapted):
                super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._load_echo(folder)

    def _load_best_model(self) -> None:
        """The best checkpoint's adapter, and its echo."""
        folder = Path(self.state.best_model_checkpoint)
        if self._is_sharded:
            self._load_adapter(folder)
        else:
            with _keeping_dtypes(self.model):
                if isinstance(self.model, PeftModel) and self.model.active_adapters != ["default"]:
                    # transformers does not look into the subfolder of a named adapter
                    self.model.load_adapter(str(adapter_folder(folder, self.model)), self.model.active_adapters[0])
                else:
                    super()._load_best_model()
        self._load_echo(folder)

    def _load_echo(self, folder: Path) -> None:
        if self._echo_model is not None:
            fill(self._echo_model.echo.tensors(), load_file(folder / ECHO_STATE))

    def _load_adapter(self, folder: Path) -> None:
        adapter = get_peft_model_state_dict(self.model, adapter_name=self.model.active_adapters[0])
        fill(adapter, read_adapter(adapter_folder(folder, self.model)))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        with no_code(checkpoint):
            super()._load_rng_state(checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if not self._is_sharded or checkpoint is None:
            with no_code(checkpoint):
                super()._load_optimizer_and_scheduler(checkpoint)
            return
        optimizer, scheduler = (
            torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True)
            for name in (OPTIMIZER_NAME, SCHEDULER_NAME)
        )
        load_whole_optimizer_state(self.optimizer, optimizer)
        self.lr_scheduler.load_state_dict(scheduler)
