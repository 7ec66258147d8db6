"""What a user switches on in Trainer, TRL or PEFT: it means with the echo what it means without, or it is refused."""

from __future__ import annotations

import dataclasses
import inspect
import re
import warnings
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import LambdaLR
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.neftune import neftune_post_forward_hook
from transformers.optimization import Adafactor
from transformers.trainer_pt_utils import LayerWiseDummyOptimizer
from trl import SFTConfig, SFTTrainer

from architectures import lora_config, tiny_base, tiny_echo_model
from echo_lora import EchoCallback, EchoSFTTrainer, EchoTrainer, get_echo_model, separate_echo
from echo_lora.errors import EchoCheckpointError, EchoConfigError, EchoModelError
from echo_lora.training.support import refuse_arguments, refuse_parallelism
from test_trainer import (
    DATASETS,
    ROUTED,
    Dataset,
    Stop,
    adapter_of,
    arguments,
    assert_same_training,
    collator,
    echo_model,
    rows,
    sft_arguments,
    sft_base,
    sft_trainer,
    trainer_of,
)

# ------------------------------------------------------------------ the table
#
# Every field of TrainingArguments and SFTConfig, by what becomes of it beside the echo.

# What is written, shown and sent, where and when; no number of a training depends on it.
RECORDS = [
    "output_dir",
    "logging_strategy",
    "logging_steps",
    "logging_first_step",
    "log_on_each_node",
    "logging_nan_inf_filter",
    "log_level",
    "log_level_replica",
    "disable_tqdm",
    "report_to",
    "run_name",
    "project",
    "trackio_space_id",
    "trackio_bucket_id",
    "trackio_static_space_id",
    "save_strategy",
    "save_steps",
    "save_on_each_node",
    "save_total_limit",
    "hub_token",
    "hub_private_repo",
    "hub_model_id",
    "hub_strategy",
    "hub_always_push",
    "hub_revision",
    "skip_memory_metrics",
    "debug",
    "do_train",
    "do_eval",
    "do_predict",
    "resume_from_checkpoint",
    "local_rank",
]
# Evaluation is the plain model's: test_evaluation_is_that_of_the_plain_model.
EVALUATION = [
    "eval_strategy",
    "eval_steps",
    "eval_delay",
    "per_device_eval_batch_size",
    "prediction_loss_only",
    "eval_on_start",
    "eval_do_concat_batches",
    "eval_use_gather_object",
    "eval_accumulation_steps",
    "include_for_metrics",
    "batch_eval_metrics",
    "bf16_full_eval",
    "fp16_full_eval",
    "metric_for_best_model",
    "greater_is_better",
]
# The machine's: the same numbers, faster or in less memory.
MACHINE = [
    "tf32",
    "use_cache",
    "liger_kernel_config",
    "torch_compile_backend",
    "torch_compile_mode",
    "torch_empty_cache_steps",
    "full_determinism",
    "use_cpu",
    "dataloader_num_workers",
    "dataloader_pin_memory",
    "dataloader_persistent_workers",
    "dataloader_prefetch_factor",
    "dataloader_multiprocessing_context",
    "dataloader_in_order",
]
# A training without a routed step is one of the stock Trainer: test_means_what_it_means_in_the_stock_trainer.
SAME = {
    "per_device_train_batch_size": 3,
    "num_train_epochs": {"num_train_epochs": 1.5, "max_steps": -1},
    "max_steps": 2,
    "learning_rate": 3e-3,
    "lr_scheduler_type": "cosine",
    "lr_scheduler_kwargs": {
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr": 5e-3},
    },
    "warmup_steps": 2,
    "optim": "adafactor",
    "optim_args": {"optim": "sgd", "optim_args": "momentum=0.9"},
    "weight_decay": 0.5,
    "adam_beta1": 0.5,
    "adam_beta2": 0.5,
    "adam_epsilon": 1e-2,
    "gradient_accumulation_steps": 2,
    "average_tokens_across_devices": False,
    "max_grad_norm": 0.01,
    "activation_checkpointing": True,
    "activation_checkpointing_kwargs": {
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": {"every_n_layers": 2},
    },
    "gradient_checkpointing": True,
    "gradient_checkpointing_kwargs": {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    },
    "include_num_input_tokens_seen": "non_padding",
    "seed": 11,
    "data_seed": 12,
    "accelerator_config": {"split_batches": True},
    "dataloader_drop_last": {"dataloader_drop_last": True, "per_device_train_batch_size": 5},
    "remove_unused_columns": False,
    "label_names": ["labels"],
    "train_sampling_strategy": "sequential",
    "length_column_name": {"train_sampling_strategy": "group_by_length", "length_column_name": "length"},
}
# By tests of their own, here or in the module named.
OWN = {
    "auto_find_batch_size": "test_arguments",
    "neftune_noise_alpha": "test_arguments",
    "save_only_model": "test_arguments",
    "load_best_model_at_end": "test_arguments",
    "enable_jit_checkpoint": "test_arguments",
    "push_to_hub": "test_arguments",
    "restore_callback_states_from_checkpoint": "test_arguments",
    "ignore_data_skip": "test_arguments",
    "parallelism_config": "test_arguments",
    "bf16": "test_precision",
    "fp16": "test_precision",
    "torch_compile": "test_compile",
    "fsdp": "test_distributed",
    "fsdp_config": "test_distributed",
    "deepspeed": "test_distributed",
    "ddp_find_unused_parameters": "test_distributed",
    "ddp_bucket_cap_mb": "test_distributed",
    "ddp_broadcast_buffers": "test_distributed",
    "ddp_backend": "test_distributed",
    "ddp_timeout": "test_distributed",
}
REFUSED = {
    "label_smoothing_factor": 0.1,
    "use_liger_kernel": True,
    "optim_target_modules": ["attn"],
    "ddp_static_graph": True,
}
SFT = {
    "the data": [
        "dataset_text_field",
        "dataset_kwargs",
        "dataset_num_proc",
        "eos_token",
        "max_length",
        "truncation_mode",
        "shuffle_dataset",
        "packing",
        "packing_strategy",
        "padding_free",
        "eval_packing",
        "pad_to_multiple_of",
        "completion_only_loss",
        "assistant_only_loss",
        "pad_token",
        "chat_template_path",
    ],
    "the model": ["model_init_kwargs", "trust_remote_code", "router_aux_loss_coef"],
    "the machine": ["activation_offloading"],  # needs an accelerator, so nothing here runs it
}
SFT_REFUSED = {"loss_type": "dft"}

