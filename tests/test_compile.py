"""torch.compile: hooks, caches and routing that change between steps must not be frozen into a graph."""

from __future__ import annotations

import pytest
import torch
from transformers import TrainingArguments

from architectures import collate, random_row, tiny_echo_model
from echo_lora import EchoConfig, EchoTrainer
from echo_lora.adapter.export import save_verified
from echo_lora.errors import EchoModelError
from test_oracle import gradients, mixed_rows

ROUTING = [False, True, False, True]  # a graph of the first, plain step must not serve the second


@pytest.fixture(autouse=True)
def forgotten():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def steps(model, run) -> list[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Loss and gradients of some steps, the last of another shape."""
    found = []
    for index, is_routed in enumerate(ROUTING):
        rows = mixed_rows(index + 1)[: 3 if index == len(ROUTING) - 1 else None]
        model.echo_config = EchoConfig(**model.echo_config.to_dict() | {"routing_start": float(is_routed)})
        loss = run(**collate(rows)).loss
        loss.backward()
        found.append((loss.detach(), gradients(model)))
        assert any(name.startswith("echo.") for name in found[-1][1]) == is_routed
    return found


def compiled_layers(model, backend):
    for layer in model.get_base_model().model.layers:
        layer.compile(backend=backend)
    return model


WAYS = {"layers": compiled_layers, "model": lambda model, backend: torch.compile(model, backend=backend)}


@pytest.mark.parametrize(
    ("way", "backend", "site"),
    [
        ("layers", "eager", "lora_input"),
        ("layers", "eager", "output"),
        pytest.param("layers", "aot_eager", "lora_input", marks=pytest.mark.slow),
        pytest.param("layers", "inductor", "lora_input", marks=pytest.mark.slow),
        pytest.param("model", "aot_eager", "lora_input", marks=pytest.mark.slow),
    ],
)
def test_compiled_steps_are_those_of_the_model(way, backend, site):
    plain, model = (tiny_echo_model(injection_site=site, echo_step="shared_prefix") for _ in range(2))
    expected = steps(plain, plain)
    torch._dynamo.utils.counters.clear()
    actual = steps(model, WAYS[way](model, backend))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0
    if way == "layers":
        assert not torch._dynamo.utils.counters["graph_break"]
    for (loss, found), (loss_expected, found_expected) in zip(actual, expected, strict=True):
        torch.testing.assert_close(loss, loss_expected, rtol=1e-5, atol=0)
        assert found.keys() == found_expected.keys()
        names = sorted(found)
        difference = torch.cat([(found[n] - found_expected[n]).flatten() for n in names]).norm()
        assert difference <= 1e-5 * torch.cat([found_expected[n].flatten() for n in names]).norm()


def test_compiled_layers_and_checkpointing_are_refused():
    model = tiny_echo_model()
    model.gradient_checkpointing_enable()
    compiled_layers(model, "eager")
    with pytest.raises(EchoModelError, match="Don't compile"):
        model.echo_losses(**collate(mixed_rows()), is_routed=True)


@pytest.mark.slow
def test_torch_compile_of_the_training_arguments(tmp_path):
    g = torch.Generator().manual_seed(1)
    rows = [random_row(g, 3 + i % 5, 2 + i % 3) for i in range(16)]
    data = [dict(zip(("input_ids", "labels"), row, strict=True)) for row in rows]
    weights = []
    for compiling in ({}, {"torch_compile": True, "torch_compile_backend": "eager"}):
        model = tiny_echo_model(routing_schedule="linear")
        args = TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=4,
            max_steps=6,
            learning_rate=1e-2,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            **compiling,
        )
        trainer = EchoTrainer(
            model=model,
            args=args,
            train_dataset=data,
            data_collator=lambda features: collate([(f["input_ids"], f["labels"]) for f in features]),
        )
        trainer.train()
        trainer.save_model(str(tmp_path / "adapter"))
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad]))
    torch.testing.assert_close(weights[1], weights[0], rtol=1e-5, atol=1e-7)


def test_a_model_with_compiled_layers_is_saved(tmp_path):
    """Its copy is not compiled, and a compiler rounds in another way: the proof runs both as they are written."""

    def rounding(graph, inputs):
        return lambda *args: tuple(out * 1.00001 if torch.is_tensor(out) else out for out in graph(*args))

    model = compiled_layers(tiny_echo_model(), rounding)
    ids = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        assert not torch.equal(model(ids).logits, tiny_echo_model()(ids).logits)
    assert save_verified(model, tmp_path / "adapter").is_dir()
