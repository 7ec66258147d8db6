"""A recipe becomes an adapter: what the output folder holds, and what an interruption leaves."""

from __future__ import annotations

import errno
import gc
import json
import os
import pickle
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from echo_lora.adapter.files import read_adapter, read_adapter_config
from echo_lora.adapter.merge import merge
from echo_lora.errors import EchoCheckpointError, EchoConfigError, EchoInterrupt, EchoModelError, EchoTrainingError
from echo_lora.models import load_tokenizer
from echo_lora.packaged import PACKAGED
from echo_lora.recipe import build
from echo_lora.recipe import train as run_module
from echo_lora.recipe.load import load_recipe
from echo_lora.recipe.record import STARTED, RunResult
from echo_lora.recipe.scoring import resolve
from echo_lora.recipe.table import recipe_table
from echo_lora.recipe.train import run
from echo_lora.training import checkpoint
from echo_lora.training.checkpoint import SEAL, begin_checkpoint, file_hash, last_complete_checkpoint
from echo_lora.training.sft import EchoSFTTrainer
from test_files import held_by_another, mode, umask
from tiny_recipe import tiny_recipe, write_rows


def loaded(folder, *overrides, **changes):
    return load_recipe(tiny_recipe(folder, **changes), overrides)


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@contextmanager
def disk_that_refuses_files_above(size: int):
    """The operating system refuses to let any file grow beyond `size` bytes."""
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def interrupt_at(monkeypatch, step: int, error: BaseException | None = None) -> None:
    """Training dies in the given optimizer step."""
    original = EchoSFTTrainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        if self.state.global_step + 1 == step:
            raise error or EchoTrainingError(f"stopped at step {step}")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(EchoSFTTrainer, "compute_loss", compute_loss)


def test_the_output_folder_holds_the_adapter_and_its_record(tmp_path):
    validation = write_rows(tmp_path / "validation.jsonl")
    recipe = loaded(tmp_path, "training.evaluate_every=2", f"data.validation={validation}")
    result = run(recipe)
    found = files(tmp_path / "run")
    assert {"run.json", "loss.png", "recipe.yaml"} <= found
    assert {f"adapter/{name}" for name in ("adapter_model.safetensors", "adapter_config.json", "README.md")} <= found
    assert {"adapter/tokenizer.json", "adapter/chat_template.jinja"} <= found
    assert not [name for name in found if "/." in name or name.startswith(".")]
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")

    assert RunResult.read(tmp_path / "run") == result
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["recipe"]["seeds"] == {"initialisation": 0, "data_order": 0, "routing": 0, "validation": 0}
    assert {"torch", "transformers", "peft", "trl", "echo_lora", "python"} <= record["versions"].keys()
    assert record["steps"] == 4
    assert record["seconds"] > 0
    assert record["peak_memory"] > 1e8
    assert record["deployed_parameters"] == sum(t.numel() for t in read_adapter(result.adapter).values())
    assert record["echo_parameters"] > 0
    assert {"loss", "ce_off", "ce_on", "distillation", "routing_p", "eval_loss"} <= record["final"].keys()
    assert [entry["step"] for entry in record["history"] if "ce_off" in entry] == [1, 2, 3, 4]

    card = (result.adapter / "README.md").read_text()
    assert card.index("PeftModel.from_pretrained") < card.index("Echo-LoRA")  # the user's adapter first
    assert "plain PEFT adapter" in card
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
    first, second = with_echo.history[0]["loss"], without.history[0]["loss"]
    assert first == pytest.approx(second, rel=1e-4)  # the same rows, in the same order


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_leaves_no_tensor_behind(tmp_path, checkpointing):
    """A graph that is never run backward must go too, although some operators save their own output."""
    counts = []
    for number in range(3):
        changes = [f"output={tmp_path / str(number)}", f"training.gradient_checkpointing={checkpointing}"]
        run(load_recipe(tiny_recipe(tmp_path), changes))
        gc.collect()
        counts.append(sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()))
    assert counts[0] == counts[1] == counts[2]