# Parameters of Trainer and SFTTrainer.
PARAMETERS = {
    *("self", "model", "args", "data_collator", "train_dataset", "eval_dataset", "processing_class", "model_init"),
    "compute_loss_func",  # refused
    *("compute_metrics", "preprocess_logits_for_metrics", "callbacks", "optimizers", "optimizer_cls_and_kwargs"),
    *("peft_config", "formatting_func", "quantization_config"),  # SFTTrainer's
}


def unclassified(found: set[str], known: set[str], package: str) -> None:
    """Fails on the pinned release; newer ones may bring more, which is then said."""
    pins = dict(
        line.split("==")
        for line in (Path(__file__).parent.parent / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if "==" in line
    )
    if version(package) == pins[package]:
        assert found == known
    elif found != known:
        warnings.warn(f"{package} {version(package)} has other arguments: {sorted(found ^ known)}", stacklevel=2)


def test_every_argument_is_classified():
    lists = [RECORDS, EVALUATION, MACHINE, [*SAME], [*OWN], [*REFUSED]]
    of_trainer = [name for names in lists for name in names]
    of_sft = [*(name for names in SFT.values() for name in names), *SFT_REFUSED]
    assert len(of_trainer) == len(set(of_trainer))
    assert len(of_sft) == len(set(of_sft))
    stock = {field.name for field in dataclasses.fields(TrainingArguments)}
    assert len(stock) > 100
    unclassified(stock, set(of_trainer), "transformers")
    unclassified({f.name for f in dataclasses.fields(SFTConfig)} - stock, set(of_sft), "trl")
    parameters = {*inspect.signature(Trainer.__init__).parameters, *inspect.signature(SFTTrainer.__init__).parameters}
    unclassified(parameters, PARAMETERS, "trl")


def test_modules_with_own_tests_exist():
    for name in OWN.values():
        assert (Path(__file__).parent / f"{name}.py").is_file()


def history(trainer) -> list[dict[str, float]]:
    names = ("loss", "grad_norm", "learning_rate", "num_input_tokens_seen", "epoch", "step")
    return [{name: log[name] for name in names if name in log} for log in trainer.state.log_history if "loss" in log]


def unrouted():
    return echo_model(routing_start=0.0, routing_end=0.0)


def stock_model():
    torch.manual_seed(5)
    return peft.get_peft_model(tiny_base(), lora_config(lora_dropout=0.0))


@pytest.fixture
def no_dropout(monkeypatch):
    """Dropout draws by the columns that a pass has, which differ."""
    monkeypatch.setattr("test_trainer.lora_config", lambda **kwargs: lora_config(**kwargs | {"lora_dropout": 0.0}))


@pytest.mark.usefixtures("no_dropout")
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing")  # the older names are tested too
@pytest.mark.parametrize("name", SAME)
def test_means_what_it_means_in_the_stock_trainer(tmp_path, name):
    value = SAME[name] if isinstance(SAME[name], dict) and name in SAME[name] else {name: SAME[name]}
    kwargs = {"max_steps": 4, "optim": "adamw_torch"} | value
    data = rows()
    if name == "length_column_name":
        data = data.add_column("length", [len(ids) for ids in data["input_ids"]])
    trained = []
    for cls, model in ((Trainer, stock_model()), (EchoTrainer, unrouted())):
        args = arguments(tmp_path / cls.__name__, **kwargs)
        trainer = cls(model=model, args=args, train_dataset=data, data_collator=collator)
        trainer.train()
        trained.append(trainer)
    stock, ours = trained
    assert len(history(stock)) > 1
    for expected, log in zip(history(stock), history(ours), strict=True):
        assert log == pytest.approx(expected, rel=1e-3)
    for key, tensor in adapter_of(stock.model).items():
        torch.testing.assert_close(adapter_of(ours.model)[key], tensor, rtol=1e-3, atol=2e-5)


@pytest.mark.parametrize("name", [*REFUSED, *SFT_REFUSED])
def test_is_refused_by_name(name):
    value = {**REFUSED, **SFT_REFUSED}[name]
    with pytest.raises(EchoConfigError, match=re.escape(f"{name}={value!r} can't") + "|" + f"{name}=attn|{name}=\\['"):
        refuse_arguments(SimpleNamespace(**{name: value}))


@pytest.mark.parametrize("optim", ["lomo", "adalomo"])
def test_an_optimizer_that_steps_in_backward_is_refused(optim):
    with pytest.raises(EchoConfigError, match=f"optim='{optim}'"):
        refuse_arguments(arguments(Path("unused"), optim=optim))


def test_every_trainer_refuses(tmp_path):
    kwargs = {"train_dataset": rows(), "data_collator": collator}
    args = arguments(tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(EchoConfigError, match="label_smoothing_factor"):
        EchoTrainer(model=echo_model(), args=args, **kwargs)
    with pytest.raises(EchoConfigError, match="label_smoothing_factor"):
        sft_trainer(tmp_path, DATASETS["conversational"], label_smoothing_factor=0.1)
    stock = Trainer(model=echo_model(), args=args, callbacks=[EchoCallback()], **kwargs)
    with pytest.raises(EchoConfigError, match="label_smoothing_factor"):
        stock.train()


@pytest.mark.parametrize("name", ["cp", "sp"])
def test_parallelism_that_cuts_rows_is_refused(name):
    parallelism = SimpleNamespace(**{f"{name}_enabled": True, f"{name}_size": 2})
    state = SimpleNamespace(parallelism_config=parallelism)
    with pytest.raises(EchoConfigError, match=f"{name}_size=2"):
        refuse_parallelism(state, has_echo=True)
    refuse_parallelism(state, has_echo=False)


# -------------------------------------------------------------------- NEFTune


def noises_of(model, step, alpha: float) -> list[torch.Tensor]:
    """What is added to the embeddings in each pass of `step`, (B, columns, d)."""
    base = model.get_base_model()
    embeddings, first = base.get_input_embeddings(), base.model.layers[0]
    seen: list[torch.Tensor] = []
    noises: list[torch.Tensor] = []

    def note(module, args):
        seen.append(args[0])

    def compare(module, args):
        clean = torch.nn.functional.embedding(seen[-1], embeddings.weight)
        noises.append((args[0] - clean).detach())

    handles = [embeddings.register_forward_pre_hook(note), first.register_forward_pre_hook(compare)]
    step()
    for handle in handles:
        handle.remove()
    return noises


@pytest.mark.parametrize("echo_step", ["shared_prefix", "full"])
def test_neftune_noise_is_that_of_a_plain_forward_and_one_for_both_passes(tmp_path, echo_step):
    alpha, steps = 5.0, []
    model = echo_model(routing_end=1.0, echo_step=echo_step)
    trainer = trainer_of(tmp_path, model, neftune_noise_alpha=alpha, per_device_train_batch_size=6, max_steps=4)
    inner = trainer.compute_loss

    def compute_loss(model_, inputs, **kwargs):
        columns, result = inputs["input_ids"].shape[1], []
        steps.append((columns, noises_of(model, lambda: result.append(inner(model_, inputs, **kwargs)), alpha)))
        return result[0]

    trainer.compute_loss = compute_loss
    trainer.train()
    assert len(steps) == 4
    columns_run = set()
    for columns, passes in steps:
        off, on = passes[-2:]  # the first step also tries the output layer
        bound = alpha / (columns * off.shape[2]) ** 0.5
        columns_run |= {(columns, off.shape[1], on.shape[1])}
        assert 0.99 * bound < off.abs().max() <= bound * (1 + 1e-5)
        assert off.std() == pytest.approx(bound / 3**0.5, rel=0.05)
        torch.testing.assert_close(on, off[:, -on.shape[1] :])
    if echo_step == "shared_prefix":
        assert any(on < off for _, off, on in columns_run)
    assert any(off != columns for columns, off, _ in columns_run)  # else its scale was never put right
    assert not hasattr(model.get_base_model().get_input_embeddings(), "neftune_noise_alpha")


def test_neftune_leaves_the_sharing_of_the_prefix_exact():
    batch = collator(rows(3))
    gradients = []
    for echo_step in ("shared_prefix", "full"):
        model = tiny_echo_model(echo_step=echo_step)
        embeddings = model.get_base_model().get_input_embeddings()
        embeddings.neftune_noise_alpha = 20.0
        embeddings.register_forward_hook(neftune_post_forward_hook)
        model(**batch)  # the first one also tries the output layer
        torch.manual_seed(7)
        model(**batch).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
        assert embeddings.neftune_noise_alpha == 20.0
    assert gradients[0].keys() == gradients[1].keys()
    for name, value in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], value, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


# ----------------------------------------------------------------- optimizers


def rates_of(optimizer, model) -> dict[str, tuple[float, float]]:
    names = {id(p): n for n, p in model.named_parameters()}
    return {
        names[id(p)]: (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
        if p.requires_grad
    }


def test_loraplus_gives_the_echo_its_own_rate(tmp_path):
    model = echo_model(echo_lr_multiplier=3.0)
    arguments_of = {"lr": 1e-3, "loraplus_lr_ratio": 16.0, "loraplus_weight_decay": 0.1}
    optimizer = create_loraplus_optimizer(model, AdamW, **arguments_of)
    trainer = EchoTrainer(
        model=model,
        args=arguments(tmp_path, max_steps=2),
        train_dataset=rows(),
        data_collator=collator,
        optimizers=(optimizer, None),
    )
    trainer.create_optimizer()
    rates = rates_of(optimizer, model)
    stock = stock_model()
    expected = rates_of(create_loraplus_optimizer(stock, AdamW, **arguments_of), stock)
    assert rates.keys() == {n for n, p in model.named_parameters() if p.requires_grad}
    for name, (rate, decay) in rates.items():
        if name in expected:
            assert (rate, decay) == expected[name], name
        else:
            is_small = name.endswith((".scale", ".bias"))
            assert (rate, decay) == (pytest.approx(3e-3), 0.0 if is_small else 0.1), name
    trainer.train()
    assert len(optimizer.param_groups) == 4 + 3  # matrices, scales and biases came from three groups


@pytest.mark.usefixtures("no_dropout")
def test_loraplus_trains_the_adapter_as_it_does_without_the_echo(tmp_path):
    adapters = []
    for cls, model in ((Trainer, stock_model()), (EchoTrainer, unrouted())):
        optimizer = create_loraplus_optimizer(model, AdamW, lr=1e-3, loraplus_lr_ratio=16.0)
        args = arguments(tmp_path / cls.__name__, max_steps=3)
        trainer = cls(
            model=model, args=args, train_dataset=rows(), data_collator=collator, optimizers=(optimizer, None)
        )
        trainer.train()
        adapters.append(adapter_of(model))
    for name, value in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], value, rtol=1e-3, atol=1e-5)


