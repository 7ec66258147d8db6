"""The benchmark measures what it says: the steps that are compared, the pairing, the processes, the files."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from transformers import PreTrainedModel
from trl import SFTTrainer
from typer.testing import CliRunner

from architectures import collate, random_row, tiny_echo_model
from echo_lora import EchoConfig, EchoSFTTrainer
from echo_lora.bench import floors, measure
from echo_lora.bench.estimate import TimeLeft, left_text
from echo_lora.bench.floors import Weights, count_weights, operations
from echo_lora.bench.measure import ChildError, in_own_process, run_bench, time_steps
from echo_lora.bench.programs import CASES, VARIANTS, Batch, Case, Program, chosen_cases, parse_shape, random_batch
from echo_lora.bench.programs import three_pass as literal_step
from echo_lora.bench.report import Interval, Measured, StepMemory, interval, table_of
from echo_lora.cli import app
from echo_lora.data.tokenize import TokenizedRow
from echo_lora.environment import MemoryWatch
from echo_lora.errors import EchoCheckpointError, EchoConfigError, EchoInterrupt, EchoModelError
from echo_lora.models import load_tokenizer
from echo_lora.recipe.build import load_base
from echo_lora.recipe.load import load_recipe
from echo_lora.recipe.rows import prepare_split
from tiny_recipe import tiny_folder, tiny_recipe

MEGABYTE = 2**20


def batch_of(*lengths: tuple[int, int]) -> Batch:
    """A row of ones for each (prompt, answer)."""
    return Batch("planted", [TokenizedRow([1] * (P + A), [-100] * P + [1] * A) for P, A in lengths])


# --------------------------------------------------------------------- the shapes


def test_shapes_are_prompt_and_answer():
    assert parse_shape("96x8") == (96, 8)
    assert parse_shape("512x64") == (512, 64)


@pytest.mark.parametrize("text", ["96x", "x8", "0x8", "96x0", "96", "96x8x2", "-1x8", "96 x 8", "ax8", ""])
def test_other_shapes_are_refused_with_an_example(text):
    with pytest.raises(EchoConfigError, match=rf"^--shape {text}: write prompt .* --shape 96x8\."):
        parse_shape(text)


def test_a_batch_knows_its_tokens_and_itself():
    batch = batch_of((10, 2), (3, 5))
    assert (batch.prompt_tokens, batch.answer_tokens, batch.supervised_tokens) == (13, 7, 7)
    gap = Batch("planted", [TokenizedRow([1, 2, 3, 4], [-100, 2, -100, 4])])
    assert (gap.prompt_tokens, gap.answer_tokens, gap.supervised_tokens) == (1, 3, 2)
    assert batch.sha256 == batch_of((10, 2), (3, 5)).sha256 != batch_of((10, 2), (4, 4)).sha256


def test_random_rows_have_the_shape_and_the_vocabulary(tmp_path):
    recipe = load_recipe(tiny_recipe(tmp_path))
    tokenizer = load_tokenizer(recipe.model)
    batch = random_batch(recipe, tokenizer, 5, 3, rows=50)
    assert (batch.name, batch.prompt_tokens, batch.answer_tokens) == ("5x3", 250, 150)
    ids = [token for row in batch.rows for token in row.input_ids]
    assert 0 <= min(ids) < 20
    assert 380 < max(ids) < 400
    for row in batch.rows:
        assert row.labels == [-100] * 5 + row.input_ids[5:]
        assert row.input_ids[-1] == tokenizer.eos_token_id
    assert random_batch(recipe, tokenizer, 5, 3, rows=50) == batch


# ---------------------------------------------------------------------- the steps


ROUTING = {"routing_schedule", "routing_start", "routing_end", "routing_seed"}  # the literal step is always routed
# A value of each other option that is not its default.
OPTIONS = {
    "source_layers": [0, -1],
    "target_layers": [1],
    "normalization": "standardize",
    "injection_site": "lora_input",
    "injection_mask": "answer",
    "bottleneck": 4,
    "scale_init": 0.5,
    "gate_bias_init": -1.0,
    "distillation_weight": 0.3,
    "distillation_temperature": 5.0,
    "distillation_direction": "off_to_on",
    "distillation_tokens": "teacher_better",
    "distillation_warmup": 0.5,
    "source_gradient": True,
    "echo_on_updates": "echo_only",
    "routed_loss_scale": 0.5,
    "echo_lr_multiplier": 3.0,
    "echo_lr_warmup": 0.5,
    "gradient_clipping": "apart",
    "echo_step": "full",
}
KINDS = ["zero", "noise", "shuffled", "shallow"]


def test_every_option_of_the_echo_is_compared():
    assert {*OPTIONS, "echo_kind", *ROUTING} == {field.name for field in dataclasses.fields(EchoConfig)}
    for name, value in OPTIONS.items():
        assert value != getattr(EchoConfig(), name)


def ragged_batch() -> dict[str, torch.Tensor]:
    """Answers of unequal length, so that padding follows some of them."""
    generator = torch.Generator().manual_seed(0)
    return collate([random_row(generator, 5, 3), random_row(generator, 2, 4), random_row(generator, 4, 1)])


@pytest.mark.parametrize(
    "change",
    [
        {},
        *({option: value} for option, value in OPTIONS.items()),
        *({"echo_kind": kind} for kind in KINDS),
        {"distillation_direction": "off_to_on", "injection_mask": "answer"},
    ],
    ids=str,
)
@pytest.mark.parametrize("is_checkpointed", [False, True], ids=["kept", "checkpointed"])
def test_the_literal_step_gives_the_losses_and_gradients_of_ours(change, is_checkpointed):
    model, batch = tiny_echo_model(**change), ragged_batch()
    if is_checkpointed:
        model.gradient_checkpointing_enable()
    model.set_routing_clock(0, 8)
    model(**batch)  # there are no statistics before a first step
    model.set_routing_clock(1, 8)
    found = []
    for step in (
        lambda: literal_step(model, **batch, num_items_in_batch=11),
        lambda: model(**batch, num_items_in_batch=11),
    ):
        model.zero_grad()
        torch.manual_seed(0)  # of the noise
        output = step()
        output.loss.backward()
        found.append((output, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}))
    (literal, gradients), (ours, our_gradients) = found
    assert (literal.distillation > 0) == (change.get("echo_kind") != "zero")
    for name, value in ours.items():
        torch.testing.assert_close(literal[name], value.to(literal[name].dtype), rtol=1e-5, atol=1e-6, msg=name)
    for name, gradient in our_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    assert model.echo_enabled


def test_the_literal_step_balances_the_load_of_a_mixture_of_experts():
    model = tiny_echo_model("mixtral")
    model.config.output_router_logits, model.config.router_aux_loss_coef = True, 0.5
    balance = [
        (output.loss - output.ce_off - output.ce_on - output.distillation).item()
        for output in (literal_step(model, **ragged_batch()), model(**ragged_batch()))
    ]
    assert balance[0] > 0.1
    assert balance[0] == pytest.approx(balance[1], rel=0.1)  # ours runs no token that predicts nothing


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """Every case on one tiny base, the base, and their batch."""
    folder = tmp_path_factory.mktemp("programs")
    recipe = load_recipe(tiny_recipe(folder), ["training.learning_rate=1e-3"])
    base, tokenizer = load_base(recipe), load_tokenizer(recipe.model)
    batch = random_batch(recipe, tokenizer, 9, 4, rows=3)
    return {case: Program(case, recipe, base, tokenizer, batch, str(folder)) for case in CASES}, base, batch


def test_the_cases_are_six_programs_with_and_without_checkpointing():
    assert [*VARIANTS] == ["trl_lora", "trl_dora", "lora", "three_pass", "echo", "echo_dora"]
    assert len(CASES) == len(set(CASES)) == 12
    assert Case("echo_dora", True).trl == Case("trl_dora", True)
    assert Case("three_pass", False).trl == Case("trl_lora", False)


def test_trl_s_programs_are_trl_s_trainer_and_ours_are_ours(programs):
    for case, program in programs[0].items():
        if case.variant.startswith("trl"):
            assert type(program.trainer) is SFTTrainer
        else:
            assert isinstance(program.trainer, EchoSFTTrainer)
        assert program.trainer.args.loss_type == "nll"
        is_dora = program.model.peft_config["default"].use_dora
        assert is_dora is case.variant.endswith("dora")
        flags = [m.gradient_checkpointing for m in program.model.modules() if hasattr(m, "gradient_checkpointing")]
        assert any(flags) is case.checkpointing


def test_the_programs_share_the_base_s_tensors_and_nothing_else(programs):
    made, base, _ = programs
    frozen = {p.data_ptr() for p in base.parameters()}
    assert base.forward.__func__ is type(base).forward  # TRL patches the forward of its own copy
    trained: set[int] = set()
    for case, program in made.items():
        shared = {p.data_ptr() for p in program.model.parameters() if not p.requires_grad}
        own = {p.data_ptr() for p in program.model.parameters() if p.requires_grad}
        assert shared == frozen, case
        assert own
        assert not own & (frozen | trained), case
        trained |= own


def test_a_step_trains_its_own_adapter_and_reports_its_routing(programs):
    made, base, batch = programs
    before = [p.clone() for p in base.parameters()]
    inputs = {case: program.inputs_of(batch) for case, program in made.items()}
    for inputs_of_case, count in inputs.values():
        assert count == 12
        assert torch.equal(inputs_of_case["input_ids"], inputs[CASES[0]][0]["input_ids"])

    def adapters() -> dict[Case, list[torch.Tensor]]:
        return {
            case: [p.detach().clone() for p in program.model.parameters() if p.requires_grad]
            for case, program in made.items()
        }

    for case, program in made.items():
        old = adapters()
        program.step(*inputs[case])
        for other, values in adapters().items():
            is_same = all(map(torch.equal, values, old[other]))
            assert is_same is (other != case), f"{case} changed {other}"
        assert all(p.grad is None for p in program.model.parameters())
        assert program.routed == (1.0 if VARIANTS[case.variant].routing else 0.0)
    assert all(map(torch.equal, before, base.parameters()))


def test_all_programs_start_from_the_same_loss(tmp_path):
    """TRL's loss is our CE(off), whatever program computes it: they differ in what they do for it."""
    recipe = load_recipe(tiny_recipe(tmp_path))
    base, tokenizer = load_base(recipe), load_tokenizer(recipe.model)
    batch = random_batch(recipe, tokenizer, 9, 4, rows=3)
    losses = {}
    for case in CASES:
        trainer = (program := Program(case, recipe, base, tokenizer, batch, str(tmp_path))).trainer
        inputs, count = program.inputs_of(batch)
        loss = trainer.training_step(program.model, dict(inputs), count)
        losses[str(case)] = trainer._meter.sums["ce_off"] if hasattr(trainer, "_meter") else loss
    assert len(losses) == 12
    for name, loss in losses.items():
        torch.testing.assert_close(loss, losses["trl_lora, checkpointing off"], rtol=1e-5, atol=0, msg=name)


