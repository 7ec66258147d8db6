"""The loss terms against scipy-like first principles, in chunks and at the edges."""

from __future__ import annotations

import pytest
import torch

from echo_lora import losses
from echo_lora.config import EchoConfig
from echo_lora.losses import distillation, loss_terms


@pytest.fixture
def logits():
    g = torch.Generator().manual_seed(0)
    off, on = (torch.randn(13, 7, generator=g, requires_grad=True) for _ in range(2))  # a chunk of 5 divides neither
    return off, on, torch.randint(7, (13,), generator=g)


def test_a_divergence_of_equal_distributions_is_zero(logits):
    off, _, _ = logits
    assert distillation(teacher_NV=off, student_NV=off, temperature=2.0).abs() < 1e-5


def test_distillation_by_hand():
    teacher, student = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 2.0]])
    p, q = torch.softmax(teacher / 3, -1), torch.softmax(student / 3, -1)
    expected = 9 * (p * (p / q).log()).sum()
    torch.testing.assert_close(distillation(teacher_NV=teacher, student_NV=student, temperature=3.0), expected)


@pytest.mark.parametrize(("direction", "teacher"), [("on_to_off", 1), ("off_to_on", 0)])
def test_the_teacher_gets_no_gradient(logits, direction, teacher):
    off, on, targets = logits
    config = EchoConfig(distillation_direction=direction)
    loss_terms(off, on, targets, config).distillation.backward()
    assert (off, on)[teacher].grad is None
    assert (off, on)[1 - teacher].grad.abs().sum() > 0


@pytest.mark.parametrize("routed", [True, False])
def test_chunks_change_nothing(logits, routed, monkeypatch):
    off, on, targets = logits
    config = EchoConfig()

    def run():
        terms = loss_terms(off, on if routed else None, targets, config)
        (terms.ce_off + terms.ce_on + terms.distillation).backward()
        grads = [t.grad.clone() for t in (off, on) if t.grad is not None]
        off.grad = on.grad = None
        return terms, grads

    whole, whole_grads = run()
    monkeypatch.setattr(losses, "CHUNK", 5)
    parts, parts_grads = run()
    torch.testing.assert_close(tuple(parts), tuple(whole))
    torch.testing.assert_close(parts_grads, whole_grads)
    assert len(whole_grads) == 1 + routed


@pytest.mark.parametrize("routed", [True, False])
def test_no_supervised_position_gives_zeros_on_the_graph(routed):
    """A rank without answers must still take part in the gradient exchange."""
    off, on = (torch.randn(0, 7, requires_grad=True) for _ in range(2))
    terms = loss_terms(off, on if routed else None, torch.zeros(0, dtype=torch.long), EchoConfig())
    loss = terms.ce_off + terms.ce_on + terms.distillation
    assert loss == 0
    loss.backward()
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
    assert terms.correct == (off.argmax(-1) == targets).sum()