@pytest.mark.parametrize("echo", ["true", "false"])
def test_training_in_bfloat16_saves_what_it_trained(tmp_path, echo):
    result = run(loaded(tmp_path, "training.bf16=true", f"echo={echo}", "training.save_every=2"))
    assert load_file(result.adapter / "adapter_model.safetensors")
    assert (tmp_path / "run" / "checkpoints" / "checkpoint-2").is_dir()


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
    begin_checkpoint(unfinished)
    unfinished.mkdir()
    (unfinished / "adapter_model.safetensors").write_text("half")
    (tmp_path / "run" / "checkpoints" / "started.json").write_text("{}")
    assert run(loaded(tmp_path)).resumed_at == 0
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir() if "-1" in path.name] == []


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
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"checkpoints", "recipe.yaml"}
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
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"checkpoints", "recipe.yaml"}
    result = run(recipe, resume=True)
    assert result.resumed_at == 4
    assert (tmp_path / "run" / "run.json").is_file()


# ------------------------------------------------- what is not the run's own


def test_files_of_others_outlive_a_run_that_dies_and_the_next_one(tmp_path, monkeypatch):
    """Notes that were put into the folders of a run while it trained."""
    recipe = loaded(tmp_path, "training.save_every=2")
    notes = [tmp_path / "run" / "notes.txt", tmp_path / "run/checkpoints/notes.txt"]
    notes += [tmp_path / "run/checkpoints/checkpoint-2/notes.txt", tmp_path / "run/checkpoints/checkpoint-1-mine/x.pt"]
    original = EchoSFTTrainer._prove

    def prove(self, folder):
        original(self, folder)
        for path in notes:
            path.parent.mkdir(exist_ok=True)
            path.write_text("mine")
        raise EchoTrainingError("died before the seal")

    with monkeypatch.context() as dying:
        dying.setattr(EchoSFTTrainer, "_prove", prove)
        with pytest.raises(EchoTrainingError, match="died before the seal"):
            run(recipe)
    expected = {str(path.relative_to(tmp_path / "run")) for path in notes}
    assert files(tmp_path / "run") == expected | {"recipe.yaml", f"checkpoints/{STARTED}", "checkpoints/README.md"}
    assert run(recipe).resumed_at == 0
    assert [path.read_text() for path in notes] == ["mine"] * 4


def test_checkpoints_of_others_beside_a_run_outlive_its_resume(tmp_path, monkeypatch):
    """Under the names that a trainer writes, in folders that a run would pass over, and in one that it saves into."""
    recipe = half_trained(tmp_path, monkeypatch)
    checkpoints = tmp_path / "run" / "checkpoints"
    theirs = ["checkpoint-500/model.safetensors", "checkpoint-500/README.md", "checkpoint-500/sub/data.bin"]
    theirs += ["checkpoint-4/trainer_state.txt", "checkpoint-4/mine.txt", "checkpoint-4/sub/README.md"]
    theirs += [".checkpoint-7.unfinished.json/x"]  # a folder of that name
    for name in theirs:
        (checkpoints / name).parent.mkdir(parents=True, exist_ok=True)
        (checkpoints / name).write_text("theirs")
    (checkpoints / "checkpoint-600").mkdir()
    before = files(checkpoints)
    with pytest.raises(EchoCheckpointError, match=r"learning_rate: checkpoint 0\.01"):
        run(loaded(tmp_path, "training.save_every=2", "training.learning_rate=2e-2"), resume=True)
    assert files(checkpoints) == before
    with monkeypatch.context() as dying:
        interrupt_saving(dying)
        with pytest.raises(EchoTrainingError, match="died before the seal"):
            run(recipe, resume=True)
    assert files(checkpoints) == before
    assert run(recipe, resume=True).steps == 4
    seal = json.loads((checkpoints / "checkpoint-4" / SEAL).read_text())
    assert "adapter_model.safetensors" in seal["files"]
    assert not {f"checkpoint-4/{name}" for name in seal["files"]} & set(theirs)
    assert {name: (checkpoints / name).read_text() for name in theirs} == dict.fromkeys(theirs, "theirs")
    assert (checkpoints / "checkpoint-600").is_dir()
    checkpoint.clear_checkpoints(checkpoints)
    assert files(checkpoints) == {*theirs, STARTED}


