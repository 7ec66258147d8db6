"""Alignment, masks, the shared prefix and what the step refuses."""

from __future__ import annotations

import logging
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from architectures import collate, lora_config, one_row, random_row, tiny_base, tiny_echo_model
from echo_lora import EchoConfig, get_echo_model
from echo_lora.errors import EchoDataError, EchoModelError
from echo_lora.method import sharing
from echo_lora.method.alignment import align_rows, boundary_positions, injection_mask
from echo_lora.method.injection import Injection
from echo_lora.method.prefix import PrefixRecorder
from echo_lora.method.targets import decoder_layers


def rows_of(*shapes, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [random_row(g, *shape) for shape in shapes]


def test_boundary_is_the_last_token_before_the_answer():
    labels = torch.tensor([[-100, -100, 5, 6], [-100, 7, -100, 8]])
    assert boundary_positions(labels).tolist() == [1, 0]


def test_a_row_without_answer_is_refused_with_its_number():
    with pytest.raises(EchoDataError, match="row 1 of the batch has no answer"):
        boundary_positions(torch.tensor([[-100, 5], [-100, -100]]))


def test_a_row_without_prompt_is_refused_with_its_number():
    with pytest.raises(EchoDataError, match="row 1 of the batch has no prompt"):
        boundary_positions(torch.tensor([[-100, 5], [4, 5]]))


shapes = st.lists(st.tuples(st.integers(1, 9), st.integers(1, 6)), min_size=1, max_size=5)


@settings(max_examples=60, deadline=None)
@given(shapes=shapes, side=st.sampled_from(["right", "left", "both"]))
def test_alignment_keeps_every_token_that_a_loss_depends_on(shapes, side):
    rows = rows_of(*shapes)
    aligned = align_rows(**collate(rows, side))
    width = aligned.prefix_length + aligned.targets.shape[1]
    assert aligned.input_ids.shape == aligned.attention_mask.shape == aligned.position_ids.shape == (len(rows), width)
    for b, ((ids, labels), (prompt, _)) in enumerate(zip(rows, shapes, strict=True)):
        inside = aligned.attention_mask[b].bool()
        kept = int(inside.sum())
        assert kept >= len(ids) - 1  # the last token predicts nothing, and is not run where no other row needs it
        assert aligned.input_ids[b][inside].tolist() == ids[:kept]
        assert aligned.position_ids[b][inside].tolist() == list(range(kept))
        targets = aligned.targets[b]
        assert targets[targets != -100].tolist() == labels[prompt:]
        boundary = int(aligned.boundary[b])
        assert inside[boundary]
        assert inside[: boundary + 1].sum() == prompt


@settings(max_examples=60, deadline=None)
@given(shapes=shapes, side=st.sampled_from(["right", "left", "both"]))
def test_alignment_gives_every_prompt_token_but_the_first_to_its_predecessor(shapes, side):
    rows = rows_of(*shapes)
    aligned = align_rows(**collate(rows, side, train_on_prompt=True))
    assert aligned.prompt_targets.shape == aligned.input_ids.shape
    for b, ((ids, _), (prompt, _)) in enumerate(zip(rows, shapes, strict=True)):
        columns = (aligned.prompt_targets[b] != -100).nonzero().flatten()
        assert aligned.attention_mask[b][columns].all()
        assert aligned.position_ids[b][columns].tolist() == list(range(prompt - 1))
        assert aligned.prompt_targets[b][columns].tolist() == ids[1:prompt]


def test_a_later_turn_counts_as_prompt():
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    aligned = align_rows(ids, None, ids, torch.tensor([[0, 0, 1, 0, 0]]))
    assert aligned.targets.tolist() == [[7, -100, -100]]
    assert aligned.prompt_targets.tolist() == [[6, -100, 8, 9]]


def test_padding_without_mask_is_taken_for_tokens():
    ids = torch.tensor([[5, 6, 7, 8]])
    aligned = align_rows(ids, None, torch.tensor([[-100, -100, 7, 8]]))
    assert aligned.input_ids.tolist() == [[5, 6, 7]]
    assert aligned.prefix_length == 1


def test_tokens_after_the_last_answer_are_not_run():
    ids = torch.arange(1, 9)[None]
    labels = torch.tensor([[-100, -100, 3, 4, -100, -100, -100, -100]])
    assert align_rows(ids, None, labels).input_ids.tolist() == [[1, 2, 3]]


def test_injection_masks():
    targets = torch.tensor([[5, 6, -100, 7, -100]])  # columns P-1 … predict the tokens after them
    assert injection_mask(targets, "predictive").int().tolist() == [[1, 1, 0, 1, 0]]
    assert injection_mask(targets, "answer").int().tolist() == [[0, 1, 1, 0, 1]]


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_prefix_states_are_shared_not_detached(is_checkpointed, monkeypatch):
    """The echo-on pass must send gradient through the prefix's keys and values into the LoRA weights."""
    model = tiny_echo_model(echo_step="shared_prefix")
    if is_checkpointed:
        model.gradient_checkpointing_enable()
    batch = collate(rows_of((8, 3), (6, 2)))
    hand_over = PrefixRecorder.prefix

    def gradient(detach):
        seen = []

        def cut(recorder, **options):
            cache = hand_over(recorder, **options)
            for layer in cache.layers:
                seen.append(layer.keys.requires_grad)
                if detach:
                    layer.keys, layer.values = layer.keys.detach(), layer.values.detach()
            return cache

        monkeypatch.setattr(PrefixRecorder, "prefix", cut)
        model.echo_losses(**batch, is_routed=True).loss.backward()
        grads = torch.cat([p.grad.flatten() for n, p in model.named_parameters() if "lora_" in n])
        model.zero_grad()
        return grads, seen

    whole, seen = gradient(detach=False)
    assert len(seen) == 4
    assert all(seen[1:])  # the first layer's keys come from frozen weights only
    cut, _ = gradient(detach=True)
    assert (whole - cut).norm() > 0.01 * whole.norm()


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_prefix_states_are_let_go(is_checkpointed, monkeypatch):
    """Nothing but the graph holds the prefix once both passes have run, and nothing at all after backward."""
    model = tiny_echo_model(echo_step="shared_prefix")
    if is_checkpointed:
        model.gradient_checkpointing_enable()
    held = []
    hand_over = PrefixRecorder.prefix

    def watch(recorder, **options):
        cache = hand_over(recorder, **options)
        assert all(layer.recorded is None for layer in recorder.layers)
        held.extend(weakref.ref(layer.keys) for layer in cache.layers)
        return cache

    monkeypatch.setattr(PrefixRecorder, "prefix", watch)
    loss = model.echo_losses(**collate(rows_of((8, 3), (6, 2))), is_routed=True).loss
    loss.backward()
    assert len(held) == 4
    assert [ref() for ref in held] == [None] * 4


def test_an_attention_that_uses_no_cache_is_found_out():
    """A layer whose states never reach a cache can't share them; silence would drop its prefix."""
    recorder = PrefixRecorder(3, 2, is_checkpointed=False)
    recorder.update(torch.ones(1, 1, 5, 2), torch.ones(1, 1, 5, 2), 0)
    with pytest.raises(EchoModelError, match=r"1 of 2 layers \(the first is layer 1\)"):
        recorder.prefix()


@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_a_plain_model_shares_its_prefix_by_default(name, is_checkpointed, caplog):
    """A release that renames an argument must not make every step twice as long with a warning only."""
    model = tiny_echo_model(name)
    if is_checkpointed:
        model.gradient_checkpointing_enable()
    widths = []
    decoder_layers(model.get_base_model())[1][-1].register_forward_pre_hook(
        lambda _m, args, kwargs: widths.append((args[0] if args else kwargs["hidden_states"]).shape[1]),
        with_kwargs=True,
    )
    with caplog.at_level(logging.WARNING):
        model.echo_losses(**collate(rows_of((8, 3), (6, 2))), is_routed=True)
    assert widths[-2:] == [10, 3]  # both passes; before them the output layer was compared
    assert not caplog.records


def test_a_forward_that_lacks_what_the_step_needs_is_named(monkeypatch):
    model = tiny_echo_model()
    base = model.get_base_model()
    forward = base.forward
    monkeypatch.setattr(base, "forward", lambda input_ids, attention_mask=None, **_: forward(input_ids=input_ids))
    ids = torch.tensor([[3, 4]])
    model._plain_forward(input_ids=ids, use_cache=False, logits_to_keep=1)  # these it can do without
    with pytest.raises(EchoModelError, match=r"LlamaForCausalLM\.forward takes no past_key_values, which"):
        model._plain_forward(input_ids=ids, cache=DynamicCache(config=base.config))


def test_the_on_pass_runs_the_answer_columns_only():
    model = tiny_echo_model()
    model._usable_head(model.get_base_model(), one_row())  # runs once, before anything is counted
    widths = []
    model.get_base_model().model.embed_tokens.register_forward_pre_hook(
        lambda _m, args: widths.append(args[0].shape[1])
    )
    model.echo_losses(**collate(rows_of((8, 3), (6, 2))), is_routed=True)
    assert widths == [10, 3]


def test_logits_at_supervised_positions_only():
    model = tiny_echo_model()
    model._usable_head(model.get_base_model(), one_row())
    shapes = []
    model.get_output_embeddings().register_forward_hook(lambda _m, _args, out: shapes.append(tuple(out.shape[:-1])))
    model.echo_losses(**collate(rows_of((8, 3), (6, 2))), is_routed=True).loss.backward()
    assert shapes == [(1, 1), (1, 1), (5,), (5,)]  # the model's own call is cut to one column


def test_with_prompts_trained_on_the_on_pass_still_has_logits_at_answers_only():
    model = tiny_echo_model()
    model._usable_head(model.get_base_model(), one_row())
    batch = collate(rows_of((8, 3), (6, 2)), train_on_prompt=True)
    shapes, widths = [], []
    model.get_output_embeddings().register_forward_hook(lambda _m, _args, out: shapes.append(tuple(out.shape[:-1])))
    model.get_base_model().model.embed_tokens.register_forward_pre_hook(
        lambda _m, args: widths.append(args[0].shape[1])
    )
    model.echo_losses(**batch, is_routed=True).loss.backward()
    assert widths == [10, 3]
    assert shapes == [(1, 1), (1, 1), (5,), (5,), (12,)]  # 7 and 5 prompt tokens have a predecessor


@pytest.mark.parametrize(("trains_prompt", "columns"), [(False, [3, 3]), (True, [10, 3])])
@pytest.mark.parametrize("echo_step", ["shared_prefix", "full"])
def test_a_model_that_keeps_its_logits_makes_them_where_they_are_needed(echo_step, trains_prompt, columns, monkeypatch):
    model = tiny_echo_model(echo_step=echo_step)
    monkeypatch.setattr(model, "_usable_head", lambda *_: None)
    widths = []
    model.get_output_embeddings().register_forward_hook(lambda _m, _args, out: widths.append(out.shape[1]))
    model.echo_losses(**collate(rows_of((8, 3), (6, 2)), train_on_prompt=trains_prompt), is_routed=True)
    assert widths == columns


@pytest.mark.parametrize("is_routed", [True, False])
def test_without_a_mask_of_answers_there_is_no_loss_on_prompts(is_routed):
    batch = collate(rows_of((8, 3), (6, 2)))
    output = tiny_echo_model().echo_losses(**batch, is_routed=is_routed)
    assert output.ce_prompt is None
    assert "ce_prompt" not in output
    # the mask alone changes nothing, where the labels leave prompts out
    same = tiny_echo_model().echo_losses(**batch, completion_mask=batch["labels"] != -100, is_routed=is_routed)
    assert same.ce_prompt == 0
    torch.testing.assert_close(same.loss, output.loss)


def test_entropy_and_accuracy_are_those_of_all_tokens_that_are_trained_on():
    model = tiny_echo_model()
    rows = rows_of((8, 3), (6, 2))
    ids = rows[0][0]
    ids[1] = int(model.get_base_model()(torch.tensor([ids[:1]])).logits.argmax())  # one prompt token is foreseen
    output = model.echo_losses(**collate(rows, train_on_prompt=True), is_routed=False)
    hits, entropy = [], []
    for ids, _ in rows:
        logits = model.get_base_model()(torch.tensor([ids])).logits[0, :-1]
        hits += (logits.argmax(-1) == torch.tensor(ids[1:])).float().tolist()
        entropy += torch.distributions.Categorical(logits=logits).entropy().tolist()
    assert len(hits) == 17
    assert hits[0] == 1
    assert output.token_accuracy.item() == pytest.approx(sum(hits) / 17)
    assert output.entropy.item() == pytest.approx(sum(entropy) / 17, rel=1e-5)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_the_echo_off_pass_alone_is_plain_lora_on_the_whole_text(method):
    """What the plain arm of a recipe trains, by the model's own loss."""
    rows = rows_of((8, 3), (6, 2), (1, 4))
    batch = collate(rows, "left", train_on_prompt=True)
    model = tiny_echo_model(method=method)
    echo = model.echo_losses(**batch, is_routed=False)
    echo.loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters() if "lora_" in n}
    model.zero_grad()

    model.echo_enabled = False
    del batch["completion_mask"]
    first = batch["attention_mask"].argmax(1, keepdim=True)
    batch["labels"].scatter_(1, first, -100)  # the row's first token, which padding would predict
    plain = model(**batch)
    plain.loss.backward()
    torch.testing.assert_close(echo.loss, plain.loss, rtol=1e-5, atol=0)
    assert len(expected) > 10
    for name, parameter in model.named_parameters():
        if name in expected:
            assert (parameter.grad - expected[name]).norm() <= 1e-5 * expected[name].norm().clamp(min=1e-2), name


