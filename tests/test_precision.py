"""bfloat16 and float16: what runs in which dtype, and how far losses and gradients are from the float32 method."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from functools import cache

import pytest
import torch
from torch import Tensor
from transformers import Trainer, TrainingArguments

from architectures import ARCHITECTURES, collate, lora_config, one_row, random_row, tiny_base, tiny_echo_model
from echo_lora import EchoConfig, EchoTrainer, get_echo_model
from echo_lora.adapter.export import save_verified
from echo_lora.method import injection as inject
from echo_lora.method import losses
from echo_lora.method.prefix import PrefixRecorder
from oracle import oracle_step
from test_oracle import mixed_rows

SEEDS = [1, 2, 3]
SCALE = {"float16 autocast": 2.0**10}  # of the loss, as a GradScaler does

# Relative errors of the loss and of the concatenated gradient: about two to three times the largest that was measured
# (docs/method.md; `pytest tests/test_precision.py -k errors -s` prints them).
BOUNDS = {
    "float16 autocast": (3e-4, 2e-2),
    "bfloat16 base": (2e-3, 0.1),
    "bfloat16 base and adapter": (2e-3, 0.1),
    "bfloat16 autocast": (2e-3, 0.1),
}
PRECISIONS = ["float32", *BOUNDS]
# not opt: a relu whose input is within rounding of zero flips, and a few flips make most of the error
NAMES = [name for name in ARCHITECTURES if name != "opt"]
QUICK = ["llama", "gpt2"]


def in_precision(name: str, precision: str, *, is_checkpointed: bool = False, **config):
    """A tiny model with the weights of `tiny_echo_model`, rounded where the precision says so."""
    model = tiny_echo_model(name, **config)
    for parameter_name, parameter in model.named_parameters():
        is_adapter, is_echo = "lora_" in parameter_name, parameter_name.startswith("echo.")
        if (precision.startswith("bfloat16 base") and not is_adapter and not is_echo) or (
            precision == "bfloat16 base and adapter" and is_adapter
        ):
            parameter.data = parameter.data.to(torch.bfloat16)
    if is_checkpointed:
        model.gradient_checkpointing_enable()
    return model


def autocast_of(precision: str):
    if not precision.endswith("autocast"):
        return nullcontext()
    return torch.autocast("cpu", dtype=torch.float16 if "16" in precision and "b" not in precision else torch.bfloat16)


def gradient_of(model) -> Tensor:
    """All gradients as one vector in float32; they are checked to have their parameter's dtype, and taken away."""
    parts = []
    for name, p in model.named_parameters():
        if p.grad is not None:
            assert p.grad.dtype == p.dtype, name
            parts.append(p.grad.flatten().float())
    model.zero_grad()
    return torch.cat(parts)


@cache
def expected(name: str, seed: int, is_routed: bool) -> tuple[float, Tensor]:
    model = tiny_echo_model(name)
    step = oracle_step(model, mixed_rows(seed), source_layers=[1, 2], config=model.echo_config, is_routed=is_routed)
    step.loss.backward()
    return step.loss.item(), gradient_of(model)


def errors(name: str, precision: str, step: str, *, is_checkpointed: bool = False) -> tuple[float, float]:
    """Over SEEDS, the largest relative error of the loss and the mean one of the gradient.

    step: "echo", routed, or "peft" for PEFT's own.
    """
    of_loss, of_gradient = [], []
    for seed in SEEDS:
        model = in_precision(name, precision, is_checkpointed=is_checkpointed)
        batch, scale = collate(mixed_rows(seed)), SCALE.get(precision, 1.0)
        model.echo_enabled = step == "echo"
        with autocast_of(precision):
            loss = (model.echo_losses(**batch, is_routed=True) if step == "echo" else model(**batch)).loss
        (loss * scale).backward()
        loss_expected, gradient_expected = expected(name, seed, step == "echo")
        of_loss.append(abs(loss.item() / loss_expected - 1))
        of_gradient.append((gradient_of(model) / scale - gradient_expected).norm() / gradient_expected.norm())
    return max(of_loss), torch.stack(of_gradient).mean().item()


@pytest.mark.parametrize("precision", BOUNDS)
@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])
def test_errors_are_those_of_the_dtype(name, precision):
    """The echo's own share: its error is at most half more than that of PEFT's LoRA step in the same dtype."""
    loss_bound, gradient_bound = BOUNDS[precision]
    of_loss, of_gradient = errors(name, precision, "echo")
    plain_loss, plain_gradient = errors(name, precision, "peft")
    print(f"| {name} | {precision} | {of_loss:.1e} | {plain_loss:.1e} | {of_gradient:.1e} | {plain_gradient:.1e} |")
    assert of_loss < loss_bound
    assert of_gradient < gradient_bound
    assert of_gradient < 1.5 * plain_gradient