def interrupt_saving(monkeypatch) -> None:
    """Training dies when a checkpoint is written and not sealed."""

    def prove(self, folder):
        raise EchoTrainingError("died before the seal")

    monkeypatch.setattr(EchoSFTTrainer, "_prove", prove)


@pytest.mark.parametrize("moment", range(6))
def test_an_interrupted_removal_is_completed_later(tmp_path, monkeypatch, moment):
    folder = tmp_path / "checkpoint-4"
    begin_checkpoint(folder)
    for name in ("optimizer.pt", "latest", "global_step4/x.pt"):  # a name that no other trainer uses, too
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("ours")
    checkpoint.seal_checkpoint(folder, configuration={}, initial_adapter_sha256=None)
    (folder / "README.md").write_text("mine")
    original = Path.unlink
    calls = []

    def unlink(self, missing_ok=False):
        calls.append(self)
        if len(calls) > moment:
            raise KeyboardInterrupt
        original(self, missing_ok)

    with monkeypatch.context() as dying:
        dying.setattr(Path, "unlink", unlink)
        if moment < 5:
            with pytest.raises(KeyboardInterrupt):
                checkpoint.remove_checkpoint(folder)
        else:
            checkpoint.remove_checkpoint(folder)
    checkpoint.remove_unfinished(tmp_path)
    assert files(tmp_path) == {"checkpoint-4/README.md"}


def test_a_record_that_was_cut_off_removes_nothing(tmp_path):
    (tmp_path / "checkpoint-4").mkdir()
    (tmp_path / "checkpoint-4" / "optimizer.pt").write_text("theirs")
    begin_checkpoint(tmp_path / "checkpoint-4")
    (record,) = tmp_path.glob(".checkpoint-4*")
    record.write_text(record.read_text()[:10])
    checkpoint.remove_unfinished(tmp_path)
    assert files(tmp_path) == {"checkpoint-4/optimizer.pt"}


@pytest.mark.parametrize("kind", ["link", "folder"])
def test_an_output_folder_that_was_there_stays_what_it_was(tmp_path, monkeypatch, kind):
    (tmp_path / "disk").mkdir()
    output = tmp_path / "run"
    output.symlink_to(tmp_path / "disk") if kind == "link" else output.mkdir()
    with monkeypatch.context() as dying:
        interrupt_at(dying, 2)
        with pytest.raises(EchoTrainingError, match="stopped at step 2"):
            run(loaded(tmp_path))
    assert output.is_symlink() == (kind == "link")
    assert output.is_dir()
    assert files(output) == set()
    run(loaded(tmp_path))
    assert output.is_symlink() == (kind == "link")
    assert "run.json" in files(output)


def test_what_can_not_be_tidied_does_not_hide_the_error(tmp_path, monkeypatch, caplog):
    """As on a mount point, which can't be removed, or in a folder that has become read-only."""
    interrupt_at(monkeypatch, 2)

    def refuse(*args, **kwargs):
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(Path, "rmdir", refuse)
    with pytest.raises(EchoTrainingError, match="stopped at step 2"):
        run(loaded(tmp_path))
    assert "run could not be cleaned up: [Errno 16] Device or resource busy" in caplog.text


def test_everything_has_the_permissions_of_the_umask(tmp_path):
    recipe = loaded(tmp_path)
    with umask(0o027):
        run(recipe)
    found = {path: mode(path) for path in (tmp_path / "run").rglob("*")}
    assert len([path for path in found if path.suffix == ".safetensors"]) == 3  # two in the checkpoint
    assert {path: m for path, m in found.items() if m != (0o750 if path.is_dir() else 0o640)} == {}