@pytest.mark.parametrize("is_routed", [True, False])
def test_an_output_layer_that_is_trained_keeps_its_gradient(is_routed):
    model = tiny_echo_model("llama")
    head = model.get_output_embeddings()
    head.weight.requires_grad_(True)
    assert model._usable_head(model.get_base_model(), one_row()) is None
    model.echo_losses(**collate(rows_of((8, 3), (6, 2))), is_routed=is_routed).loss.backward()
    assert head.weight.grad.abs().sum() > 0


def test_a_model_that_does_more_to_its_logits_keeps_them(caplog):
    model = tiny_echo_model()
    batch = collate(rows_of((8, 3), (6, 2)))
    base = model.get_base_model()
    base.register_forward_hook(lambda _m, _args, out: out.__setitem__("logits", out.logits * 2))
    with caplog.at_level(logging.WARNING):
        loss = model.echo_losses(**batch, is_routed=True).ce_off
    assert model._abilities._head is None
    assert "changes its logits" in caplog.text
    assert loss != tiny_echo_model().echo_losses(**batch, is_routed=True).ce_off


@pytest.mark.parametrize(
    "change",
    [
        lambda logits: 7.6 * logits,
        lambda logits: 30 * torch.tanh(logits / 30),
        lambda logits: logits.index_fill(-1, torch.tensor([5]), -1e9),
        lambda logits: logits + logits.new_ones(logits.shape[-1]).cumsum(0),
        lambda logits: torch.cat([logits, logits[..., :2]], dim=-1),
    ],
    ids=["factor", "soft cap", "forbidden token", "bias", "more tokens"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_a_model_does_to_its_logits_is_found_whatever_the_first_tokens_are(change, dtype):
    """Padding of zero embedding has logits of zero, and small logits pass a soft cap unchanged."""
    model = tiny_echo_model().to(dtype)
    base = model.get_base_model()
    batch = collate(rows_of((8, 3), (2, 2)), "left")
    base.model.embed_tokens.weight.data[0] = 0
    base.lm_head.weight.data *= 0.01
    aligned = align_rows(**batch)
    assert model._usable_head(base, aligned) is not None
    model._abilities._head_is_known = False
    base.register_forward_hook(lambda _m, _args, out: out.__setitem__("logits", change(out.logits)))
    assert model._usable_head(base, aligned) is None


def test_comparing_the_output_layer_leaves_random_numbers_and_hooks_alone():
    model = tiny_echo_model()
    hooks = len(model.get_base_model().lm_head._forward_pre_hooks)
    before = torch.get_rng_state()
    model._usable_head(model.get_base_model(), one_row())
    assert torch.equal(torch.get_rng_state(), before)
    assert len(model.get_base_model().lm_head._forward_pre_hooks) == hooks


class Waits(TorchDispatchMode):
    """Notes the operations for which the host waits until a device is done."""

    def __init__(self):
        super().__init__()
        self.noted = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        sizes_depend_on_values = func.name() in {"aten::nonzero", "aten::masked_select", "aten::equal"} or (
            func.name() in {"aten::index.Tensor", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
            and any(index is not None and index.dtype == torch.bool for index in args[1])
        )
        if sizes_depend_on_values or func.name() in {"aten::_local_scalar_dense", "aten::item"}:
            self.noted.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalization": "standardize", "source_gradient": True},
        {"distillation_tokens": "teacher_better"},
        {"echo_on_updates": "echo_only"},
        {"distillation_direction": "off_to_on"},
    ],
    ids=str,
)
def test_nothing_waits_for_the_device_from_the_first_layer_to_the_end_of_backward(options, is_checkpointed):
    model = tiny_echo_model(**options)
    if is_checkpointed:
        model.gradient_checkpointing_enable()
    batch = collate(rows_of((8, 3), (6, 2)), train_on_prompt="echo_on_updates" not in options)
    model(**batch, num_items_in_batch=torch.tensor(5)).loss.backward()  # tried, and warm
    noted = []  # at the start of each pass, the operations noted so far
    with Waits() as waits:
        layer = model.get_base_model().model.layers[0]
        layer.register_forward_pre_hook(lambda *_: noted.append(len(waits.noted)))
        model(**batch, num_items_in_batch=torch.tensor(5)).loss.backward()
    assert len(noted) == 2
    assert noted[0] > 0  # those of the alignment
    assert waits.noted[noted[0] :] == []


def test_an_unrouted_step_is_one_pass():
    model = tiny_echo_model()
    model._usable_head(model.get_base_model(), one_row())
    calls = []
    model.get_base_model().model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    output = model.echo_losses(**collate(rows_of((8, 3), (6, 2))), is_routed=False)
    assert calls == [1]
    assert not output.routed
    assert output.ce_on == output.distillation == output.echo_norm == 0


@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (lambda base: setattr(base.config, "layer_types", ["full_attention", "linear_attention"]), "linear_attention"),
        (lambda base: setattr(base, "_is_stateful", True), "recurrent state"),
    ],
)
def test_where_sharing_is_not_exact_the_pass_is_full_and_says_so_once(break_it, reason, caplog, monkeypatch):
    model = tiny_echo_model()
    base = model.get_base_model()
    break_it(base)
    assert reason in sharing.why_full(base)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            assert not model._shares_prefix(sharing.why_full(base))
    assert len(caplog.records) == 1
    assert reason in caplog.text
    forced = tiny_echo_model(echo_step="shared_prefix")
    break_it(forced.get_base_model())
    with pytest.raises(EchoModelError, match=reason):
        forced._shares_prefix(sharing.why_full(forced.get_base_model()))


