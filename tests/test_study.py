"""A study: its design, its runs, what is kept of them, and that it resumes after any interruption."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from echo_lora.cli import app
from echo_lora.errors import EchoConfigError, EchoDataError, EchoError, EchoModelError, EchoTrainingError
from echo_lora.study import compare as comparing
from echo_lora.study import folder, workers
from echo_lora.study import run as executing
from echo_lora.study.compare import choose, run_study
from echo_lora.study.design import RunKey, load_study, recipe_of, shipped_studies, slurm_options
from echo_lora.study.folder import STUDY_FILE, Archive, StudyFile, read_study
from echo_lora.study.looks import confidence_at
from echo_lora.study.records import RECORD, RUNS_FILE, read_record, record_path, write_archive, write_record
from echo_lora.study.report.page import summary_lines, write_report
from echo_lora.study.run import execute
from echo_lora.study.workers import Engine
from echo_lora.training.sft import EchoSFTTrainer
from tiny_recipe import ROWS, tiny_document, tiny_folder, write_rows

TESTS = Path(__file__).parent
ARMS = {
    "lora": {"label": "LoRA", "set": {"echo": False}},
    "echo-lora": {"label": "Echo-LoRA", "keep_echo_on": True},
    "zero": {"role": "control", "set": {"echo_config.echo_kind": "zero"}},
}


def study_file(folder: Path, **changes) -> Path:
    """`folder`/study.yaml of three arms on a tiny model, with its recipe, rows and text."""
    if not (folder / "base").exists():
        tiny_folder(folder / "base")
    write_rows(folder / "train.jsonl")
    write_rows(folder / "validation.jsonl", ROWS[4:8])
    write_rows(folder / "test.jsonl", ROWS[:4])
    (folder / "general.txt").write_text("The capital of France is Paris. " * 20)
    recipe = tiny_document()
    recipe["data"] |= {"validation": "validation.jsonl"}
    recipe["training"] |= {"evaluate_every": 2, "save_every": 1}
    recipe["lora"] |= {"dropout": 0.1}
    recipe["evaluation"] = {"tasks": [{"name": "words", "max_new_tokens": 3}]}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    document = {
        "title": "Tiny",
        "recipe": "recipe.yaml",
        "arms": ARMS,
        "baseline": "lora",
        "learning_rates": [1e-2, 3e-2],
        "seeds": [1, 2],
        "smallest_effect": 0.05,
        "general": {"file": "general.txt", "tokens": 50},
        "output": str(folder / "study"),
    } | changes
    path = folder / "study.yaml"
    path.write_text(
        yaml.safe_dump({key: value for key, value in document.items() if value is not None}, sort_keys=False)
    )
    return path


def loaded(folder: Path, *overrides: str, **changes):
    return load_study(study_file(folder, **changes), overrides)


def records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in gzip.decompress((folder / RUNS_FILE).read_bytes()).splitlines()]


def record_of(study, key: RunKey) -> dict:
    return read_record(record_path(study.output, key))


def numbers(folder: Path) -> list[dict]:
    """The records without what rightly differs between two runs of one study: time, memory, where it was resumed."""
    found = records(folder)
    for record in found:
        for name in ("seconds", "peak_memory", "resumed_at", "commit"):
            record.pop(name)
        record["recipe"].pop("output")
        for score in record["scores"]:
            score.pop("seconds")
            score["result"].pop("seconds")
        record["history"] = [
            {name: value for name, value in entry.items() if "runtime" not in name and "per_second" not in name}
            for entry in record["history"]
            if "train_runtime" not in entry
        ]
    return found


# ------------------------------------------------------------------ the design


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"baseline": "lore"}, "there is no arm 'lore'. Did you mean 'lora'?"),
        ({"comparisons": [["zero", "zero"]]}, "must name two different arms"),
        ({"comparisons": [["zero"]]}, "must name two different arms"),
        ({"comparisons": [["zero+echo", "lora"]]}, "names zero+echo, but arm zero does not set keep_echo_on: true"),
        ({"comparisons": [["echo-lore+echo", "lora"]]}, "no arm 'echo-lore+echo'. Did you mean 'echo-lora+echo'?"),
        ({"comparisons": [["echo-lora+ech", "lora"]]}, "no arm 'echo-lora+ech'. Did you mean 'echo-lora+echo'?"),
        ({"baseline": "echo-lora+echo"}, "there is no arm 'echo-lora+echo'"),
        ({"set": {"echo": False}}, "arm echo-lora: keep_echo_on needs an echo, but the arm trains without one"),
        ({"seeds": [0, 1]}, "seed 0 is in both seeds and tuning_seeds"),
        ({"seeds": [1, 1]}, "seeds = [1, 1] must be different"),
        ({"tuning_seeds": []}, "need tuning_seeds"),
        ({"smallest_effect": 1}, "smallest_effect"),
        ({"margin": 0}, "margin = 0 must be greater than 0"),
        ({"margin": 1}, "margin = 1 must be less than 1"),
        (
            {"looks": []},
            "looks = [] must be increasing numbers of seeds, at least 3, and end with the number of all seeds, 2",
        ),
        ({"looks": [2]}, "looks = [2] must be increasing"),
        ({"seeds": [1, 2, 3, 4], "looks": [3]}, "looks = [3] must be"),
        ({"seeds": [1, 2, 3, 4], "looks": [3, 3, 4]}, "looks = [3, 3, 4] must be"),
        ({"seeds": [1, 2, 3, 4], "looks": [4, 3]}, "looks = [4, 3] must be"),
        ({"seeds": [1, 2, 3, 4], "looks": [3, 4.0]}, "looks.1 = 4.0 must be a valid integer"),
        ({"arms": ARMS | {"zero": {"learning_rates": [1e-3]}}}, "an equal budget"),
        ({"arms": ARMS | {"zero": {"set": {"seeds.routing": 3}}}}, "the study sets seeds.routing for each run"),
        ({"arms": ARMS | {"zero": {"set": {"echo_config.echo_kin": "zero"}}}}, "arm zero: "),
        ({"arms": ARMS | {"a/b": {}}}, "the arm name 'a/b'"),
        ({"arms": {"lora": {}}}, "arms"),
        ({"general": {"file": "no.txt"}}, "no.txt: there is no such file"),
        ({"recipe": "no.yaml"}, "no.yaml: there is no such file"),
        ({"comparisons": []}, "comparisons = [] compares nothing"),
        ({"set": {"output": "x"}}, "the study sets output for each run"),
        ({"set": {"data.validation": None, "training.evaluate_every": None}}, "arm lora: answers to validation rows"),
        ({"tune_on": "loss", "set": {"training.evaluate_every": None}}, "Set training.evaluate_every"),
        ({"tune_on": "loss", "set": {"data.test": None}}, "arm lora: there are no test rows"),
        ({"set": {"evaluation.tasks": [{"name": "words", "kind": "code"}]}}, "a study does not run generated code"),
        ({"set": {"evaluation.tasks": [{"name": "words", "kind": "choice"}]}}, "arm echo-lora: keep_echo_on is for"),
        ({"learning_rate": 1}, "unknown key learning_rate. Did you mean 'learning_rates'?"),
    ],
)
def test_a_wrong_design_is_refused_before_the_first_run(tmp_path, changes, message):
    with pytest.raises(EchoConfigError) as error:
        loaded(tmp_path, **changes)
    assert message in str(error.value)
    assert not (tmp_path / "study").exists()


def test_an_error_names_the_line_of_the_study(tmp_path):
    path = study_file(tmp_path, baseline=3)
    line = 1 + [text.startswith("baseline") for text in path.read_text().splitlines()].index(True)
    with pytest.raises(EchoConfigError, match=f"{path}:{line}: baseline = 3"):
        load_study(path)


def test_every_run_of_a_seed_has_the_seeds_and_the_rate_of_its_key(tmp_path):
    study = loaded(tmp_path)
    keys = study.tuning_runs
    assert [(key.seed, key.arm, key.learning_rate) for key in keys[:3]] == [
        (0, "lora", 1e-2),
        (0, "lora", 3e-2),
        (0, "echo-lora", 1e-2),
    ]
    assert len(keys) == 6
    keys = study.confirmation_runs({"lora": 1e-2, "echo-lora": 3e-2, "zero": 1e-2})
    assert [key.seed for key in keys] == [1, 1, 1, 2, 2, 2]
    recipe = recipe_of(study, keys[1])
    assert (recipe.training.learning_rate, recipe.echo) == (3e-2, True)
    assert recipe.seeds.model_dump() == {"initialisation": 1, "data_order": 1, "routing": 1, "validation": 0}
    assert not recipe_of(study, keys[0]).echo


def test_the_quick_study_says_what_makes_its_model(tmp_path, monkeypatch):
    makefile = (Path(__file__).parent.parent / "Makefile").read_text()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EchoConfigError, match=r"`make study-quick` makes it and runs the study") as caught:
        load_study("quick")
    (command,) = re.findall(r"`python (scripts/.*)`", str(caught.value))
    assert f"python {command}\n" in makefile


def test_one_learning_rate_needs_no_tuning(tmp_path):
    study = loaded(tmp_path, learning_rates=[1e-2], seeds=[0])
    assert study.tuning_runs == []
    assert choose(study) == dict.fromkeys(ARMS, 1e-2)


def test_shipped_studies_can_be_read():
    assert "quick" in shipped_studies()
    for name in shipped_studies():
        if name != "quick":  # whose general text is made by its program
            assert load_study(name).title


def test_the_study_of_the_documentation_can_be_read(tmp_path):
    page = (TESTS.parent / "docs" / "study.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"```yaml\n(.*?)```", page, re.DOTALL)
    path = study_file(tmp_path).with_name("documented.yaml")
    path.write_text(text)
    study = load_study(path)
    assert (study.margin, study.looks, len(study.seeds)) == (0.01, [5, 10, 15, 20], 20)


def test_the_study_of_the_page_on_comparing_can_be_read(tmp_path):
    page = (TESTS.parent / "docs" / "compare.md").read_text(encoding="utf-8")
    recipe, study = re.findall(r"```yaml\n# (?:mine|study)\.yaml\n(.*?)```", page, re.DOTALL)
    (tmp_path / "mine.yaml").write_text(recipe)
    (tmp_path / "study.yaml").write_text(study)
    found = load_study(tmp_path / "study.yaml")
    assert len(found.tuning_runs) == 2 * 3
    shipped = load_study("peft-methods")
    assert f"at most {len(shipped.runs(None))} runs" in page
    assert not any(recipe_of(shipped, key).echo for key in shipped.runs(None) if key.learning_rate)


def test_options_of_slurm_are_texts_but_for_numbers():
    options = slurm_options(["timeout_min=60", "slurm_partition=gpu", "slurm_time=01:00:00"])
    assert options == {"timeout_min": 60, "slurm_partition": "gpu", "slurm_time": "01:00:00"}
    with pytest.raises(EchoConfigError, match="--slurm 60: write it as key=value"):
        slurm_options(["60"])


# -------------------------------------------------------------------- the runs


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A study that was never interrupted."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")  # as `start_study`: other threads add in another order
        assert run_study(loaded(folder), Engine(), command="echo-lora compare study.yaml")
    return folder


def test_a_study_keeps_every_run_and_every_prediction(whole):
    about = json.loads((whole / "study" / STUDY_FILE).read_text())
    found = records(whole / "study")
    assert [record["stage"] for record in found] == ["tuning"] * 6 + ["confirmation"] * 6
    assert set(about["chosen"]) == set(ARMS)
    assert about["power"]["source"].startswith("tuning runs of echo-lora and lora")
    assert read_study(whole / "study").design.pairs == [("echo-lora", "lora"), ("zero", "lora")]
    for record in found:
        parts = {(score["part"], score["echo"]) for score in record["scores"]}
        kept = record["arm"] == "echo-lora" and record["stage"] == "confirmation"
        part = "validation" if record["stage"] == "tuning" else "test"
        assert parts == ({(part, False), (part, True)} if kept else {(part, False)})
        for score in record["scores"]:
            assert len(score["result"]["predictions"]) == 4
        assert record["general"]["before"] > 0
        assert record["general"]["tokens"] == 50
        assert not record_path(whole / "study", RunKey.of(record)).with_name("checkpoints").exists()
        evaluated = [entry for entry in record["history"] if "eval_loss" in entry]
        assert [entry["step"] for entry in evaluated] == [2, 4]
        assert all(("eval_ce_on" in entry) == (record["arm"] != "lora") for entry in evaluated)


def test_arms_of_a_seed_start_from_one_adapter_and_end_with_different_ones(whole):
    for seed in (1, 2):
        of_seed = [r for r in records(whole / "study") if r["seed"] == seed]
        assert len({r["initial_adapter_sha256"] for r in of_seed}) == 1
        assert len({r["adapter_sha256"] for r in of_seed}) == 3


def test_arms_of_a_seed_see_the_same_rows_in_the_same_order(tmp_path, monkeypatch):
    study, seen = loaded(tmp_path, learning_rates=[1e-2]), {}
    original = EchoSFTTrainer.compute_loss

    def compute_loss(self, model, inputs, *args, **kwargs):
        if model.training:
            seen.setdefault(arm, []).append(inputs["_echo_row"].tolist())
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(EchoSFTTrainer, "compute_loss", compute_loss)
    for arm in ARMS:
        assert execute(study, RunKey("confirmation", arm, 1e-2, 1))
    arm = "other seed"
    assert execute(study, RunKey("confirmation", "lora", 1e-2, 2))
    assert seen["lora"] == seen["echo-lora"] == seen["zero"] != seen["other seed"]
    assert len(seen["lora"]) == 4


def kept(study, *found: dict) -> Archive:
    """The archive of a study whose folder has these records and no others."""
    for record in found:
        write_record(record_path(study.output, RunKey.of(record)), record)
    return Archive(study)


def test_arms_that_are_not_paired_are_refused(whole, tmp_path):
    first, second = records(whole / "study")[6:8]
    chosen = StudyFile.read(whole / "study").chosen
    for name, words in {
        "": "",
        "initial_adapter_sha256": "start from the same adapter",
        "data_sha256": "train on the same rows",
        "questions_sha256": "answer the same questions",
        "general": "have the same base",
    }.items():
        study = load_study(whole / "study.yaml", [f"output={tmp_path / (name or 'paired')}"])
        other = {name: {"before": 9.0, "after": 9.0} if name == "general" else "another"} if name else {}
        archive = kept(study, first, second | other)
        if not name:
            archive.gather(chosen)
            assert records(Path(study.output)) == [first, second]
            continue
        with pytest.raises(EchoError, match=rf"arms lora \(seed 1\) and echo-lora \(seed 1\) did not {words}"):
            archive.gather(chosen)


def test_each_record_is_read_once_and_all_are_written_in_the_order_of_the_design(whole, tmp_path, monkeypatch):
    found, chosen = records(whole / "study"), StudyFile.read(whole / "study").chosen
    study = load_study(whole / "study.yaml", [f"output={tmp_path / 'study'}"])
    read = []
    monkeypatch.setattr(folder, "read_record", lambda path: read.append(path) or read_record(path))
    archive = kept(study)
    for number, record in enumerate(reversed(found), start=1):
        kept(study, record)
        archive.gather(chosen)
        assert records(Path(study.output)) == found[-number:]
    assert len(read) == len(set(read)) == len(found)


def test_a_rate_that_changes_with_its_records_changes_what_is_gathered(tmp_path, planted):
    """As when a tuning run is removed and done again: the confirmation runs at the other rate no longer count."""
    planted(0)
    study = loaded(tmp_path, **LOOKS | {"learning_rates": [1e-2, 3e-2], "tune_on": "loss"})
    assert run_study(study, Engine())
    assert StudyFile.read(study.output).chosen == dict.fromkeys(ARMS, 1e-2)
    for key in study.tuning_runs:
        record = record_of(study, key)
        kept(study, record | {"history": [{"eval_loss": 1.0 if key.learning_rate == 1e-2 else 0.5}]})
    assert run_study(study, Engine())
    assert StudyFile.read(study.output).chosen == dict.fromkeys(ARMS, 3e-2)
    assert [RunKey.of(record) for record in records(Path(study.output))] == study.runs(dict.fromkeys(ARMS, 3e-2))


def test_the_rate_is_the_best_on_validation_rows_and_of_equals_the_lowest(tmp_path):
    study = loaded(tmp_path, tuning_seeds=[0, 5])
    accuracy = {("lora", 1e-2): [0.5, 0.6], ("lora", 3e-2): [0.9, 0.3], ("zero", 1e-2): [0.1, 0.3]}
    for key in study.tuning_runs:
        value = accuracy.get((key.arm, key.learning_rate), [0.2, 0.2])[study.tuning_seeds.index(key.seed)]
        result = {"task": "words", "accuracy": value, "correct_per_row": [True]}
        kept(study, asdict(key) | {"scores": [{"result": result}], "history": [{"eval_loss": 1 - value}]})
    assert choose(study) == {"lora": 3e-2, "echo-lora": 1e-2, "zero": 1e-2}
    by_loss = study.model_copy(update={"tune_on": "loss"})
    assert choose(by_loss) == {"lora": 3e-2, "echo-lora": 1e-2, "zero": 1e-2}


def test_a_rate_at_which_training_diverges_is_not_chosen(tmp_path, monkeypatch):
    study = loaded(tmp_path)
    original = EchoSFTTrainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        if self.args.learning_rate == 3e-2:
            raise EchoTrainingError("ce_off is nan at step 1")
        return original(self, *args, **kwargs)

    monkeypatch.setattr(EchoSFTTrainer, "compute_loss", compute_loss)
    for key in study.tuning_runs:
        assert execute(study, key)
    diverged = record_of(study, RunKey("tuning", "lora", 3e-2, 0))
    assert diverged["diverged"] == "ce_off is nan at step 1"
    assert choose(study) == dict.fromkeys(ARMS, 1e-2)
    with pytest.raises(EchoTrainingError):
        execute(study, RunKey("confirmation", "lora", 3e-2, 1))
    comparing._begin(study, "").model_copy(update={"chosen": choose(study)}).write(study.output)
    Archive(study).gather(choose(study))
    assert "diverged" in (write_report(study.output).parent / "report.md").read_text()


def test_a_study_resumes_from_its_gathered_records(whole, tmp_path, monkeypatch):
    for name in (STUDY_FILE, RUNS_FILE):
        (tmp_path / "clone").mkdir(exist_ok=True)
        (tmp_path / "clone" / name).write_bytes((whole / "study" / name).read_bytes())
    monkeypatch.setattr(workers, "_on_this_machine", lambda *_: pytest.fail("a run was begun"))
    study = load_study(whole / "study.yaml", [f"output={tmp_path / 'clone'}"])
    assert run_study(study, Engine())
    assert (tmp_path / "clone" / RUNS_FILE).read_bytes() == (whole / "study" / RUNS_FILE).read_bytes()


@pytest.mark.parametrize(
    "change",
    [{"arm": "../../../outside"}, {"arm": "/outside"}, {"stage": "../outside"}, {"learning_rate": 0.5}, {"seed": 77},
     {"seed": "../../../../../outside"}, {"arm": {"a": 1}}, None],
    ids=str,
)  # fmt: skip
def test_a_record_that_is_not_of_the_design_does_not_become_a_path(tmp_path, change):
    (tmp_path / "inner").mkdir()
    study = loaded(tmp_path / "inner")
    record = {"stage": "tuning", "arm": "lora", "learning_rate": 1e-2, "seed": 0, "scores": [], "history": []}
    write_archive(Path(study.output) / RUNS_FILE, json.dumps(None if change is None else record | change) + "\n")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(EchoDataError, match=rf"{RUNS_FILE}:1: .*Remove the line"):
        run_study(study, Engine())
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("moment", ["in training", "after training"])
def test_an_interrupted_run_resumes_to_the_same_answers(tmp_path, monkeypatch, moment):
    """Five steps are no whole number of epochs: a checkpoint of the last one must not be trained on."""
    settings = {"training.steps": 5, "training.log_every": 2, "training.schedule": "constant"}
    study = loaded(tmp_path, set=settings)
    key = RunKey("confirmation", "echo-lora", 1e-2, 1)
    assert execute(study, key)
    whole = record_of(study, key)
    (tmp_path / "study" / key.folder / RECORD).unlink()

    def die(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if moment == "in training":
            original = EchoSFTTrainer.compute_loss
            patch.setattr(
                EchoSFTTrainer,
                "compute_loss",
                lambda self, *a, **k: die() if self.state.global_step == 3 else original(self, *a, **k),
            )
        else:
            patch.setattr(executing, "score", die)
        with pytest.raises(KeyboardInterrupt):
            execute(study, key)
    assert execute(study, key)
    again = record_of(study, key)
    assert again["resumed_at"] == (3 if moment == "in training" else 5)
    for name in ("steps", "adapter_sha256", "initial_adapter_sha256", "data_sha256", "questions_sha256", "general"):
        assert again[name] == whole[name], name
    predictions = [[s["result"]["predictions"] for s in record["scores"]] for record in (whole, again)]
    assert predictions[0] == predictions[1]


def test_another_design_in_the_same_folder_is_refused(whole):
    with pytest.raises(EchoConfigError, match="a study with another design: smallest_effect differ"):
        run_study(load_study(whole / "study.yaml", ["smallest_effect=0.01"]), Engine())


def test_a_key_that_a_study_was_begun_without_may_have_its_default(tmp_path):
    study = loaded(tmp_path)
    comparing._begin(study, "")
    path = tmp_path / "study" / STUDY_FILE
    about = json.loads(path.read_text())
    for section, key in [
        (about["design"], "margin"),
        (about["design"], "looks"),
        (about["design"]["arms"]["lora"], "keep_echo_on"),
        (about["recipe"]["training"], "max_grad_norm"),
        (about["recipe"]["evaluation"]["tasks"][0], "kind"),
        (about["recipe"], "quantization"),
    ]:
        del section[key]
    about |= {"title": "Tiny", "seeds": [1, 2]}  # as the first versions wrote, beside the design
    path.write_text(json.dumps(about))
    assert comparing._begin(study, "") == StudyFile.model_validate(about)
    for key, changed in {
        "margin": study.model_copy(update={"margin": 0.01}),
        "seeds": study.model_copy(update={"seeds": [1, 2, 3]}),
        "arms": study.model_copy(update={"arms": dict(list(study.arms.items())[:2])}),
        "recipe": study.model_copy(update={"set": {"training.max_grad_norm": 7.0}}),
    }.items():
        with pytest.raises(EchoConfigError, match=rf"another design: .*{key} differ"):
            comparing._begin(changed, "")
    del about["design"]["arms"]["lora"]["set"], about["recipe"]["lora"]["dropout"]  # neither is at its default
    path.write_text(json.dumps(about))
    with pytest.raises(EchoConfigError, match="another design: arms, recipe differ"):
        comparing._begin(study, "")


def test_a_finished_study_does_nothing_when_called_again(whole, monkeypatch):
    monkeypatch.setattr(workers, "_on_this_machine", lambda *_: pytest.fail("a run was begun"))
    before = (whole / "study" / RUNS_FILE).read_bytes()
    assert run_study(load_study(whole / "study.yaml"), Engine())
    assert (whole / "study" / RUNS_FILE).read_bytes() == before


def test_each_source_is_a_task_where_the_recipe_names_none(tmp_path):
    validation = [{"file": str(tmp_path / "validation.jsonl")}, {"file": str(tmp_path / "test.jsonl")}]
    study = loaded(tmp_path, set={"evaluation.tasks": [], "data.validation": validation}, score_on="validation")
    key = RunKey("confirmation", "lora", 1e-2, 1)
    assert execute(study, key)
    assert [score["result"]["task"] for score in record_of(study, key)["scores"]] == [
        "validation",
        "test",
    ]


@pytest.mark.parametrize("own", [None, "1"])
def test_threads_are_shared_out_among_workers_and_the_environment_is_left_as_it_was(tmp_path, monkeypatch, own):
    if own is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", own)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    study = loaded(tmp_path, learning_rates=[1e-2], seeds=[1], general=None, arms=dict(list(ARMS.items())[:2]))
    assert run_study(study, Engine(workers=2))
    assert {record["threads"] for record in records(tmp_path / "study")} == {2 if own is None else 1}
    assert os.environ.get("OMP_NUM_THREADS") == own


def test_time_that_is_up_begins_no_run(tmp_path):
    assert not run_study(loaded(tmp_path), Engine(), minutes=0)
    assert records(tmp_path / "study") == []
    assert json.loads((tmp_path / "study" / STUDY_FILE).read_text())["design"]["title"] == "Tiny"


def test_test_rows_that_are_missing_show_before_the_first_run(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "_on_this_machine", lambda *_: pytest.fail("a run was begun"))
    study = loaded(tmp_path)
    (tmp_path / "test.jsonl").unlink()
    with pytest.raises(EchoDataError, match=r"test\.jsonl"):
        run_study(study, Engine())
    assert not Path(study.output).exists()


def test_faults_and_warnings_of_any_arms_rows_show_before_the_first_run(tmp_path, planted, caplog):
    rows = tmp_path / "merged.jsonl"
    rows.write_text(json.dumps({"prompt": "the answer ", "completion": "is"}) + "\n")  # one token: " is"
    other = {"set": {"echo": False, "data.train": [{"file": str(rows)}], "data.chat": False}}
    study = loaded(tmp_path, learning_rates=[1e-2], arms=ARMS | {"other": other})
    with caplog.at_level("WARNING"):
        assert run_study(study, Engine())
    found = [message for message in caplog.messages if "merged.jsonl" in message]
    assert len(found) == 1
    assert "has one token for the end of its prompt and the start of its answer" in found[0]

    rows.write_text(json.dumps({"prompt": "th", "completion": "e"}) + "\n")  # no boundary
    shutil.rmtree(study.output)
    with pytest.raises(EchoDataError, match=r"merged\.jsonl:1: row 0 has no boundary"):
        run_study(study, Engine())
    assert not Path(study.output).exists()


def test_a_model_that_cannot_keep_its_echo_shows_before_the_first_run(tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "_on_this_machine", lambda *_: pytest.fail("a run was begun"))
    monkeypatch.setattr(LlamaForCausalLM, "_is_stateful", True)
    study = loaded(tmp_path)
    with pytest.raises(EchoModelError, match=r"arm echo-lora: keep_echo_on .* but .* has a recurrent state"):
        run_study(study, Engine())
    assert not Path(study.output).exists()


def test_a_run_that_fails_is_named_and_the_others_are_done(tmp_path):
    study = loaded(tmp_path, learning_rates=[1e-2], arms=ARMS | {"bad": {"set": {"lora.target_modules": ["none"]}}})
    with pytest.raises(EchoError) as error:
        run_study(study, Engine())
    message = str(error.value)
    assert "2 of 8 runs failed" in message
    assert "confirmation bad lr 0.01 seed 1" in message
    log = tmp_path / "study" / "runs/confirmation/bad/lr-0.01/seed-1/log.txt"
    assert str(log) in message
    assert "Traceback" in log.read_text()
    assert all(record_of(study, RunKey("confirmation", arm, 1e-2, seed)) for arm in ARMS for seed in (1, 2))


def test_a_run_that_another_process_holds_is_left_to_it(tmp_path):
    study = loaded(tmp_path)
    key = RunKey("tuning", "lora", 1e-2, 0)
    folder = tmp_path / "study" / key.folder
    folder.mkdir(parents=True)
    holder = subprocess.Popen(
        [sys.executable, "-c", "import filelock, sys; f = filelock.FileLock(sys.argv[1]).acquire();"
         "print('held', flush=True); sys.stdin.read()", str(folder / "lock")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert holder.stdout.readline() == "held\n"
    assert not execute(study, key)
    assert not (folder / RECORD).exists()
    holder.kill()
    holder.wait()
    assert execute(study, key)


def test_a_damaged_record_is_named(tmp_path):
    study = loaded(tmp_path)
    key = RunKey("tuning", "lora", 1e-2, 0)
    path = tmp_path / "study" / key.folder / RECORD
    path.parent.mkdir(parents=True)
    path.write_bytes(b"no archive")
    with pytest.raises(EchoError, match=f"{path} can't be read"):
        Archive(study).gather(None)


def start_study(folder: Path) -> subprocess.Popen:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "echo_lora.cli", "compare", str(folder / "study.yaml"), "--workers", "2"]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def kill_after(process: subprocess.Popen, runs: int, seconds: float) -> None:
    """kill -9 a while after so many runs have ended."""
    for line in process.stderr:
        if f"{runs}/" in line and "done" in line:
            break
    time.sleep(seconds)  # not to wait for anything: to hit the middle of a run
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)


@pytest.mark.parametrize("runs", [2])
@pytest.mark.slow
def test_a_study_killed_and_begun_again_ends_with_the_same_numbers(tmp_path, whole, runs):
    study_file(tmp_path)
    kill_after(start_study(tmp_path), runs, 0.5)
    done = len(list((tmp_path / "study").rglob(RECORD)))
    assert runs <= done < 12
    again = start_study(tmp_path)
    _, errors = again.communicate(timeout=300)
    assert again.returncode == 0, errors
    assert len(records(tmp_path / "study")) == 12
    # one tokenizer and one model, made twice from the same seed in different folders
    first, second = numbers(whole / "study"), numbers(tmp_path / "study")
    for record in first + second:
        for name in ("model", "data", "evaluation"):
            record["recipe"].pop(name)
        record.pop("rows")
        for score in record["scores"]:
            score["result"].pop("file", None)
    assert second == first


@pytest.mark.slow
def test_a_study_runs_as_a_job_array_of_submitit(tmp_path, whole):
    pytest.importorskip("submitit")
    study = loaded(tmp_path, learning_rates=[1e-2], seeds=[1])
    assert run_study(study, Engine(cluster="local", options={"timeout_min": 10}))
    assert len(records(tmp_path / "study")) == 3


def test_options_that_submitit_does_not_know_are_named(tmp_path):
    pytest.importorskip("submitit")
    study = loaded(tmp_path, learning_rates=[1e-2], seeds=[1])
    with pytest.raises(EchoConfigError, match="submitit refuses the options"):
        run_study(study, Engine(cluster="debug", options={"minutes": 3}))


# ------------------------------------------------------------------ until it is decided


LOOKS = {"learning_rates": [1e-2], "seeds": list(range(1, 9)), "looks": [3, 5, 8], "general": None}


@pytest.fixture
def planted(monkeypatch):
    """Runs that are not done but made up: of 400 questions Echo-LoRA is right on `gain` more. The runs are listed."""

    def run(study, keys, engine, ends):
        for key in keys:
            right = 200 + (gain if key.arm == "echo-lora" else 0)
            result = {"task": "words", "accuracy": right / 400, "correct_per_row": [i < right for i in range(400)]}
            record = {
                **{name: getattr(key, name) for name in ("stage", "arm", "learning_rate", "seed")},
                **dict.fromkeys(["initial_adapter_sha256", "data_sha256", "questions_sha256"], "0"),
                "recipe": recipe_of(study, key).to_dict(),
                "scores": [{"result": result}],
                "history": [{"eval_loss": 1.0}],
                "general": None,
            }
            write_record(record_path(study.output, key), record)
            done.append((key.seed, key.arm))
            yield key, None

    gain, done = 0, []

    def plant(questions):
        nonlocal gain
        gain = questions
        return done

    monkeypatch.setattr(workers, "_on_this_machine", run)
    return plant


def test_a_study_without_looks_has_no_moment_to_decide(tmp_path):
    study = loaded(tmp_path)
    with pytest.raises(EchoConfigError, match=r"declares no looks.*declare looks before the first run"):
        run_study(study, Engine(), until_decided=True)
    assert not Path(study.output).exists()


@pytest.mark.parametrize(
    ("gain", "smallest", "looks", "word"),
    [
        (60, 0.03, 1, "better"),
        (10, 0.03, 2, "better"),
        (0, 0.05, 1, "no difference shown"),
        (3, 0.005, 3, "too few data"),
    ],
)
def test_a_study_runs_until_a_look_decides_it(tmp_path, planted, capfd, gain, smallest, looks, word):
    done = planted(gain)
    study = loaded(tmp_path, smallest_effect=smallest, **LOOKS)
    assert run_study(study, Engine(), until_decided=True)
    seeds = [3, 5, 8][looks - 1]
    assert done == [(seed, arm) for seed in range(1, seeds + 1) for arm in ARMS]
    said = " ".join(capfd.readouterr().err.split())
    assert f"look {looks} of 3, {seeds} seeds: {word}" in said
    assert ("decided" in said) == (word != "too few data")
    assert (f"look {looks - 1} of 3" in said) == (looks > 1)
    write_report(study.output)
    before = {path: path.read_bytes() for path in Path(study.output).rglob("*") if path.is_file()}
    assert run_study(study, Engine(), until_decided=True)
    write_report(study.output)
    assert len(done) == seeds * len(ARMS)
    assert f"look {looks} of 3, {seeds} seeds: {word}" in " ".join(capfd.readouterr().err.split())
    assert {path: path.read_bytes() for path in Path(study.output).rglob("*") if path.is_file()} == before


def test_the_later_of_two_looks_counts(tmp_path, planted, capfd):
    """Seeds that were run without --until-decided are not forgotten."""
    done = planted(60)
    study = loaded(tmp_path, **LOOKS)
    assert run_study(study, Engine())
    assert len(done) == 8 * len(ARMS)
    capfd.readouterr()
    assert run_study(study, Engine(), until_decided=True)
    said = capfd.readouterr().err
    assert "look 3 of 3, 8 seeds: better; decided" in " ".join(said.split())
    assert "look 1" not in said


def test_the_power_of_a_study_with_looks_is_that_of_its_last_one(tmp_path, planted):
    planted(60)
    study = loaded(tmp_path, margin=0.02, **LOOKS)
    run_study(study, Engine(), until_decided=True)
    about = json.loads((Path(study.output) / STUDY_FILE).read_text())
    assert about["power"]["confidence"] == confidence_at([3, 5, 8], 3)
    assert (about["power"]["seeds"], about["power"]["margin"]) == (8, 0.02)
    assert (about["design"]["looks"], about["design"]["margin"]) == ([3, 5, 8], 0.02)


def test_time_that_is_up_before_a_look_decides_nothing(tmp_path, planted):
    done = planted(60)
    study = loaded(tmp_path, **LOOKS)
    run = workers._on_this_machine
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "_on_this_machine", lambda study, keys, *rest: run(study, keys[:7], *rest))
        assert not run_study(study, Engine(), until_decided=True)
    assert len(done) == 7
    assert read_study(study.output).look == 0
    assert summary_lines(study.output)[0].startswith("too few data: Echo-LoRA − LoRA: no look has been reached yet")
    assert record_path(study.output, RunKey("confirmation", "lora", 1e-2, 3)).is_file()


def test_the_command_tells_the_look_and_that_it_is_decided(tmp_path, planted):
    planted(60)
    path = study_file(tmp_path, margin=0.01, **LOOKS)
    for _ in range(2):
        done = CliRunner().invoke(app, ["compare", str(path), "--until-decided"], catch_exceptions=False)
        assert done.exit_code == 0
        assert "better: Echo-LoRA − LoRA: +15.00 percentage points" in done.stdout
        assert "Look 1 of 3: 3 of 8 seeds." in done.stdout
        assert "It is shown that Echo-LoRA is not worse than LoRA by more than the margin of 1 point" in done.stdout
        assert "not complete" not in done.stdout
        assert "decided, nothing is left to do" in " ".join(done.stderr.split())
    done = CliRunner().invoke(app, ["compare", str(path), "--until-decided", "--set", "looks=null"])
    assert done.exit_code == 1
    assert done.stderr.startswith("Error: --until-decided: the study of")


# --------------------------------------------------------------------------------------------------- without an echo


@pytest.mark.parametrize(
    "names",
    [["lora", "pissa"], pytest.param(list(load_study("peft-methods").arms), marks=pytest.mark.slow)],
    ids=["two arms", "all arms"],
)
def test_the_study_of_methods_of_peft_runs_on_a_tiny_model_and_reports(tmp_path, names):
    arms = {name: load_study("peft-methods").arms[name] for name in names}
    assert not any(arm.keep_echo_on for arm in arms.values())
    study = loaded(
        tmp_path,
        arms={name: {"label": arm.label, "set": arm.set} for name, arm in arms.items()},
        set={"echo": False, "training.steps": 3},
        learning_rates=[1e-2],
        seeds=[1],
        margin=0.05,
    )
    assert run_study(study, Engine())
    found = {record["arm"]: record for record in records(Path(study.output))}
    assert list(found) == names
    assert len({record["adapter_sha256"] for record in found.values()}) == len(names)  # every setting has an effect
    # the base of an arm that changes its base is the base, too, not what is left of it
    assert len({f"{record['general']['before']:.4f}" for record in found.values()}) == 1
    assert found["pissa"]["deployed_parameters"] == 2 * found["lora"]["deployed_parameters"]
    write_report(study.output)
    for name in ("report.html", "report.md"):
        written = (Path(study.output) / name).read_text()
        assert "PiSSA − LoRA" in written
        assert "echo" not in re.sub(r"echo[-_]lora", "", written.replace(str(tmp_path), "")).lower()
    assert len(summary_lines(study.output)) >= len(names) - 1