# --------------------------------------------------------------- one at a time


def test_a_second_run_on_an_output_folder_is_refused_while_the_first_lives(tmp_path, monkeypatch):
    recipe = loaded(tmp_path, "training.save_every=2")
    with monkeypatch.context() as dying:
        interrupt_at(dying, 4)
        with pytest.raises(EchoTrainingError):
            run(recipe)
    before = files(tmp_path / "run")
    with held_by_another(tmp_path / "run") as holder:
        in_use = rf"run is in use by process {holder.pid}"
        for resume in (False, True):
            with pytest.raises(EchoCheckpointError, match=in_use):
                run(recipe, resume=resume)
        with pytest.raises(EchoCheckpointError, match=in_use):
            resolve(str(tmp_path / "recipe.yaml"))
        with pytest.raises(EchoCheckpointError, match=in_use):  # which has no run.json yet
            resolve(str(tmp_path / "run"))
        assert files(tmp_path / "run") == before
    result = run(recipe, resume=True)
    with held_by_another(tmp_path / "run") as holder, pytest.raises(EchoCheckpointError, match=f"process {holder.pid}"):
        resolve(str(result.adapter))
    with held_by_another(tmp_path / "merged"), pytest.raises(EchoCheckpointError, match="merged is in use"):
        merge(result.adapter, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_a_run_that_has_not_reached_a_checkpoint_is_not_taken_for_a_dead_one(tmp_path):
    """Its folder looks like that of a run that was killed, which the next one may tidy."""
    unfinished = tmp_path / "run" / "checkpoints" / "checkpoint-1"
    unfinished.mkdir(parents=True)
    (unfinished / "adapter_model.safetensors").write_text("half")
    (tmp_path / "run" / "checkpoints" / STARTED).write_text("{}")
    with held_by_another(tmp_path / "run"), pytest.raises(EchoCheckpointError, match="in use"):
        run(loaded(tmp_path))
    assert (unfinished / "adapter_model.safetensors").read_text() == "half"


# ------------------------------------------------------------------- the clock


def test_a_clock_that_was_set_back_removes_and_resumes_no_wrong_checkpoint(tmp_path, monkeypatch):
    expected = run(loaded(tmp_path, "training.steps=6", f"output={tmp_path / 'whole'}"))

    class SetBack(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            os.utime(folder, (1e9 - 1e5 * state.global_step,) * 2)

    progress = run_module._Progress
    monkeypatch.setattr(run_module, "_Progress", type("_", (SetBack, progress), {}))
    recipe = loaded(tmp_path, "training.steps=6", "training.save_every=1", "training.keep_checkpoints=2")
    with monkeypatch.context() as dying:
        interrupt_at(dying, 6)
        with pytest.raises(EchoTrainingError):
            run(recipe)
    kept = sorted((tmp_path / "run" / "checkpoints").glob("checkpoint-*"))
    assert [path.name for path in kept] == ["checkpoint-4", "checkpoint-5"]
    assert kept[0].stat().st_mtime > kept[1].stat().st_mtime
    resumed = run(recipe, resume=True)
    assert resumed.resumed_at == 5
    assert resumed.adapter_sha256 == expected.adapter_sha256


# -------------------------------------------------------------------- the base


def test_a_local_base_is_recorded_by_its_path_and_never_becomes_a_hub_name(tmp_path, monkeypatch):
    tiny_recipe(tmp_path, output="run")
    monkeypatch.chdir(tmp_path)
    result = run(load_recipe("recipe.yaml"))
    base = str(tmp_path / "base")
    assert result.recipe["model"] == base
    assert read_adapter_config(result.adapter)["base_model_name_or_path"] == base
    seal = json.loads((last_complete_checkpoint("run/checkpoints") / SEAL).read_text())
    assert seal["configuration"]["adapter.base_model_name_or_path"] == base
    assert f'from_pretrained("{base}")' in (result.adapter / "README.md").read_text()
    assert "base_model:" not in (result.adapter / "README.md").read_text()  # it would have to be a hub id

    (tmp_path / "base").rename(tmp_path / "elsewhere")
    monkeypatch.chdir(tmp_path / "elsewhere")
    recipe, _ = resolve(str(tmp_path / "run"))
    adapter, message = tmp_path / "run" / "adapter", f"{base}: there is no such folder"
    for ask in (lambda: load_tokenizer(recipe.model), lambda: merge(adapter, tmp_path / "merged")):
        with pytest.raises(EchoModelError) as caught:
            ask()
        assert message in str(caught.value)


@pytest.mark.slow
def test_no_hub_is_asked_for_what_is_on_this_machine(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    asked = []

    def getaddrinfo(host, *args, **kwargs):
        asked.append(host)
        raise OSError("no network in tests")

    monkeypatch.setattr("socket.getaddrinfo", getaddrinfo)
    result = run(loaded(tmp_path))
    path = result.adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "runs/base"}))
    merge(result.adapter, tmp_path / "merged", base=tmp_path / "base", verify=True)
    assert asked == []
    with pytest.raises(EchoModelError):  # the check above does see it
        merge(result.adapter, tmp_path / "again")
    assert asked


