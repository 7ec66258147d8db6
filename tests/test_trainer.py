"""Training in transformers' Trainer and TRL's SFTTrainer."""

from __future__ import annotations

import dataclasses
import json
from itertools import pairwise
from pathlib import Path

import peft
import pytest
import torch
from datasets import Dataset
from safetensors.torch import load_file
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import SFTConfig, SFTTrainer

from architectures import VOCAB, collate, lora_config, random_row, tiny_base
from echo_lora import EchoCallback, EchoConfig, EchoSFTTrainer, EchoTrainer, get_echo_model
from echo_lora.adapter.files import adapter_hash
from echo_lora.errors import EchoCheckpointError, EchoConfigError, EchoDataError, EchoModelError, EchoTrainingError
from echo_lora.method.routing import is_routed
from echo_lora.training.checkpoint import read_seal
from echo_lora.training.optimizer import separate_echo
from echo_lora.training.support import refuse_deepspeed
from tiny import tiny_tokenizer

ROUTED = EchoConfig(source_layers=[2], target_layers=[0, 1], bottleneck=8, echo_lr_multiplier=1.0)


def rows(count: int = 12, seed: int = 0) -> Dataset:
    g = torch.Generator().manual_seed(seed)
    data = {"input_ids": [], "labels": []}
    for _ in range(count):
        prompt, answer = (int(torch.randint(2, 7, (), generator=g)) for _ in range(2))
        ids = torch.randint(3, VOCAB, (prompt + answer,), generator=g).tolist()
        data["input_ids"].append(ids)
        data["labels"].append([-100] * prompt + ids[prompt:])
    return Dataset.from_dict(data)


def collator(features):
    return collate([(f["input_ids"], f["labels"]) for f in features])


def arguments(folder: Path, **kwargs) -> TrainingArguments:
    defaults = {
        "output_dir": str(folder),
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "seed": 3,
        "data_seed": 4,
    }
    return TrainingArguments(**defaults | kwargs)


def echo_model(**config):
    torch.manual_seed(5)
    return get_echo_model(tiny_base(), lora_config(lora_dropout=0.1), dataclasses.replace(ROUTED, **config))


def trainer_of(folder, model=None, cls=EchoTrainer, **kwargs):
    model = echo_model() if model is None else model
    return cls(model=model, args=arguments(folder, **kwargs), train_dataset=rows(), data_collator=collator)


def adapter_of(model) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in peft.get_peft_model_state_dict(model).items()}


# --------------------------------------------------------------- the echo off


@pytest.mark.parametrize("method", ["lora", "dora", "rslora"])
def test_with_the_echo_off_training_is_bit_identical_to_stock(tmp_path, method):
    adapters = []
    for kind in ("stock", "disabled", "baseline"):
        torch.manual_seed(5)
        config = lora_config(method=method, lora_dropout=0.1)
        model = (
            get_echo_model(tiny_base(), config, ROUTED)
            if kind == "disabled"
            else peft.get_peft_model(tiny_base(), config)
        )
        if kind == "disabled":
            model.echo_enabled = False
        trainer_of(tmp_path / kind, model, Trainer if kind == "stock" else EchoTrainer).train()
        adapters.append(adapter_of(model))
    for other in adapters[1:]:
        assert adapters[0].keys() == other.keys()
        for name, value in adapters[0].items():
            assert torch.equal(value, other[name]), name


def test_echo_changes_the_adapter(tmp_path):
    """The comparison above could not fail if the echo had no effect at all."""
    plain, echo = echo_model(), echo_model()
    plain.echo_enabled = False
    for name, model in (("plain", plain), ("echo", echo)):
        trainer_of(tmp_path / name, model).train()
    assert any(not torch.equal(v, adapter_of(echo)[n]) for n, v in adapter_of(plain).items())


# --------------------------------------------------------------- the echo on


