"""EchoConfig: validation that names the field, layers by depth, JSON."""

from __future__ import annotations

import dataclasses

import pytest

from echo_lora.errors import EchoConfigError
from echo_lora.method.config import EchoConfig


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("source_layers", []),
        ("source_layers", [1, 1]),
        ("source_layers", "last"),
        ("target_layers", [True]),
        ("injection_site", "attention"),
        ("injection_mask", "all"),
        ("bottleneck", 0),
        ("bottleneck", 2.5),
        ("scale_init", 0.0),
        ("scale_init", float("nan")),
        ("gate_bias_init", "open"),
        ("routing_schedule", "step"),
        ("routing_start", 1.5),
        ("routing_end", -0.1),
        ("routing_seed", None),
        ("distillation_weight", -1.0),
        ("distillation_temperature", 0.0),
        ("distillation_direction", "both"),
        ("echo_lr_multiplier", 0),
        ("echo_kind", "loud"),
        ("echo_step", "fast"),
    ],
)
def test_a_wrong_value_is_refused_with_the_name_of_its_field(field, value):
    with pytest.raises(EchoConfigError, match=f"^{field} = "):
        EchoConfig(**{field: value})


def test_every_field_has_a_line_of_help():
    for field in dataclasses.fields(EchoConfig):
        assert field.metadata["help"], field.name


def test_json_round_trip():
    config = EchoConfig(source_layers=[-2, 3], injection_site="output", scale_init=2, echo_kind="noise")
    assert EchoConfig.from_json(config.to_json()) == config


def test_an_unknown_field_is_refused_with_the_nearest_name():
    with pytest.raises(EchoConfigError, match=r"'target_layer'.*Did you mean 'target_layers'"):
        EchoConfig.from_dict({"target_layer": [1]})


@pytest.mark.parametrize(
    ("depth", "source", "target"),
    [
        (32, [24, 25, 26, 27], [4, 5, 6, 7]),
        (30, [22, 23, 24, 25], [3, 4, 5, 6]),
        (64, [48, 50, 52, 54], [8, 10, 12, 14]),
        (12, [9, 10], [1, 2]),
        (2, [1], [0]),
    ],
)
def test_default_layers_scale_with_depth(depth, source, target):
    config = EchoConfig()
    assert config.resolve_source_layers(depth) == source
    assert config.resolve_target_layers(depth) == target


def test_negative_layers_count_from_the_end():
    assert EchoConfig(source_layers=[-1, 0]).resolve_source_layers(6) == [0, 5]


@pytest.mark.parametrize("index", [6, -7])
def test_an_unknown_layer_is_refused_with_the_depth(index):
    with pytest.raises(EchoConfigError, match=f"target_layers names layer {index}, but the model has 6"):
        EchoConfig(target_layers=[index]).resolve_target_layers(6)


def test_one_layer_named_in_two_ways_is_refused():
    with pytest.raises(EchoConfigError, match="twice"):
        EchoConfig(source_layers=[5, -1]).resolve_source_layers(6)


def test_the_shallow_control_reads_the_target_layers():
    config = EchoConfig(echo_kind="shallow", target_layers=[1, 2])
    assert config.resolve_source_layers(8) == [1, 2]