def test_checkpointing_switched_on_behind_the_model_still_injects():
    """The base model's own switch sets no context; a recomputation would forget echo and prefix."""
    model, other = tiny_echo_model(), tiny_echo_model()
    batch = collate(rows_of((8, 3), (6, 2)))
    model.get_base_model().activation_checkpointing_enable()
    for m in (model, other):
        m.echo_losses(**batch, is_routed=True).loss.backward()
    for (name, p), (_, q) in zip(model.named_parameters(), other.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=lambda m, n=name: f"{n}: {m}")


def test_a_graph_that_is_retained_gives_the_same_gradient_again():
    model = tiny_echo_model(echo_step="shared_prefix")
    model.gradient_checkpointing_enable()
    loss = model.echo_losses(**collate(rows_of((8, 3), (6, 2))), is_routed=True).loss
    parameters = [p for p in model.parameters() if p.requires_grad]
    first = torch.autograd.grad(loss, parameters, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(loss, parameters), first)


def test_reentrant_checkpointing_switched_on_behind_the_model_is_refused():
    model = tiny_echo_model()
    model.get_base_model().activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(EchoModelError, match="use_reentrant"):
        model.echo_losses(**collate(rows_of((8, 3), (6, 2))), is_routed=True)


def test_checkpointing_with_a_shared_prefix_says_nothing_of_caches(caplog):
    """transformers' warning that it drops the cache would be false here."""
    model = tiny_echo_model(echo_step="shared_prefix")
    model.gradient_checkpointing_enable()
    logger = logging.getLogger("transformers.modeling_layers")
    logger.addHandler(caplog.handler)
    model.echo_losses(**collate(rows_of((8, 3), (6, 2))), is_routed=True).loss.backward()
    logger.removeHandler(caplog.handler)
    assert "Caching" not in caplog.text