def test_lorafa_keeps_names_and_factors_beside_their_parameters():
    model = echo_model(echo_lr_multiplier=3.0)
    optimizer = create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=1e-3)
    separate_echo(optimizer, model)
    names = {id(p): n for n, p in model.named_parameters()}
    held = 0
    for group in optimizer.param_groups:
        assert len(group["params"]) == len(group["names"]) == len(group["scaling_factors"])
        for parameter, name in zip(group["params"], group["names"], strict=True):
            assert names[id(parameter)] == name
            assert group["lr"] == pytest.approx(3e-3 if name.startswith("echo.") else 1e-3)
            held += 1
    assert held == len(names)


@pytest.mark.parametrize(
    "optimizer_of",
    [
        lambda p: AdamW(p, lr=1e-2, weight_decay=0.1),
        lambda p: AdamW([{"params": p, "lr": 1e-2}]),  # the default rate of AdamW is another
        lambda p: SGD(p, lr=1e-2),
        lambda p: Adafactor(p, lr=1e-2, relative_step=False, scale_parameter=False),
    ],
    ids=["adamw", "adamw-group", "sgd", "adafactor"],
)
def test_a_given_optimizer_trains_the_echo_at_its_rate(optimizer_of):
    model = echo_model(echo_lr_multiplier=7.0)
    optimizer = optimizer_of([p for p in model.parameters() if p.requires_grad])
    separate_echo(optimizer, model)
    separate_echo(optimizer, model)  # again, nothing happens
    for name, (rate, decay) in rates_of(optimizer, model).items():
        assert rate == pytest.approx(7e-2 if name.startswith("echo.") else 1e-2), name
        if name.endswith((".scale", ".bias")):
            assert decay == 0
    assert len(rates_of(optimizer, model)) == sum(p.requires_grad for p in model.parameters())


