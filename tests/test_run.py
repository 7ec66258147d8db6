"""A recipe becomes an adapter: what the output folder holds, and what an interruption leaves."""

from __future__ import annotations

import errno
import json
import resource
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from echo_lora.base_models import PACKAGED
from echo_lora.errors import EchoCheckpointError, EchoConfigError, EchoTrainingError
from echo_lora.export import read_adapter, read_adapter_config
from echo_lora.recipe import load_recipe
from echo_lora.run import RunResult, run
from echo_lora.sft import EchoSFTTrainer
from tiny_recipe import tiny_recipe, write_rows


def loaded(folder, *overrides, **changes):
    return load_recipe(tiny_recipe(folder, **changes), overrides)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@contextmanager
def disk_that_refuses_files_above(size: int):
    """The operating system refuses to let any file grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def interrupt_at(monkeypatch, step: int) -> None:
    """Training dies in the given optimizer step."""
    original = EchoSFTTrainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        if self.state.global_step + 1 == step:
            raise EchoTrainingError(f"stopped at step {step}")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(EchoSFTTrainer, "compute_loss", compute_loss)


def test_the_output_folder_holds_the_adapter_and_its_record(tmp_path):
    validation = write_rows(tmp_path / "validation.jsonl")
    recipe = loaded(tmp_path, "training.evaluate_every=2", f"data.validation={validation}")
    result = run(recipe)
    found = files(tmp_path / "run")
    assert {"run.json", "loss.png"} <= found
    assert {f"adapter/{name}" for name in ("adapter_model.safetensors", "adapter_config.json", "README.md")} <= found
    assert {"adapter/tokenizer.json", "adapter/chat_template.jinja"} <= found
    assert not [name for name in found if "/." in name or name.startswith(".")]
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")

    assert RunResult.read(tmp_path / "run") == result
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["recipe"]["seeds"] == {"initialisation": 0, "data_order": 0, "routing": 0}
    assert {"torch", "transformers", "peft", "trl", "echo_lora", "python"} <= record["versions"].keys()
    assert record["steps"] == 4
    assert record["seconds"] > 0
    assert record["peak_memory"] > 1e8
    assert record["deployed_parameters"] == sum(t.numel() for t in read_adapter(result.adapter).values())
    assert record["echo_parameters"] > 0
    assert {"loss", "ce_off", "ce_on", "distillation", "routing_p", "eval_loss"} <= record["final"].keys()
    assert [entry["step"] for entry in record["history"] if "ce_off" in entry] == [1, 2, 3, 4]

    card = (result.adapter / "README.md").read_text()
    assert "Nothing of this is\nleft in the adapter" in card
    assert record["initial_adapter_sha256"] in card
    assert f'from_pretrained("{recipe.model}")' in card


def test_the_adapter_loads_with_stock_peft_and_its_tokenizer_beside_it(tmp_path):
    result = run(loaded(tmp_path))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(result.adapter)
    ids = tokenizer("Count the words", return_tensors="pt")["input_ids"]
    with torch.no_grad():
        before = base(ids).logits
        after = PeftModel.from_pretrained(base, result.adapter)(ids).logits
    assert not torch.allclose(before, after, atol=1e-4)


def test_with_and_without_echo_the_adapter_starts_from_the_same_numbers(tmp_path):
    with_echo = run(loaded(tmp_path))
    without = run(loaded(tmp_path, "echo=false", f"output={tmp_path / 'plain'}"))
    assert with_echo.initial_adapter_sha256 == without.initial_adapter_sha256
    assert with_echo.adapter_sha256 != without.adapter_sha256
    assert without.echo_parameters == 0
    assert with_echo.deployed_parameters == without.deployed_parameters
    assert read_adapter(with_echo.adapter).keys() == read_adapter(without.adapter).keys()
    assert "ce_off" not in without.final
    assert "Trained without the echo" in (without.adapter / "README.md").read_text()
    first, second = with_echo.history[0]["ce_off"], without.history[0]["loss"]
    assert first == pytest.approx(second, rel=1e-4)  # the same rows, in the same order


@pytest.mark.parametrize("key", ["initialisation", "data_order", "routing"])
def test_each_seed_changes_the_adapter(tmp_path, key):
    one = run(loaded(tmp_path, "echo_config.routing_start=0.5", "echo_config.routing_end=0.5"))
    two = run(
        loaded(
            tmp_path,
            "echo_config.routing_start=0.5",
            "echo_config.routing_end=0.5",
            f"seeds.{key}=7",
            f"output={tmp_path / 'two'}",
        )
    )
    assert one.adapter_sha256 != two.adapter_sha256
    assert (one.initial_adapter_sha256 == two.initial_adapter_sha256) == (key != "initialisation")


@pytest.mark.parametrize(
    ("override", "key"), [("method=dora", "use_dora"), ("method=rslora", "use_rslora"), ("method=lora", None)]
)
def test_the_method_is_in_the_adapter(tmp_path, override, key):
    config = read_adapter_config(run(loaded(tmp_path, override, "training.steps=2")).adapter)
    assert [name for name in ("use_dora", "use_rslora") if config[name]] == ([key] if key else [])


def test_gradient_checkpointing_and_accumulation_train_the_same_adapter(tmp_path):
    overrides = ["training.batch_size=4", "echo_config.echo_step=full"]
    plain = run(loaded(tmp_path, *overrides))
    overrides += ["training.batch_size=2", "training.gradient_accumulation=2", "training.gradient_checkpointing=true"]
    other = run(loaded(tmp_path, *overrides, f"output={tmp_path / 'two'}"))
    one, two = read_adapter(plain.adapter), read_adapter(other.adapter)
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-5, msg=name)


# ------------------------------------------------------- folders and interruptions


def test_an_output_folder_with_files_is_left_alone(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("mine")
    with pytest.raises(EchoCheckpointError, match=r"run exists and is not empty.*recipe's key is output"):
        run(loaded(tmp_path))
    assert files(tmp_path / "run") == {"mine.txt"}


def test_checkpoints_of_others_are_left_alone(tmp_path):
    foreign = tmp_path / "run" / "checkpoints" / "checkpoint-5"
    foreign.mkdir(parents=True)
    (foreign / "adapter_model.safetensors").write_text("theirs")
    with pytest.raises(EchoCheckpointError, match="exists and is not empty") as caught:
        run(loaded(tmp_path))
    assert "resume" not in str(caught.value)
    assert (foreign / "adapter_model.safetensors").read_text() == "theirs"


def test_a_run_that_was_killed_before_its_first_checkpoint_starts_anew(tmp_path):
    unfinished = tmp_path / "run" / "checkpoints" / "checkpoint-1"
    unfinished.mkdir(parents=True)
    (unfinished / "adapter_model.safetensors").write_text("half")
    (tmp_path / "run" / "checkpoints" / "started.json").write_text("{}")
    assert run(loaded(tmp_path)).resumed_at == 0
    assert not unfinished.exists()


def test_a_run_that_dies_before_its_first_checkpoint_leaves_nothing(tmp_path, monkeypatch):
    interrupt_at(monkeypatch, 2)
    with pytest.raises(EchoTrainingError):
        run(loaded(tmp_path))
    assert not (tmp_path / "run").exists()


def test_a_run_that_dies_keeps_its_checkpoints_and_resumes_to_the_same_adapter(tmp_path, monkeypatch):
    expected = run(loaded(tmp_path, "training.save_every=2", f"output={tmp_path / 'whole'}"))
    recipe = loaded(tmp_path, "training.save_every=2")
    with monkeypatch.context() as dying:
        interrupt_at(dying, 4)
        with pytest.raises(EchoTrainingError):
            run(recipe)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"checkpoints"}
    with pytest.raises(EchoCheckpointError, match=r"--resume"):
        run(recipe)
    resumed = run(recipe, resume=True)
    assert resumed.resumed_at == 2
    assert resumed.adapter_sha256 == expected.adapter_sha256
    assert resumed.initial_adapter_sha256 == expected.initial_adapter_sha256
    assert [entry["step"] for entry in resumed.history if "ce_off" in entry] == [1, 2, 3, 4]
    with pytest.raises(EchoCheckpointError, match="finished run"):
        run(recipe, resume=True)


def test_resuming_nothing_is_refused(tmp_path):
    with pytest.raises(EchoCheckpointError, match="no complete checkpoint"):
        run(loaded(tmp_path), resume=True)
    assert not (tmp_path / "run").exists()


def test_a_resume_with_another_recipe_is_refused_with_the_difference(tmp_path, monkeypatch):
    with monkeypatch.context() as dying:
        interrupt_at(dying, 4)
        with pytest.raises(EchoTrainingError):
            run(loaded(tmp_path, "training.save_every=2"))
    with pytest.raises(EchoCheckpointError, match=r"training\.learning_rate: checkpoint 0\.01, now 0\.02"):
        run(loaded(tmp_path, "training.save_every=2", "training.learning_rate=2e-2"), resume=True)


@pytest.mark.parametrize("size", [2_000, 20_000])  # of the adapter's file, or of the optimizer's
def test_a_full_disk_at_a_checkpoint_leaves_only_complete_ones(tmp_path, size):
    recipe = loaded(tmp_path)
    with disk_that_refuses_files_above(size), pytest.raises(EchoCheckpointError, match="could not be written"):
        run(recipe)
    assert not (tmp_path / "run").exists()


def test_a_full_disk_at_the_end_leaves_no_adapter_and_the_run_can_be_resumed(tmp_path, monkeypatch):
    recipe = loaded(tmp_path)
    original = Path.write_text

    def write_text(self, text, *args, **kwargs):
        if self.name == "README.md":
            raise OSError(errno.ENOSPC, "No space left on device")
        return original(self, text, *args, **kwargs)

    with monkeypatch.context() as disk:
        disk.setattr(Path, "write_text", write_text)
        with pytest.raises(EchoCheckpointError, match="No space left on device"):
            run(recipe)
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"checkpoints"}
    result = run(recipe, resume=True)
    assert result.resumed_at == 4
    assert (tmp_path / "run" / "run.json").is_file()


def test_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(EchoConfigError, match="one process"):
        run(loaded(tmp_path))


def test_a_record_that_is_none_is_refused(tmp_path):
    with pytest.raises(EchoCheckpointError, match=r"run\.json is not the record"):
        RunResult.read(tmp_path)
    (tmp_path / "run.json").write_text('{"output": "x"}')
    with pytest.raises(EchoCheckpointError, match=r"run\.json is not the record"):
        RunResult.read(tmp_path)


@pytest.mark.slow
def test_the_smallest_shipped_recipe_trains(tmp_path):
    recipe = load_recipe("tiny", ["training.steps=3", f"output={tmp_path / 'run'}"])
    result = run(recipe)
    assert recipe.model == PACKAGED
    assert result.steps == 3
    assert "packaged_model()" in (result.adapter / "README.md").read_text()