def test_every_program_steps_once_in_each_round_and_a_resumed_round_has_its_order():
    order: list[tuple[Case, int]] = []

    class Fake:
        def __init__(self, case: Case) -> None:
            self.case = case

        def inputs_of(self, batch: Batch) -> tuple[Case, int]:
            return self.case, len(batch.rows)

        def step(self, case: Case, rows: int) -> None:
            order.append((case, rows))

    def rounds_of(rounds: range) -> list[list[tuple[Case, int]]]:
        order.clear()
        programs, batch = {case: Fake(case) for case in CASES}, batch_of((2, 1), (2, 1), (2, 1))
        found = list(time_steps(programs, batch, rounds, seed=0, left=lambda: None))
        assert [is_warm_up for is_warm_up, _ in found] == [True, *(False for _ in rounds)]
        assert all(set(seconds) == set(CASES) for _, seconds in found)
        return [order[i : i + 12] for i in range(0, len(order), 12)]

    rounds = rounds_of(range(5))
    assert len(rounds) == 6
    assert all(set(round_) == {(case, 3) for case in CASES} for round_ in rounds)
    assert len({tuple(round_) for round_ in rounds}) == 6
    assert rounds_of(range(3, 5)) == [rounds[0], *rounds[4:]]


def test_the_cases_are_those_that_the_user_asks_for(tmp_path):
    recipe = load_recipe(tiny_recipe(tmp_path))
    assert chosen_cases(recipe, (), None) == [Case(name, False) for name in ("trl_lora", "lora", "echo")]
    checkpointed = load_recipe(tiny_recipe(tmp_path), ["training.gradient_checkpointing=true", "method=dora"])
    assert chosen_cases(checkpointed, (), None) == [Case("trl_dora", True), Case("echo_dora", True)]
    assert chosen_cases(recipe, ["echo", "lora", "echo"], "on") == [Case("lora", True), Case("echo", True)]
    assert chosen_cases(recipe, [*VARIANTS], "both") == CASES
    with pytest.raises(EchoConfigError, match=r"^--variant ecko: there is no such step\. Did you mean 'echo'"):
        chosen_cases(recipe, ["echo", "ecko"], None)
    with pytest.raises(EchoConfigError, match=r"^--checkpointing maybe: write off, on, both\.$"):
        chosen_cases(recipe, [], "maybe")