def test_an_optimizer_with_named_parameters_keeps_the_names():
    model = echo_model(echo_lr_multiplier=7.0)
    optimizer = AdamW([(n, p) for n, p in model.named_parameters() if p.requires_grad], lr=1e-2)
    separate_echo(optimizer, model)
    names = dict(model.named_parameters())
    for group in optimizer.param_groups:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            assert names[name] is parameter


def test_groups_of_the_echo_alone_are_left_as_they_were_made():
    model = echo_model(echo_lr_multiplier=7.0)
    of_echo = {id(p) for p in model.echo.parameters()}
    groups = [
        {"params": [p for p in model.parameters() if p.requires_grad and id(p) not in of_echo]},
        {"params": list(model.echo.parameters()), "lr": 5e-4},
    ]
    optimizer = AdamW(groups, lr=1e-2)
    separate_echo(optimizer, model)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, 5e-4]


def test_a_class_of_optimizer_is_treated_like_the_default_one(tmp_path):
    model = echo_model(echo_lr_multiplier=7.0)
    trainer = EchoTrainer(
        model=model,
        args=arguments(tmp_path, weight_decay=0.3),
        train_dataset=rows(),
        data_collator=collator,
        optimizer_cls_and_kwargs=(SGD, {"lr": 2e-3}),
    )
    rates = rates_of(trainer.create_optimizer(), model)
    assert isinstance(trainer.optimizer, SGD)
    for name, (rate, decay) in rates.items():
        assert rate == pytest.approx(14e-3 if name.startswith("echo.") else 2e-3), name
        assert decay == (0 if name.endswith((".scale", ".bias")) else 0.3), name


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ((LayerWiseDummyOptimizer, {"optimizer_dict": {}, "lr": 1e-3}), "LayerWiseDummyOptimizer does not hold"),
        ((Adafactor, {"lr": None}), "lr=None"),
    ],
    ids=["layerwise", "no rate"],
)
def test_an_optimizer_that_can_not_give_the_echo_its_rate_is_refused(tmp_path, given, words):
    trainer = EchoTrainer(
        model=echo_model(echo_lr_multiplier=7.0),
        args=arguments(tmp_path),
        train_dataset=rows(),
        data_collator=collator,
        optimizer_cls_and_kwargs=given,
    )
    with pytest.raises(EchoConfigError, match=words):
        trainer.train()


