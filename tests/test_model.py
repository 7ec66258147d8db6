"""EchoModel is the PEFT model that it is, and the echo can learn."""

from __future__ import annotations

import copy
import inspect
import json
import pickle

import peft
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, PeftModel, PeftModelForCausalLM
from safetensors.torch import load_file
from torch import nn

from architectures import ARCHITECTURES, VOCAB, collate, lora_config, random_row, tiny_base, tiny_echo_model
from echo_lora import EchoConfig, EchoModel, EchoOutput, get_echo_model
from echo_lora.errors import EchoConfigError, EchoDataError, EchoModelError
from echo_lora.method.echo import EchoNetworks, Standardize, apply_control, echo_representation
from echo_lora.method.step import reading


def batch_of(*shapes, seed=0, side="right"):
    g = torch.Generator().manual_seed(seed)
    return collate([random_row(g, *shape) for shape in shapes], side)


BATCH = ((8, 3), (5, 4))


# ------------------------------------------------------------ a PEFT model


def test_forward_takes_what_pefts_takes_by_position():
    ours, theirs = (list(inspect.signature(c.forward).parameters) for c in (EchoModel, PeftModelForCausalLM))
    assert ours == theirs


def test_labels_given_by_position_train_the_echo():
    model, batch = tiny_echo_model(), batch_of(*BATCH)
    by_name = model(**batch)
    by_position = model(batch["input_ids"], batch["attention_mask"], None, batch["labels"])
    assert isinstance(by_position, EchoOutput)
    assert torch.equal(by_position.loss, by_name.loss)
    with pytest.raises(EchoDataError, match="inputs_embeds"):
        model(None, batch["attention_mask"], torch.ones(2, 11, 32), batch["labels"])


@pytest.mark.parametrize("site", ["output", "lora_input"])
@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))], ids=["copy", "pickle"]
)
def test_a_copy_has_hooks_of_its_own(copied, is_checkpointed, site):
    model, batch = tiny_echo_model(injection_site=site), batch_of(*BATCH)
    if is_checkpointed:
        model.gradient_checkpointing_enable()
        model.get_base_model().disable_input_require_grads()  # a closure, which can't be pickled
    expected = model(**batch).loss
    other = copied(model)
    with torch.no_grad():
        for parameter in model.echo.parameters():  # what the original does must not reach the copy
            parameter.fill_(5.0)
    loss = other(**batch).loss
    assert torch.equal(loss, expected)
    loss.backward()
    assert all(p.grad is None for p in model.parameters())
    assert all(p.grad is not None for p in other.echo.parameters())


@pytest.mark.parametrize("leave", ["unload", "merge_and_unload"])
@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_base_is_left_without_anything_of_the_echo(name, leave, is_checkpointed):
    model, batch = tiny_echo_model(name), batch_of(*BATCH)
    if is_checkpointed:
        model.gradient_checkpointing_enable()
    model(**batch).loss.backward()
    base = getattr(model, leave)()
    for module in base.modules():
        assert "echo_lora" not in repr([*module._forward_hooks.values(), *module._forward_pre_hooks.values()])
        assert "echo_lora" not in repr(getattr(module, "_gradient_checkpointing_func", None))
    if not is_checkpointed:  # else transformers' own hook on the embeddings is a closure
        assert b"echo_lora" not in pickle.dumps(base)
    assert base.is_activation_checkpointing == is_checkpointed
    again = get_echo_model(base, lora_config(name), EchoConfig(routing_schedule="constant"))
    again.train()(**batch).loss.backward()


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
@pytest.mark.parametrize("state", ["eval", "no labels", "echo off", "adapter disabled", "another adapter"])
def test_where_the_echo_does_not_apply_it_is_the_plain_model(name, state):
    model = tiny_echo_model(name)
    plain = peft.get_peft_model(tiny_base(name), lora_config(name, init_lora_weights=False))
    plain.load_state_dict(model.state_dict(), strict=False)
    batch = batch_of(*BATCH)
    if state == "another adapter":
        model.add_adapter("other", lora_config(name))
        model.set_adapter("other")
        with plain.disable_adapter():  # a fresh adapter does nothing
            expected = plain.train()(**batch)
    elif state == "adapter disabled":
        with plain.disable_adapter():
            expected = plain.train()(**batch)
    else:
        plain.train(state != "eval")
        expected = plain(**{k: v for k, v in batch.items() if k != "labels" or state != "no labels"})
    if state == "eval":
        model.eval()
    if state == "echo off":
        model.echo_enabled = False
    inputs = {k: v for k, v in batch.items() if k != "labels" or state != "no labels"}
    if state == "adapter disabled":
        with model.disable_adapter():
            output = model(**inputs)
    else:
        output = model(**inputs)
    assert not isinstance(output, EchoOutput)
    assert torch.equal(output.logits, expected.logits)
    if "labels" in inputs:
        assert torch.equal(output.loss, expected.loss)