def half_trained(folder: Path, monkeypatch, *overrides: str):
    """A recipe whose run died with a checkpoint of step 2."""
    recipe = loaded(folder, "training.save_every=2", *overrides)
    with monkeypatch.context() as dying:
        interrupt_at(dying, 4)
        with pytest.raises(EchoTrainingError):
            run(recipe)
    return recipe


def test_the_keys_of_a_refused_resume_exist(tmp_path, monkeypatch):
    half_trained(tmp_path, monkeypatch)
    seal = json.loads((last_complete_checkpoint(tmp_path / "run" / "checkpoints") / SEAL).read_text())
    assert build.RECIPE_KEYS.keys() <= seal["configuration"].keys()
    known = {key for key, *_ in recipe_table()}
    named = {key for keys in build.RECIPE_KEYS.values() for key in keys.split(", ")}
    named |= {build.recipe_key(key).split(" (")[0] for key in seal["configuration"] if key.startswith("echo.")}
    assert len(named) > 40
    assert named <= known


def test_a_checkpoint_that_is_passed_over_is_named_once(tmp_path, monkeypatch, caplog):
    recipe = half_trained(tmp_path, monkeypatch)
    theirs = tmp_path / "run" / "checkpoints" / "checkpoint-9"
    theirs.mkdir()
    run(recipe, resume=True)
    assert caplog.text.count(f"{theirs} is incomplete, or was written by another program; skipping it.") == 1
    assert caplog.text.count("skipping it") == 1


def test_a_base_with_other_weights_is_not_resumed_on(tmp_path, monkeypatch):
    recipe = half_trained(tmp_path, monkeypatch)
    path = tmp_path / "base" / "model.safetensors"
    weights = load_file(path)
    weights["model.layers.2.mlp.down_proj.weight"][-1, -1] += 1e-3
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(EchoCheckpointError, match=r"model \(base\.sha256\): checkpoint '\w{64}', now '\w{64}'"):
        run(recipe, resume=True)