@pytest.mark.parametrize("is_routed", [True, False])
def test_mixture_of_experts_keeps_its_auxiliary_loss(is_routed):
    model = tiny_echo_model("mixtral")
    batch = collate(rows_of((5, 2), (3, 3)))
    plain = model.echo_losses(**batch, is_routed=is_routed).loss
    with_prompts = collate(rows_of((5, 2), (3, 3)), train_on_prompt=True)  # 5 answer tokens and 6 of prompts
    plain_with_prompts = model.echo_losses(**with_prompts, is_routed=is_routed).loss
    config = model.get_base_model().config
    config.output_router_logits, config.router_aux_loss_coef = True, 0.5
    whole = model.echo_losses(**batch, is_routed=is_routed)
    assert whole.loss > plain + 0.1
    # the shares of equal micro-batches add up to the whole
    halves = [model.echo_losses(**batch, is_routed=is_routed, num_items_in_batch=10).loss for _ in range(2)]
    torch.testing.assert_close(sum(halves), whole.loss)

    # it is the same whatever is supervised of the same columns
    auxiliary = model.echo_losses(**with_prompts, is_routed=is_routed).loss - plain_with_prompts
    torch.testing.assert_close(auxiliary, whole.loss - plain)


def test_layers_that_share_keys_and_values_run_the_pass_in_full():
    model = tiny_echo_model()
    model.get_base_model().config.num_kv_shared_layers = 2
    assert "keys and values of others" in sharing.why_full(model.get_base_model())