def test_metrics_are_logged(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 6
    for step, log in enumerate(logs):
        assert log["routed"] == float(is_routed(ROUTED, step, 6))
        assert log["routing_p"] == pytest.approx(1.0 - 0.8 * step / 5)
        assert log.keys() >= {"ce_off", "entropy", "mean_token_accuracy", "grad_norm", "learning_rate"}
        total = log["ce_off"]
        if log["routed"]:
            assert log["echo_norm"] >= 0
            assert 0 < log["gate_mean"] < 1
            total += log["ce_on"] + log["distillation"]
        assert log["objective"] == pytest.approx(total, rel=1e-4)
        assert log["loss"] == log["ce_off"]
    assert any(not log["routed"] for log in logs)
    assert any(log["routed"] for log in logs)


def test_echo_has_a_learning_rate_of_its_own(tmp_path):
    model = echo_model(echo_lr_multiplier=7.0)
    trainer = trainer_of(tmp_path, model)
    optimizer = trainer.create_optimizer()
    of_echo = {id(p) for p in model.echo.parameters()}
    found = 0
    for group in optimizer.param_groups:
        assert group["lr"] == pytest.approx(7e-2 if group.get("echo") else 1e-2)
        for parameter in group["params"]:
            assert (id(parameter) in of_echo) == bool(group.get("echo"))
            found += 1
    assert found == sum(p.requires_grad for p in model.parameters())


class Rates(TrainerCallback):
    """The learning rates with which each optimizer step is made: of the adapter, of the echo."""

    def __init__(self, trainer):
        self.seen = []
        step = trainer.optimizer.step

        def watched(*args, **kwargs):
            of_echo = [bool(group.get("echo")) for group in trainer.optimizer.param_groups]
            rates = [group["lr"] for group in trainer.optimizer.param_groups]
            self.seen.append((rates[of_echo.index(False)], rates[of_echo.index(True)]))
            return step(*args, **kwargs)

        trainer.optimizer.step = watched


@pytest.mark.parametrize("stock", [False, True])
def test_the_echo_warms_up_by_itself(tmp_path, stock):
    model = echo_model(echo_lr_multiplier=2.0, echo_lr_warmup=0.5)
    trainer = trainer_of(tmp_path, model, lr_scheduler_type="linear", max_grad_norm=0)
    if stock:
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        separate_echo(optimizer, model)
        trainer = Trainer(
            model=model,
            args=trainer.args,
            train_dataset=rows(),
            data_collator=collator,
            callbacks=[EchoCallback()],
            optimizers=(optimizer, None),
        )
    trainer.create_optimizer()
    rates = Rates(trainer)
    trainer.train()
    falling = [1e-2 * (1 - step / 6) for step in range(6)]
    assert [of_adapter for of_adapter, _ in rates.seen] == pytest.approx(falling)
    factors = [1 / 3, 2 / 3, 1, 1, 1, 1]
    assert [of_echo for _, of_echo in rates.seen] == pytest.approx(
        [2 * rate * factor for rate, factor in zip(falling, factors, strict=True)]
    )
    assert trainer.state.log_history[0]["learning_rate"] == pytest.approx(falling[0])


def test_a_warm_up_of_the_echo_needs_groups_of_its_own(tmp_path):
    model = echo_model(echo_lr_warmup=0.5)
    args = arguments(tmp_path)
    trainer = Trainer(model=model, args=args, train_dataset=rows(), data_collator=collator, callbacks=[EchoCallback()])
    with pytest.raises(EchoConfigError, match=r"echo_lr_warmup=0\.5 needs .* groups of their own.*separate_echo"):
        trainer.train()


def test_the_weight_of_the_distillation_rises(tmp_path):
    model = echo_model(distillation_warmup=1.0, distillation_weight=3.0, routing_end=1.0)
    trainer = trainer_of(tmp_path, model)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "ce_on" in log]
    for step, log in enumerate(logs):
        rest = log["objective"] - log["ce_off"] - log["ce_on"]
        assert rest == pytest.approx(3 * step / 6 * log["distillation"], abs=2e-4)
    assert logs[-1]["distillation"] > 1e-3  # there is something to weigh


def test_adapter_and_echo_are_clipped_apart(tmp_path, monkeypatch):
    model = echo_model(gradient_clipping="apart")
    trainer = trainer_of(tmp_path, model, max_grad_norm=0.5)
    given = torch.Generator().manual_seed(0)
    of_echo = {id(p) for p in model.echo.parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter in trained:
        parameter.grad = torch.randn(parameter.shape, generator=given) * (100 if id(parameter) in of_echo else 1)
    before = [parameter.grad.clone() for parameter in trained]
    parts = [
        [g for g, p in zip(before, trained, strict=True) if (id(p) in of_echo) == which] for which in (False, True)
    ]
    norms = [torch.cat([g.flatten() for g in part]).norm() for part in parts]
    assert trainer._clip_grad_norm(model).item() == pytest.approx(norms[0].item(), rel=1e-5)  # the adapter's
    for parameter, gradient in zip(trained, before, strict=True):
        expected = gradient * 0.5 / norms[id(parameter) in of_echo]
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-7)


def test_clipping_apart_is_refused_where_it_can_t_be_done(tmp_path):
    model = echo_model(gradient_clipping="apart")
    args = arguments(tmp_path)
    trainer = Trainer(model=model, args=args, train_dataset=rows(), data_collator=collator, callbacks=[EchoCallback()])
    with pytest.raises(EchoConfigError, match="gradient_clipping='apart' is not supported by the stock Trainer"):
        trainer.train()


@pytest.mark.parametrize(
    "config", [{"echo_lr_warmup": 0.5}, {"gradient_clipping": "apart"}], ids=lambda config: next(iter(config))
)
def test_what_deepspeed_does_by_itself_is_refused(config):
    with pytest.raises(EchoConfigError, match=rf"{next(iter(config))}=.* can't be combined with DeepSpeed"):
        refuse_deepspeed(True, echo_model(**config))
    refuse_deepspeed(True, echo_model())
    refuse_deepspeed(False, echo_model(**config))