# --------------------------------------------------------------------- the floors

# layers of 100 weights, 80 of them passed by a gradient, 10 of them trained; an output layer of 1000
PLANTED = Weights(layers=100, with_gradient=80, trained=10, output_layer=1000)


def test_floors_by_hand(monkeypatch):
    batch = batch_of((8, 3), (4, 5))  # P = 12, A = 8, 20 tokens
    on, off = Case("echo", True), Case("echo", False)
    # a token: 2·100 forward, 2·80 gradient of inputs, 2·10 of the adapter; checkpointed, 2·80 once more
    assert operations(PLANTED, off.lora, batch, 0.0) == (20 * 380, 8 * 4000)
    assert operations(PLANTED, on.lora, batch, 0.0) == (20 * 540, 8 * 4000)
    assert operations(PLANTED, off, batch, 1.0) == (28 * 380, 16 * 4000)
    assert operations(PLANTED, off, batch, 0.25) == (22 * 380, 10 * 4000)
    # z's pass has no gradient; every pass scores every token
    assert operations(PLANTED, Case("three_pass", False), batch, 1.0) == (20 * (200 + 2 * 380), 20 * (2000 + 8000))

    found = floors.floors(PLANTED, off, batch, 1.0)
    assert found.layers == pytest.approx(28 / 20)  # (P + 2·A) / (P + A)
    assert found.output_layer == 2.0
    assert found.both == pytest.approx((28 * 380 + 16 * 4000) / (20 * 380 + 8 * 4000))
    assert str(found) == "1.40 / 2.00 / 1.88"
    ours = floors.floors(PLANTED, off.lora, batch, 0.0)
    assert (ours.layers, ours.output_layer, ours.both) == (1.0, 1.0, 1.0)

    for labels_only, scored in ((False, 18), (True, 8)):  # of 20 tokens, the last of each row predicts nothing
        monkeypatch.setattr(floors, "trl_scores_labels_only", lambda answer=labels_only: answer)
        trl = floors.floors(PLANTED, off.trl, batch, 0.0)
        assert (trl.layers, trl.output_layer) == (1.0, scored / 8)
        assert trl.both == pytest.approx((20 * 380 + scored * 4000) / (20 * 380 + 8 * 4000))


def test_a_model_without_an_output_layer_has_one_floor():
    weights = Weights(layers=100, with_gradient=80, trained=10, output_layer=0)
    found = floors.floors(weights, Case("echo", False), batch_of((8, 4)), 1.0)
    assert (found.output_layer, found.both) == (1.0, found.layers)


def test_weights_are_counted_on_the_model_itself(tmp_path):
    recipe = load_recipe(tiny_recipe(tmp_path))
    # width 32, key heads of 16, inner width 48, 4 layers, 400 tokens; r = 4 on q, v and up
    attention, inner = 2 * 32 * 32 + 2 * 32 * 16, 3 * 32 * 48
    adapter = 4 * ((32 + 32) + (32 + 16) + (32 + 48))
    expected = Weights(4 * (attention + inner + adapter), 4 * (attention + inner + adapter), 4 * adapter, 400 * 32)
    assert count_weights(recipe) == expected
    for other in ("method=dora", "lora.init=pissa"):
        assert count_weights(load_recipe(tiny_recipe(tmp_path), [other])) == expected


def test_layers_below_the_first_adapter_have_no_backward(tmp_path):
    recipe = load_recipe(tiny_recipe(tmp_path, lora={"r": 4, "target_modules": ["layers.2.self_attn.q_proj"]}))
    layer, adapter = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48, 4 * (32 + 32)
    assert count_weights(recipe) == Weights(4 * layer + adapter, 2 * layer + adapter, adapter, 400 * 32)


def test_a_token_meets_few_of_the_experts(tmp_path):
    from transformers import MixtralConfig

    tiny_recipe(tmp_path)
    shape = {"vocab_size": 400, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 4}
    config = MixtralConfig(**shape, **heads, num_local_experts=8, num_experts_per_tok=2)
    config.save_pretrained(tmp_path / "base")  # counting needs no weights
    recipe = load_recipe(tiny_recipe(tmp_path, lora={"r": 4, "target_modules": ["q_proj"]}))
    layer, adapter = 4 * 32 * 32 + 8 * 32 + 2 * (3 * 32 * 48), 4 * (32 + 32)
    assert count_weights(recipe).layers == 2 * (layer + adapter)