@pytest.mark.parametrize("precision", ["bfloat16 autocast", "float16 autocast"])
@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_weights_that_autocast_keeps_are_frozen_in_an_echo_on_pass_for_the_echo_only(precision, is_checkpointed):
    config = {"echo_on_updates": "echo_only", "distillation_weight": 0.0}
    found = []
    for given, of in (("float32", "echo_only"), (precision, "echo_only"), ("float32", "all")):
        model = in_precision("llama", given, is_checkpointed=is_checkpointed)
        model.echo_config = dataclasses.replace(model.echo_config, **config | {"echo_on_updates": of})
        with autocast_of(given):
            loss = model.echo_losses(**collate(mixed_rows()), is_routed=True).loss
        loss.backward()
        found.append(torch.cat([p.grad.flatten().float() for n, p in model.named_parameters() if "lora_" in n]))
    expected, frozen, trained = found
    assert (frozen - expected).norm() < 0.03 * expected.norm()
    assert (trained - expected).norm() > 0.3 * expected.norm()  # what CE(on) would add


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_checkpointing_recomputes_in_the_same_dtype(name, precision):
    rows, vectors = mixed_rows(), []
    for is_checkpointed in (False, True):
        model = in_precision(name, precision, is_checkpointed=is_checkpointed)
        with autocast_of(precision):
            loss = model.echo_losses(**collate(rows), is_routed=True).loss
        loss.backward()
        vectors.append(torch.cat([loss.detach()[None], gradient_of(model)]))
    torch.testing.assert_close(vectors[1], vectors[0], rtol=0, atol=0)


@pytest.mark.parametrize("site", ["lora_input", "output"])
@pytest.mark.parametrize(
    ("precision", "computes", "lora_input", "keys"),
    [
        ("float32", torch.float32, torch.float32, torch.float32),
        ("bfloat16 base", torch.bfloat16, torch.float32, torch.bfloat16),
        ("bfloat16 base and adapter", torch.bfloat16, torch.bfloat16, torch.bfloat16),
        ("bfloat16 autocast", torch.bfloat16, torch.float32, torch.float32),  # rotary positions are float32
        ("float16 autocast", torch.float16, torch.float32, torch.float32),
    ],
)
def test_what_runs_in_which_dtype(precision, computes, lora_input, keys, site, monkeypatch):
    """computes: what linear layers give. lora_input: what lora_A is given, and δ is added to."""
    model = in_precision("llama", precision, injection_site=site)
    model._usable_head(model.get_base_model(), one_row())
    seen: dict[str, set[torch.dtype]] = {}

    def watch(owner, attribute, note):
        original = getattr(owner, attribute)

        def watched(*args, **kwargs):
            result = original(*args, **kwargs)
            note(args, result)
            return result

        monkeypatch.setattr(owner, attribute, watched)

    def note(what, *tensors):
        seen.setdefault(what, set()).update(t.dtype for t in tensors)

    watch(
        losses,
        "terms_and_gradient",
        lambda args, out: (note("logits", *args[0]), note("terms", *out[0].to_tuple(), *out[1])),
    )
    watch(losses, "distillation", lambda _, out: note("distillation", *out))
    watch(inject, "_add", lambda args, total: (note("injected into", args[0]), note("injected", total)))
    watch(
        PrefixRecorder,
        "prefix",
        lambda _, cache: [(note("keys", c.keys), note("values", c.values)) for c in cache.layers],
    )
    model.echo.register_forward_hook(lambda _m, args, out: note("echo", *args, *out[0].values(), *out[1:]))
    with autocast_of(precision):
        output = model.echo_losses(**collate(mixed_rows()), is_routed=True)
    output.loss.backward()
    gradient_of(model)

    added_to = lora_input if site == "lora_input" else computes
    assert seen == {
        "logits": {computes},
        "terms": {torch.float32},
        "distillation": {torch.float32},
        "injected into": {added_to},
        "injected": {added_to},
        "keys": {keys},
        "values": {computes},
        "echo": {torch.float32},
    }
    for name, value in output.items():
        assert value.dtype == (torch.bool if name == "routed" else torch.float32), name