def test_it_is_a_peft_model_that_trains_by_its_forward():
    model = tiny_echo_model()
    assert isinstance(model, PeftModelForCausalLM)
    output = model(**batch_of(*BATCH))
    assert isinstance(output, EchoOutput)
    assert output.routed
    assert all(torch.isfinite(output[name]).all() for name in output)
    assert model.eval().generate(
        torch.tensor([[3, 4, 5]]), max_new_tokens=2, min_new_tokens=2, do_sample=False
    ).shape == (1, 5)


@pytest.mark.parametrize("method", ["lora", "dora", "rslora"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_the_saved_adapter_is_one_without_echo(tmp_path, name, method):
    torch.manual_seed(1)
    plain = peft.get_peft_model(tiny_base(name), lora_config(name, method=method))
    torch.manual_seed(1)
    echo = get_echo_model(tiny_base(name), lora_config(name, method=method), EchoConfig(target_layers=[0]))
    plain.save_pretrained(tmp_path / "plain")
    echo.save_pretrained(tmp_path / "echo")
    files = [sorted(p.name for p in (tmp_path / kind).iterdir()) for kind in ("plain", "echo")]
    assert files[0] == files[1]
    configs = [json.loads((tmp_path / k / "adapter_config.json").read_text()) for k in ("plain", "echo")]
    assert configs[0] == configs[1]
    tensors = [load_file(tmp_path / kind / "adapter_model.safetensors") for kind in ("plain", "echo")]
    assert tensors[0].keys() == tensors[1].keys()
    assert all(torch.equal(v, tensors[1][k]) for k, v in tensors[0].items())  # the same start, and the same shapes


def test_a_random_state_is_not_advanced_by_the_echo():
    states = []
    for wrap in (peft.get_peft_model, get_echo_model):
        torch.manual_seed(1)
        wrap(tiny_base(), lora_config())
        states.append(torch.random.get_rng_state())
    assert torch.equal(*states)


def test_merged_and_unloaded_the_echo_is_gone():
    model = tiny_echo_model(injection_site="output")
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        expected = model.eval()(input_ids=ids).logits
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert not any("echo" in name or "lora" in name for name in merged.state_dict())


def test_a_second_adapter_gets_no_echo():
    model = tiny_echo_model()
    model.add_adapter("other", lora_config(init_lora_weights=False))
    batch = batch_of(*BATCH)
    with_echo = model(**batch)
    assert isinstance(with_echo, EchoOutput)
    model.set_adapter("other")
    assert not isinstance(model(**batch), EchoOutput)
    model.set_adapter("default")
    again = model(**batch)
    assert torch.equal(again.loss, with_echo.loss)


def test_a_named_adapter_carries_the_echo():
    model = get_echo_model(tiny_base(), lora_config(), EchoConfig(target_layers=[0]), adapter_name="mine").train()
    model.set_routing_clock(0, 10)
    assert isinstance(model(**batch_of(*BATCH)), EchoOutput)
    assert model.echo_adapter == "mine"


# ----------------------------------------------------------------- the echo


def test_an_untrained_echo_is_neutral():
    model = tiny_echo_model(started=False)
    output = model(**batch_of(*BATCH))
    assert output.echo_norm == 0
    torch.testing.assert_close(output.ce_on, output.ce_off)
    assert output.distillation.abs() < 1e-6


@pytest.mark.parametrize("site", ["lora_input", "output"])
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_every_echo_parameter_gets_a_gradient_within_the_first_steps(site, method):
    torch.manual_seed(1)
    config = EchoConfig(source_layers=[2], target_layers=[0, 1], bottleneck=8, injection_site=site)
    model = get_echo_model(tiny_base(), lora_config(method=method), config).train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    touched: set[str] = set()
    for step in range(4):
        model.echo_losses(**batch_of(*BATCH, seed=step), is_routed=True).loss.backward()
        touched |= {n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
        optimizer.step()
        optimizer.zero_grad()
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert any(n.startswith("echo.") for n in trainable)
    assert trainable - touched == set()


def test_the_echo_alone_lowers_ce_on_below_ce_off():
    """With the LoRA weights frozen, on a task whose answer is readable from the deep boundary state.

    Four prompts that differ in their first token only, each with an answer of its own; the frozen random model
    can't know the pairing, so CE(off) stays near log V, and only what z carries into the on pass can lower CE(on).
    """
    model = tiny_echo_model(started=False, bottleneck=16)
    g = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.requires_grad_(False)
        if "lora_B" in name:
            parameter.data.normal_(generator=g)
    model.get_output_embeddings().weight.data.mul_(4)  # a random head alone could not make any answer likely
    pairs = {5: 40, 6: 41, 7: 42, 8: 43}
    rows = [([first, 9, 10, answer], [-100, -100, -100, answer]) for first, answer in pairs.items()]
    batch = collate(rows)
    optimizer = torch.optim.AdamW(model.echo.parameters(), lr=3e-2)
    before = model.echo_losses(**batch, is_routed=True)
    for _ in range(250):
        model.echo_losses(**batch, is_routed=True).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = model.echo_losses(**batch, is_routed=True)
    torch.testing.assert_close(after.ce_off, before.ce_off)
    assert after.ce_on < 0.25 * after.ce_off
    model.echo_config = EchoConfig(**model.echo_config.to_dict() | {"echo_kind": "shuffled"})
    # another row's z points to another answer: it was the row's own that did it
    assert model.echo_losses(**batch, is_routed=True).ce_on > 10 * after.ce_on


@pytest.mark.parametrize("keeps_graph", [False, True])
def test_states_are_read_without_gradient_unless_it_is_wanted(keeps_graph):
    layer = nn.Linear(4, 4)
    with reading([layer], torch.tensor([2, 0]), 3, keeps_graph=keeps_graph) as hidden:
        output = layer(torch.randn(2, 3, 4))
    assert hidden[0].requires_grad == keeps_graph
    torch.testing.assert_close(hidden[0], output[[0, 1], [2, 0]])


def test_representation_is_the_normalised_mean():
    z = echo_representation([torch.randn(3, 16) * 5 + 2 for _ in range(2)])
    assert z.shape == (3, 16)
    assert z.dtype == torch.float32
    torch.testing.assert_close(z.mean(-1), torch.zeros(3), atol=1e-6, rtol=0)
    torch.testing.assert_close(z.var(-1, unbiased=False), torch.ones(3), atol=1e-4, rtol=0)


def test_standardised_states_follow_the_rows_of_earlier_steps_however_these_were_split():
    g = torch.Generator().manual_seed(0)
    common = torch.randn(16, generator=g) * 30  # as in pretrained models: rows differ by little from one long vector
    steps = [common + torch.randn(4, 16, generator=g) for _ in range(3)]
    rows = torch.cat(steps)
    for size in (4, 3, 1):
        standardize = Standardize(16)
        assert not echo_representation([rows], standardize.eval()).any()  # nothing has been seen
        standardize.train()
        for step in steps:
            z = torch.cat([echo_representation([part], standardize) for part in step.split(size)])
            standardize.end_step()
            standardize.end_step()  # without rows between: nothing
        torch.testing.assert_close(standardize.mean, rows.mean(0))
        torch.testing.assert_close(standardize.variance, rows.var(0, unbiased=False), rtol=1e-4, atol=1e-4)
        seen = torch.cat(steps[:-1])
        expected = (steps[-1] - seen.mean(0)) / seen.var(0, unbiased=False).sqrt()
        torch.testing.assert_close(z, expected.clamp(-5, 5), rtol=1e-3, atol=1e-3)

    for _ in range(200):  # it forgets what it saw long ago
        standardize(rows - 100)
        standardize.end_step()
    torch.testing.assert_close(standardize.mean, (rows - 100).mean(0), rtol=1e-3, atol=1e-2)


def test_an_evaluation_does_not_move_standardised_states():
    standardize = Standardize(8)
    standardize(torch.randn(5, 8))
    standardize.end_step()
    before = {name: value.clone() for name, value in standardize.named_buffers()}
    with torch.no_grad():
        assert standardize(torch.full((2, 8), 1000.0)).max() == Standardize.LIMIT
    standardize.eval()(torch.randn(5, 8))
    standardize.end_step()
    assert all(torch.equal(value, before[name]) for name, value in standardize.named_buffers())


def test_a_model_lets_rows_count_when_its_step_changes():
    model = tiny_echo_model(normalization="standardize", routing_schedule="linear")
    model.train()
    batch = collate([random_row(torch.Generator().manual_seed(n), 5, 3) for n in range(4)], "right")
    statistics = model.echo.standardize
    for _ in range(2):  # micro-batches of one step
        model.set_routing_clock(0, 10)
        model(**batch)
    assert (statistics.steps, statistics.new_rows) == (0, 8)
    model.set_routing_clock(1, 10)
    assert (statistics.steps, statistics.new_rows) == (1, 0)
    assert statistics.variance.min() > 0


def test_an_answer_with_the_echo_kept_on_does_not_move_standardised_states():
    model = tiny_echo_model(normalization="standardize").train()
    batch = collate([random_row(torch.Generator().manual_seed(n), 5, 3) for n in range(4)], "left")
    with torch.no_grad():  # only forwards of a training step count
        model(**batch)
    assert not model.echo.standardize.new_rows
    model(**batch)
    before = {name: value.clone() for name, value in model.echo.named_buffers()}
    with model.keeping_echo():
        model.generate(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=2)
    assert before["standardize.new_rows"] == 4
    assert all(torch.equal(value, before[name]) for name, value in model.echo.named_buffers())


def test_statistics_survive_a_cast_of_the_model_and_a_row_that_overflows():
    standardize = Standardize(8)
    standardize(torch.randn(4, 8))
    standardize.end_step()
    mean = standardize.mean.clone()
    standardize.to(torch.bfloat16)
    assert standardize.mean.dtype == torch.float32
    assert torch.equal(standardize.mean, mean)
    standardize(torch.full((2, 8), torch.inf))
    standardize.end_step()
    assert torch.equal(standardize.mean, mean)


def test_a_first_step_of_one_row_leaves_the_echo_silent():
    standardize = Standardize(8)
    standardize(torch.randn(1, 8))
    standardize.end_step()
    assert not standardize(torch.randn(1, 8)).any()
    standardize.end_step()
    assert standardize(torch.randn(1, 8)).any()


def test_standardising_leaves_the_echo_more_of_what_tells_rows_apart():
    states = torch.randn(1, 64) * 20 + torch.randn(8, 64)
    standardize = Standardize(64)
    standardize(states)
    standardize.end_step()
    cosine = [F.cosine_similarity(z[:1], z[1:]).mean() for z in (echo_representation([states]), standardize(states))]
    assert cosine[0] > 0.98
    assert cosine[1].abs() < 0.3


def test_controls():
    z = echo_representation([torch.randn(4, 16)])
    assert torch.equal(apply_control(z, "real"), z)
    assert torch.equal(apply_control(z, "shallow"), z)
    assert not apply_control(z, "zero").any()
    assert not apply_control(torch.zeros(4, 16), "noise").any()
    noise = apply_control(z, "noise")
    torch.testing.assert_close(noise.norm(dim=-1), z.norm(dim=-1), rtol=1e-3, atol=0)
    assert not torch.allclose(noise, z)
    shuffled = apply_control(z, "shuffled")
    assert all(not torch.equal(a, b) for a, b in zip(z, shuffled, strict=True))
    assert sorted(z.sum(-1).tolist()) == sorted(shuffled.sum(-1).tolist())
    with pytest.raises(EchoDataError, match="single row"):
        apply_control(z[:1], "shuffled")


def test_networks_shapes_and_start():
    config = EchoConfig(bottleneck=5, scale_init=0.3, gate_bias_init=-1.0)
    echo = EchoNetworks(16, {"a.b": 7, "a.c": 9}, config)
    deltas, norm, gate = echo(torch.randn(3, 16))
    assert {name: tuple(delta.shape) for name, delta in deltas.items()} == {"a.b": (3, 7), "a.c": (3, 9)}
    assert norm == 0
    assert gate == pytest.approx(torch.sigmoid(torch.tensor(-1.0)).item())
    for branch in echo.branches.values():
        assert branch.scale.item() == pytest.approx(0.3)
        assert branch.W1.weight.any()
        assert branch.U1.weight.any()
        assert not branch.W2.weight.any()


# -------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("config", "error", "words"),
    [
        (LoraConfig(r=4, target_modules=["q_proj"], task_type="SEQ_CLS"), EchoModelError, "SEQ_CLS"),
        (peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[]), EchoModelError, "IA3Config"),
        (
            LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM", layers_to_transform=[3]),
            EchoModelError,
            r"target layer 0 \(model\.layers\.0\) has no linear LoRA module",
        ),
    ],
)
def test_an_adapter_that_cannot_carry_the_echo(config, error, words):
    with pytest.raises(error, match=words):
        get_echo_model(tiny_base(), config, EchoConfig())


@pytest.mark.parametrize(
    ("targets", "unmatched"),
    [
        (["q_proj", "nope", "proj"], "nope, proj"),
        (["q_proj", "model.layers.0.self_attn.k_proj", "layers.1.self_attn.v_proj"], None),
        ("all-linear", None),
        (r".*\.(q_proj|nope)", None),
    ],
)
def test_a_name_that_matches_no_module_is_named(targets, unmatched, caplog):
    base = tiny_base()
    with caplog.at_level("WARNING"):
        get_echo_model(base, lora_config(target_modules=targets), EchoConfig(source_layers=[1], target_layers=[0]))
    found = [record.getMessage() for record in caplog.records if "target_modules" in record.getMessage()]
    assert len(found) == (unmatched is not None)
    if unmatched:
        assert found[0].startswith(
            f"LoraConfig.target_modules names {unmatched}, but the name of no adapted module ends that way"
        )


# PEFT gives the experts ranks under a name that is no module's
@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
def test_names_that_peft_replaces_and_excluded_ones_are_not_meant(caplog):
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    config = MixtralConfig(vocab_size=VOCAB, num_key_value_heads=2, num_local_experts=2, **sizes)
    echo = EchoConfig(source_layers=[1], target_layers=[0])
    with caplog.at_level("WARNING"):
        for targets in (
            {"target_modules": ["q_proj", "w1", "w3"]},
            {"target_modules": "all-linear", "exclude_modules": ["gate"]},
        ):
            get_echo_model(MixtralForCausalLM(config), LoraConfig(r=4, task_type="CAUSAL_LM", **targets), echo)
    assert "target_modules names" not in caplog.text


def test_an_unknown_layer():
    with pytest.raises(EchoConfigError, match="source_layers names layer 9"):
        get_echo_model(tiny_base(), lora_config(), EchoConfig(source_layers=[9]))


def test_a_base_with_an_adapter():
    with pytest.raises(EchoModelError, match="already carries a PEFT adapter"):
        get_echo_model(peft.get_peft_model(tiny_base(), lora_config()), lora_config())


def test_an_encoder_decoder():
    from transformers import T5Config, T5ForConditionalGeneration

    base = T5ForConditionalGeneration(T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2, vocab_size=VOCAB))
    with pytest.raises(EchoModelError, match="encoder-decoder"):
        get_echo_model(base, LoraConfig(target_modules=["q"]))


