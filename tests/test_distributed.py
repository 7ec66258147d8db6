"""Two processes give what one does: losses and adapter, routed steps and others, whole and resumed, DDP and FSDP2.

One process with two batches per step stands for two processes with one batch each. In exact arithmetic they are equal;
in float32 they differ by the order in which gradients are added. Adam divides by the root of the second moment, which
blows that rounding up where a gradient is near zero: an epsilon of 1e-2 keeps its state and takes that away, so that
the tolerance can be 1e-5.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import sys
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import echo_lora
from echo_lora.errors import EchoCheckpointError, EchoConfigError
from echo_lora.method.grouping import CPU_PRICE
from echo_lora.recipe.record import RunResult
from echo_lora.training.checkpoint import fill
from echo_lora.training.support import refuse_parallelism
from test_trainer import echo_model, trainer_of
from tiny_recipe import tiny_document, tiny_recipe

SCRIPT = Path(__file__).parent / "distributed_run.py"
CONFIGS = Path(echo_lora.__file__).parent / "accelerate"
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Run:
    folder: Path
    logs: list[dict[str, float]]
    adapter: dict[str, torch.Tensor]  # the folder that save_model wrote
    echo: dict[str, torch.Tensor]  # of the last checkpoint
    initial: str  # hash of the adapter before the first step


def on_cpu(**variables: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", **variables}


def launch(folder: Path, plan: str, **settings: Any) -> subprocess.CompletedProcess:
    """plan: `one` process, or the name of a shipped configuration for two."""
    processes = 1 if plan == "one" else 2
    defaults = {
        "kind": "EchoTrainer",
        "base": "llama",
        "method": "lora",
        "dtype": "float32",
        "echo": "{}",  # of the EchoConfig, as JSON
        "data": [24, 0],
        "stop": None,
        "price": CPU_PRICE,  # of a group of rows
    }
    defaults |= {"resume": None, "adam_epsilon": 1e-2, "gradient_accumulation_steps": 2 // processes}
    command = [str(SCRIPT), str(folder), json.dumps(defaults | settings)]
    if plan == "one":
        command = [sys.executable, *command]
    else:
        config = CONFIGS / f"{plan}.yaml" if "/" not in plan else Path(plan)
        options = ["--config_file", str(config), "--num_processes", "2", "--main_process_port", "0"]
        command = [sys.executable, "-m", "accelerate.commands.launch", *options, *command]
    return subprocess.run(command, env=on_cpu(), timeout=300, capture_output=True, text=True)


def train(folder: Path, plan: str, **settings: Any) -> Run:
    done = launch(folder, plan, **settings)
    assert done.returncode == 0, done.stderr[-5000:]
    said = json.loads((folder / "run.json").read_text())
    expected = {"one": "DistributedType.NO", "ddp": "DistributedType.MULTI_CPU", "fsdp2": "DistributedType.FSDP"}
    if plan in expected:
        assert said == {"type": expected[plan], "processes": 1 + (plan != "one"), "shards": plan == "fsdp2"}
    echo = sorted(folder.glob("checkpoint-*/echo_state.safetensors"))[-1]
    logs = json.loads((folder / "logs.json").read_text())
    seal = json.loads((echo.parent / "echo_checkpoint.json").read_text())
    adapter = load_file(folder / "adapter" / "adapter_model.safetensors")
    return Run(folder, logs, adapter, load_file(echo), seal["initial_adapter_sha256"])


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The run of one process with these settings, made once."""

    @cache
    def run(**settings: Any) -> Run:
        return train(tmp_path_factory.mktemp("one"), "one", **settings)

    return run


LOGGED = (
    *("loss", "objective", "ce_off", "ce_on", "distillation", "routed", "echo_norm", "grad_norm"),
    *("eval_loss", "train_loss"),
)