def test_the_adapter_of_a_bfloat16_base_is_float32():
    model = get_echo_model(tiny_base().to(torch.bfloat16), lora_config(), EchoConfig())
    dtypes = {p.dtype for p in model.parameters() if p.requires_grad}
    assert dtypes == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_neutral_echo_distils_rounding_only(precision):
    """With δ = 0 the passes differ by rounding; their divergence must be far below a loss worth learning from."""
    model = in_precision("llama", precision)
    for branch in model.echo.branches.values():
        branch.W2.weight.data.zero_()
    with torch.no_grad(), autocast_of(precision):
        output = model.echo_losses(**collate(mixed_rows()), is_routed=True)
    assert output.echo_norm == 0
    assert output.distillation.abs() < (1e-6 if precision == "float32" else 1e-3)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_scaled_loss_gives_scaled_gradients(precision):
    """What a GradScaler does; the gradient is found in forward, before the scale is known."""
    scale = 2.0**16
    vectors = []
    for factor in (1.0, scale):
        model = in_precision("llama", precision)
        with autocast_of(precision):
            loss = model.echo_losses(**collate(mixed_rows()), is_routed=True).loss
        (loss * factor).backward()
        vectors.append(gradient_of(model))
    unscaled, scaled = vectors
    assert scaled.isfinite().all()
    # unscaled gradients of float16 lose what is below its range, which is what the scale is for
    tolerance = 1e-2 if precision == "float16 autocast" else 1e-6
    assert (scaled / scale - unscaled).norm() < tolerance * unscaled.norm()


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 1e-4), (torch.bfloat16, 1e-3)])
def test_the_count_of_tokens_is_not_rounded(dtype, bound):
    """States of 16 bits: 1/57 rounded to bfloat16 would be a wrong learning rate, by 0.2 %."""
    torch.manual_seed(0)
    off, on = (torch.randn(57, 61).to(dtype).requires_grad_() for _ in range(2))
    exact = [x.detach().float().requires_grad_() for x in (off, on)]
    targets = torch.randint(0, 61, (57,))
    for states in ((off, on), exact):
        (losses.loss_terms(*states, targets, EchoConfig()).loss / 57).backward()
    for x, y in zip((off, on), exact, strict=True):
        slope = (
            x.grad.double() * y.grad
        ).sum() / y.grad.double().square().sum()  # what rounding each entry leaves at 1
        assert abs(slope - 1) < bound


def test_a_scale_beyond_float16_is_no_infinity():
    """2^16 is GradScaler's first scale, and no float16."""
    logits = torch.tensor([[8.0, 0.0]], dtype=torch.float16, requires_grad=True)
    (losses.loss_terms(logits, None, torch.tensor([0]), EchoConfig()).loss * 2.0**16).backward()
    assert logits.grad.isfinite().all()
    assert logits.grad.abs().max() > 10


@pytest.mark.parametrize("trainer_class", [EchoTrainer, Trainer])
def test_bf16_of_the_training_arguments_is_autocast(trainer_class, tmp_path):
    generator = torch.Generator().manual_seed(1)
    rows = [random_row(generator, prompt, 3) for prompt in (4, 7, 5, 6)]
    data = [dict(zip(("input_ids", "labels"), row, strict=True)) for row in rows]
    logged = {}
    for bf16 in (False, True):
        arguments = {"report_to": [], "save_strategy": "no", "use_cpu": True, "logging_steps": 1, "max_steps": 1}
        args = TrainingArguments(str(tmp_path), bf16=bf16, per_device_train_batch_size=4, **arguments)
        trainer = trainer_class(
            model=tiny_echo_model(),
            args=args,
            train_dataset=data,
            data_collator=lambda features: collate([(f["input_ids"], f["labels"]) for f in features]),
        )
        trainer.train()
        logged[bf16] = trainer.state.log_history[0]
    if trainer_class is EchoTrainer:  # whose checkpoints are proved, and so is what save_verified writes afterwards
        args = TrainingArguments(str(tmp_path), bf16=True, **arguments | {"save_strategy": "steps", "save_steps": 1})
        trainer = EchoTrainer(trainer.model, args, train_dataset=data, data_collator=trainer.data_collator)
        trainer.train()
        save_verified(trainer.model, tmp_path / "adapter")
    assert logged[True]["loss"] != logged[False]["loss"]
    assert logged[True]["loss"] == pytest.approx(logged[False]["loss"], rel=2e-3)
    assert logged[True]["grad_norm"] == pytest.approx(logged[False]["grad_norm"], rel=2e-2)
