"""The loss terms against first principles and against plain autograd, in chunks and at the edges."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from echo_lora.method import losses
from echo_lora.method.config import EchoConfig
from echo_lora.method.losses import distillation, loss_terms


@pytest.fixture
def logits():
    g = torch.Generator().manual_seed(0)
    off, on = (torch.randn(13, 7, generator=g, requires_grad=True) for _ in range(2))  # a chunk of 5 divides neither
    return off, on, torch.randint(7, (13,), generator=g)


def reference_terms(off, on, targets, config):
    """Loss, CE(off), CE(on) and distillation of logits, for autograd to differentiate."""
    ce_off = F.cross_entropy(off, targets, reduction="sum")
    if on is None:
        return ce_off, ce_off, torch.zeros(()), torch.zeros(())
    ce_on = F.cross_entropy(on, targets, reduction="sum")
    teacher, student = (on, off) if config.distillation_direction == "on_to_off" else (off, on)
    T = config.distillation_temperature
    t, s = (teacher.detach() / T).softmax(-1), (student / T).softmax(-1)
    kl = T**2 * (t * (t / s).log()).sum(-1)
    if config.distillation_tokens == "teacher_better":
        at = torch.arange(len(targets)), targets
        kl = kl * (teacher.softmax(-1)[at] > student.softmax(-1)[at])
    kl = kl.sum()
    return ce_off + ce_on + config.distillation_weight * kl, ce_off, ce_on, kl


def test_a_divergence_of_equal_distributions_is_zero(logits):
    off, _, _ = logits
    kl, gradient = distillation(off, off, 2.0)
    assert kl.abs().max() == 0
    assert gradient.abs().max() == 0


@pytest.mark.parametrize("V", [260, 50_000])
def test_a_small_divergence_is_not_lost_in_rounding(V):
    g = torch.Generator().manual_seed(0)
    off = 2 * torch.randn(8, V, generator=g)
    on = off + 1e-2 * torch.randn(8, V, generator=g)
    exact = reference_terms(off.double(), on.double(), torch.zeros(8, dtype=torch.long), EchoConfig())[3]
    kl, _ = distillation(on.log_softmax(-1), off.log_softmax(-1), EchoConfig().distillation_temperature)
    assert exact / 8 < 1e-4
    assert kl.min() > 0
    assert kl.sum() == pytest.approx(exact.item(), rel=2e-4)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_distillation_by_hand(temperature):
    teacher, student = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]], requires_grad=True)
    p, q = torch.softmax(teacher / temperature, -1), torch.softmax(student / temperature, -1)
    expected = temperature**2 * (p * (p / q).log()).sum(-1)
    kl, gradient = distillation(teacher, student.detach(), temperature)
    torch.testing.assert_close(kl, expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected.sum(), student)[0])


class TinyHead(nn.Linear):
    vocabulary = 7


@pytest.fixture
def states():
    """Hidden states of two passes, targets, and an output layer that is frozen."""
    g = torch.Generator().manual_seed(0)
    off, on = (torch.randn(13, 4, generator=g, requires_grad=True) for _ in range(2))
    head = TinyHead(4, 7).requires_grad_(False)
    return off, on, torch.randint(7, (13,), generator=g), head


@pytest.mark.parametrize("chunk", [1, 5, 7, 256])  # 5 and 7 divide neither 13 nor each other
@pytest.mark.parametrize("block", [1, 3, 256])  # rows for each thread
@pytest.mark.parametrize("direction", ["on_to_off", "off_to_on"])
@pytest.mark.parametrize("tokens", ["all", "teacher_better"])
@pytest.mark.parametrize("routed", [True, False])
def test_chunks_give_the_loss_and_gradient_of_autograd(states, routed, tokens, direction, block, chunk, monkeypatch):
    off, on, targets, head = states
    config = EchoConfig(distillation_direction=direction, distillation_tokens=tokens, distillation_weight=0.7)
    passes = [off, on] if routed else [off]

    expected = reference_terms(head(off), head(on) if routed else None, targets, config)
    expected_gradients = torch.autograd.grad(expected[0] * 3, passes)

    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", chunk * TinyHead.vocabulary)
    monkeypatch.setattr(losses, "BLOCK_ELEMENTS", block * TinyHead.vocabulary)
    actual = loss_terms(off, on if routed else None, targets, config, head)
    gradients = torch.autograd.grad(actual.loss * 3, passes)
    torch.testing.assert_close(actual.to_tuple()[:4], expected)
    torch.testing.assert_close(gradients, expected_gradients)
    assert not any(term.requires_grad for term in actual.to_tuple()[1:])


@pytest.mark.parametrize("chunk", [1, 5, 256])
@pytest.mark.parametrize("routed", [True, False])
def test_prompt_tokens_add_their_cross_entropy_of_the_echo_off_pass(states, routed, chunk, monkeypatch):
    off, on, targets, head = states
    prompt = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), requires_grad=True)
    prompt_targets = torch.arange(6)
    answer = loss_terms(off, on if routed else None, targets, EchoConfig(), head)
    cross_entropy = nn.functional.cross_entropy(head(prompt), prompt_targets, reduction="sum")
    expected = torch.autograd.grad(2 * (answer.loss + cross_entropy), [off, prompt])

    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", chunk * TinyHead.vocabulary)
    both = loss_terms(off, on if routed else None, targets, EchoConfig(), head, (prompt, prompt_targets))
    torch.testing.assert_close(both.ce_prompt, cross_entropy.detach())
    torch.testing.assert_close(both.loss, answer.loss + cross_entropy)
    torch.testing.assert_close(torch.autograd.grad(2 * both.loss, [off, prompt]), expected)
    for name in ("ce_off", "ce_on", "distillation"):
        torch.testing.assert_close(getattr(both, name), getattr(answer, name))
    assert answer.ce_prompt == 0


def test_a_batch_without_prompt_tokens_keeps_its_prompts_on_the_graph(states):
    off, on, targets, head = states
    none = torch.zeros(0, 4, requires_grad=True)
    terms = loss_terms(off, on, targets, EchoConfig(), head, (none, targets[:0]))
    terms.loss.backward()
    assert terms.ce_prompt == 0
    assert none.grad.shape == (0, 4)


def test_no_tensor_of_the_vocabulary_is_larger_than_a_chunk(states, monkeypatch):
    off, on, targets, head = states
    sizes = []
    head.register_forward_hook(lambda _m, _args, out: sizes.append(len(out)))
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 4 * TinyHead.vocabulary)
    loss_terms(off, on, targets, EchoConfig(), head).loss.backward()
    assert sizes == [4, 4, 4, 4, 4, 4, 1, 1]  # neither all at once, nor again in backward


def test_nothing_is_differentiated_where_no_gradient_is_wanted(states):
    off, on, targets, head = states
    with torch.no_grad():
        quiet = loss_terms(off, on, targets, EchoConfig(), head)
    torch.testing.assert_close(
        quiet.to_tuple(), tuple(x.detach() for x in loss_terms(off, on, targets, EchoConfig(), head).to_tuple())
    )
    assert not quiet.loss.requires_grad


def test_a_second_derivative_is_an_error(states):
    off, on, targets, head = states
    loss = loss_terms(off, on, targets, EchoConfig(), head).loss ** 2  # whose own second derivative is not zero
    (gradient,) = torch.autograd.grad(loss, off, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("routed", [True, False])
def test_no_supervised_position_gives_zeros_on_the_graph(routed):
    """A rank without answers must still take part in the gradient exchange."""
    off, on = (torch.randn(0, 7, requires_grad=True) for _ in range(2))
    terms = loss_terms(off, on if routed else None, torch.zeros(0, dtype=torch.long), EchoConfig())
    assert terms.loss == 0
    terms.loss.backward()
    assert off.grad.shape == (0, 7)
    assert (on.grad is not None) == routed


def test_half_precision_is_computed_in_float32():
    off = torch.full((1, 50_000), 20.0, dtype=torch.bfloat16)
    terms = loss_terms(off, None, torch.tensor([3]), EchoConfig())
    assert terms.ce_off.dtype == torch.float32
    torch.testing.assert_close(terms.ce_off, torch.tensor(50_000.0).log())


def test_entropy_and_accuracy(logits):
    off, _, targets = logits
    terms = loss_terms(off, None, targets, EchoConfig())
    p = off.softmax(-1)
    torch.testing.assert_close(terms.entropy, -(p * p.log()).sum())
    assert terms.token_accuracy == (off.argmax(-1) == targets).sum()