def assert_same(expected: Run, got: Run) -> None:
    assert len(expected.logs) == len(got.logs)
    compared = 0
    for a, b in zip(expected.logs, got.logs, strict=True):
        for name in LOGGED:
            assert (name in a) == (name in b), (a["step"], name)
            if name in a:
                compared += 1
                assert b[name] == pytest.approx(a[name], rel=TOLERANCE, abs=1e-8), (a["step"], name)
    assert compared > 20
    assert expected.initial == got.initial
    for a, b in ((expected.adapter, got.adapter), (expected.echo, got.echo)):
        assert a.keys() == b.keys()
        for name, value in a.items():
            error = (b[name] - value).norm() / value.norm().clamp(min=1e-12)
            assert error <= TOLERANCE, f"{name} differs by {error:.2g}"


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "recomputed"])
@pytest.mark.parametrize("plan", ["ddp", "fsdp2"])
def test_two_processes_give_what_one_does(tmp_path, reference, plan, checkpointing):
    one = reference()
    two = train(tmp_path, plan, activation_checkpointing=checkpointing)
    steps = [log for log in one.logs if "loss" in log]
    assert {log["routed"] for log in steps} == {0.0, 1.0}
    assert steps[2]["distillation"] > 1e-2  # the echo has an effect
    assert_same(one, two)


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["ddp", "fsdp2"])
def test_sft_on_two_processes_gives_what_one_does(tmp_path, reference, plan):
    settings = {"kind": "EchoSFTTrainer", "eval_strategy": "steps", "eval_steps": 3}
    assert_same(reference(**settings), train(tmp_path, plan, **settings))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("plan", "settings"),
    [("ddp", {}), ("fsdp2", {}), ("ddp", {"echo": '{"normalization": "standardize"}'})],
    ids=["ddp", "fsdp2", "statistics"],
)
def test_processes_that_split_their_rows_differently_give_what_one_does(tmp_path, reference, plan, settings):
    """Groups that cost nothing: every row of another length runs alone, unless the processes communicate in a pass."""
    settings = settings | {"per_device_train_batch_size": 3}
    assert_same(reference(**settings), train(tmp_path, plan, price=0, **settings))


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "recomputed"])
@pytest.mark.parametrize("plan", ["ddp", "fsdp2"])
def test_packed_rows_on_two_processes_give_what_one_does(tmp_path, reference, plan, checkpointing):
    """Eight packed rows, so two steps of four make an epoch. Steps only: TRL weighs packs in `eval_loss` equally."""
    settings = {"kind": "EchoSFTTrainer", "packing": True, "max_length": 24, "method": "dora"}
    two = train(tmp_path, plan, activation_checkpointing=checkpointing, **settings)
    assert_same(reference(**settings), two)


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"method": "dora"},
        # the base; the adapter stays in float32. Without clipping, whose norm is summed in another order: one bit of
        # it flips roundings to bfloat16 a few steps on
        {"dtype": "bfloat16", "max_grad_norm": 0.0},
        {"base": "gemma"},  # whose output layer is its embedding
        {"max_grad_norm": 0.0},  # gradients are looked at elsewhere
        {"gradient_accumulation_steps": 2},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_fsdp2_gives_what_one_process_does(tmp_path, reference, settings):
    of_one = settings | ({"gradient_accumulation_steps": 4} if "gradient_accumulation_steps" in settings else {})
    assert_same(reference(**of_one), train(tmp_path, "fsdp2", **settings))


OPTIONS = {
    "source_gradient": {"source_gradient": True, "gradient_clipping": "apart"},
    "echo_only": {"echo_on_updates": "echo_only", "distillation_tokens": "teacher_better", "routed_loss_scale": 0.5},
    "warm-ups": {"distillation_warmup": 0.6, "echo_lr_warmup": 0.6, "echo_lr_multiplier": 3.0},
}


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True], ids=["stored", "recomputed"])
@pytest.mark.parametrize(
    ("plan", "options"),
    [(plan, name) for plan in ("ddp", "fsdp2") for name in OPTIONS if (plan, name) != ("fsdp2", "echo_only")],
)
def test_options_on_two_processes_also_after_a_resume(tmp_path, reference, plan, options, checkpointing):
    settings = {"echo": json.dumps(OPTIONS[options])}
    train(tmp_path, plan, stop=3, activation_checkpointing=checkpointing, **settings)
    resumed = train(tmp_path, plan, resume=True, activation_checkpointing=checkpointing, **settings)
    assert_same(reference(**settings), resumed)


@pytest.mark.slow
def test_an_echo_on_pass_that_trains_the_echo_only_is_refused_with_fsdp2(tmp_path):
    done = launch(tmp_path, "fsdp2", echo=json.dumps(OPTIONS["echo_only"]))
    assert done.returncode != 0
    assert "echo_on_updates='echo_only' can't be combined with parameters that are sharded" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("plan", ["ddp", "fsdp2"])
