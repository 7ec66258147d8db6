"""transformers' Trainer with the echo, and the mixin that it shares with the SFTTrainer of `sft.py`.

`EchoTrainerMixin` adds the routing clock, the echo networks' own learning rate, metrics, sealed checkpoints with the
echo's state, a resume that rejects a changed configuration, and a stop at the first loss or gradient that is not
finite. With a plain PEFT model it adds all of these except the echo's parts, so a baseline runs the same program.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from echo_lora.adapter.files import adapter_hash
from echo_lora.data.sources import ROW
from echo_lora.data.tokenize import ANSWER
from echo_lora.errors import EchoConfigError, EchoDataError, EchoTrainingError
from echo_lora.method import losses
from echo_lora.method.model import EchoModel
from echo_lora.method.packing import unpacked
from echo_lora.method.routing import routing_probability
from echo_lora.training import support
from echo_lora.training.callback import Watch
from echo_lora.training.collator import RowCollator, WeightedForward, numbered
from echo_lora.training.metrics import Meter
from echo_lora.training.optimizer import loraplus, refuse_shared_rate, separate_echo
from echo_lora.training.resume import CheckpointMixin

logger = logging.getLogger(__name__)


class EchoTrainerMixin(CheckpointMixin):
    """See the module's docstring. Put it before the Trainer class in the bases."""

    _is_sft = False  # whether TRL computes the loss without the echo
    data_collator: Any
    optimizer: Any
    train_dataset: Any
    _signature_columns: Any

    def __init__(
        self, *args: Any, answer_weight: float = 1.0, loraplus_lr_ratio: float | None = None, **kwargs: Any
    ) -> None:
        self.answer_weight = answer_weight
        self.loraplus_lr_ratio = loraplus_lr_ratio
        super().__init__(*args, **kwargs)
        self._base_accepts_loss_kwargs = self.model_accepts_loss_kwargs
        self._given_optimizer = None if self.optimizer is None else f"{type(self.optimizer).__name__}"
        if self.optimizer_cls_and_kwargs is not None:
            self._given_optimizer = f"{self.optimizer_cls_and_kwargs[0].__name__} {self.optimizer_cls_and_kwargs[1]}"
        self.data_collator = RowCollator(self.data_collator, self._wants_answers)
        self.train_dataset = numbered(self.train_dataset, "train data")
        evaluated = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"eval": self.eval_dataset}
        for name, dataset in {"train": self.train_dataset, **evaluated}.items():
            support.refuse_unfit_data(dataset, f"{name} data", self.accelerator.unwrap_model(self.model))
        support.refuse_answer_weight(self)
        support.refuse_loraplus(self)
        self._meter = Meter(self.answer_weight)
        self._loss_sum, self._summed_to = 0.0, 0
        self._rows_of_step: list[int] = []
        self._losses_of_step: list[tuple[str, Tensor]] = []
        self.initial_adapter_hash: str | None = None
        self.name_of_key: Callable[[str], str] = str  # the user's name for a configuration key, in messages
        self._base: dict[str, Any] = {}
        self.add_callback(Watch(self))
        support.refuse_parallelism(self.accelerator.state, has_echo=self._echo_model is not None)
        if self._echo_model is not None:
            self._echo_model.echo.float()  # TRL casts trainable parameters on a quantised base to bf16
            # the step divides by num_items_in_batch, whether or not the base does
            self.model_accepts_loss_kwargs |= self._echo_model.echo_enabled
            support.refuse_arguments(self.args)
            support.refuse_deepspeed(self.is_deepspeed_enabled, self._echo_model)
            for name, dataset in {"train": self.train_dataset, **evaluated}.items():
                support.refuse_packed_data(self, dataset, f"{name} data")
            support.refuse_lonely_rows(self)
            support.keep_float32(getattr(self.accelerator.state, "fsdp_plugin", None))
            if self.compute_loss_func is not None:
                raise EchoConfigError(
                    "compute_loss_func can't be combined with the echo: the step computes its own losses. Leave it out."
                )
            if self.args.n_gpu > 1:
                raise EchoConfigError(
                    f"{self.args.n_gpu} GPUs in one process means nn.DataParallel, and the echo's hooks don't reach "
                    "its replicas. Launch with torchrun or accelerate, or set CUDA_VISIBLE_DEVICES to one GPU."
                )

    @property
    def _wants_answers(self) -> bool:
        """Whether the loss needs to tell answers from prompts."""
        return self._echo_model is not None or self.answer_weight != 1

    # ---------------------------------------------------------------- the step

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        rows = inputs.pop(ROW, None)
        echo = self._echo_model
        if self.answer_weight != 1 and self.model.training and ANSWER not in inputs:
            raise EchoDataError(
                f"answer_weight={self.answer_weight:g} needs to know which tokens are answers, but the batch has no "
                f"{ANSWER}. Pass rows with prompt and completion, and completion_only_loss=False."
            )
        is_plain = echo is None or not echo.applies(inputs.get("labels"))
        if is_plain:
            is_answer = inputs.pop(ANSWER, None)
            if self.answer_weight != 1 and self.model.training:
                model = WeightedForward(model, is_answer, self.answer_weight)
        if not self.model.training:
            items = num_items_in_batch if self._base_accepts_loss_kwargs else None
            return super().compute_loss(model, inputs, return_outputs, items)
        self._rows_of_step += [] if rows is None else rows.tolist()
        if is_plain:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            self._keep_loss({"loss": result[0] if return_outputs else result})
            return result
        weight = {} if self.answer_weight == 1 else {"answer_weight": self.answer_weight}
        outputs = model(**inputs, num_items_in_batch=num_items_in_batch, **weight)
        self._keep_loss({name: outputs[name] for name in (*losses.SHOWN, "loss") if name in outputs})
        loss = outputs.loss
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # num_items_in_batch counts the tokens of all ranks, but DDP averages gradients over ranks
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        self._meter.add(outputs)
        return (loss, outputs) if return_outputs else loss

    def _keep_loss(self, terms: dict[str, Tensor]) -> None:
        """Keep the terms to check before the optimizer step: a look at them now would wait for the device."""
        self._losses_of_step += [(name, value.detach().float().mean()) for name, value in terms.items()]
        if self.is_deepspeed_enabled:  # its backward takes the optimizer step
            self._check_losses()

    def _check_losses(self) -> None:
        names, values = zip(*self._losses_of_step, strict=True) if self._losses_of_step else ((), ())
        self._losses_of_step.clear()
        for name, value in zip(names, torch.stack(values).tolist() if values else [], strict=True):
            if not math.isfinite(value):
                self._stop(f"{name} is {value}")

    def _clip_grad_norm(self, model: Any) -> Any:
        self._check_gradients()  # clipping would spread one bad gradient to all
        echo = self._echo_model
        if echo is None or echo.echo_config.gradient_clipping == "together":
            return super()._clip_grad_norm(model)
        of_echo = {id(parameter) for parameter in echo.echo.parameters()}
        others = [parameter for parameter in model.parameters() if id(parameter) not in of_echo]
        norm = self.accelerator.clip_grad_norm_(others, self.args.max_grad_norm)  # also unscales fp16 gradients
        torch.nn.utils.clip_grad_norm_(echo.echo.parameters(), self.args.max_grad_norm)
        return norm

    def _check_gradients(self) -> None:
        self._check_losses()
        if self.accelerator.scaler is not None:  # the GradScaler of fp16 skips such steps
            return
        groups = getattr(self.optimizer, "param_groups", [])  # accelerate's placeholder for DeepSpeed's has none
        trained = [parameter for group in groups for parameter in group["params"]]
        gradients = [_local(parameter.grad) for parameter in trained if parameter.grad is not None]
        if not gradients or torch.isfinite(torch.nn.utils.get_total_norm(gradients)):
            return
        named = [(name, _local(p.grad)) for name, p in self.model.named_parameters() if p.grad is not None]
        bad = [name for name, gradient in named if not torch.isfinite(gradient).all()]
        if bad:
            self._stop(f"the gradient of {bad[0]} is not finite ({len(bad)} of {len(named)} parameters)")
        elif self.args.max_grad_norm:  # clipping would scale them all to zero
            self._stop(f"the norm of all gradients together overflows {gradients[0].dtype}")

    def _stop(self, what: str) -> None:
        rows = ", ".join(map(str, self._rows_of_step)) or "of unknown number"
        raise EchoTrainingError(
            f"{what} at step {self.state.global_step + 1}, rows {rows}. Inspect these rows, lower the learning rate or "
            f"the echo_lr_multiplier, then resume: the checkpoints in {self.args.output_dir} are intact."
        )

    # --------------------------------------------------------------- optimizer

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Trainer's optimizer, LoRA+, or the one passed to it, with the echo networks in groups of their own."""
        if self.loraplus_lr_ratio is not None and self.optimizer is None:
            adapted = self.accelerator.unwrap_model(self.model)
            self.optimizer = loraplus(adapted, self.loraplus_lr_ratio, self.args)
        optimizer = super().create_optimizer(model)
        echo = self._echo_model
        if echo is None or not echo.echo_enabled:
            return optimizer
        if not hasattr(optimizer, "param_groups"):  # accelerate's placeholder for a DeepSpeed optimizer
            if echo.echo_config.echo_lr_multiplier != 1:
                raise EchoConfigError(
                    f"echo_lr_multiplier={echo.echo_config.echo_lr_multiplier:g} can't be applied to the optimizer of "
                    "the DeepSpeed configuration. Remove its optimizer block, so that Trainer creates the optimizer."
                )
        elif self.lr_scheduler is not None and not self._created_lr_scheduler:
            refuse_shared_rate(
                optimizer, echo, "Call separate_echo(optimizer, model) before you create the scheduler, or pass none."
            )
        else:
            separate_echo(optimizer, echo)
        return optimizer

    # ----------------------------------------------------------------- metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As Trainer's, but `loss` is that of the deployed, echo-off pass; `objective` is what is optimised. [O]"""
        if "loss" in logs:
            if metrics := self._metrics_of_steps():
                assert self._echo_model is not None
                step = max(self.state.global_step - 1, 0)
                metrics["routing_p"] = routing_probability(self._echo_model.echo_config, step, self.state.max_steps)
                logs |= {"objective": logs["loss"]} | metrics
            self._meter.reset()
            self._loss_sum += logs["loss"] * (self.state.global_step - self._summed_to)
            self._summed_to = self.state.global_step
        if "train_loss" in logs:  # Trainer's is of the objective, and of the steps since a resume only
            logs["train_loss"] = self._sum_of_losses() / max(self.state.global_step - self._summed_from, 1)
        super().log(logs, start_time)

    def _metrics_of_steps(self) -> dict[str, float]:
        """Metrics of the steps since the last log; empty without the echo. Call it in every process."""
        return self._meter.metrics(lambda x: self.accelerator.reduce(x, "sum"))

    def _sum_of_losses(self) -> float:
        """Sum of `loss` over the steps so far. Call it in every process."""
        if metrics := self._metrics_of_steps():
            return self._loss_sum + metrics["loss"] * self._meter.optimizer_steps
        return self._loss_sum + self.accelerator.reduce(self._tr_loss.detach().clone(), "mean").item()

    def evaluation_loop(
        self, dataloader: Any, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any
    ) -> EvalLoopOutput:
        """As Trainer's, with the metrics of EchoModel.diagnose on the same rows (not under FSDP2). [O]

        Unless `eval_ce_on` is below `eval_ce_off`, the distillation has nothing to teach.
        """
        output = super().evaluation_loop(dataloader, *args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self._echo_model is not None and not self._is_sharded and self._echo_model.echo_enabled:
            diagnosis = self._diagnose(self._echo_model, dataloader)
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in diagnosis.items()})
        return output

    def _diagnose(self, model: EchoModel, dataloader: Any) -> dict[str, float]:
        """Means over the answer tokens of all batches and processes."""
        sums: dict[str, float] = {}
        count = 0
        for batch in dataloader:
            batch = unpacked(self._prepare_inputs(batch))
            if "labels" not in batch:
                continue  # prediction only
            if len(batch["labels"]) == 1 and model.echo_config.mixes_rows:
                continue  # there is no other row whose echo to use
            labels = batch["labels"].where(batch[ANSWER].bool(), -100) if ANSWER in batch else batch["labels"]
            tokens = int((labels != -100).sum())
            with self.accelerator.autocast():  # as in training
                terms = model.diagnose(batch["input_ids"], batch.get("attention_mask"), labels)
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + value * tokens
            count += tokens
        total = torch.tensor([*sums.values(), float(count)], dtype=torch.float64)
        total = self.accelerator.reduce(total.to(self.args.device), "sum").cpu()
        return {name: (value / total[-1]).item() for name, value in zip(sums, total, strict=False)}

    def _begin(self) -> None:
        self._meter.reset()  # auto_find_batch_size restarts after running out of memory
        self._loss_sum, self._summed_from = self._sum_before
        self._summed_to = self.state.global_step
        if isinstance(model := self.accelerator.unwrap_model(self.model), PeftModel):
            self.initial_adapter_hash = self.initial_adapter_hash or adapter_hash(model, model.active_adapters[0])
            logger.info("initial adapter sha256 %s", self.initial_adapter_hash)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if ROW not in self._signature_columns:
            ours = [ROW, ANSWER] if self._wants_answers else [ROW]
            self._signature_columns = [*self._signature_columns, *ours]


def _local(gradient: Tensor) -> Tensor:
    """This process's part of a sharded gradient."""
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


class EchoTrainer(EchoTrainerMixin, Trainer):
    """transformers' Trainer for a model from `get_echo_model`; datasets hold input_ids and labels."""