def test_a_source_layer_that_drops_tokens_is_refused():
    """Its column would be another token's."""
    model = tiny_echo_model(echo_step="full", source_layers=[3])
    model.get_base_model().model.layers[3].register_forward_hook(lambda _m, _args, out: out[:, 1:])
    with pytest.raises(EchoModelError, match="needs 10 tokens"):
        model.echo_losses(**collate(rows_of((8, 3), (6, 2))), is_routed=True)


def test_a_model_that_names_no_output_layer_keeps_its_logits(caplog, monkeypatch):
    model = tiny_echo_model()
    monkeypatch.setattr(model.get_base_model(), "get_output_embeddings", lambda: None)
    batch = collate(rows_of((8, 3), (6, 2)))
    with caplog.at_level(logging.WARNING):
        loss = model.echo_losses(**batch, is_routed=True).loss
    assert "names no output layer" in caplog.text
    torch.testing.assert_close(loss, tiny_echo_model().echo_losses(**batch, is_routed=True).loss)


def test_a_target_that_gives_no_tensor_is_named():
    """A router of experts gives its choice beside its logits."""
    model = tiny_echo_model(injection_site="output")
    layer = model.get_base_model().get_submodule("model.layers.0.self_attn.q_proj")
    (hook,) = layer._forward_hooks.values()
    with (
        model._injector.injecting(Injection({}, torch.ones(1, 2))),
        pytest.raises(EchoModelError, match="returns a tuple"),
    ):
        hook(layer, (), (torch.ones(1, 2, 3), torch.ones(1, 2)))