def test_statistics_of_states_are_those_of_all_processes_also_after_a_resume(tmp_path, reference, plan):
    settings = {"echo": '{"normalization": "standardize"}'}
    one = reference(**settings)
    assert one.echo["standardize.steps"] > 0
    train(tmp_path, plan, stop=3, **settings)
    assert load_file(tmp_path / "checkpoint-3" / "echo_state.safetensors")["standardize.new_rows"] == 4
    assert_same(one, train(tmp_path, plan, resume=True, **settings))


@pytest.mark.slow
def test_fsdp2_in_bfloat16_keeps_losses_in_float32(tmp_path, reference):
    """FSDP2 rounds every parameter, autocast only what multiplies matrices: they agree as far as bfloat16 goes."""
    one, two = reference(bf16=True), train(tmp_path, "fsdp2", bf16=True)
    for a, b in zip(one.logs[:6], two.logs[:6], strict=True):
        assert b["ce_off"] == pytest.approx(a["ce_off"], rel=2e-3)
        assert b["ce_off"] != torch.tensor(b["ce_off"]).bfloat16().item()
    for name, value in one.adapter.items():
        assert two.adapter[name].dtype == torch.float32
        assert (two.adapter[name] - value).norm() < 2e-2 * value.norm(), name


@pytest.mark.slow
def test_the_comparison_sees_other_data(tmp_path, reference):
    other = train(tmp_path, "ddp", data=[24, 1])
    with pytest.raises(AssertionError):
        assert_same(reference(), other)
    name = next(name for name in other.adapter if "lora_B" in name)
    assert (other.adapter[name] - reference().adapter[name]).norm() > 1e-2 * other.adapter[name].norm()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"), [("fsdp2", "one"), ("one", "fsdp2"), ("fsdp2", "fsdp2"), ("ddp", "fsdp2"), ("ddp", "one")]
)
def test_resumed_on_other_processes_gives_the_uninterrupted_run(tmp_path, reference, before, after):
    train(tmp_path, before, stop=3)
    assert not (tmp_path / "checkpoint-6").exists()
    resumed = train(tmp_path, after, resume=True)
    assert len([log for log in resumed.logs if "loss" in log]) == 6
    assert_same(reference(), resumed)
    # what is left is the same, whoever wrote it
    files = [{p.name for p in (f / "checkpoint-6").iterdir()} for f in (reference().folder, tmp_path)]
    assert {name for name in files[0] ^ files[1] if not name.startswith("rng_state")} == set()


@pytest.mark.slow
def test_other_rows_in_a_step_are_not_resumed(tmp_path, reference):
    shutil.copytree(reference().folder, tmp_path / "even")
    done = launch(tmp_path / "even", "ddp", resume=True, gradient_accumulation_steps=2)
    assert done.returncode != 0
    assert "training.batches: checkpoint '4 rows a step', now '8 rows a step'" in done.stderr

    train(tmp_path / "odd", "ddp", data=[22, 0], stop=3)  # two processes fill 22 rows up to 24
    done = launch(tmp_path / "odd", "one", data=[22, 0], resume=True)
    assert done.returncode != 0
    assert "checkpoint '1 x 2 rows a step in each of 2 processes', now '4 rows a step'" in done.stderr


def test_the_documentation_names_the_shipped_configurations():
    page = (CONFIGS.parents[2] / "docs" / "scaling.md").read_text(encoding="utf-8")
    shipped = sorted(path.name for path in CONFIGS.iterdir())
    assert shipped == ["ddp.yaml", "fsdp2.yaml"]
    assert sorted(set(re.findall(r"\$configs/([\w.]+)", page))) == shipped