@pytest.mark.parametrize(
    ("override", "difference"),
    [("dtype=bfloat16", "  dtype (base.dtype): checkpoint 'float32', now 'bfloat16'"),
     ("attn_implementation=eager", "  attn_implementation (base.attn_implementation): checkpoint 'sdpa', now 'eager'"),
     ("seeds.data_order=4", "  seeds.data_order (training.data_seed): checkpoint 0, now 4"),
     ("training.steps=5", "  training.steps (training.max_steps): checkpoint 4, now 5"),
     ("lora.alpha=9", "  lora.alpha (adapter.lora_alpha): checkpoint 8, now 9"),
     ("seeds.routing=3", "  seeds.routing (echo.routing_seed): checkpoint 0, now 3"),
     ("echo_config.bottleneck=4", "  echo_config.bottleneck (echo.bottleneck): checkpoint 8, now 4"),
     ("training.learning_rate=0.02", "  training.learning_rate: checkpoint 0.01, now 0.02")],
)  # fmt: skip
def test_a_refused_resume_names_the_keys_of_the_recipe(tmp_path, monkeypatch, override, difference):
    half_trained(tmp_path, monkeypatch)
    with pytest.raises(EchoCheckpointError) as caught:
        run(loaded(tmp_path, "training.save_every=2", override), resume=True)
    assert difference in str(caught.value)


def test_the_same_base_in_another_place_is_resumed_on(tmp_path, monkeypatch):
    recipe = half_trained(tmp_path, monkeypatch)
    (tmp_path / "base").rename(tmp_path / "moved")
    assert run(recipe.model_copy(update={"model": str(tmp_path / "moved")}), resume=True).resumed_at == 2


# ------------------------------------------------------- code that was received