@pytest.mark.parametrize("rows_count", [16, 14])  # 14 leaves a last window of 6 rows
def test_accumulation_gives_one_gradient(tmp_path, rows_count):
    adapters, losses = [], []
    for batch, accumulation in ((8, 1), (4, 2), (2, 4), (1, 8)):
        torch.manual_seed(5)
        model = get_echo_model(tiny_base(), lora_config(), ROUTED)
        args = arguments(
            tmp_path / str(batch),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            max_steps=4,
        )
        trainer = EchoTrainer(model=model, args=args, train_dataset=rows(rows_count), data_collator=collator)
        trainer.train()
        adapters.append(adapter_of(model))
        losses.append([log["ce_off"] for log in trainer.state.log_history if "loss" in log])
    for other, loss in zip(adapters[1:], losses[1:], strict=True):
        assert loss == pytest.approx(losses[0], rel=1e-4)
        for name, value in adapters[0].items():
            torch.testing.assert_close(other[name], value, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_stock_trainer_with_the_callback(tmp_path):
    model = echo_model()
    args = arguments(tmp_path)
    trainer = Trainer(model=model, args=args, train_dataset=rows(), data_collator=collator, callbacks=[EchoCallback()])
    trainer.train()
    ours = echo_model()
    trainer_of(tmp_path / "ours", ours).train()
    assert all(torch.equal(v, adapter_of(ours)[n]) for n, v in adapter_of(model).items())


def test_stock_trainer_without_the_callback_says_what_is_missing(tmp_path):
    trainer = Trainer(model=echo_model(), args=arguments(tmp_path), train_dataset=rows(), data_collator=collator)
    with pytest.raises(EchoModelError, match=r"EchoCallback\(\)"):
        trainer.train()


@pytest.mark.parametrize("kind", ["real", "zero", "noise", "shuffled", "shallow"])
def test_every_control_trains(tmp_path, kind):
    trainer = trainer_of(tmp_path, echo_model(echo_kind=kind, routing_schedule="constant"))
    trainer.train()
    routed = [log for log in trainer.state.log_history if log.get("routed")]
    assert routed
    if kind == "zero":
        assert all(log["echo_norm"] == 0 for log in routed)
    else:
        assert routed[-1]["echo_norm"] > 0


def test_shuffled_refuses_a_lonely_row(tmp_path):
    with pytest.raises(EchoConfigError, match="batches of 1"):
        trainer_of(tmp_path, echo_model(echo_kind="shuffled"), per_device_train_batch_size=1)


def test_compiling_with_checkpointing_is_refused(tmp_path):
    with pytest.raises(EchoConfigError, match="torch_compile=True can't be combined with activation_checkpointing"):
        trainer_of(tmp_path, echo_model(), torch_compile=True, activation_checkpointing=True)


# ---------------------------------------------------------------- checkpoints


def test_checkpoint_holds_a_plain_adapter_and_the_echo_apart(tmp_path):
    model = echo_model()
    trainer_of(tmp_path, model, save_strategy="steps", save_steps=3).train()
    folder = tmp_path / "checkpoint-3"
    saved = load_file(folder / "adapter_model.safetensors")
    assert saved
    assert not any("echo" in name for name in saved)
    assert load_file(folder / "echo_state.safetensors").keys() == model.echo.state_dict().keys()
    stock = peft.PeftModel.from_pretrained(tiny_base(), folder)
    assert adapter_of(stock).keys() == saved.keys()


class Stop(TrainerCallback):
    """Ends training after a step, as an interruption does; the schedule is that of the whole run."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == self.step


def assert_same_training(one, other) -> None:
    for name, value in adapter_of(one).items():
        assert torch.equal(value, adapter_of(other)[name]), name
    for name, value in one.echo.tensors().items():
        assert torch.equal(value, other.echo.tensors()[name]), name


@pytest.mark.parametrize(
    "config", [{"normalization": "layer"}, {"normalization": "standardize", "routing_end": 1.0}], ids=str
)
def test_interrupted_and_resumed_is_bit_identical(tmp_path, config):
    whole = echo_model(**config)
    trainer_of(tmp_path / "whole", whole, save_strategy="steps", save_steps=2).train()
    first = trainer_of(tmp_path / "parts", echo_model(**config), save_strategy="steps", save_steps=2)
    first.add_callback(Stop(5))  # after the checkpoint of step 4
    first.train()
    resumed = echo_model(**config)
    torch.manual_seed(99)  # a resume must not depend on the state it finds
    trainer = trainer_of(tmp_path / "parts", resumed, save_strategy="steps", save_steps=2)
    trainer.train(resume_from_checkpoint=True)
    assert trainer.state.global_step == 6
    assert_same_training(whole, resumed)


def stock_trainer_of(folder, model, **kwargs) -> Trainer:
    trainer = trainer_of(folder, model, Trainer, save_strategy="steps", save_steps=2, **kwargs)
    trainer.add_callback(EchoCallback())
    return trainer


@pytest.mark.parametrize(
    "config", [{"normalization": "layer"}, {"normalization": "standardize", "routing_end": 1.0}], ids=str
)
def test_the_stock_trainer_resumes_the_echo_too(tmp_path, config):
    whole = echo_model(**config)
    stock_trainer_of(tmp_path / "whole", whole).train()
    trainer = stock_trainer_of(tmp_path / "parts", echo_model(**config))
    trainer.add_callback(Stop(5))
    trainer.train()
    resumed = echo_model(**config)
    stock_trainer_of(tmp_path / "parts", resumed).train(resume_from_checkpoint=True)
    assert_same_training(whole, resumed)


def half_trained_by_the_stock_trainer(folder) -> Path:
    trainer = stock_trainer_of(folder, echo_model())
    trainer.add_callback(Stop(4))
    trainer.train()
    return folder / "checkpoint-4"


def test_the_stock_trainer_does_not_resume_an_adapter_without_its_echo(tmp_path):
    saved = half_trained_by_the_stock_trainer(tmp_path / "one")
    missing = r"other/checkpoint-4/adapter_model\.safetensors is missing"
    with pytest.raises(EchoCheckpointError, match=rf"EchoCallback can't find its echo in .*{missing}.*Resume from"):
        stock_trainer_of(tmp_path / "other", echo_model()).train(resume_from_checkpoint=str(saved))
    other = stock_trainer_of(tmp_path / "other", echo_model(), max_steps=4, learning_rate=1e-3)
    other.train()  # another training, which has reached the same step
    with pytest.raises(EchoCheckpointError, match="differs from the trained adapter"):
        stock_trainer_of(tmp_path / "other", echo_model()).train(resume_from_checkpoint=str(saved))
    of_another = (tmp_path / "other" / "checkpoint-4" / "echo_state.safetensors").read_bytes()
    (saved / "echo_state.safetensors").write_bytes(of_another)  # as where a process was killed before it wrote its own
    with pytest.raises(EchoCheckpointError, match=r"echo_state\.safetensors was saved with another adapter"):
        stock_trainer_of(tmp_path / "one", echo_model()).train(resume_from_checkpoint=True)
    (saved / "echo_state.safetensors").unlink()
    with pytest.raises(EchoCheckpointError, match=r"can't find its echo in .*checkpoint-4: No such file"):
        stock_trainer_of(tmp_path / "one", echo_model()).train(resume_from_checkpoint=True)


def test_the_stock_trainer_does_not_resume_another_echo(tmp_path):
    half_trained_by_the_stock_trainer(tmp_path)
    with pytest.raises(EchoCheckpointError, match=r"has the shape .* in the checkpoint but .* in the model"):
        stock_trainer_of(tmp_path, echo_model(bottleneck=4)).train(resume_from_checkpoint=True)


def test_echo_trainer_does_not_do_the_work_of_the_callback_twice(tmp_path):
    models = [echo_model(echo_lr_warmup=0.5), echo_model(echo_lr_warmup=0.5)]
    for model in models:
        trainer = trainer_of(tmp_path, model)
        if model is models[1]:
            trainer.add_callback(EchoCallback())
        trainer.train()
    assert_same_training(*models)


def test_statistics_of_a_step_are_resumed_in_a_model_that_stopped_in_another(tmp_path):
    config = {"normalization": "standardize", "routing_end": 1.0}
    whole = echo_model(**config)
    trainer_of(tmp_path / "whole", whole, save_strategy="steps", save_steps=2).train()
    model = echo_model(**config)
    trainer = trainer_of(tmp_path / "parts", model, save_strategy="steps", save_steps=2)
    trainer.add_callback(Stop(5))
    trainer.train()
    pending = load_file(tmp_path / "parts" / "checkpoint-4" / "echo_state.safetensors")
    assert pending["standardize.new_rows"] > 0  # of step 4, which count from step 5 on
    trainer.remove_callback(Stop)
    trainer.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-4"))
    assert_same_training(whole, model)


def test_saving_does_not_change_training(tmp_path):
    """Proving a checkpoint loads a second adapter; neither weights nor random states may notice."""
    models = []
    for strategy in ("no", "steps"):
        model = echo_model()
        trainer_of(tmp_path / strategy, model, save_strategy=strategy, save_steps=1).train()
        models.append(adapter_of(model))
    assert all(torch.equal(v, models[1][n]) for n, v in models[0].items())


def test_resume_with_another_configuration_is_refused_with_a_diff(tmp_path):
    trainer_of(tmp_path, save_strategy="steps", save_steps=3).train()
    other = trainer_of(tmp_path, echo_model(scale_init=2.0), learning_rate=2e-2)
    with pytest.raises(EchoCheckpointError) as error:
        other.train(resume_from_checkpoint=True)
    assert "training.learning_rate: checkpoint 0.01, now 0.02" in str(error.value)
    assert "echo.scale_init: checkpoint 1.0, now 2.0" in str(error.value)
    assert "max_steps" not in str(error.value)


def test_an_unfinished_checkpoint_is_passed_over(tmp_path):
    trainer_of(tmp_path, save_strategy="steps", save_steps=2, save_total_limit=2).train()
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    (tmp_path / "checkpoint-6" / "echo_checkpoint.json").unlink()
    trainer = trainer_of(tmp_path)
    with pytest.raises(EchoCheckpointError, match="interrupted"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    trainer_of(tmp_path).train(resume_from_checkpoint=True)
    assert (tmp_path / "checkpoint-6").exists()  # it may be somebody else's


def test_a_damaged_checkpoint_is_refused(tmp_path):
    trainer_of(tmp_path, save_strategy="steps", save_steps=6).train()
    path = tmp_path / "checkpoint-6" / "echo_state.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(EchoCheckpointError, match=r"echo_state\.safetensors"):
        trainer_of(tmp_path).train(resume_from_checkpoint=True)


def test_nothing_to_resume(tmp_path):
    with pytest.raises(EchoCheckpointError, match="holds no complete checkpoint"):
        trainer_of(tmp_path).train(resume_from_checkpoint=True)


# ----------------------------------------------------------------- divergence


def test_a_loss_that_is_not_finite_stops_with_step_rows_and_term(tmp_path):
    model = echo_model(routing_schedule="constant")
    trainer = trainer_of(tmp_path, model, save_strategy="steps", save_steps=2)

    class Poison(EchoCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 3:
                for branch in model.echo.branches.values():
                    torch.nn.init.constant_(branch.W2.weight, float("nan"))

    trainer.add_callback(Poison())
    with pytest.raises(EchoTrainingError, match=r"ce_on is nan at step [45], rows \d+, \d+\."):
        trainer.train()
    assert (tmp_path / "checkpoint-2" / "echo_checkpoint.json").is_file()
    assert not (tmp_path / "checkpoint-6").exists()


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
def test_a_gradient_that_is_not_finite_stops_with_its_name(tmp_path, max_grad_norm):
    model = echo_model()
    parameter = next(p for n, p in model.named_parameters() if p.requires_grad and "lora_B" in n)
    parameter.register_hook(lambda grad: grad * float("inf"))
    with pytest.raises(EchoTrainingError, match=r"gradient of .* is not finite .* at step 1, rows"):
        trainer_of(tmp_path, model, max_grad_norm=max_grad_norm).train()


# ------------------------------------------------------------------------ TRL


def sft_arguments(folder: Path, **kwargs) -> SFTConfig:
    defaults = {
        "output_dir": str(folder),
        "max_steps": 3,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
    }
    return SFTConfig(**defaults | kwargs)


def sft_base():
    tokenizer = tiny_tokenizer()
    base = tiny_base()
    base.resize_token_embeddings(len(tokenizer))
    base.config.eos_token_id = base.generation_config.eos_token_id = tokenizer.eos_token_id
    return base, tokenizer


DATASETS = {
    "prompt-completion": {"prompt": ["one two", "three"] * 3, "completion": [" four", " five six"] * 3},
    "conversational": {
        "prompt": [[{"role": "user", "content": "one two"}]] * 6,
        "completion": [[{"role": "assistant", "content": "three four"}]] * 6,
    },
}


def sft_trainer(folder, data, *, echo=ROUTED, **kwargs):
    base, tokenizer = sft_base()
    on_overlength = {k: kwargs.pop(k) for k in ("on_overlength",) if k in kwargs}
    return EchoSFTTrainer(
        model=base,
        args=sft_arguments(folder, **kwargs),
        train_dataset=Dataset.from_dict(data),
        processing_class=tokenizer,
        peft_config=lora_config(),
        echo_config=echo,
        **on_overlength,
    )


@pytest.mark.parametrize("echo", [ROUTED, None], ids=["echo", "plain"])
def test_logged_losses_and_tokens_continue_after_a_resume(tmp_path, echo):
    def trainer(folder, every=4):
        options = {"max_steps": 6, "logging_steps": every, "save_strategy": "steps", "save_steps": 3}
        return sft_trainer(folder, DATASETS["prompt-completion"], echo=echo, **options)

    whole, parts = trainer(tmp_path / "whole"), trainer(tmp_path / "parts")
    output = whole.train()
    each = trainer(tmp_path / "each", 1)
    each.train()
    losses = [log["loss"] for log in each.state.log_history if "loss" in log]
    assert len(losses) == 6
    assert output.training_loss == output.metrics["train_loss"] == pytest.approx(sum(losses) / 6, rel=1e-5)
    assert whole.state.log_history[-1]["train_loss"] == pytest.approx(output.training_loss, rel=1e-5)
    parts.add_callback(Stop(3))
    parts.train()
    resumed = trainer(tmp_path / "parts")
    assert resumed.train(resume_from_checkpoint=True).training_loss == pytest.approx(output.training_loss, rel=1e-6)
    assert resumed._total_train_tokens == whole._total_train_tokens > 0
    ended = trainer(tmp_path / "parts").train(resume_from_checkpoint=True)
    assert ended.training_loss == pytest.approx(output.training_loss, rel=1e-6)


@pytest.mark.parametrize("name", ["checkpoint-3", "best"])
def test_a_checkpoint_that_did_not_sum_its_losses_can_be_resumed_from(tmp_path, name):
    options = {"save_strategy": "steps", "save_steps": 3}
    whole = trainer_of(tmp_path, **options)
    whole.train()
    (tmp_path / "checkpoint-3").rename(tmp_path / name)
    seal = tmp_path / name / "echo_checkpoint.json"
    values = json.loads(seal.read_text())
    del values["loss_sum"]
    seal.write_text(json.dumps(values))
    output = trainer_of(tmp_path, **options).train(resume_from_checkpoint=str(tmp_path / name))
    losses = [log["loss"] for log in whole.state.log_history if "loss" in log]
    assert output.training_loss == pytest.approx(sum(losses[3:]) / 3, rel=1e-5)


@pytest.mark.parametrize("name", DATASETS)
def test_sft_takes_the_datasets_of_trl(tmp_path, name):
    trainer = sft_trainer(tmp_path, DATASETS[name])
    trainer.train()
    log = next(log for log in trainer.state.log_history if "loss" in log)
    assert log.keys() >= {"ce_off", "ce_on", "entropy", "mean_token_accuracy", "num_tokens"}
    assert log["num_tokens"] > 0


def test_sft_multi_turn(tmp_path):
    turns = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three four"},
        {"role": "assistant", "content": "five"},
    ]
    trainer = sft_trainer(tmp_path, {"messages": [turns] * 4}, assistant_only_loss=True)
    labels = trainer.train_dataset[0]["labels"]
    supervised = [label != -100 for label in labels]
    changes = sum(a != b for a, b in pairwise(supervised))
    assert changes >= 3  # two answers, with unsupervised tokens between them
    trainer.train()


def test_sft_without_echo_is_sfttrainer(tmp_path):
    adapters = []
    for cls in (SFTTrainer, EchoSFTTrainer):
        base, tokenizer = sft_base()
        trainer = cls(
            model=base,
            args=sft_arguments(tmp_path / cls.__name__),
            train_dataset=Dataset.from_dict(DATASETS["conversational"]),
            processing_class=tokenizer,
            peft_config=lora_config(lora_dropout=0.1),
        )
        trainer.train()
        adapters.append(adapter_of(trainer.model))
    assert all(torch.equal(v, adapters[1][n]) for n, v in adapters[0].items())


def test_sft_echo_starts_from_the_adapter_that_trl_makes(tmp_path):
    hashes = []
    for echo in (None, ROUTED):
        trainer = sft_trainer(tmp_path / str(echo is None), DATASETS["conversational"], echo=echo)
        trainer.train()
        hashes.append(trainer.initial_adapter_hash)
    assert hashes[0] == hashes[1]


def test_sft_evaluates_the_plain_model(tmp_path):
    trainer = sft_trainer(tmp_path, DATASETS["conversational"])
    data = Dataset.from_dict(DATASETS["conversational"])
    metrics = trainer.evaluate(data)
    batch = trainer.data_collator([trainer.train_dataset[0]])
    batch.pop("_echo_row")
    trainer.model.eval()
    expected = trainer.model(**batch).loss
    assert metrics["eval_loss"] == pytest.approx(expected.item(), rel=1e-4)


def test_sft_with_gradient_checkpointing_matches_without(tmp_path, caplog):
    losses = []
    for on in (False, True):
        trainer = sft_trainer(tmp_path / str(on), DATASETS["prompt-completion"], activation_checkpointing=on)
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert "runs on whole rows" not in caplog.text


@pytest.mark.parametrize(
    ("data", "kwargs", "error", "words"),
    [
        ({"text": ["one two"] * 4}, {}, EchoDataError, r"train data has no boundary.*\['text'\]"),
        (DATASETS["conversational"], {"loss_type": "dft"}, EchoConfigError, "loss_type='dft'"),
        ({"prompt": ["one two three"] * 4, "completion": [" four"] * 4}, {"max_length": 2}, EchoDataError, "row 0"),
    ],
    ids=["text", "dft", "overlength"],
)
def test_sft_refuses(tmp_path, data, kwargs, error, words):
    with pytest.raises(error, match=words):
        sft_trainer(tmp_path, data, **kwargs)


def test_sft_attaches_the_echo_to_a_model_with_an_adapter(tmp_path):
    base, tokenizer = sft_base()
    trainer = EchoSFTTrainer(
        model=peft.get_peft_model(base, lora_config()),
        args=sft_arguments(tmp_path),
        train_dataset=Dataset.from_dict(DATASETS["conversational"]),
        processing_class=tokenizer,
        echo_config=ROUTED,
    )
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    trainer.train()
    after = trainer.model.state_dict()
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert any(name.startswith("echo.") for name in changed)
    assert {name for name in before if "lora_B" in name} <= changed
    assert all("lora_" in name or name.startswith("echo.") for name in changed)


@pytest.mark.parametrize(
    ("make", "peft_config", "words"),
    [
        (lambda base: peft.get_peft_model(base, lora_config()), lora_config(), "an adapter, and a peft_config"),
        (lambda base: get_echo_model(base, lora_config(), ROUTED), None, "that already has the echo"),
    ],
    ids=["two-adapters", "two-echoes"],
)
def test_sft_refuses_a_second_adapter_or_echo(tmp_path, make, peft_config, words):
    base, tokenizer = sft_base()
    with pytest.raises(EchoConfigError, match=words):
        EchoSFTTrainer(
            model=make(base),
            args=sft_arguments(tmp_path),
            train_dataset=Dataset.from_dict(DATASETS["conversational"]),
            processing_class=tokenizer,
            peft_config=peft_config,
            echo_config=ROUTED,
        )


def test_sft_sends_no_telemetry(tmp_path, monkeypatch):
    sent = []
    monkeypatch.setattr("trl.trainer.base_trainer.send_telemetry", lambda **kwargs: sent.append(kwargs))
    monkeypatch.delenv("CI", raising=False)
    sft_trainer(tmp_path, DATASETS["conversational"])
    assert not sent
    monkeypatch.setenv("ECHO_LORA_TELEMETRY", "1")
    sft_trainer(tmp_path, DATASETS["conversational"])
    assert len(sent) == 1


# ------------------------------------------------------------- edges found by use


def test_terms_are_right_over_windows_of_unequal_length(tmp_path):
    """12 rows in batches of 2, 5 batches a step: a step of 5 that is routed, then one of 1 that is not."""
    model = echo_model(routing_start=1.0, routing_end=0.0)
    args = {"max_steps": 2, "logging_steps": 2, "gradient_accumulation_steps": 5, "learning_rate": 1e-9}
    trainer = trainer_of(tmp_path, model, **args)
    trainer.train()
    log = next(log for log in trainer.state.log_history if "loss" in log)
    assert log["routed"] == 0.5
    assert log["ce_on"] == pytest.approx(log["ce_off"], rel=0.1)  # a neutral echo; dropout and other rows differ


def saved_adapter(folder: Path, **config) -> Path:
    model = peft.get_peft_model(tiny_base(), lora_config(init_lora_weights=False, **config))
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("cls", [EchoTrainer, Trainer])
def test_a_continued_adapter_under_a_second_name_is_refused(tmp_path, cls):
    model = echo_model()
    model.load_adapter(str(saved_adapter(tmp_path / "saved")), "continued", is_trainable=True)
    model.set_adapter("continued")
    trainer = trainer_of(tmp_path / "run", model, cls)
    trainer.add_callback(EchoCallback())
    with pytest.raises(
        EchoModelError, match=r"belongs to the adapter 'default', but the active one is 'continued'.*load_adap"
    ):
        trainer.train()


def test_another_adapter_trains_without_the_echo_where_it_is_switched_off(tmp_path):
    model = echo_model()
    model.add_adapter("other", lora_config())
    model.set_adapter("other")
    model.echo_enabled = False
    trainer = trainer_of(tmp_path, model)
    trainer.train()
    assert not {"ce_off", "routing_p"} & trainer.state.log_history[0].keys()
    assert any(p.any() for n, p in model.named_parameters() if "lora_B.other" in n)
    assert not any(p.any() for n, p in model.named_parameters() if "lora_B.default" in n)


def test_several_active_adapters_are_refused(tmp_path):
    model = echo_model()
    model.add_adapter("other", lora_config())
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(EchoModelError, match="the active one is 'default', 'other'"):
        trainer_of(tmp_path, model).train()


def test_an_inactive_second_adapter_changes_nothing(tmp_path):
    alone, beside = echo_model(), echo_model()
    beside.load_adapter(str(saved_adapter(tmp_path / "saved")), "other")
    beside.train()
    for name, model in (("alone", alone), ("beside", beside)):
        trainer_of(tmp_path / name, model, save_strategy="steps", save_steps=3).train()
    assert_same_training(alone, beside)


def test_a_saved_adapter_is_continued_with_the_echo(tmp_path):
    folder = saved_adapter(tmp_path / "saved")
    model = echo_model()
    model.load_adapter(str(folder), "default", is_trainable=True)
    start = adapter_of(model)
    assert all(
        torch.equal(value, start[name]) for name, value in load_file(folder / "adapter_model.safetensors").items()
    )
    trainer = trainer_of(tmp_path / "run", model)
    trainer.train()
    assert trainer.state.log_history[0]["routing_p"] == 1.0
    assert any(not torch.equal(value, start[name]) for name, value in adapter_of(model).items())
    assert all(branch.W2.weight.any() for branch in model.echo.branches.values())


@pytest.mark.parametrize("cls", [EchoTrainer, Trainer])
def test_a_named_adapter_is_trained_saved_and_resumed(tmp_path, cls):
    def named():
        torch.manual_seed(5)
        return get_echo_model(tiny_base(), lora_config(), ROUTED, adapter_name="mine")

    def trained(model, folder, **kwargs):
        trainer = trainer_of(folder, model, cls, save_strategy="steps", save_steps=2, **kwargs)
        trainer.add_callback(EchoCallback())
        return trainer

    whole, parts = named(), named()
    trained(whole, tmp_path / "whole").train()
    trainer = trained(parts, tmp_path / "parts")
    trainer.add_callback(Stop(4))
    trainer.train()
    parts = named()
    trained(parts, tmp_path / "parts").train(resume_from_checkpoint=True)
    one, other = (peft.get_peft_model_state_dict(model, adapter_name="mine") for model in (whole, parts))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    folder = tmp_path / "whole" / "checkpoint-6" / "mine"
    assert all(torch.equal(v, one[n]) for n, v in load_file(folder / "adapter_model.safetensors").items())


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"r": 8}, "r is 8 there and 4 here"),
        ({"lora_alpha": 64}, "lora_alpha is 64 there and 8 here"),
        ({"use_rslora": True}, "use_rslora is True there and False here"),
        ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern is"),
        ({"target_modules": ["q_proj"]}, "it lacks .*v_proj"),
        ({"target_modules": ["q_proj", "k_proj", "v_proj", "up_proj", "down_proj"]}, "it also holds .*k_proj"),
    ],
    ids=["rank", "alpha", "rslora", "alpha pattern", "fewer modules", "more modules"],
)
def test_an_adapter_with_other_hyperparameters_is_not_continued(tmp_path, config, words):
    model = echo_model()
    before = adapter_hash(model)
    with pytest.raises(EchoModelError, match=words):
        model.load_adapter(str(saved_adapter(tmp_path, **config)), "default", is_trainable=True)
    assert adapter_hash(model) == before


def test_a_frozen_adapter_is_refused(tmp_path):
    folder = saved_adapter(tmp_path / "saved")
    with pytest.raises(EchoModelError, match="inference_mode is True"):
        get_echo_model(tiny_base(), peft.LoraConfig.from_pretrained(folder), ROUTED)
    model = echo_model()
    model.set_requires_grad("default", False)
    with pytest.raises(EchoModelError, match=r"every parameter .* is frozen, so only the echo"):
        trainer_of(tmp_path / "run", model).train()
    model.set_adapter("default")
    trainer_of(tmp_path / "again", model).train()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda model: model.base_model.disable_adapter_layers(), "are disabled"),
        (lambda model: model.merge_adapter(), "is merged"),
    ],
    ids=["disabled", "merged"],
)
def test_an_adapter_that_the_echo_does_not_reach_is_refused(tmp_path, change, words):
    model = echo_model(injection_site="lora_input")
    change(model)
    with pytest.raises(EchoModelError, match=words):
        model.set_routing_clock(0, 5)


def test_the_echo_follows_an_adapter_that_is_made_anew():
    model = echo_model(injection_site="lora_input", routing_schedule="constant")
    model.base_model.delete_adapter("default")
    model.add_adapter("default", lora_config(init_lora_weights=False))
    model.set_adapter("default")
    model.train()(**collate([random_row(torch.Generator().manual_seed(0), 5, 3)])).loss.backward()
    assert all(branch.W2.weight.grad.any() for branch in model.echo.branches.values())


def test_an_adapter_changed_during_training_is_refused(tmp_path):
    model = echo_model()
    model.add_adapter("other", lora_config())

    class Change(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 2:
                kwargs["model"].set_adapter("other")

    trainer = trainer_of(tmp_path, model)
    trainer.add_callback(Change())
    with pytest.raises(EchoModelError, match="step 3 was trained without the echo"):
        trainer.train()


def test_the_adapter_that_carries_the_echo_is_not_deleted():
    model = echo_model()
    model.add_adapter("other", lora_config())
    with pytest.raises(EchoModelError, match="'default' carries the echo"):
        model.delete_adapter("default")
    model.delete_adapter("other")


def test_a_saved_adapter_is_no_echo_model(tmp_path):
    with pytest.raises(EchoModelError, match="holds no echo"):
        type(echo_model()).from_pretrained(tiny_base(), saved_adapter(tmp_path))


@pytest.mark.parametrize(
    "config",
    [{"modules_to_save": ["lm_head"]}, {"modules_to_save": ["embed_tokens"]}, {"trainable_token_indices": [3, 4, 5]}],
    ids=str,
)
def test_whole_modules_beside_the_adapter_are_trained_saved_and_resumed(tmp_path, config):
    def model_of():
        torch.manual_seed(5)
        return get_echo_model(tiny_base(), lora_config(**config), ROUTED)

    whole, resumed = model_of(), model_of()
    start = adapter_of(whole)
    trainer_of(tmp_path, whole, save_strategy="steps", save_steps=3).train()
    own = [name for name in start if "lora_" not in name]
    assert own
    assert all(not torch.equal(start[name], adapter_of(whole)[name]) for name in own)
    trainer_of(tmp_path, resumed, save_strategy="steps", save_steps=3).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-3")
    )
    assert_same_training(whole, resumed)


def test_an_optimizer_that_was_given_is_left_alone(tmp_path):
    model = echo_model()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
    trainer = EchoTrainer(
        model=model,
        args=arguments(tmp_path),
        train_dataset=rows(),
        data_collator=collator,
        optimizers=(optimizer, scheduler),
    )
    trainer.train()
    assert len(optimizer.param_groups) == 1


def test_the_parameter_whose_gradient_broke_is_named(tmp_path):
    model = echo_model()
    name, parameter = next((n, p) for n, p in model.named_parameters() if "layers.3" in n and "lora_B" in n)
    parameter.register_hook(lambda grad: grad * float("nan"))
    with pytest.raises(EchoTrainingError, match=rf"gradient of {name} is not finite \(1 of"):
        trainer_of(tmp_path, model).train()


def test_save_model_is_proved(tmp_path):
    model = echo_model()
    trainer = trainer_of(tmp_path, model)
    trainer.train()
    trainer.save_model(str(tmp_path / "good"))
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            parameter.data.fill_(float("nan"))
    with pytest.raises(EchoCheckpointError, match="not finite"):
        trainer.save_model(str(tmp_path / "bad"))


def test_resuming_beside_strange_checkpoints_deletes_nothing(tmp_path):
    plain = peft.get_peft_model(tiny_base(), lora_config())
    trainer_of(tmp_path, plain, Trainer, save_strategy="steps", save_steps=3).train()
    with pytest.raises(EchoCheckpointError, match="holds no complete checkpoint"):
        trainer_of(tmp_path).train(resume_from_checkpoint=True)
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-6"]


def test_what_lay_in_the_folder_of_a_checkpoint_outlives_it(tmp_path):
    """Its seal does not name it, and the rotation leaves it."""
    theirs = [tmp_path / "checkpoint-2" / name for name in ("notes.txt", "README.md", "sub/notes.txt")]
    for path in theirs[::2]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
        path.chmod(0o600)
    theirs[1].write_text("mine, which PEFT writes over")
    trainer = trainer_of(tmp_path, save_strategy="steps", save_steps=2, save_total_limit=1)

    class Look(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if state.global_step == 2:
                sealed.update(read_seal(tmp_path / "checkpoint-2")["files"])

    sealed: dict[str, str] = {}
    trainer.add_callback(Look())
    trainer.train()
    assert {"adapter_model.safetensors", "README.md"} <= sealed.keys()
    assert not {"notes.txt", "sub/notes.txt"} & sealed.keys()
    files = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()]
    left = sorted(name for name in files if "-6" not in name)
    assert left == ["checkpoint-2/notes.txt", "checkpoint-2/sub/notes.txt"]
    assert theirs[0].stat().st_mode & 0o777 == 0o600


def test_the_best_checkpoint_alone_is_kept_beside_those_of_others(tmp_path):
    theirs = tmp_path / "checkpoint-900" / "model.safetensors"
    theirs.parent.mkdir()
    theirs.write_text("theirs")
    options = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1, "load_best_model_at_end": True}
    options |= {"eval_strategy": "steps", "eval_steps": 2, "metric_for_best_model": "score", "greater_is_better": True}
    trainer = EchoTrainer(
        model=echo_model(),
        args=arguments(tmp_path, **options),
        train_dataset=rows(),
        eval_dataset=rows(4, seed=1),
        data_collator=collator,
        compute_metrics=lambda prediction: {"score": float(trainer.state.global_step == 2)},
    )
    trainer.train()
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-900"]
    assert trainer.args.save_total_limit == 1
    assert theirs.read_text() == "theirs"


def test_a_bfloat16_adapter_is_proved(tmp_path):
    torch.manual_seed(5)
    model = get_echo_model(tiny_base().bfloat16(), lora_config(), ROUTED, autocast_adapter_dtype=False)
    trainer_of(tmp_path, model, save_strategy="steps", save_steps=3).train()
    assert load_file(tmp_path / "checkpoint-3" / "adapter_model.safetensors")


def test_a_stream_with_max_length_is_refused(tmp_path):
    base, tokenizer = sft_base()
    with pytest.raises(EchoConfigError, match="is a stream"):
        EchoSFTTrainer(
            model=base,
            args=sft_arguments(tmp_path),
            train_dataset=Dataset.from_dict(DATASETS["conversational"]).to_iterable_dataset(),
            processing_class=tokenizer,
            peft_config=lora_config(),
            echo_config=ROUTED,
        )