def test_ways_to_share_the_same_rows_are_one_configuration(tmp_path):
    def batches(batch: int, accumulation: int, echo_kind: str = "real", **kwargs: Any) -> str:
        kwargs |= {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        return trainer_of(tmp_path, echo_model(echo_kind=echo_kind), **kwargs).configuration()["training.batches"]

    assert batches(4, 1) == batches(2, 2) == batches(1, 4) == batches(4, 1, dataloader_drop_last=True)
    assert batches(4, 1) != batches(4, 2)
    assert batches(8, 1) == batches(4, 2)  # 12 rows: the last step has 4 in either
    assert batches(8, 1, dataloader_drop_last=True) != batches(4, 2, dataloader_drop_last=True)
    assert batches(4, 1, "shuffled") != batches(2, 2, "shuffled")  # rows lend their echo within a batch
    ordered = {"train_sampling_strategy": "group_by_length"}
    assert batches(4, 1, **ordered) != batches(2, 2, **ordered)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("version: 2", "version: 1\n  fsdp_sync_module_states: false", "fsdp_version=1"),
        ("activation_checkpointing: false", "activation_checkpointing: true", "fsdp_activation_checkpointing=True"),
    ],
    ids=["FSDP1", "checkpointing by FSDP"],
)
def test_fsdp_refuses(tmp_path, key, value, words):
    text = (CONFIGS / "fsdp2.yaml").read_text()
    assert key in text
    config = tmp_path / "changed.yaml"
    config.write_text(text.replace(key, value).replace("efficient_loading: true", "efficient_loading: false"))
    done = launch(tmp_path / "run", str(config))
    assert done.returncode != 0
    assert re.search(rf"EchoConfigError: {words}", done.stderr)


@pytest.mark.parametrize(
    ("plugins", "words"),
    [
        ({"fsdp_plugin": SimpleNamespace(fsdp_version=1)}, "fsdp_version=1"),
        (
            {"fsdp_plugin": SimpleNamespace(fsdp_version=2, activation_checkpointing=True)},
            "fsdp_activation_checkpointing=True",
        ),
        ({"deepspeed_plugin": SimpleNamespace(zero_stage=3)}, "stage=3"),
    ],
    ids=["FSDP1", "checkpointing by FSDP", "ZeRO-3"],
)
def test_parallelism_that_would_train_something_else_is_refused(plugins, words):
    with pytest.raises(EchoConfigError, match=words):
        refuse_parallelism(SimpleNamespace(**plugins), has_echo=True)
    if words != "fsdp_version=1":
        refuse_parallelism(SimpleNamespace(**plugins), has_echo=False)