def test_an_optimizer_without_the_echo_is_refused(tmp_path):
    model = echo_model()
    optimizer = AdamW([p for n, p in model.named_parameters() if "lora_" in n], lr=1e-2)
    trainer = EchoTrainer(
        model=model,
        args=arguments(tmp_path),
        train_dataset=rows(),
        data_collator=collator,
        optimizers=(optimizer, None),
    )
    with pytest.raises(EchoConfigError, match="does not hold the parameters of the echo"):
        trainer.train()
    model.echo.requires_grad_(False)
    trainer.train()


@pytest.mark.parametrize("is_separate", [False, True])
def test_a_given_schedule_needs_groups_made_before_it(tmp_path, is_separate):
    model = echo_model(echo_lr_multiplier=7.0)
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    if is_separate:
        separate_echo(optimizer, model)
    scheduler = LambdaLR(optimizer, lambda step: 1 / (step + 1))
    trainer = EchoTrainer(
        model=model,
        args=arguments(tmp_path, max_steps=2),
        train_dataset=rows(),
        data_collator=collator,
        optimizers=(optimizer, scheduler),
    )
    if is_separate:
        trainer.train()
        assert {round(group["lr"], 6) for group in optimizer.param_groups} == {0.003333, 0.023333}
    else:
        with pytest.raises(EchoConfigError, match=r"learning rate of 0.01, but echo_lr_multiplier=7 asks for 0.07"):
            trainer.train()


@pytest.mark.parametrize("remedy", [None, "multiplier", "separate"])
def test_the_stock_trainer_does_not_drop_the_multiplier(tmp_path, remedy):
    model = echo_model(echo_lr_multiplier=1.0 if remedy == "multiplier" else 7.0)
    optimizer = None
    if remedy == "separate":
        optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        separate_echo(optimizer, model)
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path, max_steps=2, warmup_steps=1),
        train_dataset=rows(),
        data_collator=collator,
        callbacks=[EchoCallback()],
        optimizers=(optimizer, None),
    )
    if remedy is None:
        with pytest.raises(EchoConfigError, match=r"echo_lr_multiplier=7 asks for 0\.07\. Use EchoTrainer"):
            trainer.train()
    else:
        trainer.train()


# ---------------------------------------------------------------- checkpoints


def test_a_checkpoint_of_the_model_only_is_not_resumed_from(tmp_path):
    kwargs = {"save_strategy": "steps", "save_steps": 2, "save_only_model": True}
    trainer = trainer_of(tmp_path, **kwargs)
    trainer.add_callback(Stop(4))
    trainer.train()
    with pytest.raises(EchoCheckpointError, match=r"checkpoint-4 was saved with save_only_model=True"):
        trainer_of(tmp_path, **kwargs).train(resume_from_checkpoint=True)


def test_the_last_checkpoint_of_the_model_only_gives_its_result(tmp_path):
    kwargs = {"save_strategy": "steps", "save_steps": 6, "save_only_model": True}
    trained, loaded = echo_model(), echo_model()
    trainer_of(tmp_path, trained, **kwargs).train()
    trainer_of(tmp_path, loaded, **kwargs).train(resume_from_checkpoint=True)
    assert_same_training(trained, loaded)


