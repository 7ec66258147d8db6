"""TRL's offloading of activations: every tensor that a step saves comes back once, and nothing else is moved."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from trl.models.activation_offloading import OffloadActivations

from architectures import collate, tiny_echo_model
from test_oracle import mixed_rows


@pytest.fixture
def offloading(monkeypatch):
    """TRL's context, for a CPU that counts as the accelerator: what it saves is copied, and copied back."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda *_, **__: torch.device("cpu"))
    monkeypatch.setattr(torch.cpu, "empty_cache", lambda: None, raising=False)  # called if bitsandbytes is imported

    def context(model):
        found = OffloadActivations(use_pin_memory=False, use_streams=False, min_offload_size=64)
        found.update_model_params(model)
        return found

    return context


def gradients(model, context):
    for is_routed in (True, False, True):  # the first step tries the model, too
        with context or nullcontext():
            output = model.echo_losses(**collate(mixed_rows()), is_routed=is_routed)
            if context is not None:
                assert sum(is_moved for _, is_moved, *_ in context.tracker.values()) > 10
            output.loss.backward()
            assert context is None or not context.tracker
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize(
    "config",
    [
        {},
        {"source_gradient": True},
        {"distillation_tokens": "teacher_better"},
        {"normalization": "standardize"},
        {"echo_on_updates": "echo_only"},
        {"echo_step": "full"},
        {"injection_site": "lora_input"},
    ],
    ids=str,
)
def test_a_step_whose_activations_are_offloaded_has_the_same_gradient(offloading, config, is_checkpointed):
    found = []
    for is_offloaded in (False, True):
        model = tiny_echo_model(**config)
        model._abilities._tried_on_batch = False
        if is_checkpointed:
            model.gradient_checkpointing_enable()
        found.append(gradients(model, offloading(model) if is_offloaded else None))
        assert model._abilities._why_full_on_batch is None
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name