class Bomb:
    """A pickle that makes a file when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_code_in_a_received_checkpoint_is_not_run(tmp_path, monkeypatch):
    recipe, marker = half_trained(tmp_path, monkeypatch), tmp_path / "marker"
    folder = last_complete_checkpoint(tmp_path / "run" / "checkpoints")
    assert pickle.loads(pickle.dumps(Bomb(marker))) is None
    assert marker.exists()
    marker.unlink()
    for name in ("optimizer.pt", "rng_state.pth"):
        kept = (folder / name).read_bytes()
        torch.save(Bomb(marker), folder / name)
        reseal(folder)
        with pytest.raises(EchoCheckpointError, match=r"checkpoint-2 holds a pickle with code"):
            run(recipe, resume=True)
        (folder / name).write_bytes(kept)
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()
    reseal(folder)
    with pytest.raises(EchoCheckpointError, match=r"adapter_model\.safetensors is missing"):
        run(recipe, resume=True)
    assert not marker.exists()


def reseal(folder: Path) -> None:
    seal = json.loads((folder / SEAL).read_text())
    seal["files"] = {path.name: file_hash(path) for path in folder.iterdir() if path.name != SEAL}
    (folder / SEAL).write_text(json.dumps(seal))


# ------------------------------------------------------------ damage and Ctrl-C


def test_a_damaged_checkpoint_names_the_newest_sound_one_and_how_to_resume(tmp_path, monkeypatch):
    recipe = loaded(tmp_path, "training.save_every=1", "training.keep_checkpoints=3")
    with monkeypatch.context() as dying:
        interrupt_at(dying, 4)
        with pytest.raises(EchoTrainingError):
            run(recipe)
    folder = tmp_path / "run" / "checkpoints"
    (folder / "checkpoint-3" / SEAL).write_text('{"files": {"../../notes": ""}, "configuration": {')
    (folder / "checkpoint-2" / "optimizer.pt").write_bytes(b"")
    with pytest.raises(EchoCheckpointError) as caught:
        run(recipe, resume=True)
    message = str(caught.value)
    assert f"{folder / 'checkpoint-3' / SEAL} is damaged" in message
    assert f"The newest sound checkpoint is {folder / 'checkpoint-1'}." in message
    assert f"move {folder / 'checkpoint-2'} and {folder / 'checkpoint-3'} away and resume" in message
    for name in ("checkpoint-2", "checkpoint-3"):
        shutil.move(folder / name, tmp_path)
    assert run(recipe, resume=True).resumed_at == 1


@pytest.mark.parametrize(
    "seal",
    ["", "[]", "{}", '{"files": [], "configuration": {}, "initial_adapter_sha256": ""}',
     '{"files": {"../notes": ""}, "configuration": {}, "initial_adapter_sha256": ""}',
     '{"files": {"C:/notes": ""}, "configuration": {}, "initial_adapter_sha256": ""}'],
)  # fmt: skip
def test_a_damaged_seal_is_named_and_its_paths_are_not_followed(tmp_path, seal):
    (tmp_path / "notes").write_text("mine")
    folder = tmp_path / "checkpoint-5"
    folder.mkdir()
    (folder / SEAL).write_text(seal)
    with pytest.raises(EchoCheckpointError, match=rf"{SEAL} is damaged: .* no sound checkpoint beside it"):
        checkpoint.read_seal(folder)
    checkpoint.remove_checkpoint(folder)
    assert not folder.exists()
    assert (tmp_path / "notes").read_text() == "mine"


def test_weights_that_were_put_beside_the_sealed_ones_are_refused(tmp_path, monkeypatch):
    """transformers would load model.safetensors instead of the adapter."""
    recipe = half_trained(tmp_path, monkeypatch)
    folder = last_complete_checkpoint(tmp_path / "run" / "checkpoints")
    save_file({"x": torch.zeros(1)}, folder / "model.safetensors")
    (folder / "notes.txt").write_text("mine, and no harm")
    with pytest.raises(EchoCheckpointError) as caught:
        run(recipe, resume=True)
    assert f"{folder / 'model.safetensors'} was added after" in str(caught.value)
    assert str(caught.value).endswith("Remove it, then resume again.")
    (folder / "model.safetensors").unlink()
    assert run(recipe, resume=True).resumed_at == 2


def test_a_moved_record_names_the_folder_it_lies_in(tmp_path):
    result = run(loaded(tmp_path))
    (tmp_path / "run").rename(tmp_path / "moved")
    assert RunResult.read(tmp_path / "moved").adapter == tmp_path / "moved" / "adapter"
    assert result.adapter == tmp_path / "run" / "adapter"


@pytest.mark.parametrize("save_every", [2, 4])
def test_an_interruption_names_step_checkpoint_and_how_to_resume(tmp_path, monkeypatch, save_every):
    recipe = loaded(tmp_path, f"training.save_every={save_every}")
    interrupt_at(monkeypatch, 4, KeyboardInterrupt())
    with pytest.raises(EchoInterrupt) as caught:
        run(recipe)
    message = str(caught.value)
    assert message.startswith("Interrupted after step 3 of 4. ")
    if save_every == 2:
        newest = tmp_path / "run" / "checkpoints" / "checkpoint-2"
        assert f"newest complete checkpoint, {newest}, is kept. To resume from it, repeat the command with" in message
    else:
        assert "There is no complete checkpoint yet, so nothing is kept: repeat the command" in message
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("value", "expected"), [("2", "RANK is not set"), ("two", "'two' is not a number")])
def test_a_world_size_without_a_launcher_is_refused(tmp_path, monkeypatch, value, expected):
    monkeypatch.setenv("WORLD_SIZE", value)
    with pytest.raises(EchoConfigError, match=expected):
        run(loaded(tmp_path))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("echo", [True, False])
def test_the_recipe_in_the_output_folder_repeats_the_run(tmp_path, monkeypatch, echo):
    monkeypatch.chdir(tmp_path)
    tiny_recipe(tmp_path, output="run", echo=echo, training={"steps": 2, "learning_rate": 1e-2})
    first = run(load_recipe("recipe.yaml", ["training.log_every=1", "trust_remote_code=true"]))
    text = (tmp_path / "run" / "recipe.yaml").read_text()
    assert "echo-lora train THIS_FILE --resume" in text
    assert "trust_remote_code" not in text
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")  # its paths are absolute
    again = run(load_recipe(tmp_path / "run" / "recipe.yaml", ["output=again"]))
    assert again.adapter_sha256 == first.adapter_sha256
    assert again.recipe | {"output": "run", "trust_remote_code": True} == first.recipe | {"data": again.recipe["data"]}
    assert load_recipe(tmp_path / "run" / "recipe.yaml").output == str(tmp_path / "run")


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