def test_a_routing_clock_that_was_never_set():
    model = get_echo_model(tiny_base(), lora_config()).train()
    with pytest.raises(EchoModelError, match="set_routing_clock"):
        model(**batch_of(*BATCH))
    model.set_routing_clock(0, 10)
    assert model(**batch_of(*BATCH)).routed


def test_reentrant_checkpointing():
    with pytest.raises(EchoModelError, match="use_reentrant"):
        tiny_echo_model().gradient_checkpointing_enable({"use_reentrant": True})


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_takes_its_own_forward(name):
    """No argument of the step is one that an architecture does not know."""
    model = tiny_echo_model(name)
    output = model(**batch_of((3, 2)))
    assert isinstance(model, PeftModel)
    assert torch.isfinite(output.loss)


@pytest.mark.parametrize(
    ("extra", "words"), [({"bias": "all"}, "bias is 'all'"), ({"bias": "lora_only"}, "bias is 'lora_only'")]
)
def test_adapters_that_could_not_be_saved_plainly(extra, words):
    with pytest.raises(EchoModelError, match=words):
        get_echo_model(tiny_base(), lora_config(**extra))


@pytest.mark.parametrize("extra", ["position_ids", "pixel_values", "nonsense"])
def test_inputs_that_would_be_lost_are_refused(extra):
    with pytest.raises(EchoDataError, match=extra):
        tiny_echo_model()(**batch_of(*BATCH), **{extra: torch.zeros(2, 11)})


def test_a_model_cast_as_a_whole_still_trains():
    assert torch.isfinite(tiny_echo_model().bfloat16()(**batch_of(*BATCH)).loss)