def test_a_checkpoint_of_other_tensors_is_refused():
    with pytest.raises(EchoCheckpointError, match="'b'"):
        fill({"a": torch.zeros(2)}, {"a": torch.ones(2), "b": torch.ones(2)})


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_deepspeed(tmp_path, monkeypatch, reference, stage):
    """SGD, for ZeRO steps parameters that got no gradient as if it were zero: Adam would move them by its momentum."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    zero = {"zero_optimization": {"stage": stage}, "gradient_clipping": "auto", "gradient_accumulation_steps": "auto"}
    (tmp_path / "zero.json").write_text(json.dumps(zero | {"train_micro_batch_size_per_gpu": "auto"}))
    config = tmp_path / "zero.yaml"
    where = f"deepspeed_config: {{deepspeed_config_file: {tmp_path / 'zero.json'}}}\n"
    config.write_text(f"compute_environment: LOCAL_MACHINE\ndistributed_type: DEEPSPEED\nnum_machines: 1\n{where}")
    settings = {"optim": "sgd", "learning_rate": 0.05}
    gloo = {"use_cpu": False, "ddp_backend": "gloo"}
    if stage == 2:
        assert_same(reference(**settings), train(tmp_path / "run", str(config), **gloo, **settings))
    else:
        done = launch(tmp_path / "run", str(config), **gloo, **settings)
        assert done.returncode != 0
        assert re.search(r"EchoConfigError: .*stage=3", done.stderr)


# --------------------------------------------------------------------- recipes


def launch_recipe(folder: Path, plan: str, *args: str, script: str | None = None) -> subprocess.CompletedProcess:
    """`echo-lora ARGS` in `folder`, in two processes with a shipped configuration, or in one."""
    entry = ["-m", "echo_lora"] if script is None else [script]
    if plan == "one":
        command = [sys.executable, *entry, *args]
    else:
        options = ["--config_file", str(CONFIGS / f"{plan}.yaml"), "--num_processes", "2", "--main_process_port", "0"]
        command = [sys.executable, "-m", "accelerate.commands.launch", *options, *entry, *args]
    return subprocess.run(command, cwd=folder, env=on_cpu(), timeout=300, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("echo", "init", "ratio"),
    [(True, "default", None), (False, "default", None), (True, "pissa", 4), (False, "pissa", 4)],
    ids=["echo", "plain", "echo, PiSSA, LoRA+", "PiSSA, LoRA+"],
)
@pytest.mark.parametrize("plan", ["ddp", "fsdp2"])
def test_a_recipe_on_two_processes_gives_the_adapter_of_one(tmp_path, plan, echo, init, ratio):
    training = {"steps": 4, "batch_size": 3, "learning_rate": 0.1, "log_every": 1, "optimizer": "sgd", "save_every": 2}
    training |= {} if ratio is None else {"loraplus_lr_ratio": ratio}
    settings = {"echo": echo, "lora": tiny_document()["lora"] | {"init": init}}
    tiny_recipe(tmp_path, training=training | {"gradient_accumulation": 2}, output="one", **settings)
    done = launch_recipe(tmp_path, "one", "train", "recipe.yaml")
    assert done.returncode == 0, done.stderr[-5000:]
    tiny_recipe(tmp_path, training=training, output="two", **settings)
    script = None if plan == "ddp" else str(Path(__file__).parent / "distributed_recipe.py")
    done = launch_recipe(tmp_path, plan, "train", "recipe.yaml", script=script)
    assert done.returncode == 0, done.stderr[-5000:]
    assert done.stdout.count("score it") == 1  # only the first process prints
    assert done.stderr.count("Loading ") == 1
    runs = [RunResult.read(tmp_path / name) for name in ("one", "two")]
    assert [run.processes for run in runs] == [1, 2]
    assert runs[0].initial_adapter_sha256 == runs[1].initial_adapter_sha256
    assert runs[0].deployed_parameters == runs[1].deployed_parameters
    one, two = (load_file(run.adapter / "adapter_model.safetensors") for run in runs)
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert value.norm() > 0
        assert (two[name] - value).norm() <= TOLERANCE * value.norm(), name
    for a, b in zip(runs[0].history, runs[1].history, strict=True):
        for name in set(LOGGED) & set(a):
            assert b[name] == pytest.approx(a[name], rel=TOLERANCE, abs=1e-8), (a["step"], name)
    assert {path.name for path in (tmp_path / "two").iterdir()} == {path.name for path in (tmp_path / "one").iterdir()}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []  # no lock is left


@pytest.mark.slow
def test_a_recipe_resumes_on_two_processes(tmp_path):
    training = {"steps": 4, "batch_size": 3, "learning_rate": 0.1, "log_every": 1, "optimizer": "sgd", "save_every": 2}
    tiny_recipe(tmp_path, training=training, output="run")
    assert launch_recipe(tmp_path, "ddp", "train", "recipe.yaml").returncode == 0
    whole = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    shutil.rmtree(tmp_path / "run" / "adapter")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "checkpoint-4")
    (tmp_path / "run" / "run.json").unlink()
    done = launch_recipe(tmp_path, "ddp", "train", "recipe.yaml", "--resume")
    assert done.returncode == 0, done.stderr[-5000:]
    assert RunResult.read(tmp_path / "run").resumed_at == 2
    resumed = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert all(torch.equal(resumed[name], value) for name, value in whole.items())


@pytest.mark.slow
def test_an_error_is_reported_once_and_ends_both_processes(tmp_path):
    tiny_recipe(tmp_path, output="run", data={"train": "train.jsonl", "max_length": 3})
    # without a launcher, which would end the second as soon as the first has failed
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    command = [sys.executable, "-m", "echo_lora", "train", "recipe.yaml"]
    processes = [
        subprocess.Popen(
            command, cwd=tmp_path, env=on_cpu(RANK=rank, LOCAL_RANK=rank, **place), stderr=subprocess.PIPE, text=True
        )
        for rank in "01"
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [1, 1]
    assert "".join(errors).count("keeps no answer token") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_only_train_runs_in_several_processes(tmp_path):
    done = launch_recipe(tmp_path, "ddp", "plan", "recipe.yaml")
    assert done.returncode != 0
    assert done.stderr.count("echo-lora plan runs in one process, but was launched in 2.") == 1