class Operations(TorchDispatchMode):
    """Counts by torch's formulas. FlopCounterMode does too, but can't follow the step's torch.autograd.grad."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function.overloadpacket in flop_registry:
            self.total += flop_registry[function.overloadpacket](*args, **(kwargs or {}), out_val=result)
        return result


@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_the_operations_are_those_that_torch_counts(tmp_path, checkpointing):
    """Wide layers and short rows, so that what is not counted, attention and the echo's networks, is little.

    The output layer is as large as all layers.
    """
    tiny_folder(tmp_path / "base", width=256, layers=8, inner=1024, vocabulary=32_000)
    recipe = load_recipe(tiny_recipe(tmp_path), ["echo_config.bottleneck=1"])
    base, tokenizer = load_base(recipe), load_tokenizer(recipe.model)
    weights, batch = count_weights(recipe), random_batch(recipe, tokenizer, 24, 24, rows=2)
    for variant in ("trl_lora", "lora", "echo", "three_pass"):
        case = Case(variant, checkpointing)
        program = Program(case, recipe, base, tokenizer, batch, str(tmp_path))
        inputs = program.inputs_of(batch)
        program.step(*inputs)  # with what is tried before the first step
        with Operations() as counter, set_checkpoint_early_stop(False):  # by default the last matrix is left out
            program.step(*inputs)
        assert counter.total == pytest.approx(sum(operations(weights, case, batch, program.routed)), rel=0.05), case
        if variant == "trl_lora":
            with FlopCounterMode(display=False) as theirs, set_checkpoint_early_stop(False):
                program.step(*inputs)
            assert theirs.get_total_flops() == counter.total


# ------------------------------------------------------------------- the estimate


def test_the_time_left_is_scaled_by_arithmetic_until_a_step_is_seen():
    a, b = Case("lora", False), Case("echo", False)
    time = TimeLeft([{a: 10.0, b: 20.0}, {a: 100.0, b: 200.0}], memory_steps=2)
    memory = [(0, b), (1, a), (1, b)]
    rounds = [{a: 4, b: 4}, {a: 4, b: 4}]
    assert time.seconds(memory, rounds) is None
    assert left_text(time.seconds(memory, rounds)) == ""
    time.add_process(0, a, 7.0, 1.0)  # a process starts in 5 seconds and steps in 1, which is 0.1 for each operation
    assert time.seconds([(0, b)], [{}, {}]) == pytest.approx(5 + 2 * 2 + 5)  # and the model is loaded for the rounds
    assert time.seconds([], [{b: 3}, {a: 1}]) == pytest.approx(3 * 2 + 10)
    assert time.seconds(memory, rounds) == pytest.approx(3 * 5 + 2 * (2 + 10 + 20) + 5 + 4 * (1 + 2 + 10 + 20))
    time.add_step(1, b, 50.0, 40.0, 60.0)  # the median of what was seen, whatever the arithmetic says
    assert time.seconds([], [{}, {b: 2}]) == pytest.approx(100)
    assert left_text(250.2) == ", about 4:10 left"


# -------------------------------------------------------------------- the figures


def test_interval_is_of_order_statistics():
    few, many = interval([3.0, 1.0, 2.0]), interval([float(n) for n in range(15, 0, -1)])
    assert few == Interval(2.0, 1.0, 3.0)  # the range
    assert many == Interval(8.0, 4.0, 12.0)  # P(X₍₄₎ ≤ median ≤ X₍₁₂₎) = 1 - 2·P(Bin(15, ½) ≤ 3) = 0.965
    assert interval([2.0]) == Interval(2.0, 2.0, 2.0)
    assert interval([1.0] * 6 + [1e9]).median == 1.0
    assert f"{few:.1f}" == "2.0 (1.0–3.0)"
    assert f"{Interval(1.0, 1.0, 1.0):.2f}" == "1.00"


FACTORS = {"trl_lora": 1, "trl_dora": 2, "lora": 0.8, "three_pass": 3, "echo": 1.2, "echo_dora": 2.5}


def planted(case: Case) -> Measured:
    """Seconds whose ratios are constant within rounds although the machine slows down from round to round."""
    first = FACTORS[case.variant] * (10 if case.checkpointing else 1)
    routed = VARIANTS[case.variant].routing or 0.0
    memory = StepMemory(before=100, peak=int(1000 * first))
    return Measured(memory, None, routed, [first * slowness for slowness in (1.0, 5.0, 2.0)])


def test_ratios_are_paired_by_round_method_and_checkpointing():
    batch = batch_of((8, 4), (8, 4))
    table = table_of(batch, {case: planted(case) for case in CASES}, PLANTED)
    assert (table.rows, table.prompt_tokens, table.answer_tokens, table.supervised_tokens) == (2, 16, 8, 8)
    assert [Case(line.variant, line.checkpointing) for line in table.lines] == CASES
    expected = {"trl_lora": 1, "trl_dora": 1, "lora": 0.8, "three_pass": 3, "echo": 1.2, "echo_dora": 1.25}
    for line in table.lines:
        case, ratio = Case(line.variant, line.checkpointing), expected[line.variant]
        for found in dataclasses.astuple(line.over_trl):  # median and both ends: the rounds agree
            assert found == pytest.approx(ratio)
        assert line.fastest_over_trl == pytest.approx(ratio)
        assert line.memory_over_trl == pytest.approx(ratio)
        if VARIANTS[line.variant].is_dora:
            assert line.over_lora is line.fastest_over_lora is line.floors is line.over_floors is None
            assert line.memory_over_lora is None
        else:
            assert line.over_lora.median == line.fastest_over_lora == pytest.approx(ratio / 0.8)
            assert line.floors == floors.floors(PLANTED, case, batch, line.routed)
            assert line.over_floors == pytest.approx(ratio / 0.8 / line.floors.both)
            assert line.memory_over_lora == pytest.approx(ratio / 0.8)
        assert line.step.median == pytest.approx(2 * planted(case).seconds[0])
        assert line.fastest == planted(case).seconds[0]


def test_the_fastest_are_compared_whatever_their_rounds():
    measured = {case: planted(case) for case in CASES[:6]}
    echo, lora = Case("echo", False), Case("lora", False)
    measured[echo].seconds, measured[lora].seconds = [3.0, 9.0, 9.0], [9.0, 2.0, 9.0]
    lines = {line.variant: line for line in table_of(batch_of((8, 4)), measured, PLANTED).lines}
    assert lines["echo"].fastest == 3.0
    assert lines["echo"].fastest_over_lora == 1.5
    assert lines["echo"].over_lora.median == 1.0


def test_a_failed_case_has_its_error_and_no_ratio_to_it():
    failed = {Case("trl_lora", False), Case("echo", True)}
    measured = {case: Measured(error="no room") if case in failed else planted(case) for case in CASES}
    table = table_of(batch_of((8, 4)), measured, PLANTED)
    lines = {Case(line.variant, line.checkpointing): line for line in table.lines}
    for case in failed:
        assert lines[case].error == "no room"
        assert lines[case].step is lines[case].memory is None
    assert lines[Case("echo", False)].over_trl is lines[Case("echo", False)].memory_over_trl is None
    assert lines[Case("echo", False)].over_lora is not None
    assert lines[Case("three_pass", True)].over_trl is not None
    assert [row["seconds"] for row in table.cells()].count("failed") == 2


def test_a_table_without_the_steps_to_compare_with_has_seconds_and_floors():
    (line,) = table_of(batch_of((8, 4)), {Case("echo", True): planted(Case("echo", True))}, PLANTED).lines
    assert line.step.median == 24.0
    assert line.over_trl is line.over_lora is line.memory_over_trl is None
    assert line.floors.layers == pytest.approx(16 / 12)


# ------------------------------------------------------------------ the processes


@pytest.mark.parametrize("can_reset", [True, False])
def test_memory_watch_sees_what_came_and_went_and_not_what_was_before(monkeypatch, can_reset):
    if not can_reset:
        monkeypatch.setattr(Path, "write_text", lambda *_: (_ for _ in ()).throw(PermissionError()))
    torch.ones(100 * MEGABYTE // 4)  # a peak of 100 MB before
    with MemoryWatch() as watch:
        held = torch.ones(40 * MEGABYTE // 4)
        for _ in range(20):  # time for the thread to look
            held += 1
        del held
    assert 35 * MEGABYTE < watch.peak - watch.before < 60 * MEGABYTE


def fail() -> None:
    raise ValueError("a planted\nerror")


def refuse() -> None:
    raise EchoModelError("a planted refusal")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_of_its_own_answers_or_its_end_is_reported(capfd):
    assert in_own_process(os.getppid) != os.getppid()
    assert in_own_process(abs, -3) == 3
    with pytest.raises(ChildError, match=r"^ValueError: a planted error$"):
        in_own_process(fail)
    assert "in fail" in capfd.readouterr().err  # with its traceback
    with pytest.raises(EchoModelError, match=r"^a planted refusal$"):
        in_own_process(refuse)
    with pytest.raises(ChildError, match=r"^its process was killed, .* lack of memory$"):
        in_own_process(die)


def test_memory_of_a_case_is_measured_in_a_process(tmp_path):
    recipe = load_recipe(tiny_recipe(tmp_path))
    batch = random_batch(recipe, load_tokenizer(recipe.model), 9, 4, rows=3)
    memory, seconds = in_own_process(measure.measure_memory, Case("echo", True), recipe, batch)
    assert 50 * MEGABYTE < memory.before < memory.peak
    assert 0 < seconds < 60


# -------------------------------------------------------------------- the command


MEMORY = StepMemory(before=10**9, peak=3 * 10**9)


def planted_memory(function, *args) -> tuple[StepMemory, float]:
    """In the place of in_own_process, which costs seconds for each case."""
    assert function is measure.measure_memory
    return MEMORY, 0.01


@pytest.fixture
def quick_children(monkeypatch):
    monkeypatch.setattr(measure, "in_own_process", planted_memory)


def invoke(*args: object, code: int = 0):
    result = CliRunner().invoke(app, ["bench", *map(str, args)], catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


def test_the_command_prints_and_writes_every_case_on_every_shape(tmp_path, quick_children):
    output = tmp_path / "bench"
    options = ["--shape", "9x4", "--shape", "6x2", "--rows", 2, "--rounds", 2, "--set", "seeds.initialisation=3"]
    options += ["--checkpointing", "both", *(word for name in VARIANTS for word in ("--variant", name))]
    result = invoke(tiny_recipe(tmp_path), *options, "--output", output)
    assert sorted(path.name for path in output.iterdir()) == ["bench.json", "bench.md", "bench.png"]
    assert (output / "bench.png").read_bytes().startswith(b"\x89PNG")

    report = json.loads((output / "bench.json").read_text())
    assert report["is_finished"] is True
    assert report["seed"] == 3
    assert report["arguments"]["shapes"] == ["9x4", "6x2"]
    assert report["recipe"]["model"] == str(tmp_path / "base")
    assert {"torch", "transformers", "peft", "trl", "accelerate", "echo_lora"} <= set(report["versions"])
    assert report["command"].split()[0] == "echo-lora"
    assert report["threads"] == torch.get_num_threads()
    assert {"commit", "machine", "device"} <= set(report)
    for table, (P, A) in zip(report["tables"], [(9, 4), (6, 2)], strict=True):
        assert (table["rows"], table["prompt_tokens"], table["answer_tokens"]) == (2, 2 * P, 2 * A)
        assert [Case(line["variant"], line["checkpointing"]) for line in table["lines"]] == CASES
        for line in table["lines"]:
            assert len(line["seconds"]) == 2
            assert line["error"] is None
            assert line["memory"] == {"before": 10**9, "peak": 3 * 10**9}
            assert line["memory_over_trl"] == 1.0
            assert line["routed"] == (VARIANTS[line["variant"]].routing or 0.0)
            assert line["over_trl"]["low"] <= line["over_trl"]["median"] <= line["over_trl"]["high"]
            assert line["fastest"] == min(line["seconds"])
        echo = next(line for line in table["lines"] if line["variant"] == "echo")
        assert echo["floors"]["layers"] == pytest.approx((P + 2 * A) / (P + A))
        assert echo["floors"]["output_layer"] == 2.0

    markdown = (output / "bench.md").read_text()
    for variant in VARIANTS:
        assert len(re.findall(rf"^ *{variant} +(?:on|off) ", result.stdout, re.MULTILINE)) == 8
        assert len(re.findall(rf"^\| {variant} \| (?:on|off) \|", markdown, re.MULTILINE)) == 8
    for text in (result.stdout, markdown):  # nothing is cut or wrapped
        assert len(re.findall(r"1\.\d\d / 2\.00 / 1\.\d\d\b", text)) == 4
        assert "…" not in text
    for progress in ("9x4: memory of echo_dora, checkpointing on", "6x2: round 2 of 2"):
        assert re.search(rf"^{progress}, about \d+:\d\d left \.\.\.$", result.stderr, re.MULTILINE)
    # said once, after the first step
    said = [line for line in result.stderr.splitlines() if "memory of" in line or line.startswith("This will take")]
    assert re.match(r"This will take about \d+:\d\d: 23 more measurements of memory, then 4 rounds\.", said[1])
    assert len(said) == 25


def test_without_a_shape_the_recipe_s_own_rows_are_measured(tmp_path, quick_children):
    report = run_bench(str(tiny_recipe(tmp_path)), rows=2, rounds=2, output=tmp_path / "bench")
    (table,) = report.tables
    assert table.name == "rows of recipe"
    assert table.rows == 2
    recipe = load_recipe(tmp_path / "recipe.yaml")
    rows = prepare_split(recipe, load_tokenizer(recipe.model), "train")[0].rows[:2]
    P, A = sum(row.answer_start for row in rows), sum(len(row.labels) - row.answer_start for row in rows)
    assert len({len(row.labels) for row in rows}) == 2  # ragged
    assert [line.variant for line in table.lines] == ["trl_lora", "lora", "echo"]
    assert table.lines[-1].floors.layers == pytest.approx((P + 2 * A) / (P + A))


def test_a_failed_case_is_shown_the_others_measured_and_the_exit_status_1(tmp_path, monkeypatch):
    def fail_once(function, case, *args):
        if case == Case("trl_lora", True):
            raise ChildError("its process ended with status -9")
        return planted_memory(function)

    monkeypatch.setattr(measure, "in_own_process", fail_once)
    output = tmp_path / "bench"
    options = ["--shape", "9x4", "--rounds", 2, "--checkpointing", "both", "--output", output]
    result = invoke(tiny_recipe(tmp_path), *options, code=1)
    assert "Error: trl_lora, checkpointing on, 9x4: its process ended with status -9" in result.stderr
    (table,) = json.loads((output / "bench.json").read_text())["tables"]
    assert [line["variant"] for line in table["lines"] if line["error"]] == ["trl_lora"]
    assert sum(len(line["seconds"]) for line in table["lines"]) == 10
    assert "failed: trl_lora, checkpointing on" in (output / "bench.md").read_text()


def test_what_is_wrong_from_the_start_is_said_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "in_own_process", lambda *args: pytest.fail("measured"))
    path = tiny_recipe(tmp_path)
    assert "--shape 0x8: write prompt" in invoke(path, "--shape", "0x8", "--output", tmp_path / "b", code=1).stderr
    assert (
        "--variant dora: there is no such step"
        in invoke(path, "--variant", "dora", "--output", tmp_path / "b", code=1).stderr
    )
    assert "--checkpointing" in invoke(path, "--checkpointing", "x", "--output", tmp_path / "b", code=2).stderr
    assert "unknown key lora.q" in invoke(path, "--set", "lora.q=1", "--output", tmp_path / "b", code=1).stderr
    with pytest.raises(EchoCheckpointError, match="exists and is not empty"):
        run_bench(str(path), output=tmp_path / "base")
    assert not (tmp_path / "b").exists()


def test_the_help_names_every_variant():
    text = " ".join(CliRunner().invoke(app, ["bench", "--help"], env={"COLUMNS": "200"}).output.split())
    assert all(re.search(rf"\b{name}\b", text) for name in VARIANTS)


# ----------------------------------------------------------------- interruptions


def interrupt_at(monkeypatch, place: str, number: int) -> list[Case]:
    """Press Ctrl-C in the call of this number; the cases of all calls so far, of memory and of steps."""
    calls: list[Case] = []
    count = iter(range(1, 1000))

    def count_up(case: Case, where: str) -> None:
        calls.append(case)
        if where == place and next(count) == number:
            raise KeyboardInterrupt

    def memory(function, case, *args):
        count_up(case, "memory")
        return planted_memory(function)

    step = measure._step

    def stepping(case, *args):
        count_up(case, "step")
        step(case, *args)

    monkeypatch.setattr(measure, "in_own_process", memory)
    monkeypatch.setattr(measure, "_step", stepping)
    return calls


def seconds_in(path: Path) -> list[list[float]]:
    return [line["seconds"] for table in json.loads(path.read_text())["tables"] for line in table["lines"]]


BENCH = {"shapes": ["9x4", "6x2"], "rows": 2, "rounds": 3, "command": "echo-lora bench mine"}


def test_an_interruption_before_anything_is_measured_leaves_nothing(tmp_path, monkeypatch):
    path = str(tiny_recipe(tmp_path))
    before = sorted(tmp_path.rglob("*"))
    interrupt_at(monkeypatch, "memory", 1)
    with pytest.raises(EchoInterrupt, match=r"^Interrupted\. 0 of 6 measurements of memory and 0 of 6 rounds are kept"):
        run_bench(path, **BENCH, output=tmp_path / "bench")
    assert sorted(tmp_path.rglob("*")) == before


def test_memory_survives_an_interruption(tmp_path, monkeypatch):
    path, output = str(tiny_recipe(tmp_path)), tmp_path / "bench"
    interrupt_at(monkeypatch, "memory", 3)
    with pytest.raises(EchoInterrupt, match=r"2 of 6 measurements of memory and 0 of 6 rounds are kept in .* Run"):
        run_bench(path, **BENCH, output=output)
    assert [path.name for path in output.iterdir()] == ["bench.json"]
    calls = interrupt_at(monkeypatch, "memory", 0)
    report = run_bench(path, **BENCH, output=output)
    assert calls[:4] == [Case("echo", False), *(Case(name, False) for name in ("trl_lora", "lora", "echo"))]
    assert all(line.memory == MEMORY for table in report.tables for line in table.lines)


def test_the_rounds_before_an_interruption_are_kept(tmp_path, monkeypatch, capsys):
    path, output = str(tiny_recipe(tmp_path)), tmp_path / "bench"
    # rounds of three steps: a warm-up and three rounds of 9x4, a warm-up of 6x2, one round, then in the second
    interrupt_at(monkeypatch, "step", 3 * 6 + 2)
    with pytest.raises(EchoInterrupt, match=r"6 of 6 measurements of memory and 4 of 6 rounds are kept"):
        run_bench(path, **BENCH, output=output)
    assert [path.name for path in output.iterdir()] == ["bench.json"]
    kept = seconds_in(output / "bench.json")
    assert [len(seconds) for seconds in kept] == [3, 3, 3, 1, 1, 1]
    assert json.loads((output / "bench.json").read_text())["is_finished"] is False
    (output / ".bench.json.0123abcd").write_text("{")  # of a process that was killed while it wrote
    capsys.readouterr()

    calls = interrupt_at(monkeypatch, "step", 0)
    run_bench(path, **BENCH | {"command": "the same in other words"}, output=output)
    assert len(calls) == 3 * 3  # a warm-up and the two missing rounds
    assert sorted(path.name for path in output.iterdir()) == ["bench.json", "bench.md", "bench.png"]
    after = seconds_in(output / "bench.json")
    assert [len(seconds) for seconds in after] == [3] * 6
    assert [seconds[: len(old)] for seconds, old in zip(after, kept, strict=True)] == kept
    said = capsys.readouterr().err
    assert "Resuming: 6 of 6 measurements of memory and 4 of 6 rounds are kept in" in said
    assert re.search(r"This will take about \d+:\d\d: 0 more measurements of memory, then 2 rounds", said)
    assert "6x2: round 2 of 3" in said
    with pytest.raises(EchoCheckpointError, match=r"exists and is not empty: it holds bench.json. Choose another"):
        run_bench(path, **BENCH, output=output)


def test_a_measurement_that_lacks_only_its_page_is_finished_without_a_step(tmp_path, monkeypatch):
    path, output = str(tiny_recipe(tmp_path)), tmp_path / "bench"
    interrupt_at(monkeypatch, "step", 0)
    whole = run_bench(path, **BENCH, output=output)
    for name in ("bench.md", "bench.png"):
        (output / name).unlink()
    values = json.loads((output / "bench.json").read_text())
    (output / "bench.json").write_text(json.dumps(values | {"is_finished": False}))
    calls = interrupt_at(monkeypatch, "step", 1)
    assert run_bench(path, **BENCH, output=output) == whole
    assert calls == []


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    """A recipe, and the folder of its measurement after the first round."""
    folder = tmp_path_factory.mktemp("interrupted")
    with pytest.MonkeyPatch.context() as patch:
        interrupt_at(patch, "step", 7)
        with pytest.raises(EchoInterrupt):
            run_bench(str(tiny_recipe(folder)), **BENCH, output=folder / "bench")
    return folder


@pytest.mark.parametrize(
    ("change", "overrides", "said"),
    [
        ({"rounds": 4}, [], "rounds: 3 then, 4 now"),
        ({"rows": 3}, [], "rows: 2 then, 3 now"),
        ({"shapes": ["9x4"]}, [], r"shapes: \['9x4', '6x2'\] then, \['9x4'\] now"),
        ({"variants": ["lora", "echo"]}, [], r"cases: \['trl_lora, .* then, \['lora, "),
        ({"checkpointing": "on"}, [], r"cases: .* now"),
        ({}, ["lora.r=2"], "recipe.lora.r: 4 then, 2 now"),
        ({}, ["seeds.initialisation=1"], "recipe.seeds.initialisation: 0 then, 1 now"),
    ],
    ids=str,
)
def test_other_settings_are_refused_by_name(interrupted, monkeypatch, change, overrides, said):
    monkeypatch.setattr(measure, "in_own_process", lambda *args: pytest.fail("measured"))
    before = (interrupted / "bench" / "bench.json").read_bytes()
    with pytest.raises(EchoCheckpointError, match="holds an unfinished measurement of another kind") as found:
        run_bench(str(interrupted / "recipe.yaml"), overrides, **BENCH | change, output=interrupted / "bench")
    assert re.search(rf"^  {said}", str(found.value), re.MULTILINE), found.value
    assert "To complete it, run `echo-lora bench mine` as it was then. For a new one choose another" in str(found.value)
    assert (interrupted / "bench" / "bench.json").read_bytes() == before


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("versions", lambda: {"torch": "0.1"}, "versions.torch: .* then, 0.1 now"),
        ("processor", lambda: "abacus", "machine: .* now"),
        ("devices", lambda: ["abacus"], "device: cpu .* then, abacus now"),
        ("commit", lambda: "abc", "commit: .* then, abc now"),
    ],
)
def test_another_machine_or_version_is_refused_by_name(interrupted, monkeypatch, name, value, said):
    monkeypatch.setattr(measure, name, value)
    with pytest.raises(EchoCheckpointError, match=rf"\n  {said}"):
        run_bench(str(interrupted / "recipe.yaml"), **BENCH, output=interrupted / "bench")


def test_other_rows_are_refused(tmp_path, monkeypatch):
    path, output = tiny_recipe(tmp_path), tmp_path / "bench"
    interrupt_at(monkeypatch, "memory", 2)
    with pytest.raises(EchoInterrupt):
        run_bench(str(path), rows=2, rounds=2, output=output)
    lines = (tmp_path / "train.jsonl").read_text().splitlines()
    (tmp_path / "train.jsonl").write_text("\n".join([lines[1], lines[0], *lines[2:]]))
    with pytest.raises(EchoCheckpointError, match=r"\n  tokens of the rows \(rows of recipe\): "):
        run_bench(str(path), rows=2, rounds=2, output=output)


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda text: text[:-20], "Expecting"),
        (lambda text: text.replace('"seconds": [', '"seconds": ["x", ', 1), r"tables\.0\.lines\.0\.seconds\.0 = 'x'"),
        (lambda text: text.replace('"variant": "lora"', '"variant": "loro"', 1), "9x4 has other cases"),
        (lambda text: text.replace('"seconds": [', '"seconds": [1.0, ', 1), "9x4 has rounds that lack a case"),
        (lambda text: text.replace('"tables"', '"table"'), "tables is missing"),
    ],
)
def test_a_damaged_file_is_not_resumed_from(interrupted, tmp_path, damage, said):
    (tmp_path / "bench").mkdir()
    text = damage((interrupted / "bench" / "bench.json").read_text())
    (tmp_path / "bench" / "bench.json").write_text(text)
    with pytest.raises(EchoCheckpointError, match=rf"bench\.json can't be resumed from: {said}"):
        run_bench(str(interrupted / "recipe.yaml"), **BENCH, output=tmp_path / "bench")
    assert (tmp_path / "bench" / "bench.json").read_text() == text


def test_files_of_earlier_versions_are_finished_measurements(tmp_path):
    """Nothing but people reads them; a new measurement must not overwrite them."""
    paths = sorted((Path(__file__).parent.parent / "results" / "bench").glob("*/bench.json"))
    assert len(paths) >= 3
    for path in paths:
        before = path.read_bytes()
        with pytest.raises(EchoCheckpointError, match="exists and is not empty"):
            run_bench("no recipe", output=path.parent)
        assert path.read_bytes() == before


@pytest.mark.slow
def test_the_whole_measurement_in_processes(tmp_path):
    report = run_bench(str(tiny_recipe(tmp_path)), shapes=["9x4"], rows=2, rounds=2, output=tmp_path / "bench")
    assert report.failures == []
    assert all(line.memory.peak > line.memory.before for line in report.tables[0].lines)


@pytest.mark.slow
def test_the_model_with_a_wide_vocabulary_can_be_measured(tmp_path):
    import subprocess
    import sys

    pytest.importorskip("gguf")
    script = Path(__file__).parent.parent / "scripts" / "wide_vocabulary_model.py"
    subprocess.run([sys.executable, script, tmp_path / "wide"], check=True, timeout=120)
    recipe = load_recipe("tiny", [f"model={tmp_path / 'wide'}"])
    base = load_base(recipe)
    assert isinstance(base, PreTrainedModel)
    assert base.config.vocab_size == 128_000
    batch = random_batch(recipe, load_tokenizer(recipe.model), 8, 4, rows=2)
    assert max(token for row in batch.rows for token in row.input_ids) > 60_000
    trl, ours = (
        in_own_process(measure.measure_memory, Case(variant, False), recipe, batch) for variant in ("trl_lora", "echo")
    )
    assert trl[0].peak > trl[0].before
    assert ours[0].peak > ours[0].before


@pytest.mark.slow
def test_a_profile_counts_each_operator_for_its_part_of_the_step(tmp_path):
    script = Path(__file__).parent.parent / "scripts" / "profile_step.py"
    options = ["--shape", "24x6", "--rows", "2", "--rounds", "1", "--output", str(tmp_path)]
    subprocess.run([sys.executable, script, *options], check=True, timeout=300, capture_output=True)
    found = json.loads((tmp_path / "profile.json").read_text())["shapes"]["24x6"]
    second = {"echo networks", "echo-on pass"}
    second |= {f"{part}, backward" for part in second}
    passes = {f"{part}{backward}" for part in ("echo-off pass", "losses") for backward in ("", ", backward")}
    assert passes | {"alignment", "optimizer"} <= found["lora"].keys()
    assert not second & found["lora"].keys()
    assert second <= found["echo"].keys()
    assert all(found["echo"][part]["matrix products"] > 0 for part in passes | second)
    assert "| echo-on pass, backward | 0 |" in (tmp_path / "profile.md").read_text()


@pytest.mark.slow
def test_the_gpu_check_runs_on_any_device_and_resumes(tmp_path):
    script = Path(__file__).parent.parent / "scripts" / "gpu_check.py"

    def run(*options: str) -> str:
        command = [sys.executable, str(script), "--tiny", "--output", str(tmp_path), *options]
        done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    assert "pieces are left" in run("--minutes", "0.001")
    first = json.loads((tmp_path / "gpu_check.json").read_text())["pieces"]
    assert first
    assert "Nothing is left." in run("--minutes", "60")
    pieces = json.loads((tmp_path / "gpu_check.json").read_text())["pieces"]
    assert {name: pieces[name] for name in first} == first
    assert {name.split()[0] for name in pieces} == {"parity", "waits", "steps", "second", "compiled"}
    assert "| tiny 12x4 | 2 | echo, checkpointing off |" in (tmp_path / "gpu_check.md").read_text()
