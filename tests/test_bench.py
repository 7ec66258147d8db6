"""The benchmark measures what it says: the steps that are compared, the pairing, the processes, the files."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel
from trl import SFTTrainer
from typer.testing import CliRunner

from architectures import collate, random_row, tiny_echo_model
from echo_lora import EchoConfig, EchoSFTTrainer
from echo_lora.bench import measure
from echo_lora.bench.measure import ChildError, in_own_process, run_bench, time_steps
from echo_lora.bench.programs import CASES, VARIANTS, Batch, Case, Program, parse_shape, random_batch
from echo_lora.bench.programs import three_pass as literal_step
from echo_lora.bench.report import Interval, StepMemory, interval, table_of
from echo_lora.cli import app
from echo_lora.data.tokenize import TokenizedRow
from echo_lora.environment import MemoryWatch
from echo_lora.errors import EchoCheckpointError, EchoConfigError, EchoModelError
from echo_lora.models import load_tokenizer
from echo_lora.recipe.build import load_base
from echo_lora.recipe.load import load_recipe
from echo_lora.recipe.rows import prepare_split
from tiny_recipe import tiny_recipe

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


def test_floor_counts_the_tokens_that_pass_through_the_model():
    assert batch_of((96, 8)).floor(1.0) == pytest.approx((96 + 16) / 104)
    assert batch_of((96, 8)).floor(0.0) == 1.0
    assert batch_of((0, 8), (0, 2)).floor(0.5) == pytest.approx(1.5)
    # rows of unequal length count by their tokens: (P, A) = (13, 7)
    assert batch_of((10, 2), (3, 5)).floor(0.6) == pytest.approx((13 + 1.6 * 7) / 20)


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


def test_every_program_steps_once_in_each_round():
    order: list[tuple[Case, int]] = []

    class Fake:
        def __init__(self, case: Case) -> None:
            self.case = case

        def inputs_of(self, batch: Batch) -> tuple[Case, int]:
            return self.case, len(batch.rows)

        def step(self, case: Case, rows: int) -> None:
            order.append((case, rows))

    seconds = time_steps({case: Fake(case) for case in CASES}, batch_of((2, 1), (2, 1), (2, 1)), rounds=5, seed=0)
    assert {case: len(times) for case, times in seconds.items()} == dict.fromkeys(CASES, 5)
    rounds = [order[i : i + 12] for i in range(0, len(order), 12)]
    assert len(rounds) == 6  # one of warm-up
    assert all(set(round_) == {(case, 3) for case in CASES} for round_ in rounds)
    assert len({tuple(round_) for round_ in rounds}) == 6


# -------------------------------------------------------------------- the figures


def test_interval_holds_the_median_and_narrows():
    wide, narrow = interval([1.0, 2.0, 3.0]), interval([1.0, 2.0, 3.0] * 40)
    assert wide.median == narrow.median == 2.0
    assert wide == interval([1.0, 2.0, 3.0])
    assert 1.0 <= wide.low < 2.0 < wide.high <= 3.0
    assert narrow.high - narrow.low < wide.high - wide.low
    assert f"{wide:.1f}" == "2.0 (1.0–3.0)"
    assert f"{Interval(1.0, 1.0, 1.0):.2f}" == "1.00"


def planted(case: Case) -> list[float]:
    """Seconds whose ratios are constant within rounds although the machine slows down from round to round."""
    factor = {"trl_lora": 1, "trl_dora": 2, "lora": 0.8, "three_pass": 3, "echo": 1.2, "echo_dora": 2.5}[case.variant]
    return [factor * (10 if case.checkpointing else 1) * slowness for slowness in (1.0, 5.0, 2.0)]


def test_ratios_are_paired_by_round_method_and_checkpointing():
    batch = batch_of((8, 4), (8, 4))
    seconds = {case: planted(case) for case in CASES}
    routed = {case: VARIANTS[case.variant].routing or 0.0 for case in CASES}
    memory = {case: StepMemory(before=100, peak=int(1000 * planted(case)[0])) for case in CASES}
    table = table_of(batch, seconds, routed, memory)
    assert (table.rows, table.prompt_tokens, table.answer_tokens) == (2, 16, 8)
    assert table.floor == pytest.approx(4 / 3)
    assert [Case(line.variant, line.checkpointing) for line in table.lines] == CASES
    expected = {"trl_lora": 1, "trl_dora": 1, "lora": 0.8, "three_pass": 3, "echo": 1.2, "echo_dora": 1.25}
    for line in table.lines:
        ratio = expected[line.variant]
        floor = 4 / 3 if VARIANTS[line.variant].routing else 1.0
        for found in dataclasses.astuple(line.over_trl):  # median and both ends: the rounds agree
            assert found == pytest.approx(ratio)
        assert line.over_floor.median == pytest.approx(ratio / floor)
        assert line.memory_over_trl == pytest.approx(ratio)
        if VARIANTS[line.variant].is_dora:
            assert line.over_lora is None
        else:
            assert line.over_lora.median == pytest.approx(ratio / 0.8)
        assert line.step.median == pytest.approx(2 * planted(Case(line.variant, line.checkpointing))[0])


def test_a_failed_case_has_its_error_and_no_ratio_to_it():
    failed = {Case("trl_lora", False), Case("echo", True)}
    works = [case for case in CASES if case not in failed]
    table = table_of(
        batch_of((8, 4)),
        {case: planted(case) for case in works},
        dict.fromkeys(works, 0.0),
        {case: "no room" if case in failed else StepMemory(1, 2) for case in CASES},
    )
    lines = {Case(line.variant, line.checkpointing): line for line in table.lines}
    for case in failed:
        assert lines[case].error == "no room"
        assert lines[case].step is lines[case].memory is None
    assert lines[Case("echo", False)].over_trl is lines[Case("echo", False)].memory_over_trl is None
    assert lines[Case("echo", False)].over_lora is not None
    assert lines[Case("three_pass", True)].over_trl is not None
    assert [row["seconds"] for row in table.cells()].count("failed") == 2


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
    memory = in_own_process(measure.measure_memory, Case("echo", True), recipe, batch)
    assert 50 * MEGABYTE < memory.before < memory.peak


# -------------------------------------------------------------------- the command


def planted_memory(function, *args) -> StepMemory:
    """In the place of in_own_process, which costs seconds for each case."""
    assert function is measure.measure_memory
    return StepMemory(before=10**9, peak=3 * 10**9)


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
    result = invoke(tiny_recipe(tmp_path), *options, "--output", output)
    assert sorted(path.name for path in output.iterdir()) == ["bench.json", "bench.md", "bench.png"]
    assert (output / "bench.png").read_bytes().startswith(b"\x89PNG")

    report = json.loads((output / "bench.json").read_text())
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

    markdown = (output / "bench.md").read_text()
    for variant in VARIANTS:
        assert len(re.findall(rf"^ *{variant} +(?:on|off) ", result.stdout, re.MULTILINE)) == 4
        assert len(re.findall(rf"^\| {variant} \| (?:on|off) \|", markdown, re.MULTILINE)) == 4
    for progress in ("9x4: memory of echo_dora, checkpointing on", "6x2: round 2 of 2"):
        assert progress in result.stderr


def test_without_a_shape_the_recipe_s_own_rows_are_measured(tmp_path, quick_children):
    report = run_bench(str(tiny_recipe(tmp_path)), rows=2, rounds=2, output=tmp_path / "bench")
    (table,) = report.tables
    assert table.name == "rows of recipe"
    assert table.rows == 2
    recipe = load_recipe(tmp_path / "recipe.yaml")
    rows = prepare_split(recipe, load_tokenizer(recipe.model), "train")[0].rows[:2]
    P, A = sum(row.answer_start for row in rows), sum(len(row.labels) - row.answer_start for row in rows)
    assert len({len(row.labels) for row in rows}) == 2  # ragged
    assert table.floor == pytest.approx((P + 2 * A) / (P + A))


def test_a_failed_case_is_shown_the_others_measured_and_the_exit_status_1(tmp_path, monkeypatch):
    def fail_once(function, case, *args):
        if case == Case("three_pass", True):
            raise ChildError("its process ended with status -9")
        return planted_memory(function)

    monkeypatch.setattr(measure, "in_own_process", fail_once)
    output = tmp_path / "bench"
    result = invoke(tiny_recipe(tmp_path), "--shape", "9x4", "--rounds", 2, "--output", output, code=1)
    assert "Error: three_pass, checkpointing on, 9x4: its process ended with status -9" in result.stderr
    (table,) = json.loads((output / "bench.json").read_text())["tables"]
    assert [line["variant"] for line in table["lines"] if line["error"]] == ["three_pass"]
    assert sum(len(line["seconds"]) for line in table["lines"]) == 22
    assert "failed: three_pass, checkpointing on" in (output / "bench.md").read_text()


def test_what_is_wrong_from_the_start_is_said_before_anything_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(measure, "in_own_process", lambda *args: pytest.fail("measured"))
    path = tiny_recipe(tmp_path)
    assert "--shape 0x8: write prompt" in invoke(path, "--shape", "0x8", "--output", tmp_path / "b", code=1).stderr
    assert "unknown key lora.q" in invoke(path, "--set", "lora.q=1", "--output", tmp_path / "b", code=1).stderr
    with pytest.raises(EchoCheckpointError, match="exists and is not empty"):
        run_bench(str(path), output=tmp_path / "base")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize("place", ["in_own_process", "time_steps"])
def test_an_interruption_leaves_nothing(tmp_path, monkeypatch, place):
    def interrupt(*args):
        raise KeyboardInterrupt

    path = tiny_recipe(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(measure, "in_own_process", planted_memory)
    monkeypatch.setattr(measure, place, interrupt)
    with pytest.raises(KeyboardInterrupt):
        run_bench(str(path), shapes=["9x4"], output=tmp_path / "bench")
    assert sorted(tmp_path.rglob("*")) == before


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
    assert trl.peak > trl.before
    assert ours.peak > ours.before