@pytest.mark.parametrize(
    ("cls", "adapter_name"), [(EchoTrainer, "default"), (EchoTrainer, "mine"), (Trainer, "default")]
)
def test_the_best_checkpoint_restores_adapter_and_echo(tmp_path, cls, adapter_name):
    torch.manual_seed(5)
    model = get_echo_model(tiny_base(), lora_config(), ROUTED, adapter_name=adapter_name)
    at_step: dict[int, tuple[dict, dict]] = {}

    class Note(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            adapter = peft.get_peft_model_state_dict(model, adapter_name=adapter_name)
            at_step[state.global_step] = (
                {n: p.detach().clone() for n, p in adapter.items()},
                {n: p.detach().clone() for n, p in model.echo.tensors().items()},
            )

    trainer = cls(
        model=model,
        args=arguments(
            tmp_path,
            max_steps=4,
            save_strategy="steps",
            save_steps=1,
            eval_strategy="steps",
            eval_steps=1,
            load_best_model_at_end=True,
            metric_for_best_model="eval_score",
            greater_is_better=True,
        ),
        train_dataset=rows(),
        eval_dataset=rows(4, seed=1),
        data_collator=collator,
        callbacks=[Note(), EchoCallback()],
        compute_metrics=lambda prediction: {"score": float(trainer.state.global_step == 2)},
    )
    for resume in (None, True) if cls is EchoTrainer else (None,):  # and again, after the last step
        trainer.train(resume_from_checkpoint=resume)
        assert trainer.state.best_model_checkpoint.endswith("checkpoint-2")
        adapter = peft.get_peft_model_state_dict(model, adapter_name=adapter_name)
        for now, then, last in (
            (adapter, at_step[2][0], at_step[4][0]),
            (model.echo.tensors(), at_step[2][1], at_step[4][1]),
        ):
            assert all(torch.equal(value, then[name]) for name, value in now.items())
            assert any(not torch.equal(value, last[name]) for name, value in now.items())


@pytest.mark.parametrize(
    ("adapter_name", "options", "words"),
    [
        ("mine", {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"},
         r"load_best_model_at_end=True is not supported by the stock Trainer for the adapter 'mine'"),
        ("default", {"enable_jit_checkpoint": True}, "enable_jit_checkpoint=True is not supported by"),
    ],
    ids=["best", "signal"],
)  # fmt: skip
def test_checkpoints_that_the_stock_trainer_can_not_restore_are_refused(tmp_path, adapter_name, options, words):
    torch.manual_seed(5)
    model = get_echo_model(tiny_base(), lora_config(), ROUTED, adapter_name=adapter_name)
    trainer = Trainer(
        model=model,
        args=arguments(tmp_path, **options),
        train_dataset=rows(),
        eval_dataset=rows(4),
        data_collator=collator,
        callbacks=[EchoCallback()],
    )
    with pytest.raises(EchoConfigError, match=words):
        trainer.train()


def test_a_checkpoint_at_a_signal_is_complete(tmp_path):
    whole = echo_model()
    trainer_of(tmp_path / "whole", whole).train()
    trainer = trainer_of(tmp_path / "parts", enable_jit_checkpoint=True)
    jit = next(c for c in trainer.callback_handler.callbacks if type(c).__name__ == "JITCheckpointCallback")

    class Signal(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            jit.jit_manager.is_checkpoint_requested = state.global_step == 3

    trainer.add_callback(Signal())
    trainer.train()
    assert sorted(p.name for p in (tmp_path / "parts").glob("checkpoint-*")) == ["checkpoint-3"]
    resumed = echo_model()
    trainer_of(tmp_path / "parts", resumed).train(resume_from_checkpoint=True)
    assert_same_training(whole, resumed)


def test_what_is_pushed_is_a_complete_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "init_hf_repo", lambda self, token=None: None)
    monkeypatch.setattr(Trainer, "_finish_current_push", lambda self: None)
    pushed = []
    trainer = trainer_of(tmp_path, save_strategy="steps", save_steps=3, push_to_hub=True)
    trainer._push_from_checkpoint = lambda folder: pushed.append(sorted(p.name for p in Path(folder).iterdir()))
    trainer.train()
    assert len(pushed) == 2
    assert all({"echo_checkpoint.json", "echo_state.safetensors"} <= set(names) for names in pushed)


def test_the_tokenizer_of_a_collator_is_saved(tmp_path):
    class Collator:
        tokenizer = sft_base()[1]

        def __call__(self, features):
            return collator(features)

    for cls, model in ((Trainer, stock_model()), (EchoTrainer, echo_model())):
        folder = tmp_path / cls.__name__
        args = arguments(folder, max_steps=2, save_strategy="steps", save_steps=2)
        cls(model=model, args=args, train_dataset=rows(), data_collator=Collator()).train()
        assert (folder / "checkpoint-2" / "tokenizer.json").is_file()


# --------------------------------------------------------------- the training


class Record(TrainerCallback):
    """Every event, with what it is given."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int, tuple[str, ...]]] = []


for event in [name for name in vars(TrainerCallback) if name.startswith("on_")]:

    def note(self, args, state, control, event=event, **kwargs):
        assert isinstance(kwargs["model"], peft.PeftModel)
        self.events.append((event, state.global_step, tuple(sorted(kwargs))))

    setattr(Record, event, note)


def test_callbacks_see_what_they_see_without_the_echo(tmp_path):
    seen = []
    for cls, model in ((Trainer, stock_model()), (EchoTrainer, echo_model())):
        record = Record()
        trainer = cls(
            model=model,
            args=arguments(
                tmp_path / cls.__name__,
                max_steps=3,
                gradient_accumulation_steps=2,
                save_strategy="steps",
                save_steps=2,
                eval_strategy="steps",
                eval_steps=2,
            ),
            train_dataset=rows(),
            eval_dataset=rows(4, seed=1),
            data_collator=collator,
            callbacks=[record],
        )
        trainer.train()
        seen.append(record.events)
    assert len(seen[0]) > 20
    assert seen[0] == seen[1]


def test_callbacks_that_stop_and_keep_a_state_work(tmp_path):
    kwargs = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    early = EarlyStoppingCallback(early_stopping_patience=2)

    def trainer_with(callback):
        return EchoTrainer(
            model=echo_model(),
            args=arguments(
                tmp_path,
                metric_for_best_model="eval_score",
                greater_is_better=True,
                restore_callback_states_from_checkpoint=True,
                **kwargs,
            ),
            train_dataset=rows(),
            eval_dataset=rows(4, seed=1),
            data_collator=collator,
            callbacks=[callback],
            compute_metrics=lambda prediction: {"score": 1.0},
        )

    trainer = trainer_with(early)
    trainer.train()
    assert trainer.state.global_step == 3
    resumed = trainer_with(EarlyStoppingCallback(early_stopping_patience=2))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 3


@pytest.mark.usefixtures("no_dropout")
def test_a_batch_size_that_does_not_fit_is_halved(tmp_path):
    """As if the smaller batch had been asked for; nothing of the steps that failed stays in the metrics."""
    logs, adapters = [], []
    for batch, auto in ((4, False), (5, True)):
        model = echo_model(normalization="standardize", routing_end=1.0)
        trainer = trainer_of(
            tmp_path / str(batch),
            model,
            per_device_train_batch_size=batch,
            auto_find_batch_size=auto,
            max_steps=3,
        )

        def too_much(module, args, kwargs):
            if kwargs["input_ids"].shape[0] > 4:
                raise RuntimeError("CUDA out of memory.")

        model.get_base_model().register_forward_pre_hook(too_much, with_kwargs=True)
        trainer.train()
        logs.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
        adapters.append(adapter_of(model))
    assert logs[0] == pytest.approx(logs[1], rel=1e-5)
    for name, value in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], value, rtol=1e-4, atol=1e-6)


def test_data_skipping_can_be_left_out(tmp_path):
    """ignore_data_skip resumes with the first rows again, as in the stock Trainer."""
    kwargs = {"save_strategy": "steps", "save_steps": 2, "ignore_data_skip": True}
    first = trainer_of(tmp_path, **kwargs)
    first.add_callback(Stop(2))
    first.train()
    resumed = trainer_of(tmp_path, **kwargs)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6


def test_evaluation_is_that_of_the_plain_model(tmp_path):
    def metrics(prediction):
        return {"score": float((prediction.predictions == prediction.label_ids).mean())}

    found = []
    for cls, model in ((Trainer, stock_model()), (EchoTrainer, echo_model())):
        trainer = cls(
            model=model,
            args=arguments(tmp_path / cls.__name__, include_for_metrics=["inputs"], per_device_eval_batch_size=3),
            train_dataset=rows(),
            eval_dataset=rows(6, seed=1),
            data_collator=collator,
            compute_metrics=metrics,
            preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
        )
        found.append((trainer.evaluate(), trainer.predict(rows(3, seed=2)).predictions))
    for name in ("eval_loss", "eval_score"):
        assert found[1][0][name] == pytest.approx(found[0][0][name], rel=1e-5)
    assert (found[0][1] == found[1][1]).all()


def test_rows_without_labels_are_predicted(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.data_collator.collate = lambda features: {"input_ids": torch.tensor([f["input_ids"] for f in features])}
    data = Dataset.from_dict({"input_ids": [[3, 4, 5], [6, 7, 8]]})
    assert trainer.predict(data).predictions.shape == (2, 3, 61)


def test_a_model_that_takes_no_loss_arguments_is_evaluated_and_trained_as_in_stock(tmp_path, monkeypatch):
    """Such models are given no num_items_in_batch; without the echo their loss is a mean of micro-batches."""
    losses = []
    for cls in (Trainer, EchoTrainer):
        model = stock_model() if cls is Trainer else echo_model()
        base = model.get_base_model()
        monkeypatch.setattr(type(base), "accepts_loss_kwargs", False, raising=False)
        given = []
        base.register_forward_pre_hook(
            lambda module, args, kwargs, given=given: given.append(kwargs.get("num_items_in_batch")), with_kwargs=True
        )
        if cls is EchoTrainer:
            model.echo_enabled = False
        trainer = cls(
            model=model,
            args=arguments(tmp_path / cls.__name__, gradient_accumulation_steps=3, max_steps=2),
            train_dataset=rows(),
            eval_dataset=rows(4, seed=1),
            data_collator=collator,
        )
        trainer.train()
        losses.append([log["loss"] for log in history(trainer)])
        trainer.evaluate()
        assert len(given) > 6
        assert set(given) == {None}
    assert losses[1] == pytest.approx(losses[0], rel=0.2)  # dropout; without the division it is three times as much


def test_a_fresh_model_for_every_training(tmp_path):
    """model_init, as a search over hyperparameters uses it."""
    trainer = EchoTrainer(
        model_init=lambda: echo_model(),
        args=arguments(tmp_path, max_steps=2),
        train_dataset=rows(),
        data_collator=collator,
    )
    results = []
    for _ in range(2):
        trainer.train()
        results.append((adapter_of(trainer.model), trainer.initial_adapter_hash))
        assert any(group.get("echo") for group in trainer.optimizer.param_groups)
    assert results[0][1] == results[1][1]
    assert all(torch.equal(value, results[1][0][name]) for name, value in results[0][0].items())


# ------------------------------------------------------------- stock trainers


def test_a_loss_function_of_the_stock_trainer_is_refused_at_the_first_step(tmp_path):
    def loss(outputs, labels, num_items_in_batch=None):
        return outputs.logits.float().logsumexp(-1).mean()

    trainer = Trainer(
        model=echo_model(),
        args=arguments(tmp_path),
        train_dataset=rows(),
        data_collator=collator,
        callbacks=[EchoCallback()],
        compute_loss_func=loss,
    )
    with pytest.raises(EchoModelError, match="step 1 was trained without the echo"):
        trainer.train()


def test_the_stock_sfttrainer_is_refused_with_the_name_of_ours(tmp_path):
    base, tokenizer = sft_base()
    trainer = SFTTrainer(
        model=get_echo_model(base, lora_config(), ROUTED),
        args=sft_arguments(tmp_path),
        train_dataset=Dataset.from_dict(DATASETS["conversational"]),
        processing_class=tokenizer,
        callbacks=[EchoCallback()],
    )
    with pytest.raises(EchoModelError, match="Use EchoSFTTrainer"):
        trainer.train()


@pytest.mark.parametrize(
    "kwargs",
    [
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"selective": True}},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"every_n_layers": 2}},
        {"torch_empty_cache_steps": 1},
        {"pad_to_multiple_of": 16},
    ],
    ids=str,
)
def test_sft_arguments_that_leave_the_numbers_alone(tmp_path, kwargs):
    losses = []
    for name, given in (("plain", {}), ("given", kwargs)):
        trainer = sft_trainer(tmp_path / name, DATASETS["prompt-completion"], **given)
        trainer.train()
        losses.append([log["loss"] for log in trainer.state.log_history if "loss" in log])
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_sft_rows_with_masks_but_no_labels_are_refused_in_evaluation_too(tmp_path):
    data = {"input_ids": [[3, 4, 5]] * 4, "labels": [[-100, 4, 5]] * 4}
    trainer = sft_trainer(tmp_path, data, dataset_kwargs={"skip_prepare_dataset": True})
    with pytest.raises(ValueError, match="skip_prepare_dataset"):
        trainer.evaluate(Dataset.from_dict({"input_ids": [[3, 4, 5]], "completion_mask": [[0, 1, 1]]}))


def test_a_model_loaded_by_name_gets_all_that_sfttrainer_would_give_it(tmp_path, monkeypatch):
    base, tokenizer = sft_base()
    loaded, processors = [], []
    monkeypatch.setattr(
        "echo_lora.training.sft.create_model_from_path", lambda name, **given: loaded.append(given) or base
    )
    monkeypatch.setattr(
        "echo_lora.training.sft.AutoProcessor.from_pretrained",
        lambda name, **given: processors.append(given) or tokenizer,
    )
    trainer = EchoSFTTrainer(
        model="somebody/model",
        args=sft_arguments(tmp_path, model_init_kwargs={"revision": "abc", "dtype": "float32"}),
        train_dataset=Dataset.from_dict(DATASETS["conversational"]),
        peft_config=lora_config(),
        quantization_config="four bits",
        echo_config=ROUTED,
    )
    expected = {"trust_remote_code": False, "revision": "abc", "dtype": "float32", "quantization_config": "four bits"}
    assert loaded == [expected | {"use_safetensors": True}]
    assert processors == [{"revision": "abc", "trust_remote_code": False}]
    assert trainer.processing_class is tokenizer