def test_a_source_layer_that_is_skipped_is_refused():
    """Mllama skips the layers that attend to images where there are none."""
    model = tiny_echo_model(echo_step="full")
    model._source_layers = [*model._source_layers, torch.nn.Identity()]
    with pytest.raises(EchoModelError, match="3 source layers returned 2 states"):
        model.echo_losses(**collate(rows_of((8, 3), (6, 2))), is_routed=True)


@pytest.mark.parametrize("echo_step", ["shared_prefix", "full"])
def test_a_full_second_pass_draws_dropout_of_its_own_for_the_prompt_too(echo_step):
    """As R-Drop needs it; with a shared prefix the prompt has the masks of the first pass."""
    base, config = tiny_base(), EchoConfig(source_layers=[1], target_layers=[0], echo_step=echo_step)
    model = get_echo_model(base, lora_config(lora_dropout=0.5), config).train()
    batch = collate(rows_of((8, 3), (8, 3)))
    model.echo_losses(**batch, is_routed=True)  # tried before
    masks: list[torch.Tensor] = []
    module = next(m for n, m in model.named_modules() if n.endswith("layers.0.mlp.up_proj"))
    handle = module.lora_dropout["default"].register_forward_hook(lambda _m, _args, out: masks.append(out == 0))
    model.echo_losses(**batch, is_routed=True)
    handle.remove()
    off, on = masks  # (B, T, d)
    if echo_step == "full":
        assert on.shape == off.shape
        assert not torch.equal(on[:, :7], off[:, :7])  # of the prompt before the boundary
    else:
        assert on.shape[1] == 3  # from the boundary on
        assert not torch.equal(on, off[:, -3:])
