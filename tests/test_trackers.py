"""Experiment trackers: each gets the run's name, project and metrics, and writes into the run's folder only."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from echo_lora.errors import EchoConfigError
from echo_lora.recipe.build import training_arguments
from echo_lora.recipe.load import load_recipe
from echo_lora.recipe.trackers import FOLDERS, PROJECTS, RUNS, tracking
from echo_lora.recipe.train import run
from tiny_recipe import tiny_recipe

VARIABLES = [*FOLDERS.values(), *PROJECTS.values()]


def recipe_with(folder: Path, *overrides: str):
    return load_recipe(tiny_recipe(folder, echo=False), [*overrides, "training.steps=2"])


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def stand_in(monkeypatch, name: str, *, is_open: bool = False) -> list[str]:
    """A package whose run is open until it is ended, and a list of how it was ended."""
    ended: list[str] = []
    package = SimpleNamespace(run="run" if is_open else None)
    package.active_run = package.get_run = lambda: package.run
    package.init = lambda **given: setattr(package, "run", given)

    def end() -> None:
        ended.append("ended")
        package.run = None

    setattr(package, RUNS[name][1], end)
    monkeypatch.setitem(sys.modules, name, package)
    return ended


def test_a_run_is_named_after_its_folder_and_its_project_after_us(tmp_path):
    arguments = training_arguments(recipe_with(tmp_path), tmp_path)
    assert (arguments.run_name, arguments.project) == ("run", "echo-lora")
    named = recipe_with(tmp_path, "training.run_name=first try", "training.project=sums")
    arguments = training_arguments(named, tmp_path)
    assert (arguments.run_name, arguments.project) == ("first try", "sums")


@pytest.mark.parametrize("name", FOLDERS)
def test_a_tracker_writes_into_the_folder_of_the_run(tmp_path, monkeypatch, name):
    if name in RUNS:
        stand_in(monkeypatch, name)
    with tracking(recipe_with(tmp_path, f"training.report_to=[{name}]"), tmp_path / "run"):
        place = os.environ[FOLDERS[name]]
        assert str((tmp_path / "run" / "logs" / name).as_posix()) in place
        assert (tmp_path / "run" / "logs" / name).is_dir()
        assert os.environ.get(PROJECTS.get(name, "")) == ("echo-lora" if name in PROJECTS else None)
        set_here = {variable for variable in VARIABLES if variable in os.environ}
    assert set_here == {FOLDERS[name], PROJECTS.get(name, FOLDERS[name])}
    assert not any(variable in os.environ for variable in VARIABLES)


@pytest.mark.parametrize("name", PROJECTS)
def test_a_variable_of_the_user_wins_over_the_folder_and_the_recipe_over_a_variable(tmp_path, monkeypatch, name):
    stand_in(monkeypatch, name)
    monkeypatch.setenv(FOLDERS[name], "/theirs")
    monkeypatch.setenv(PROJECTS[name], "theirs")
    with tracking(recipe_with(tmp_path, f"training.report_to=[{name}]"), tmp_path / "run"):
        assert (os.environ[FOLDERS[name]], os.environ[PROJECTS[name]]) == ("/theirs", "theirs")
    ours = recipe_with(tmp_path, f"training.report_to=[{name}]", "training.project=sums")
    with tracking(ours, tmp_path / "run"):
        assert os.environ[PROJECTS[name]] == "sums"
    assert os.environ[PROJECTS[name]] == "theirs"
    assert not (tmp_path / "run" / "logs").exists()


@pytest.mark.parametrize("name", RUNS)
def test_tracking_ends_with_the_run_also_after_an_error_but_not_what_was_open_before(tmp_path, monkeypatch, name):
    recipe = recipe_with(tmp_path, f"training.report_to=[{name}]")
    ended = stand_in(monkeypatch, name)

    def interrupted() -> None:
        with tracking(recipe, tmp_path / "run"):
            sys.modules[name].run = "begun by the trainer"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert ended == ["ended"]
    ended = stand_in(monkeypatch, name, is_open=True)
    with tracking(recipe, tmp_path / "run"):
        pass
    assert ended == []


def test_swanlab_gets_name_and_project_from_us(tmp_path, monkeypatch):
    stand_in(monkeypatch, "swanlab")
    with tracking(recipe_with(tmp_path, "training.report_to=[swanlab]"), tmp_path / "run"):
        assert sys.modules["swanlab"].run == {"project": "echo-lora", "experiment_name": "run"}
    assert sys.modules["swanlab"].run is None


@pytest.mark.parametrize("name", FOLDERS)
def test_a_missing_tracker_is_named_before_anything_is_loaded(tmp_path, name):
    if find_spec(name) is not None:
        pytest.skip(f"{name} is installed")
    recipe = recipe_with(tmp_path, f"training.report_to=[{name}]", "model=./nowhere")
    with pytest.raises(EchoConfigError) as error:
        run(recipe)
    assert str(error.value) == (
        f"training.report_to = {name} needs the package {name}, which is not installed. Run `pip install {name}`, or "
        "leave it out."
    )
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------- with the packages themselves


def tensorboard_names(logs: Path, losses: list[float]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(logs))
    found.Reload()
    assert [event.value for event in found.Scalars("train/loss")] == pytest.approx(losses, rel=1e-6)
    assert [event.step for event in found.Scalars("train/loss")] == [1, 2]


def mlflow_names(logs: Path, losses: list[float]) -> None:
    with sqlite3.connect(logs / "mlflow.db") as database:
        assert ("sums",) in database.execute("select name from experiments").fetchall()
        assert database.execute("select name, status from runs").fetchall() == [("first", "FINISHED")]
        values = database.execute("select value from metrics where key = 'loss' order by step").fetchall()
    assert [value for (value,) in values] == pytest.approx(losses, rel=1e-6)


def trackio_names(logs: Path, losses: list[float]) -> None:
    with sqlite3.connect(logs / "sums.db") as database:
        rows = database.execute("select run_name, metrics from metrics order by step").fetchall()
    assert {name for name, _ in rows} == {"first"}
    found = [json.loads(metrics) for _, metrics in rows]
    assert [entry["train/loss"] for entry in found if "train/loss" in entry] == pytest.approx(losses, rel=1e-6)


def wandb_names(logs: Path, losses: list[float]) -> None:
    (folder,) = (logs / "wandb").glob("offline-run-*")
    (record,) = folder.glob("*.wandb")
    assert b"first" in record.read_bytes()
    assert b"sums" in record.read_bytes()
    assert b"train/loss" in record.read_bytes()


def swanlab_names(logs: Path, losses: list[float]) -> None:
    written = b"".join(path.read_bytes() for path in logs.rglob("*") if path.is_file())
    assert b"first" in written
    assert b"sums" in written
    assert b"train/loss" in written


@pytest.mark.parametrize("check", [tensorboard_names, mlflow_names, trackio_names, wandb_names, swanlab_names])
def test_metrics_name_and_project_arrive(tmp_path, check: Callable[[Path, list[float]], None]):
    name = check.__name__.removesuffix("_names")
    pytest.importorskip(name)
    working, path = tmp_path / "elsewhere", tiny_recipe(tmp_path, echo=False)
    for folder in (working, tmp_path / "home"):
        folder.mkdir()
    settings = [f"training.report_to=[{name}]", "training.run_name=first", "training.project=sums", "training.steps=2"]
    offline = {"WANDB_MODE": "offline", "SWANLAB_MODE": "offline", "WANDB_SILENT": "true", "MPLBACKEND": "agg"}
    result = subprocess.run(
        [sys.executable, "-m", "echo_lora", "train", str(path), *(part for one in settings for part in ("--set", one))],
        env=os.environ | offline | {"HOME": str(tmp_path / "home")},
        cwd=working,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    assert list(working.iterdir()) == []
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    losses = [entry["loss"] for entry in record["history"] if "loss" in entry]
    assert len(losses) == 2
    assert [folder.name for folder in (tmp_path / "run" / "logs").iterdir()] == [name]
    check(tmp_path / "run" / "logs" / name, losses)
