"""The cases of `fuzz.py`: for every kind of input, what is sound and what is not."""

from __future__ import annotations

import copy
import gzip
import json
import os
import pickle
import random
import shutil
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import typer
import yaml
from safetensors.torch import load_file, save_file

from echo_lora.cli import app
from tiny_recipe import ROWS

Arrange = Callable[[Path], Any]


def _nothing(folder: Path) -> None:
    pass


@dataclass(frozen=True)
class Case:
    """One command on one input. Paths start at the case's folder, which holds copies of what it `needs`."""

    name: str
    args: list[str]
    is_sound: bool | None  # None: whether it is taken is a matter of taste; then it must only behave
    needs: tuple[str, ...] = ()
    arrange: Arrange = _nothing
    says: str = ""  # what a message must hold, for it to name the place
    makes: tuple[str, ...] = ()  # what an accepted command leaves
    env: dict[str, str | None] = field(default_factory=dict)
    is_unprivileged: bool = False  # not as the superuser, who may do anything
    is_real: bool = False  # in a new interpreter
    stdout: Path | None = None


ROW_FILES = ("train.jsonl", "validation.jsonl", "test.jsonl")
RECIPE = ("recipe.yaml", *ROW_FILES)
STUDY = ("study.yaml", "general.txt", *RECIPE)


def all_cases(template: Path, rng: random.Random) -> dict[str, list[Case]]:
    """Families of cases by name, which begins the names of its cases."""
    families = {
        "recipe key": recipe_keys(template),
        "recipe text": recipe_texts(template, rng),
        "override": overrides(),
        "rows": rows(rng),
        "parquet": parquet(rng),
        "path": paths(template),
        "environment": environment(),
        "adapter": adapters(template, rng),
        "base": bases(),
        "run": runs(template, rng),
        "first recipe": first_recipes(template),
        "answer": answers(template),
        "checkpoint": checkpoints(template, rng),
        "study key": study_keys(),
        "study record": study_records(template, rng),
        "import": imports(rng),
        "option": options(),
        "process": processes(),
    }
    found: dict[str, list[Case]] = {}
    for family, made in families.items():
        seen: dict[str, int] = {}
        for case in made:
            count = seen[case.name] = seen.get(case.name, 0) + 1
            again = f" ({count})" if count > 1 else ""
            found.setdefault(family, []).append(replace(case, name=f"{family}: {case.name}{again}"))
    return found


def shown(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 60 else f"{text[:40]}…{len(text)}"


def writes(name: str, content: str | bytes) -> Arrange:
    def arrange(folder: Path) -> None:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))

    return arrange


def both(*arranged: Arrange) -> Arrange:
    return lambda folder: [arrange(folder) for arrange in arranged]


# -------------------------------------------------------------------------------------------- values, as YAML texts

NO_VALUE = [  # what no key takes
    *("&a [*a]", "*nowhere", "!!int x", "!!float x", "!!timestamp x", "!!binary aGk=", "!!set {a}", "!x 4", "%", "@4"),
    *("!!python/object/apply:os.system ['true']", "!!python/tuple [1]", "[" * 2000, "{a: " * 500, "{? [a] : 4}"),
    *("{{a: 1}: 2}", "[4", "'4", "{1: 2, 1: 3}", "\x01", "\t- 4"),
]
# Numbers to YAML 1.1 and to nobody else, and other things that only look like one.
NO_NUMBER = [
    *("1:30", "1:30:00", "190:20:30.15", "010", "0o17", "0x1F", "0b101", "1_000", "1,000", "2024-01-01", "=", "<<"),
    *("2024-01-01 10:00:00", "on", "off", "yes", "no", "true", "y", "'4'", '"4"', "''", "four", "1 2", "4px", "½", "٤"),
    *("[]", "[4]", "{}", "{a: 4}", "!!int '1:30'", ".nan", ".inf", "-.inf", "1e400", "-1e400", "nan", "inf", "- 4"),
    *("9" * 5000, "4" + "x" * 100_000),
]
NO_WHOLE = [*NO_NUMBER, "4.0", "4.5", "1e3", "-1", "1000000000000", "1" + "0" * 18, "9" * 30]
NO_BOOLEAN = ["on", "off", "yes", "no", "y", "n", "1", "0", "1.0", "'true'", "''", "maybe", "[]", "[true]", "{}", "~"]
NO_CHOICE = ["nonsense", "''", "3", "true", "on", "1:30", "[]", "{}", "2024-01-01", "x" * 50_000]
NO_TEXT = ["3", "1.5", "true", "[]", "[3]", "{}", "{a: b}", "''", "' '", ".nan", '"\\0"', '"a\\0b"', '"\\ud800"']
GENERIC = {*NO_WHOLE, *NO_BOOLEAN, *NO_CHOICE}
NO_LIST = ["3", "true", "{}", "[[]]", "[{}]", "[~]", "[1.5]", "[.nan]", "[[3]]"]


@dataclass(frozen=True)
class Key:
    """A key of a recipe: texts that it takes, texts that it does not, and what else must be set for it to count."""

    sound: list[str]
    unsound: list[str]
    also: list[str] = field(default_factory=list)
    late: list[str] = field(default_factory=list)  # unsound for this model or these rows: found by plan and train
    taste: list[str] = field(default_factory=list)


def whole(*sound: str, is_null: bool = False, absurd: tuple[str, ...] = (), **more: Any) -> Key:
    null = ["~", "null", ""] if is_null else []
    return Key([*sound, *null], [*NO_WHOLE, *absurd, *([] if is_null else ["~"])], **more)


def number(*sound: str, is_null: bool = False, unsound: tuple[str, ...] = ("-1",), **more: Any) -> Key:
    return Key([*sound, *(["~"] if is_null else [])], [*NO_NUMBER, *unsound, *([] if is_null else ["~"])], **more)


def boolean(*, taste: tuple[str, ...] = (), sound: tuple[str, ...] = ("true", "false", "True"), **more: Any) -> Key:
    return Key([*sound], list(NO_BOOLEAN), taste=[*taste], **more)


def choice(*sound: str, is_null: bool = False, **more: Any) -> Key:
    return Key([*sound, *(["~"] if is_null else [])], [*NO_CHOICE, *([] if is_null else ["~"])], **more)


def keys_of_recipe(template: Path) -> dict[str, Key]:
    """Every key of a recipe; the sections have their own cases."""
    sources = Key(
        ["train.jsonl", "{file: train.jsonl}", "[train.jsonl]", "[train.jsonl, test.jsonl]"],
        [*NO_LIST, "''", "{file: 3}", "{file: ''}", "{file: train.jsonl, task: chain_sum}", "{part: x}", "[]", "[~]"],
        late=["nowhere.jsonl", ".", "/dev/null", "{task: nonsense, count: 3}", '"a\\0b"', "~nobody/x.jsonl", "x" * 300],
    )
    no_source = [f"{{task: chain_sum, count: {text}}}" for text in ("0", "1:30", "1" + "0" * 12, "yes", "010")]
    return {
        "model": Key(
            [str(template / "base")],
            [value for value in NO_TEXT if value not in ("' '",)],
            late=["./nowhere", "~nobody/x", "packaged:nothing", "a/b/c", "/dev/null", "train.jsonl", "x" * 300, "' '"],
        ),
        "dtype": choice("float32", "bfloat16", "float16"),
        "attn_implementation": choice("sdpa", "eager", is_null=True, late=["flash_attention_2"]),
        "quantization": choice(is_null=True, taste=["4bit"]),
        "trust_remote_code": boolean(),
        "method": choice("lora", "dora", "rslora"),
        "echo": boolean(),
        "lora.r": whole("1", "8", absurd=("0", "1000000000"), late=["4096"]),
        "lora.alpha": whole("1", "64", absurd=("0",)),
        "lora.dropout": number("0", "0.5", unsound=("-1", "1", "1.5", "~")),
        "lora.init": choice("default", "gaussian", "olora", "pissa", "pissa_niter_16", taste=["orthogonal"]),
        "lora.target_modules": Key(
            ["[q_proj]", "[q_proj, up_proj]", "all-linear"],
            ["3", "true", "[3]", "[~]", "{}", "''", "[]", "['']", "[q_proj, q_proj, '']", "~"],
            late=["q_proj", "nonsense", "[nonsense]", "'('", "[norm]", "lm_head"],
            taste=["[q_proj, q_proj]", "'.*q_proj'"],
        ),
        **{
            f"echo_config.{name}": Key(
                ["[1, 2]", "[-1]", "[0]", "~"],
                ["[]", "[1, 1]", "[1.5]", "[true]", "['1']", "[[1]]", "3", "on", "{}", "[1:30]", "[010]", "[~]"],
                late=["[4]", "[-5]", "[1000000000000]", "[1, -3]"],
            )
            for name in ("source_layers", "target_layers")
        },
        "echo_config.normalization": choice("layer", "standardize"),
        "echo_config.injection_site": choice("output", "lora_input"),
        "echo_config.injection_mask": choice("predictive", "answer"),
        "echo_config.bottleneck": whole("1", "8", absurd=("0", "1000000000")),
        "echo_config.scale_init": number("0.5", "-1", unsound=("0", "1e300")),
        "echo_config.gate_bias_init": number("-2", "0", unsound=("1e300",)),
        "echo_config.routing_schedule": choice("linear", "constant"),
        "echo_config.routing_start": number("0", "1", "0.5", unsound=("-0.1", "1.1")),
        "echo_config.routing_end": number("0", "1", "0.5", unsound=("-0.1", "1.1")),
        "echo_config.distillation_weight": number("0", "2", unsound=("-1", "1e300")),
        "echo_config.distillation_temperature": number("0.5", "4", unsound=("0", "-1", "1e-300", "1e300")),
        "echo_config.distillation_direction": choice("on_to_off", "off_to_on"),
        "echo_config.distillation_tokens": choice("all", "teacher_better"),
        "echo_config.distillation_warmup": number("0", "0.3", "1", unsound=("-0.1", "1.1")),
        "echo_config.source_gradient": boolean(),
        "echo_config.echo_on_updates": choice("all", "echo_only"),
        "echo_config.routed_loss_scale": number("0.5", "2", unsound=("0", "-1", "1e300")),
        "echo_config.echo_lr_warmup": number("0", "0.3", "1", unsound=("-0.1", "1.1")),
        "echo_config.gradient_clipping": choice("together", "apart"),
        "echo_config.echo_lr_multiplier": number("1", "100", unsound=("0", "-1", "1e300")),
        "echo_config.echo_kind": choice("real", "zero", "noise", "shuffled", "shallow"),
        "echo_config.echo_step": choice("auto", "full", "shared_prefix"),
        "data.train": replace(sources, late=[*sources.late, "base"]),
        "data.validation": replace(sources, sound=[*sources.sound[:2], "~"]),
        "data.test": replace(sources, sound=[*sources.sound, "~"], late=[]),
        "data.validation_share": Key(
            ["~", "0.5"],
            ["0", "1", "-1", "2", "on", "''", "[]", "1:30"],
            late=["1e-9", "0.999999"],
            also=["data.validation=null"],
        ),
        "data.format": choice("auto", late=["messages", "alpaca", "sharegpt"], taste=["prompt_completion"]),
        "data.stream": boolean(),
        "data.shuffle_buffer": whole("1", "1000", absurd=("0",)),
        "data.columns": Key(
            ["{completion: prompt, prompt: completion}", "~"],
            ["3", "[]", "on", "{prompt: 3}", "{prompt: ~}", "{3: prompt}", "{prompt: [a]}", "{on: ~}"],
            late=["{prompt: nothing}", "{prompt: prompt, completion: prompt}"],
        ),
        "data.ignore_columns": Key(["[]", "[id]"], [*NO_LIST, "id", "['']"]),
        "data.train_on_prompt": boolean(),
        "data.chat": boolean(),
        "data.max_length": whole("128", is_null=True, absurd=("0", "1", "1000000000000000"), late=["2", "12"]),
        "data.on_overlength": choice("error", "drop", "truncate_prompt"),
        "data.limit": whole("1", "5", is_null=True, absurd=("0",)),
        "<source>.file": Key(["train.jsonl"], [*NO_TEXT, "~"]),
        "<source>.hub": Key([], [*NO_TEXT, "../x", "/etc", "a/b/c"], late=["nobody/nothing", "on", "base"]),
        "<source>.split": Key(["~"], [value for value in NO_TEXT if value != "' '"], late=["nothing", "on"]),
        "<source>.config": Key(["~"], [value for value in NO_TEXT if value != "' '"], late=["nothing"]),
        "<source>.revision": Key(["~"], [*NO_TEXT, "main"]),
        "<source>.weight": Key(["1", "2", "0.5", "~"], ["0", "-1", "on", "''", "[]", "1e9", "1:30"]),
        "<source>.part": Key(["~"], [value for value in NO_TEXT if value != "' '"], late=["nothing", "on", "1:30"]),
        "<source>.task": Key([], [*NO_TEXT], late=["nothing", "on"]),
        "<source>.count": whole("5", absurd=("0",), late=["100000000"]),
        "<source>.params": Key(
            ["{}", "{min_terms: 2}", "~"],
            ["3", "[]", "on", "''", "{3: 4}"],
            late=[
                *("{nothing: 3}", "{min_terms: x}", "{min_terms: -1}", "{min_terms: 1000000000000}", "{min_terms: ~}"),
                *("{min_terms: .inf}", "{min_terms: []}", "{size: 3}", "{seed: 3}", "{max_digits: 1000000000}"),
            ],
        ),
        "<source>.seed": whole("0", "7", is_null=True),
        "training.epochs": number("1", "0.5", "2", unsound=("0", "-1", "1e9", "1e300"), also=["training.steps=null"]),
        "training.steps": whole("1", "4", is_null=True, absurd=("0",)),
        "training.batch_size": whole("1", "3", "100", absurd=("0",)),
        "training.gradient_accumulation": whole("1", "3", absurd=("0",)),
        "training.learning_rate": number("1e-3", "1.e-3", "0.001", unsound=("0", "-1", "1e30")),
        "training.schedule": choice("linear", "cosine", "constant"),
        "training.loraplus_lr_ratio": number("16", "1", "~", unsound=("0", "-1", "1e300")),
        "training.neftune_noise_alpha": number("5", "~", unsound=("0", "-1", "1e300")),
        "training.run_name": Key(["a run", "on", "1:30", "~"], NO_TEXT),
        "training.project": Key(["a project", "~"], NO_TEXT),
        "training.warmup_steps": whole("0", "2", absurd=("4",)),
        "training.weight_decay": number("0", "0.1", unsound=("-1", "1e30")),
        "training.answer_weight": number("1", "1.6", unsound=("0", "-1", "1e300"), also=["data.train_on_prompt=true"]),
        "training.max_grad_norm": number("0", "0.5", unsound=("-1",)),
        "training.optimizer": choice("adamw_torch", "adafactor", "sgd", late=["adamw_bnb_8bit", "paged_adamw_8bit"]),
        "training.gradient_checkpointing": boolean(),
        "training.bf16": boolean(sound=("false",), taste=("true",)),  # for hardware that has it
        "training.save_every": whole("1", "100", absurd=("0",)),
        "training.keep_checkpoints": whole("1", "2", absurd=("0",)),
        "training.log_every": whole("1", "10", absurd=("0",)),
        "training.evaluate_every": whole("2", "4", is_null=True, absurd=("0",)),
        "training.report_to": Key(["[]"], [*NO_LIST, "[nonsense]", "wandb", "all", "~"], late=["[mlflow]"]),
        "seeds.initialisation": whole("0", "7", "4294967295"),
        "seeds.data_order": whole("0", "7"),
        "seeds.validation": whole("0", "7"),
        "seeds.routing": whole("0", "7"),
        "evaluation.tasks[].name": Key(
            ["a", "no", "2024-01-01", "A_b-1", "1_000"], [*NO_TEXT, "a b", "../a", "x" * 300]
        ),
        "evaluation.tasks[].kind": choice("generate", taste=["choice", "number", "code"]),
        "evaluation.tasks[].answer_pattern": Key(
            ["'[a-z]+'", "~"], ["3", "[]", "'('", "''", "'*'", "true", "'" + "(" * 5000 + "'", "'a{1000000000000}'"]
        ),
        "evaluation.tasks[].max_new_tokens": whole("1", "2", absurd=("0",)),
        "evaluation.tasks[].num_beams": whole("1", "2", absurd=("0",)),
        "evaluation.tasks[].stop": Key(["[]", "[x]", "['\\n']"], [*NO_LIST, "x", "['']", "[on, 3]"]),
        "evaluation.tasks[].limit": whole("1", "2", is_null=True, absurd=("0",)),
        "evaluation.tasks[].data": Key(["test.jsonl", "~"], [*NO_LIST, "''", "[]", *no_source]),
        "evaluation.batch_size": whole("1", "4", absurd=("0",)),
        "output": Key(["new", "on", "2024-01-01", "1:30", "010", "no"], [*NO_TEXT, "~"]),
        **{
            name: Key(
                ["{}"], ["3", "[]", "on", "''", "[a]", "{nothing: 3}", "{1: 2}", "{? {} : 3}"], also=["echo=true"]
            )
            for name in ("lora", "echo_config", "training", "seeds", "evaluation")
        },
        "data": Key([], ["3", "[]", "on", "''", "{}", "~", "{train: ~}", "{train: train.jsonl, trian: x}"]),
        "evaluation.tasks": Key(["[]", "[{name: a}]"], [*NO_LIST, "{}", "[{}]", "[{name: a}, {name: a}]", "~"]),
    }


def placed(key: str, text: str) -> tuple[str, str]:
    """The key that can be set, and the text that sets this one in it."""
    if key.startswith("evaluation.tasks[]."):
        name = key.rpartition(".")[2]
        return "evaluation.tasks", f"[{{{'' if name == 'name' else 'name: words, '}{name}: {text}}}]"
    if key.startswith("<source>."):
        name = key.rpartition(".")[2]
        around = {
            **dict.fromkeys(("part", "split", "config", "revision", "weight"), "file: train.jsonl, "),
            "task": "count: 3, ",
            "params": "task: chain_sum, count: 3, ",
            "count": "task: chain_sum, ",
            "seed": "task: chain_sum, count: 3, ",
        }
        return "data.train", f"{{{around.get(name, '')}{name}: {text}}}"
    return key, text


def in_file(template: Path, key: str, text: str) -> Arrange:
    """The recipe with a text in the place of a key's value."""

    def arrange(folder: Path) -> None:
        document = yaml.safe_load((template / "recipe.yaml").read_text())
        section, parts = document, key.split(".")
        for part in parts[:-1]:
            section = section.setdefault(part, {})
        section[parts[-1]] = "@@@"
        (folder / "recipe.yaml").write_text(yaml.safe_dump(document, sort_keys=False).replace("'@@@'", text))

    return arrange


def recipe_keys(template: Path) -> list[Case]:
    commands = ("plan", "preview", "train", "eval", "bench")
    keys = keys_of_recipe(template)
    from echo_lora.recipe.table import recipe_table

    known = {key for key, *_ in recipe_table()}
    assert known <= keys.keys(), f"keys without a case: {known - keys.keys()}"
    keys = {key: values for key, values in keys.items() if key in known}
    cases: list[Case] = []

    def add(key: str, text: str, is_sound: bool | None, commands: tuple[str, ...], also: list[str]) -> None:
        number = len(cases)
        command, by_file = commands[number % len(commands)], number % 2 == 0 and "\x01" not in text
        setting, value = placed(key, text)
        says = "recipe.yaml" if by_file else "--set"
        also = [item for name in also for item in ("--set", name)]
        cases.append(
            Case(
                f"{key} = {shown(text)}" + (" in the file" if by_file else ""),
                [command, "recipe.yaml", *([] if by_file else ["--set", f"{setting}={value}"]), *also],
                is_sound,
                RECIPE,
                in_file(template, setting, value) if by_file else _nothing,
                says=says if is_sound is False and command in commands[:5] and commands is not LATE else "",
                makes=("run", "new"),
            )
        )

    LATE = ("plan", "train")
    for place, (key, values) in enumerate(keys.items()):  # of what goes for many keys, each tries another part
        for text in dict.fromkeys(values.sound):
            add(key, text, True, ("plan", "plan", "train") if "output" not in key else ("plan",), values.also)
        for number, text in enumerate(dict.fromkeys(values.unsound)):
            if text not in GENERIC or number % 4 == place % 4:
                add(key, text, False, commands, values.also)
        for text in dict.fromkeys(values.late):
            add(key, text, False, LATE, values.also)
        for text in dict.fromkeys(values.taste):
            add(key, text, None, ("plan",), values.also)
        for text in NO_VALUE[place % 6 :: 6]:
            add(key, text, False, commands, values.also)
    return [_apart(case) for case in cases]


def _apart(case: Case) -> Case:
    """Training goes to a folder of its own, so that the finished run is no obstacle."""
    if case.args[0] == "train" and "output" in case.name:
        return replace(case, args=["plan", *case.args[1:]])
    if case.args[0] == "train":
        return replace(case, args=[*case.args, "--set", "output=new"])
    return case


# ------------------------------------------------------------------------------------------------- texts of a recipe


def recipe_texts(template: Path, rng: random.Random) -> list[Case]:
    sound = (template / "recipe.yaml").read_text()
    laughs = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))
    merges = "m0: &m0 {k: 1}\n" + "".join(f"m{i}: &m{i} {{<<: [*m{i - 1}, *m{i - 1}]}}\n" for i in range(1, 40))
    texts: dict[str, tuple[str | bytes, bool | None]] = {
        "as it is": (sound, True),
        "with a byte order mark": (b"\xef\xbb\xbf" + sound.encode(), True),
        "with line ends of Windows": (sound.replace("\n", "\r\n"), True),
        "in UTF-16": (sound.encode("utf-16"), False),
        "in Latin-1": (("# é\n" + sound).encode("latin-1"), False),
        "empty": ("", False),
        "a comment": ("# nothing\n", False),
        "null": ("~", False),
        "a number": ("3", False),
        "a list": ("- a\n- b\n", False),
        "JSON": (json.dumps(yaml.safe_load(sound)), True),
        "two documents": (sound + "---\n" + sound, False),
        "a NUL byte": (sound + "\0", False),
        "random bytes": (rng.randbytes(2000), False),
        "a picture": (b"\x89PNG\r\n\x1a\n" + rng.randbytes(500), False),
        "tabs": (sound.replace("  ", "\t"), False),
        "a key twice": (sound + "method: lora\nmethod: dora\n", False),
        "a section twice": (sound + "lora: {r: 2}\n", False),
        "a key twice in a flow": (sound + "seeds: {routing: 1, routing: 2}\n", False),
        "a key that is a list": (sound + "? [a, b]\n: 3\n", False),
        "a key that is a mapping": (sound + "? {a: b}\n: 3\n", False),
        "a key that is null": (sound + "~: 3\n", False),
        "a key that is a number": (sound + "3: 3\n", False),
        "a key of a megabyte": (sound + "x" * 1_000_000 + ": 3\n", False),
        "a value of ten megabytes": (sound.replace("r: 4", "r: " + "x" * 10_000_000), False),
        "an unknown key of 100 kB": (sound + "x" * 100_000 + ": 3\n", False),
        "100,000 unknown keys": (sound + "".join(f"key{i}: {i}\n" for i in range(100_000)), False),
        "1,000 unknown keys": (sound + "".join(f"key{i}: {i}\n" for i in range(1000)), False),
        "brackets without end": (sound + "x: " + "[" * 100_000, False),
        "deep lists": (sound + "x: " + "[" * 3000 + "]" * 3000, False),
        "deep mappings": (sound + "x: " + "{a: " * 2000 + "}" * 2000, False),
        "deep params": (
            sound.replace(
                "train: train.jsonl", "train: {task: chain_sum, count: 3, params: {a: " + "[" * 200 + "]" * 200 + "}}"
            ),
            False,
        ),
        "a billion laughs": (sound + laughs, False),
        "a billion laughs in params": (
            "x: &x {}\n"
            + laughs
            + sound.replace("train: train.jsonl", "train: {task: chain_sum, count: 3, params: *x}"),
            False,
        ),
        "merges of merges": (sound + merges, False),
        "a list that holds itself": (sound + "x: &x [*x]\n", False),
        "a mapping that holds itself": (sound + "x: &x {a: *x}\n", False),
        "a merge of itself": (sound + "x: &x {<<: *x}\n", False),
        "a merge of a number": (sound + "<<: 3\n", False),
        "a merge": ("<<: &o {method: dora}\n" + sound, None),
        "an anchor": (sound.replace("validation: validation.jsonl", "validation: &f validation.jsonl"), True),
        "a Python object": (sound + "x: !!python/object/apply:os.system ['touch pwned']\n", False),
        "a Python name": (sound.replace("r: 4", "r: !!python/name:os.system"), False),
        "an environment variable": (sound.replace("r: 4", "r: ${R}"), False),
        "no model": (sound.replace("model:", "modell:"), False),
        "a directive": ("%YAML 1.1\n---\n" + sound, None),
        "an unknown directive": ("%FOO bar\n---\n" + sound, None),
        "an old directive": ("%YAML 9.9\n---\n" + sound, None),
    }
    cases = [
        Case(
            name,
            [command, "recipe.yaml"],
            is_sound,
            RECIPE,
            writes("recipe.yaml", text),
            says="recipe.yaml" if is_sound is False else "",
        )
        for (name, (text, is_sound)), command in zip(
            texts.items(), ["plan", "preview", "train", "eval"] * 20, strict=False
        )
    ]
    cases = [replace(case, makes=("run",)) if case.args[0] == "train" else case for case in cases]
    pieces = [
        ":",
        "- ",
        "&a ",
        "*a",
        "{",
        "}",
        "[",
        "]",
        "'",
        '"',
        "\n",
        "  ",
        "~",
        "!",
        "!!str ",
        "#",
        "|",
        ">",
        "?",
        "%",
    ]
    for number in range(80):
        text = list(sound)
        for _ in range(rng.choice((1, 1, 2, 5))):
            place = rng.randrange(len(text))
            act = rng.randrange(3)
            if act == 0:
                del text[place : place + rng.choice((1, 3))]
            elif act == 1:
                text.insert(place, rng.choice(pieces))
            else:
                text[place] = chr(rng.choice((rng.randrange(32, 127), rng.randrange(0, 0x500))))
        cases.append(
            Case(f"changed {number}", ["plan", "recipe.yaml"], None, RECIPE, writes("recipe.yaml", "".join(text)))
        )
    return cases


def overrides() -> list[Case]:
    unsound = [
        *(
            "",
            "=",
            "a",
            "=3",
            "a=",
            ".=1",
            "..=1",
            "a..b=1",
            "lora.=3",
            ".lora=3",
            "lora..r=3",
            "lora.r.x=3",
            "lora.r",
            " =3",
        ),
        *("lora.r=[1", "lora.r={", "lora.r=*a", "lora.r=&a", "model.path=x", "data.train.0=x", "data.train.0.file=x"),
        *("evaluation.tasks.0.name=b", "evaluation.tasks.7.name=b", "lora r=3", "Lora.r=3", "lora/r=3", "LORA.R=3"),
        *(
            "x" * 100_000,
            "x" * 100_000 + "=3",
            "lora.r=" + "x" * 100_000,
            "a." * 20_000 + "b=1",
            "lora.r=" + "[" * 5000,
        ),
        *(
            "lora.r=4\nlora.alpha=3",
            "lora.r=4 # r\n- 3",
            "lora.r=\x00",
            "lora.r=\x07",
            "lora.r=\udcff",
            "\udcff=3",
            "é=3",
        ),
        *("lora.r==4", "lora.r:4", "--r=3", "lora.r=4;alpha=3", "lora.__class__=3", "__init__=3", "model_config=3"),
        *(
            "lora=",
            "echo_config.routing_seed=1",
            "training=",
            "lora=4",
            "lora=[r]",
            "data=",
            "seeds=3",
            "lora.r=--- 4\n--- 5",
        ),
    ]
    sound = [
        "lora.r=4",
        " lora.r =4",
        "lora.r= 4",
        "lora={r: 2}",
        "echo_config.bottleneck=4",
        "lora.r=4 # four",
    ]
    sound += ["data.train={file: train.jsonl}", "lora.target_modules=[q_proj]", "training.epochs=~"]
    cases = [
        Case(f"{shown(text)}", [command, "recipe.yaml", "--set", text], False, RECIPE, says="--set")
        for text, command in zip(unsound, ["plan", "train", "preview", "eval", "bench"] * 20, strict=False)
    ]
    cases += [Case(f"sound {text}", ["plan", "recipe.yaml", "--set", text], True, RECIPE) for text in sound]
    cases += [
        Case("the last of two wins", ["plan", "recipe.yaml", "--set", "lora.r=x", "--set", "lora.r=4"], True, RECIPE),
        Case("1,000 of them", ["plan", "recipe.yaml", *["--set", "lora.r=4"] * 1000], True, RECIPE),
    ]
    for number, text in enumerate(("recipe=x", "arms=3", "title.x=3", "seeds=[1:30, 2]", "seeds", "=", "baseline=on")):
        cases.append(
            Case(f"study {number} {text}", ["compare", "study.yaml", "--minutes", "0", "--set", text], False, STUDY)
        )
    return cases


# --------------------------------------------------------------------------------------------------------- the rows


def lines(*found: Any) -> str:
    return "".join((item if isinstance(item, str) else json.dumps(item)) + "\n" for item in found)


def _previewed(
    name: str, content: str | bytes, is_sound: bool | None, command: str = "preview", file: str = "train.jsonl"
) -> Case:
    args = [command, "recipe.yaml", "--set", "output=new"]
    if file != "train.jsonl":
        args += ["--set", f"data.train={file}"]
    return Case(
        name, args, is_sound, RECIPE, writes(file, content), says=file if is_sound is False else "", makes=("new",)
    )


def rows(rng: random.Random) -> list[Case]:
    row, text = ROWS[0], lines(*ROWS)
    deep = "[" * 100_000 + "]" * 100_000
    contents: dict[str, tuple[str | bytes, bool | None]] = {
        "as they are": (text, True),
        "a byte order mark": (b"\xef\xbb\xbf" + text.encode(), True),
        "line ends of Windows": (text.replace("\n", "\r\n"), True),
        "no line end at the end": (text.rstrip("\n"), True),
        "blank lines at the end": (text + "\n\n", True),
        "a list": (json.dumps(ROWS), True),
        "an indented list": (json.dumps(ROWS, indent=2), True),
        "U+2028 in a text": (lines(*ROWS, {"prompt": "a\u2028b", "completion": " c"}), True),
        "emoji": (json.dumps([{"prompt": "👩‍👩‍👧 é", "completion": " ½ ٤ 漢字"}], ensure_ascii=False), True),
        "empty": ("", False),
        "white space": (" \n \n", False),
        "an empty line": (lines(row, "", row), False),
        "an empty list": ("[]", False),
        "a list of nothing": ("[null]", False),
        "a list of lists": ("[[]]", False),
        "null": ("null", False),
        "a number": ("3", False),
        "a text": ('"a"', False),
        "one object over lines": (json.dumps(row, indent=2), False),
        "UTF-16": (text.encode("utf-16"), False),
        "Latin-1": ('{"prompt": "é", "completion": " b"}'.encode("latin-1"), False),
        "a NUL byte": (text + "\0\n", False),
        "a NUL in a text": (lines({"prompt": "a\0b", "completion": " c"}), None),
        "random bytes": (rng.randbytes(3000), False),
        "gzip": (gzip.compress(text.encode()), False),
        "a pickle": (pickle.dumps(ROWS), False),
        "CSV": ("prompt,completion\na,b\n", False),
        "YAML": ("- prompt: a\n  completion: b\n", False),
        "an unfinished line": (text + '{"prompt": "a", "comp', False),
        "an unfinished list": (json.dumps(ROWS)[:-1], False),
        "a comma at the end": (json.dumps(ROWS)[:-1] + ",]", False),
        "single quotes": ("{'prompt': 'a', 'completion': 'b'}\n", False),
        "two objects in a line": (lines(row) * 2 + json.dumps(row) + json.dumps(row), False),
        "NaN": ('{"prompt": "a", "completion": NaN}\n', False),
        "Infinity": ('{"prompt": Infinity, "completion": "b"}\n', False),
        "a number of 10,000 digits": ('{"prompt": "a", "completion": %s}\n' % ("9" * 10_000), False),
        "a column of 10,000 digits": ('{"prompt": "a", "completion": "b", "id": %s}\n' % ("9" * 10_000), False),
        "a column of 1e400": ('{"prompt": "a", "completion": "b", "id": 1e400}\n', None),
        "deep nesting": (f'{{"prompt": "a", "completion": "b", "x": {deep}}}\n', False),
        "a deep list": (deep, False),
        "a key twice": ('{"prompt": "a", "prompt": "b", "completion": "c"}\n', False),
        "a lone surrogate in the prompt": ('{"prompt": "\\ud800", "completion": "b"}\n', False),
        "a lone surrogate in the answer": ('{"prompt": "a", "completion": "\\udfff b"}\n', False),
        "a lone surrogate in another column": ('{"prompt": "a", "completion": " b", "note": "\\ud800"}\n', None),
        "a prompt of a megabyte": (lines({"prompt": "one " * 250_000, "completion": " b"}), False),
        "an answer of a megabyte": (lines({"prompt": "a", "completion": " one" * 250_000}), False),
        "a value of ten megabytes": (lines({"prompt": 3, "completion": "x" * 10_000_000}), False),
        "a column name of a megabyte": (lines({"x" * 1_000_000: 3}), False),
        "100,000 columns": (lines({f"c{i}": i for i in range(100_000)}), False),
        "other columns": (lines({"question": "a", "answer": "b"}), False),
        "an empty object": (lines({}), False),
        "an empty key": (lines({"": 3}), False),
    }
    values: list[Any] = [None, "", " ", 3, 1.5, True, [], {}, [3], ["a"], [[]], [None], {"a": 1}, "\n", "\t"]
    for value in values:
        for column in ("prompt", "completion"):
            is_blank_prompt = column == "prompt" and value in (" ", "\n", "\t")
            changed = lines(ROWS[1], row | {column: value})
            contents[f"{column} is {value!r}"] = (changed, None if is_blank_prompt else False)
    user, assistant = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    contents["messages"] = (lines({"messages": [user, assistant]}), True)
    contents["prompt and completion in messages"] = (lines({"prompt": [user], "completion": [assistant]}), True)
    contents["no assistant"] = (lines({"messages": [user]}), False)
    contents["no user"] = (lines({"messages": [assistant]}), None)
    contents["no message"] = (lines({"messages": []}), False)
    contents["messages beside a text prompt"] = (lines({"prompt": "a", "completion": [assistant]}), False)
    contents["text beside messages"] = (lines({"text": "a"}), False)
    for value in (None, 3, True, [], {}, "robot", "", ["user"], {"a": 1}, "x" * 10_000):
        contents[f"role {shown(value)}"] = (
            lines({"messages": [{"role": value, "content": "a"}, assistant]}),
            False if not isinstance(value, str) else None,
        )
        contents[f"assistant's role {shown(value)}"] = (
            lines({"messages": [user, {"role": value, "content": "a"}]}),
            False,
        )
    for value in (
        None,
        3,
        True,
        {},
        [3],
        [None],
        [[]],
        [{"type": "image"}],
        [{"type": "text"}],
        [{"type": "text", "text": 3}],
    ):
        contents[f"user's content {shown(value)}"] = (
            lines({"messages": [{"role": "user", "content": value}, assistant]}),
            False,
        )
        contents[f"assistant's content {shown(value)}"] = (
            lines({"messages": [user, {"role": "assistant", "content": value}]}),
            False,
        )
    for value in (3, "a", None, [], {}, True):
        contents[f"messages {value!r}"] = (lines({"messages": value}), False)
        contents[f"a message {value!r}"] = (lines({"messages": [user, value, assistant]}), False)
    for column in ("tools", "chat_template_kwargs"):
        for value in (
            3,
            "a",
            "{",
            "[3]",
            [],
            [3],
            {},
            [{}],
            True,
            "null",
            '"a"',
            {"tokenize": False},
            {"messages": []},
            {"return_dict": False},
        ):
            text_ = lines({"messages": [user, assistant], column: value})
            contents[f"{column} {shown(value)}"] = (text_, None)
    for value in (3, "a", [], [3], {}, [{}], True):
        contents[f"tool_calls {value!r}"] = (lines({"messages": [user, assistant | {"tool_calls": value}]}), None)
    cases = [_previewed(name, content, is_sound) for name, (content, is_sound) in contents.items()]
    for name in ("as they are", "an empty line", "a key twice", "NaN", "completion is 3", "deep nesting", "messages"):
        content, is_sound = contents[name]
        cases.append(_previewed(f"train: {name}", content, is_sound, "train"))
    cases += [
        _previewed(f"a name that ends in {end}", text, is_sound, file=f"rows{end}")
        for end, is_sound in (
            (".json", True),
            ("", True),
            (".parquet", False),
            (".JSONL", True),
            (".csv", None),
            (".gz", None),
        )
    ]
    for number in range(60):
        changed = bytearray(text.encode())
        for _ in range(rng.choice((1, 1, 3, 10))):
            place = rng.randrange(len(changed))
            changed[place : place + rng.choice((0, 1, 4))] = rng.randbytes(rng.choice((0, 1, 2)))
        cases.append(_previewed(f"changed {number}", bytes(changed), None))
    scored = {
        "no answer": ({"prompt": "a"}, False),
        "an answer that is a number": ({"prompt": "a", "completion": " b", "answer": 3}, False),
        "an answer of several lines": ({"prompt": "a", "completion": " b\nc"}, False),
        "an answer that is null": ({"prompt": "a", "completion": " b", "answer": None}, True),
        "an empty answer": ({"prompt": "a", "completion": " b", "answer": ""}, False),
        "a group that is a number": ({"prompt": "a", "completion": " b", "group": 3}, False),
        "a lone surrogate": ({"prompt": "a", "completion": " b\ud800"}, False),
        "a lone surrogate in the group": ({"prompt": "a", "completion": " b", "group": "\ud800"}, False),
        "messages": ({"messages": [user, assistant]}, True),
    }
    for name, (scored_row, is_sound) in scored.items():
        cases.append(
            Case(f"eval: {name}", ["eval", "recipe.yaml"], is_sound, RECIPE, writes("test.jsonl", lines(scored_row)))
        )
    sound = {"prompt": "a", "choices": [" b", " c"], "label": 1}
    for column, found in {
        "choices": [
            [],
            [" b"],
            [" b", " b"],
            [" b", 3],
            [" b", ""],
            [" b", None],
            "ab",
            3,
            None,
            {"a": 1},
            [[" b"], [" c"]],
        ],
        "label": [-1, 2, 10**12, "1", 1.0, 0.5, True, None, [1], "b"],
    }.items():
        for value in found:
            changed = lines(sound | {column: value})
            args = ["eval", "recipe.yaml", "--set", "evaluation.tasks=[{name: w, kind: choice}]"]
            cases.append(
                Case(f"eval: {column} {value!r}", args, False, RECIPE, writes("test.jsonl", changed), says="row 0")
            )
    args = ["eval", "recipe.yaml", "--set", "evaluation.tasks=[{name: w, kind: choice}]"]
    cases.append(Case("eval: choices", args, True, RECIPE, writes("test.jsonl", lines(sound))))
    for value in ("4", "1,200", "-3.5", "four", "", "1e3", "NaN", "½", "4 apples", "1:30"):
        is_sound = value in ("4", "1,200", "-3.5")
        args = ["eval", "recipe.yaml", "--set", "evaluation.tasks=[{name: w, kind: number, max_new_tokens: 2}]"]
        changed = lines({"prompt": "a", "completion": " b", "answer": value})
        cases.append(Case(f"eval: the number {value!r}", args, is_sound, RECIPE, writes("test.jsonl", changed)))
    return cases


def parquet(rng: random.Random) -> list[Case]:
    text = {"prompt": ["Count:", "Say:"], "completion": [" one", " two"]}
    message = pa.array([[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]] * 2)
    tables: dict[str, tuple[Any, bool | None]] = {
        "text": (text, True),
        "large text": ({name: pa.array(value, pa.large_string()) for name, value in text.items()}, True),
        "dictionaries": ({name: pa.array(value).dictionary_encode() for name, value in text.items()}, True),
        "messages": ({"messages": message}, True),
        "one more number": (text | {"id": [1, 2]}, True),
        "no row": ({name: pa.array([], pa.string()) for name in text}, False),
        "no column": ({}, False),
        "nulls": (text | {"completion": pa.array([None, None], pa.string())}, False),
        "one null": (text | {"completion": [" one", None]}, False),
        "numbers": (text | {"completion": [1, 2]}, False),
        "floats": (text | {"prompt": [1.5, float("nan")]}, False),
        "booleans": (text | {"completion": [True, False]}, False),
        "bytes": (
            {name: pa.array([one.encode() for one in value], pa.binary()) for name, value in text.items()},
            False,
        ),
        "bytes that are no UTF-8": (text | {"prompt": pa.array([b"\xff", b"\xfe"], pa.binary())}, False),
        "lists": (text | {"completion": [["a"], ["b"]]}, False),
        "structs": (text | {"completion": [{"a": 1}, {"a": 2}]}, False),
        "dates": (text | {"completion": pa.array([1, 2], pa.date32())}, False),
        "decimals": (text | {"completion": pa.array([Decimal(1), Decimal(2)])}, False),
        "durations": (text | {"completion": pa.array([1, 2], pa.duration("s"))}, False),
        "maps": (text | {"completion": pa.array([[("a", 1)], [("b", 2)]], pa.map_(pa.string(), pa.int64()))}, False),
        "dates beside": (text | {"day": pa.array([1, 2], pa.date32())}, None),
        "a timestamp out of range": (text | {"day": pa.array([2**62, 2], pa.timestamp("ms"))}, None),
        "nanoseconds": (text | {"day": pa.array([1, 2], pa.timestamp("ns"))}, None),
        "bytes beside": (text | {"raw": pa.array([b"\xff", b"a"], pa.binary())}, None),
        "other columns": ({"question": ["a"], "answer": ["b"]}, False),
        "messages that are numbers": ({"messages": [[1], [2]]}, False),
        "messages without content": ({"messages": [[{"role": "assistant"}]] * 2}, False),
        "messages that are null": ({"messages": pa.array([None, None], pa.list_(pa.string()))}, False),
        "empty texts": ({"prompt": ["", ""], "completion": ["a", "b"]}, False),
    }

    def written(columns: Any) -> Arrange:
        return lambda folder: pq.write_table(pa.table(columns), folder / "rows.parquet")

    def case(name: str, arrange: Arrange, is_sound: bool | None, command: str = "preview") -> Case:
        args = [command, "recipe.yaml", "--set", "data.train=rows.parquet", "--set", "output=new"]
        says = "rows.parquet" if is_sound is False else ""
        return Case(name, args, is_sound, RECIPE, arrange, says=says, makes=("new",))

    cases = [case(name, written(columns), is_sound) for name, (columns, is_sound) in tables.items()]
    cases += [
        case(f"train: {name}", written(tables[name][0]), tables[name][1], "train")
        for name in ("text", "messages", "one null")
    ]
    repeated = pa.Table.from_arrays(
        [pa.array(["a"]), pa.array(["b"]), pa.array([" c"])], names=["prompt", "prompt", "completion"]
    )
    cases.append(case("a column twice", lambda folder: pq.write_table(repeated, folder / "rows.parquet"), False))
    buffer = pa.BufferOutputStream()
    pq.write_table(pa.table(text), buffer)
    sound = buffer.getvalue().to_pybytes()
    for name, content in {
        "empty": b"",
        "magic only": b"PAR1",
        "both magics": b"PAR1PAR1",
        "text": b"prompt,completion\n",
        "zeros": bytes(4000),
    }.items():
        cases.append(case(f"bytes: {name}", writes("rows.parquet", content), False))
    for share in (0.1, 0.3, 0.5, 0.9, 0.99):
        cases.append(case(f"cut at {share}", writes("rows.parquet", sound[: int(share * len(sound))]), False))
    for number in range(60):
        changed = bytearray(sound)
        for _ in range(rng.choice((1, 3, 10))):
            changed[rng.randrange(len(changed))] = rng.randrange(256)
        cases.append(case(f"changed {number}", writes("rows.parquet", bytes(changed)), None))
    return cases


# ------------------------------------------------------------------------------------------------------------ paths


def _loop(folder: Path) -> None:
    (folder / "loop").symlink_to("loop")


def _dangling(folder: Path) -> None:
    (folder / "dangling").symlink_to("nowhere")


def _fifo(folder: Path) -> None:
    os.mkfifo(folder / "fifo")


def _socket(folder: Path) -> None:
    here = os.getcwd()
    os.chdir(folder)  # the address of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind("socket")
    finally:
        os.chdir(here)


def _full(folder: Path) -> None:
    (folder / "full").mkdir()
    (folder / "full" / "mine.txt").write_text("mine")


def _closed(folder: Path) -> None:
    (folder / "closed").mkdir()
    (folder / "closed" / "x").write_text("x")
    (folder / "closed").chmod(0)


def _closed_file(folder: Path) -> None:
    (folder / "closed.txt").write_text("{}")
    (folder / "closed.txt").chmod(0)


def _fixed(folder: Path) -> None:
    (folder / "fixed").mkdir()
    (folder / "fixed").chmod(0o555)


# name → path, what makes it, whether it must be done as another user than the superuser
NO_FILE: dict[str, tuple[str, Arrange, bool]] = {
    "missing": ("nowhere/x", _nothing, False),
    "empty": ("", _nothing, False),
    "dot": (".", _nothing, False),
    "root": ("/", _nothing, False),
    "a loop": ("loop", _loop, False),
    "below a loop": ("loop/x", _loop, False),
    "dangling": ("dangling", _dangling, False),
    "below a file": ("a.txt/x", writes("a.txt", "a"), False),
    "a long name": ("n" * 300, _nothing, False),
    "a long path": ("d/" * 3000 + "x", _nothing, False),
    "no UTF-8": ("\udcff\udcfe", _nothing, False),
    "a newline": ("a\nb", _nothing, False),
    "an escape": ("\x1b[31mred", _nothing, False),
    "the null device": ("/dev/null", _nothing, False),
    "the zero device": ("/dev/zero", _nothing, False),
    "a terminal": ("/dev/tty", _nothing, False),
    "a pipe": ("fifo", _fifo, False),
    "a socket": ("socket", _socket, False),
    "in a closed folder": ("closed/x", _closed, True),
    "closed": ("closed.txt", _closed_file, True),
    "nobody's home": ("~nosuchuser/x", _nothing, False),
    "a blank": (" ", _nothing, False),
    "a process": ("/proc/self/mem", _nothing, False),
}
NO_FOLDER = {
    **{name: NO_FILE[name] for name in NO_FILE if name not in ("closed", "dot", "root")},
    "a file": ("a.txt", writes("a.txt", "a"), False),
    "an empty folder": ("hollow", lambda folder: (folder / "hollow").mkdir(), False),
    "a full folder": ("full", _full, False),
    "a closed folder": ("closed", _closed, True),
}
NO_OUTPUT: dict[str, tuple[str, Arrange, bool]] = {
    **{
        name: NO_FILE[name]
        for name in (
            *("empty", "dot", "a loop", "below a loop", "below a file", "a long name", "a long path"),
            *("the null device", "a pipe", "a socket", "in a closed folder", "nobody's home"),
        )
    },
    "a file": NO_FOLDER["a file"],
    "a full folder": NO_FOLDER["a full folder"],
    "a closed folder": NO_FOLDER["a closed folder"],
    "in a folder that can't be written": ("fixed/x", _fixed, True),
    "below a device": ("/dev/null/x", _nothing, False),
    "in /proc": ("/proc/x", _nothing, False),
    "dangling": NO_FILE["dangling"],
}


def paths(template: Path) -> list[Case]:
    cases: list[Case] = []
    adapter = str(template / "run" / "adapter")
    base = str(template / "base")
    nul = ("a\0b", _nothing, False)

    def add(
        what: str,
        kinds: dict[str, tuple[str, Arrange, bool]],
        args: list[str],
        needs: tuple[str, ...] = (),
        **more: Any,
    ) -> None:
        for name, (path, arrange, is_unprivileged) in kinds.items():
            given = [arg.replace("PATH", json.dumps(path) if "=PATH" in arg else path) for arg in args]
            cases.append(Case(f"{what}: {name}", given, False, needs, arrange, is_unprivileged=is_unprivileged, **more))

    quick = ["--shape", "2x2", "--quick"]
    add("recipe", NO_FILE, ["plan", "PATH"])
    add("recipe to train", NO_FILE, ["train", "PATH"])
    add("rows", NO_FILE | {"a NUL": nul}, ["preview", "recipe.yaml", "--set", "data.train=PATH"], RECIPE)
    add("model", NO_FOLDER | {"a NUL": nul}, ["plan", "recipe.yaml", "--set", "model=PATH"], RECIPE)
    add("model to train", NO_FOLDER, ["train", "recipe.yaml", "--set", "output=new", "--set", "model=PATH"], RECIPE)
    add("output of train", NO_OUTPUT | {"a NUL": nul}, ["train", "recipe.yaml", "--set", "output=PATH"], RECIPE)
    add(
        "run to resume",
        NO_FOLDER | {"a NUL": nul},
        ["train", "recipe.yaml", "--resume", "--set", "output=PATH"],
        RECIPE,
    )
    add("adapter to look into", NO_FOLDER, ["doctor", "PATH"])
    add("adapter to merge", NO_FOLDER, ["merge", "PATH", "merged"])
    add(
        "base to merge into",
        {name: kind for name, kind in NO_FOLDER.items() if name != "empty"},
        ["merge", adapter, "merged", "--base", "PATH"],
    )
    add("output of merge", NO_OUTPUT, ["merge", adapter, "PATH", "--base", base])
    add("adapter to score", NO_FOLDER, ["eval", "recipe.yaml", "--adapter", "PATH"], RECIPE)
    add("what to score", NO_FOLDER, ["eval", "PATH"])
    scores = {name: kind for name, kind in NO_OUTPUT.items() if name not in ("a full folder", "a file")}
    add(
        "scores", scores | {"a folder": NO_FOLDER["a full folder"]}, ["eval", "recipe.yaml", "--output", "PATH"], RECIPE
    )
    answered = {name: kind for name, kind in NO_OUTPUT.items() if name not in ("a full folder", "dangling")}
    args = ["generate", str(template / "run"), "train.jsonl", "--max-new-tokens", "2", "--output", "PATH"]
    add("answers", answered | {"a folder": NO_FOLDER["a full folder"]}, args, RECIPE)
    add("what to talk to", NO_FOLDER, ["chat", "PATH", "--prompt", "a", "--max-new-tokens", "2"])
    add("prompts", NO_FILE, ["generate", str(template / "run"), "PATH", "--output", "answers.jsonl"])
    no_rows = {name: kind for name, kind in NO_FILE.items() if name != "dot"}
    add("rows for a recipe", no_rows, ["init", "PATH", "--model", base])
    add("model for a recipe", NO_FOLDER, ["init", "train.jsonl", "--model", "PATH"], RECIPE)
    written = {name: kind for name, kind in NO_OUTPUT.items() if name not in ("a full folder",)}
    add("a recipe to write", written, ["init", "train.jsonl", "--model", base, "--output", "PATH"], RECIPE)
    add("study to report", NO_FOLDER, ["report", "PATH"])
    add("study", NO_FILE, ["compare", "PATH", "--minutes", "0"])
    add("output of a study", NO_OUTPUT, ["compare", "study.yaml", "--minutes", "0", "--set", "output=PATH"], STUDY)
    add(
        "recipe of a study",
        NO_FILE | {"a NUL": nul},
        ["compare", "study.yaml", "--minutes", "0", "--set", "recipe=PATH"],
        STUDY,
    )
    add("general text", NO_FILE, ["compare", "study.yaml", "--minutes", "0", "--set", "general.file=PATH"], STUDY)
    add("source of an import", NO_FOLDER, ["data", "import", "PATH", "imported"])
    for name, (path, arrange, is_unprivileged) in NO_OUTPUT.items():
        args = ["data", "import", "dataset", path]
        cases.append(
            Case(
                f"output of an import: {name}",
                args,
                False,
                (),
                both(dataset(), arrange),
                is_unprivileged=is_unprivileged,
            )
        )
    add("output of bench", NO_OUTPUT, ["bench", "recipe.yaml", *quick, "--output", "PATH"], RECIPE)
    demo = {name: NO_OUTPUT[name] for name in ("a file", "below a file", "in a folder that can't be written", "a loop")}
    add("output of the demonstration", demo, ["demo", "--output", "PATH"])
    tasks = "evaluation.tasks=[{name: w, data: PATH}]"
    for name, (path, arrange, is_unprivileged) in NO_FILE.items():
        args = ["eval", "recipe.yaml", "--set", tasks.replace("PATH", json.dumps(path))]
        cases.append(Case(f"rows to score: {name}", args, False, RECIPE, arrange, is_unprivileged=is_unprivileged))
    link = Case(
        "a link to a recipe",
        ["plan", "link.yaml"],
        True,
        RECIPE,
        lambda folder: (folder / "link.yaml").symlink_to("recipe.yaml"),
    )
    odd = os.fsdecode(b"\xff.yaml")
    cases += [
        link,
        Case(
            "a recipe whose name is no UTF-8",
            ["plan", odd],
            True,
            RECIPE,
            lambda folder: shutil.copy(folder / "recipe.yaml", folder / odd),
        ),
        Case("an unknown key in one", ["plan", odd], False, RECIPE, writes(odd, "x: 1\n")),
        Case(
            "a recipe with a line end in its name",
            ["plan", "a\nb.yaml"],
            True,
            RECIPE,
            lambda folder: shutil.copy(folder / "recipe.yaml", folder / "a\nb.yaml"),
        ),
        Case(
            "an output whose name is no UTF-8",
            ["eval", "recipe.yaml", "--output", os.fsdecode(b"\xff.json")],
            None,
            RECIPE,
            makes=(os.fsdecode(b"\xff.json"),),
        ),
        Case(
            "rows of 100 GB",
            ["preview", "recipe.yaml"],
            False,
            RECIPE,
            lambda folder: os.truncate(folder / "train.jsonl", 10**11),
        ),
        Case(
            "a recipe of 100 GB",
            ["plan", "recipe.yaml"],
            False,
            RECIPE,
            lambda folder: os.truncate(folder / "recipe.yaml", 10**11),
        ),
        Case(
            "an adapter of 100 GB",
            ["doctor", "run/adapter"],
            False,
            ("run",),
            lambda folder: os.truncate(folder / "run/adapter/adapter_model.safetensors", 10**11),
        ),
        Case(
            "a configuration of 100 GB",
            ["doctor", "run/adapter"],
            False,
            ("run",),
            lambda folder: os.truncate(folder / "run/adapter/adapter_config.json", 10**11),
        ),
        Case(
            "records of 100 GB",
            ["report", "study"],
            False,
            ("study",),
            lambda folder: os.truncate(folder / "study/runs.jsonl.gz", 10**11),
        ),
        Case(
            "a record of 100 GB",
            ["eval", "run"],
            False,
            ("run", *RECIPE),
            lambda folder: os.truncate(folder / "run/run.json", 10**11),
        ),
        Case(
            "a tilde as the output",
            ["train", "recipe.yaml", "--set", "output=~/x"],
            None,
            RECIPE,
            env={"HOME": "."},
            makes=("x", "~"),
        ),
    ]
    return cases


def environment() -> list[Case]:
    cases: list[Case] = []
    for value in ("", "abc", "-1", "1.5", "0", "99999999999999999999", "1:30", "½"):
        is_sound = None if value in ("", "0", "-1") else False
        cases.append(
            Case(
                f"WORLD_SIZE={value}",
                ["train", "recipe.yaml", "--set", "output=new"],
                is_sound,
                RECIPE,
                env={"WORLD_SIZE": value},
                says="WORLD_SIZE" if is_sound is False else "",
                makes=("new",),
            )
        )
    cases.append(
        Case(
            "WORLD_SIZE=2",
            ["train", "recipe.yaml", "--set", "output=new"],
            False,
            RECIPE,
            env={"WORLD_SIZE": "2"},
            says="WORLD_SIZE",
        )
    )
    for value in ("", "abc", "-1", "0", "1.5", "99999999999999999999"):
        cases.append(
            Case(
                f"OMP_NUM_THREADS={value}",
                ["compare", "study.yaml", "--minutes", "0"],
                None,
                STUDY,
                env={"OMP_NUM_THREADS": value},
                makes=("study-out",),
            )
        )
    for name in ("COLUMNS", "LINES"):
        for value in ("", "abc", "-1", "0", "1", "99999999999"):
            cases.append(Case(f"{name}={value}", ["plan", "recipe.yaml"], True, RECIPE, env={name: value}))
    for name, value in {
        "TERM": "nonsense",
        "NO_COLOR": "x",
        "FORCE_COLOR": "x",
        "LANG": "xx_XX",
        "LC_ALL": "nonsense",
        "TZ": "Nowhere/Nothing",
        "PATH": "",
        "HF_TOKEN": "a\nb",
        "HF_ENDPOINT": "nonsense",
    }.items():
        cases.append(Case(f"{name}={value!r}", ["plan", "recipe.yaml"], True, RECIPE, env={name: value}))
        cases.append(
            Case(
                f"train with {name}={value!r}",
                ["train", "recipe.yaml", "--set", "output=new"],
                True,
                RECIPE,
                env={name: value},
                makes=("new",),
            )
        )
    packaged = ["plan", "recipe.yaml", "--set", "model=packaged:smollm2-135m"]
    for name in ("ECHO_LORA_CACHE", "XDG_CACHE_HOME"):
        kinds = {
            kind: NO_OUTPUT[kind]
            for kind in (
                "a file",
                "below a file",
                "a loop",
                "a long name",
                "the null device",
                "in a folder that can't be written",
                "nobody's home",
                "in /proc",
            )
        }
        for kind, (path, arrange, is_unprivileged) in kinds.items():
            cases.append(
                Case(
                    f"{name} is {kind}",
                    packaged,
                    False if name == "ECHO_LORA_CACHE" or path.startswith("/") else None,  # relative: is ignored
                    RECIPE,
                    arrange,
                    env={"ECHO_LORA_CACHE": None, name: path},
                    is_unprivileged=is_unprivileged,
                )
            )
    for kind, path in {
        "missing": "nowhere",
        "a file": "recipe.yaml",
        "empty": "",
        "the null device": "/dev/null",
    }.items():
        cases.append(Case(f"TMPDIR is {kind}", ["eval", "recipe.yaml"], None, RECIPE, env={"TMPDIR": path}))
    cases.append(Case("no HOME", ["plan", "recipe.yaml"], True, RECIPE, env={"HOME": None}))
    cases.append(Case("HOME is missing", ["plan", "recipe.yaml"], True, RECIPE, env={"HOME": "/nowhere"}))
    cases.append(
        Case(
            "no HOME for the cache",
            packaged,
            False,
            RECIPE,
            env={"HOME": "/dev/null", "ECHO_LORA_CACHE": None, "XDG_CACHE_HOME": None},
        )
    )
    for name, value in {
        "RANK": "3",
        "LOCAL_RANK": "abc",
        "MASTER_PORT": "abc",
        "ACCELERATE_MIXED_PRECISION": "nonsense",
        "ACCELERATE_USE_FSDP": "true",
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "abc",
        "ACCELERATE_DYNAMO_BACKEND": "nonsense",
        "ACCELERATE_USE_CPU": "maybe",
    }.items():
        cases.append(
            Case(
                f"train with {name}={value}",
                ["train", "recipe.yaml", "--set", "output=new"],
                None,
                RECIPE,
                env={name: value},
                makes=("new",),
            )
        )
    return cases


# --------------------------------------------------------------------------------------------------------- adapters


def edited(name: str, change: Callable[[Any], Any]) -> Arrange:
    """A JSON file with its value changed in place, or replaced by what `change` gives."""

    def arrange(folder: Path) -> None:
        value = json.loads((folder / name).read_text())
        replaced = change(value)
        (folder / name).write_text(json.dumps(value if replaced is None else replaced))

    return arrange


def setting(name: str, key: str, value: Any) -> Arrange:
    def change(document: dict[str, Any]) -> None:
        *path, last = key.split("/")
        for part in path:
            document = document[int(part) if isinstance(document, list) else part]
        if value is REMOVED:
            del document[last]
        else:
            document[int(last) if isinstance(document, list) else last] = value

    return edited(name, change)


REMOVED = type("Removed", (), {"__repr__": lambda self: "removed"})()
HUGE = 10**18
NO_JSON: dict[str, str | bytes] = {
    "empty": "",
    "white space": " ",
    "unfinished": '{"r": 4, "lora',
    "a list": "[]",
    "a list of objects": "[{}]",
    "a text": '"a"',
    "a number": "3",
    "null": "null",
    "NaN": "NaN",
    "an empty object": "{}",
    "UTF-16": '{"r": 4}'.encode("utf-16"),
    "no UTF-8": b'{"r": "\xff"}',
    "random bytes": bytes(range(256)) * 4,
    "YAML": "r: 4\n",
    "deep": "[" * 100_000,
    "deep and closed": "[" * 100_000 + "]" * 100_000,
    "a number of 10,000 digits": '{"r": ' + "9" * 10_000 + "}",
    "a NUL": "\0",
    "a pickle": pickle.dumps({"r": 4}),
}
WEIGHTS, CONFIG = "run/adapter/adapter_model.safetensors", "run/adapter/adapter_config.json"
CARD = "run/adapter/README.md"  # which eval brings up to date


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Arrange:
    def arrange(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        replaced = change(found)
        save_file(replaced if isinstance(replaced, dict) else found, folder / WEIGHTS)

    return arrange


def bytes_of(name: str, change: Callable[[bytes], bytes]) -> Arrange:
    return lambda folder: (folder / name).write_bytes(change((folder / name).read_bytes()))


class Pwned:
    def __reduce__(self) -> Any:
        return os.mkdir, ("pwned",)


def adapters(template: Path, rng: random.Random) -> list[Case]:
    base = str(template / "base")
    commands = {
        "doctor": ["doctor", "run/adapter"],
        "merge": ["merge", "run/adapter", "merged", "--base", base],
        "eval": ["eval", "recipe.yaml", "--adapter", "run/adapter"],
        "eval of the run": ["eval", "run"],
    }
    cases: list[Case] = []

    def add(
        name: str, arrange: Arrange, is_sound: bool | None, which: tuple[str, ...] = tuple(commands), says: str = ""
    ) -> None:
        for command in which:
            needs = ("run",) if command in ("doctor", "merge") else ("run", *RECIPE)
            makes = ("merged", CARD)
            cases.append(
                Case(f"{command}: {name}", commands[command], is_sound, needs, arrange, says=says, makes=makes)
            )

    add("as it is", _nothing, True)
    two = (("doctor", "merge"), ("doctor", "eval"))
    for number, (name, content) in enumerate(NO_JSON.items()):
        add(f"the configuration is {name}", writes(CONFIG, content), False, two[number % 2], "adapter_config.json")
        add(f"the weights are {name}", writes(WEIGHTS, content), False, two[number % 2], "adapter_model.safetensors")
    unsound: dict[str, list[Any]] = {
        "r": [-1, 0, "4", 4.5, None, True, [4], {}, 10**9, HUGE, 8, float("nan"), REMOVED],
        "lora_alpha": [None, "8", [8], {}, float("nan"), float("inf"), 0, True],
        "peft_type": ["NONSENSE", "lora", None, 3, [], {}, "", True, "IA3", "PREFIX_TUNING", "LN_TUNING", REMOVED],
        "target_modules": [3, [], ["nothing"], [3], [None], {"a": 1}, "nothing", "(", True, ["q_proj"], [[]], ""],
        "lora_dropout": ["x", 7, -1, None, [0.1], float("nan")],
        "use_dora": ["yes", True, 3, None, []],
        "use_rslora": ["yes", 3, []],
        "bias": ["nonsense", 3, None, []],
        "base_model_name_or_path": [3, ["x"], {}, True, "./nowhere", "x" * 10_000],
        "modules_to_save": [3, "q_proj", [3], ["nothing"], {}],
        "rank_pattern": [3, "x", {"q_proj": -1}, {"q_proj": "x"}, {"q_proj": HUGE}, [], {"q_proj": 8}],
        "alpha_pattern": [3, "x", {"q_proj": "x"}, {"q_proj": None}],
        "fan_in_fan_out": ["x", True, 3],
        "layers_to_transform": ["x", [100], [-1], 3.5, ["a"], [HUGE]],
        "layers_pattern": [3, "nothing", [3]],
        "task_type": ["NONSENSE", 3, [], "SEQ_2_SEQ_LM"],
        "exclude_modules": [3, "(", ["q_proj"]],
        "layer_replication": [3, [[0, 1]], [[0, 100]], "x"],
        "target_parameters": [3, ["nothing"], "x"],
        "trainable_token_indices": [3, [HUGE], "x"],
    }
    for key, values in unsound.items():
        for number, value in enumerate(values):
            late = {
                "base_model_name_or_path",
                "target_modules",
                "modules_to_save",
                "layers_to_transform",
                "layers_pattern",
                "layer_replication",
            }
            late |= (
                {
                    "task_type",
                }
                if value == "SEQ_2_SEQ_LM"
                else set()
            )
            late |= {"target_parameters", "trainable_token_indices", "exclude_modules", "fan_in_fan_out"}
            sound: bool | None = False if key not in late else None
            add(f"{key} = {shown(value)}", setting(CONFIG, key, value), sound, two[number % 2])
    for key, value in {
        "unknown": 3,
        "lora_dropout": 0.5,
        "inference_mode": False,
        "revision": None,
        "megatron_core": "x",
        "lora_bias": False,
    }.items():
        add(f"{key} = {value!r} is no harm", setting(CONFIG, key, value), None, two[0])
    add(
        "a key twice in the configuration",
        bytes_of(CONFIG, lambda old: old.replace(b'"r": 4', b'"r": 4, "r": 8')),
        False,
        ("doctor",),
    )
    add("no configuration", lambda folder: (folder / CONFIG).unlink(), False, says="adapter_config.json")
    add("no weights", lambda folder: (folder / WEIGHTS).unlink(), False, says="adapter_model.safetensors")
    for name, value in {"NaN": float("nan"), "inf": float("inf")}.items():
        add(
            f"{name} in the weights",
            tensors(lambda found, value=value: next(iter(found.values())).view(-1)[:1].fill_(value)),
            False,
        )
    add(
        "zero weights",
        tensors(lambda found: {name: torch.zeros_like(t) for name, t in found.items()}),
        False,
        ("doctor",),
    )
    add("bfloat16", tensors(lambda found: {name: t.bfloat16() for name, t in found.items()}), True)
    add("whole numbers", tensors(lambda found: {name: t.to(torch.int32) + 1 for name, t in found.items()}), False)
    add(
        "complex numbers",
        tensors(lambda found: {name: t.to(torch.complex64) for name, t in found.items()}),
        False,
        two[0],
    )
    add("booleans", tensors(lambda found: {name: t > 0 for name, t in found.items()}), False, two[1])
    add("no tensor", tensors(lambda found: {}), False)
    add("one tensor less", tensors(lambda found: {name: found[name] for name in sorted(found)[1:]}), False)
    add(
        "one layer less",
        tensors(lambda found: {n: t for n, t in found.items() if ".layers.0." not in n}),
        False,
        ("merge", "eval"),
    )
    add("one tensor more", tensors(lambda found: found | {"x": torch.ones(2)}), False)
    add("foreign names", tensors(lambda found: {f"x.{name}": t for name, t in found.items()}), False)
    add("a bare scalar", tensors(lambda found: found | {sorted(found)[0]: torch.tensor(1.0)}), False)
    add("no element", tensors(lambda found: found | {sorted(found)[0]: torch.ones(0, 4)}), False)
    add("one more dimension", tensors(lambda found: {name: t[None] for name, t in found.items()}), False)
    add("turned", tensors(lambda found: {name: t.T.contiguous() for name, t in found.items()}), False)
    add(
        "another rank",
        tensors(
            lambda found: {name: t.repeat(2, 1) if "lora_A" in name else t.repeat(1, 2) for name, t in found.items()}
        ),
        False,
    )
    add(
        "another width",
        tensors(lambda found: {name: t.repeat(1, 2) if "lora_A" in name else t for name, t in found.items()}),
        False,
        ("merge", "eval"),
    )
    add("weights that are a folder", lambda folder: ((folder / WEIGHTS).unlink(), (folder / WEIGHTS).mkdir()), False)
    add(
        "a configuration that is a folder",
        lambda folder: ((folder / CONFIG).unlink(), (folder / CONFIG).mkdir()),
        False,
    )
    add(
        "weights that are a pipe",
        lambda folder: ((folder / WEIGHTS).unlink(), os.mkfifo(folder / WEIGHTS)),
        False,
        ("doctor",),
    )
    add(
        "a configuration that is a pipe",
        lambda folder: ((folder / CONFIG).unlink(), os.mkfifo(folder / CONFIG)),
        False,
        ("doctor",),
    )
    add(
        "weights that are a loop",
        lambda folder: ((folder / WEIGHTS).unlink(), (folder / WEIGHTS).symlink_to(Path(WEIGHTS).name)),
        False,
    )

    def pickled(folder: Path) -> None:
        (folder / WEIGHTS).unlink()
        (folder / "run/adapter/adapter_model.bin").write_bytes(pickle.dumps(Pwned()))

    add("a pickle beside no weights", pickled, False)
    add("a pickle for weights", writes(WEIGHTS, pickle.dumps(Pwned())), False)
    sound = (template / WEIGHTS).read_bytes()
    for size in (1, 4, 7, 8, 9, 50, 300, len(sound) // 2, len(sound) - 1):
        add(
            f"weights of {size} bytes", writes(WEIGHTS, sound[:size]), False, two[size % 2], "adapter_model.safetensors"
        )
    add("weights with more at the end", writes(WEIGHTS, sound + b"x"), False, two[0])
    header = json.loads(sound[8 : 8 + struct.unpack("<Q", sound[:8])[0]])
    first = next(name for name in header if name != "__metadata__")

    def headed(change: Callable[[dict[str, Any]], Any]) -> bytes:
        changed = copy.deepcopy(header)
        change(changed)
        text = json.dumps(changed).encode()
        return struct.pack("<Q", len(text)) + text + sound[8 + struct.unpack("<Q", sound[:8])[0] :]

    headers = {
        "an unknown dtype": headed(lambda found: found[first].update(dtype="F7")),
        "a dtype that is null": headed(lambda found: found[first].update(dtype=None)),
        "a negative shape": headed(lambda found: found[first].update(shape=[-1, 4])),
        "a huge shape": headed(lambda found: found[first].update(shape=[2**62, 4])),
        "offsets beyond the file": headed(lambda found: found[first].update(data_offsets=[0, 2**40])),
        "offsets turned": headed(lambda found: found[first].update(data_offsets=[100, 0])),
        "no offsets": headed(lambda found: found[first].pop("data_offsets")),
        "a header that is a list": struct.pack("<Q", 2) + b"[]",
        "a header of 2^63 bytes": struct.pack("<Q", 2**63) + sound[8:],
        "a header without end": struct.pack("<Q", 100) + b"{" * 100,
        "a header of zero bytes": struct.pack("<Q", 0) + sound[8:],
    }
    for number, (name, content) in enumerate(headers.items()):
        add(name, writes(WEIGHTS, content), False, two[number % 2], "adapter_model.safetensors")
    for number in range(30):
        changed = bytearray(sound)
        for _ in range(rng.choice((1, 3))):
            changed[rng.randrange(min(len(sound), 2000))] = rng.randrange(256)
        add(f"changed weights {number}", writes(WEIGHTS, bytes(changed)), None, two[number % 2])
    text = (template / CONFIG).read_bytes()
    for number in range(40):
        changed = bytearray(text)
        place = rng.randrange(len(changed))
        changed[place : place + rng.choice((0, 1, 1, 3))] = (
            rng.randbytes(1) if rng.random() < 0.3 else rng.choice((b"", b"9", b'"', b"[", b"-", b"null"))
        )
        add(f"changed configuration {number}", writes(CONFIG, bytes(changed)), None, two[number % 2])
    return cases


def bases() -> list[Case]:
    cases: list[Case] = []
    model = ["--set", "model=./base", "--set", "output=new"]

    def add(name: str, arrange: Arrange, is_sound: bool | None, which: tuple[str, ...] = ("plan", "train")) -> None:
        for command in which:
            cases.append(
                Case(
                    f"{command}: {name}",
                    [command, "recipe.yaml", *model],
                    is_sound,
                    ("base", *RECIPE),
                    arrange,
                    makes=("new",),
                )
            )

    add("as it is", _nothing, True, ("plan", "train", "eval"))
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        for name, content in NO_JSON.items():
            is_taste = file in ("tokenizer_config.json", "generation_config.json") or (name, file) == (
                "an empty object",
                "tokenizer.json",
            )
            add(
                f"{file} is {name}",
                writes(f"base/{file}", content),
                None if is_taste else False,
                ("plan" if file[0] == "c" else "train",),
            )
    for key, values in {
        "hidden_size": [0, -1, "32", 1.5, None, 33, 10**9, HUGE, [], True],
        "num_hidden_layers": [0, -1, "4", 1.5, 10**9, HUGE],
        "num_attention_heads": [0, -1, 3, "4", 10**9],
        "num_key_value_heads": [0, 3, "x", -1],
        "vocab_size": [0, -1, "400", 5, HUGE, 1.5],
        "intermediate_size": [0, -1, "48", HUGE],
        "max_position_embeddings": [0, -1, "x", 4],
        "model_type": ["nonsense", 3, None, [], "bert", "t5", REMOVED],
        "architectures": [3, ["Nonsense"], "x"],
        "dtype": ["nonsense", 3, "int8", "float7"],
        "rope_parameters": [3, "x", {"rope_type": "nonsense"}, {"rope_theta": "x", "rope_type": "default"}, []],
        "hidden_act": ["nonsense", 3],
        "rms_norm_eps": ["x", None],
        "tie_word_embeddings": ["x", 3],
        "pad_token_id": [-1, 10**6, "x"],
        "quantization_config": [3, {}, {"quant_method": "nonsense"}, "x"],
        "auto_map": [{"AutoConfig": "code.Config"}, 3],
    }.items():
        unsure = {
            "architectures",
            "tie_word_embeddings",
            "pad_token_id",
            "auto_map",
            "rope_parameters",
            "rms_norm_eps",
            "dtype",
            "quantization_config",
        }
        for number, value in enumerate(values):
            is_sound: bool | None = None if key in unsure or value in (True, 4) else False
            add(
                f"{key} = {value!r}",
                setting("base/config.json", key, value),
                is_sound,
                (("plan",), ("train",))[number % 2],
            )
    weights = "base/model.safetensors"
    for name, change in {
        "cut": lambda old: old[: len(old) // 2],
        "empty": lambda old: b"",
        "of random bytes": lambda old: bytes(len(old)),
        "a pickle": lambda old: pickle.dumps(Pwned()),
    }.items():
        add(f"weights {name}", bytes_of(weights, change), False, ("train", "eval"))

    def changed(change: Callable[[dict[str, torch.Tensor]], Any]) -> Arrange:
        def arrange(folder: Path) -> None:
            found = load_file(folder / weights)
            save_file(change(found) or found, folder / weights, {"format": "pt"})

        return arrange

    add(
        "a tensor less",
        changed(lambda found: {name: found[name] for name in sorted(found)[1:]}),
        False,
        ("train", "eval"),
    )
    add("a tensor more", changed(lambda found: found | {"x": torch.ones(1)}), None, ("train", "eval"))
    add(
        "a tensor of another shape",
        changed(lambda found: found | {sorted(found)[0]: torch.ones(3, 3)}),
        False,
        ("train", "eval"),
    )
    add(
        "NaN weights",
        changed(lambda found: {name: t * float("nan") for name, t in found.items()}),
        False,
        ("train", "eval"),
    )
    add("no tensor", changed(lambda found: {"x": torch.ones(1)}), False, ("train", "eval"))
    add("no weights", lambda folder: (folder / weights).unlink(), False, ("train", "eval"))
    add("no configuration", lambda folder: (folder / "base/config.json").unlink(), False)
    add("no tokenizer", lambda folder: [path.unlink() for path in (folder / "base").glob("tokenizer*")], False)

    def pickled(folder: Path) -> None:
        (folder / weights).unlink()
        (folder / "base/pytorch_model.bin").write_bytes(pickle.dumps(Pwned()))

    add("a pickle beside no weights", pickled, False, ("train", "eval"))
    for name, template in {
        "unfinished": "{{ x",
        "raising": "{{ raise_exception('no') }}",
        "a loop": "{% for i in range(10**9) %}x{% endfor %}",
        "empty": "",
    }.items():
        chat = writes("base/chat_template.jinja", template)
        with_messages = writes(
            "train.jsonl",
            lines({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}),
        )
        add(f"a chat template that is {name}", both(chat, with_messages), False, ("plan",))
        add(f"a chat template that is {name}, not used", chat, None, ("plan",))
    return cases


# ------------------------------------------------------------------------------------------------- runs, checkpoints


def runs(template: Path, rng: random.Random) -> list[Case]:
    cases = [
        Case("as it is", ["eval", "run"], True, ("run", *RECIPE)),
        Case("by its adapter", ["eval", "run/adapter"], True, ("run", *RECIPE)),
        Case("trained again", ["train", "recipe.yaml"], False, ("run", *RECIPE), says="run"),
        Case("resumed", ["train", "recipe.yaml", "--resume"], False, ("run", *RECIPE), says="run"),
        Case(
            "without an adapter",
            ["eval", "run"],
            False,
            ("run", *RECIPE),
            lambda folder: shutil.rmtree(folder / "run/adapter"),
        ),
        Case("without a base", ["eval", "run", "--set", "model=./nowhere"], False, ("run", *RECIPE)),
        Case("without rows", ["eval", "run"], False, ("run", "recipe.yaml")),
        Case("a folder without a run", ["eval", "."], False, RECIPE),
    ]

    def add(name: str, arrange: Arrange, is_sound: bool | None = False, says: str = "") -> None:
        cases.append(Case(name, ["eval", "run"], is_sound, ("run", *RECIPE), arrange, says=says, makes=(CARD,)))

    for name, content in NO_JSON.items():
        add(f"run.json is {name}", writes("run/run.json", content), says="run.json")
    for value in (3, None, [], "x", {}, True, REMOVED):
        add(f"recipe = {value!r}", setting("run/run.json", "recipe", value), says="run.json")
    for key, values in {
        "model": [3, None, "", "./nowhere", REMOVED],
        "data": [3, None, {}, [], REMOVED],
        "data/test": [3, "nowhere.jsonl", None],
        "lora/r": [-1, "4", HUGE, None],
        "evaluation/batch_size": [0, HUGE, "x", 1.5],
        "evaluation/tasks": [3, [{}], "x"],
        "unknown": [3],
        "output": [3, ""],
        "echo_config/bottleneck": [-1, HUGE, "x"],
        "training/steps": [-1, HUGE, "x"],
    }.items():
        for value in values:
            is_sound = None if (key, value) in (("data/test", None),) else False
            add(f"recipe/{key} = {value!r}", setting("run/run.json", f"recipe/{key}", value), is_sound)
    for number in range(30):
        changed = bytearray((template / "run/run.json").read_bytes())
        for _ in range(rng.choice((1, 3))):
            place = rng.randrange(len(changed))
            changed[place : place + rng.choice((0, 1, 3))] = rng.choice((b"", b"9", b'"', b"[", b"-", b"null", b"\xff"))
        add(f"changed run.json {number}", writes("run/run.json", bytes(changed)), None)
    return cases


def first_recipes(template: Path) -> list[Case]:
    """`init`, and `train` without a recipe."""
    base, cases = str(template / "base"), []

    def add(
        name: str,
        is_sound: bool | None,
        data: str = "train.jsonl",
        *options: str,
        arrange: Arrange = _nothing,
        model: str = base,
        makes: tuple[str, ...] = ("train.yaml",),
        **more: Any,
    ) -> None:
        args = ["init", data, "--model", model, *options]
        cases.append(Case(name, args, is_sound, ROW_FILES, arrange, makes=makes, **more))

    add("as it is", True)
    add("a file that exists", False, arrange=writes("train.yaml", "mine"), says="train.yaml")
    add("an output that is the data", False, "train.jsonl", "--output", "train.jsonl", says="train.jsonl")
    add("a pattern", True, "*.jsonl", makes=("data.yaml",))
    add("a pattern of nothing", False, "*.nothing", says="*.nothing")
    add("no hub", False, "owner/name", says="owner/name")
    user, assistant = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    said = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    for name, row, is_sound in (
        ("Alpaca", {"instruction": "a", "input": "", "output": "b"}, True),
        ("Alpaca without an output", {"instruction": "a", "input": ""}, False),
        ("ShareGPT", {"conversations": said}, True),
        ("ShareGPT without an answer", {"conversations": said[:1]}, False),
        ("ShareGPT of nobody", {"conversations": [{"from": "nobody", "value": "a"}, *said]}, False),
        ("messages", {"messages": [user, assistant]}, True),
        ("a column of text that goes unused", {"prompt": "a", "completion": "b", "context": "c"}, False),
        ("other columns", {"question": "a", "answer": "b"}, False),
        ("an empty answer", {"prompt": "a", "completion": ""}, False),
        ("a prompt that is too long", {"prompt": "one " * 10_000, "completion": "b"}, False),
        ("a number", {"prompt": "a", "completion": 3}, False),
    ):
        add(name, is_sound, arrange=writes("train.jsonl", lines(row)), says="" if is_sound else "train.jsonl")
    for name, content, is_sound in (
        ("CSV", "prompt,completion\na,b\n", True),
        ("CSV without a header", "a,b\n" * 3, False),
        ("CSV of two headers", "prompt,prompt\na,b\n", False),
        ("CSV of a header", "prompt,completion\n", False),
        ("CSV that is empty", "", False),
        ("CSV with more cells than columns", "prompt,completion\na,b,c\n", False),
        ("CSV with an open quote", 'prompt,completion\n"a,b\n', False),
        ("CSV in UTF-16", "prompt,completion\na,b\n".encode("utf-16"), False),
        ("CSV of zeros", bytes(4000), False),
    ):
        add(name, is_sound, "rows.csv", arrange=writes("rows.csv", content), makes=("rows.yaml",))
    for name, content in {
        "gzip": gzip.compress(lines(*ROWS).encode()),
        "bytes": b"\x1f\x8b" + bytes(range(99)),
    }.items():
        add(f"{name} in a .gz", name == "gzip", "a.jsonl.gz", arrange=writes("a.jsonl.gz", content), makes=("a.yaml",))
    for text, is_sound in {
        "training.steps=2": True,
        "lora.r=2": True,
        "method=dora": True,
        "data.max_length=64": True,
        "data.max_length=null": True,
        "data.on_overlength=truncate_prompt": True,
        "data.chat=false": True,
        "data.validation=validation.jsonl": True,
        "training.evaluate_every=2": False,
        "training.gradient_checkpointing=true": True,
        **dict.fromkeys(("training=3", "training.steps=x", "training.batch_size=0", "lora=4", "lora.r=4096"), False),
        **dict.fromkeys(("data=3", "data={train: test.jsonl}", "data.train=test.jsonl", "model=x", "output="), False),
        **dict.fromkeys(("data.format=alpaca", "data.max_length=2", "data.stream=true", "nothing=3", "=", ""), False),
        **dict.fromkeys(("data.validation_share=1", "data.validation_share=0", "data.weight=2", "a=["), False),
    }.items():
        add(f"--set {text}", is_sound, "train.jsonl", "--set", text)
    for model in ("", " ", "nowhere/x", "./nowhere", "packaged:nothing", "train.jsonl", "/dev/null", "x" * 300):
        add(f"model {shown(model)}", False, model=model)
    train = ["train", "--model", base, "--data"]
    short = ["--set", "training.steps=2", "--set", "output=new"]
    cases += [
        Case("train", [*train, "train.jsonl", *short], True, ROW_FILES, makes=("new",)),
        Case("train on nothing", [*train, "nowhere.jsonl", *short], False, says="nowhere.jsonl"),
        Case("train on other columns", [*train, "x.jsonl", *short], False, (), writes("x.jsonl", lines({"a": "b"}))),
        Case("train into a full folder", [*train, "train.jsonl", "--set", "output=full"], False, ROW_FILES, _full),
        Case("train without rows", ["train", "--model", base], False),
        Case("train without a model", ["train", "--data", "train.jsonl"], False, ROW_FILES),
        Case("train a recipe and rows", ["train", "recipe.yaml", "--data", "train.jsonl"], False, RECIPE),
        Case("resume rows", [*train, "train.jsonl", "--resume"], False, ROW_FILES),
    ]
    return cases


def answers(template: Path) -> list[Case]:
    """`chat` and `generate`."""
    cases: list[Case] = []
    short = ["--max-new-tokens", "2"]
    run = ("run", *RECIPE)

    def chat(name: str, is_sound: bool | None, *args: str, arrange: Arrange = _nothing, **more: Any) -> None:
        cases.append(Case(f"chat: {name}", ["chat", *args], is_sound, run, arrange, **more))

    def generate(
        name: str,
        is_sound: bool | None,
        content: str | bytes,
        *options: str,
        file: str = "prompts.jsonl",
        arrange: Arrange = _nothing,
        **more: Any,
    ) -> None:
        args = ["generate", "run", file, "--output", "answers.jsonl", *short, *options]
        arranged = both(writes(file, content), arrange)
        cases.append(Case(f"generate: {name}", args, is_sound, run, arranged, makes=("answers.jsonl",), **more))

    ask = ["--prompt", "Count:", *short]
    for target, is_sound in (("run", True), ("run/adapter", True), ("recipe.yaml", True), ("base", False)):
        chat(f"of {target}", is_sound, target, *ask)
    chat("of a recipe that was not trained", False, "recipe.yaml", *ask, arrange=lambda f: shutil.rmtree(f / "run"))
    chat("beside the base", True, "run", "--base", *ask)
    chat("without a prompt or a terminal", True, "run")
    for prompt in ("", " ", "\n"):
        chat(f"prompt {prompt!r}", False if not prompt else None, "run", "--prompt", prompt, *short)
    for prompt in ("漢字 👩‍👩‍👧", "/quit", "<|im_end|>", "\x1b[31mred", "one " * 20):
        chat(f"prompt {shown(prompt)}", True, "run", "--prompt", prompt, *short)
    chat("a prompt that is no UTF-8", False, "run", "--prompt", "\udcff", *short)
    chat("a prompt that is too long", False, "run", "--prompt", "one " * 5000, *short, says="limit")
    chat("a prompt of a megabyte", False, "run", "--prompt", "one " * 250_000, *short)
    chat("a system message without a template", False, "run", "--system", "a", *ask, says="--system")
    chat("a system message", None, "run", "--template", "--system", "a", *ask)
    chat("a template", True, "run", "--template", *ask)
    chat("no template", True, "run", "--no-template", *ask)
    for text in (*NO_COUNT, "0"):
        most = text == "1" + "0" * 18  # an answer ends where the model does
        chat(
            f"--max-new-tokens {shown(text)}", None if most else False, "run", "--prompt", "a", "--max-new-tokens", text
        )
    for text in ("-1", "nan", "inf", "-inf", "1e400", "x", "", "101", "1:30"):
        chat(f"--temperature {text}", False, "run", *ask, "--temperature", text)
    for text in ("0", "1", "100", "1e-30", "1e-320"):
        chat(f"--temperature {text}", True if text in "01" else None, "run", *ask, "--temperature", text)
    for text in ("-1", "x", "1.5", str(2**32), "9" * 5000):
        chat(f"--seed {shown(text)}", False, "run", *ask, "--temperature", "1", "--seed", text)
    for text in ("", " ", "./nowhere", "nowhere/x", "packaged:nothing", "train.jsonl", "/dev/null"):
        chat(f"--base-model {text}", None if not text else False, "run", *ask, "--base-model", text)
    for name, content in NO_JSON.items():
        chat(f"run.json is {name}", False, "run", *ask, arrange=writes("run/run.json", content), says="run.json")
    for key in ("is_chat", "is_alpaca"):
        for value in (3, "x", [], {}, None, REMOVED):
            chat(f"{key} = {value!r}", None, "run", *ask, arrange=setting("run/run.json", key, value))
    chat("a base that is gone", False, "run", *ask, arrange=setting("run/run.json", "recipe/model", "./nowhere"))

    generate("rows", True, lines(*ROWS[:3]))
    generate("rows, the base beside", True, lines(*ROWS[:3]), "--base", "--batch-size", "2")
    generate("text", True, "Count:\n\nSay:\r\n", file="prompts.txt")
    generate("a byte order mark", True, b"\xef\xbb\xbfCount:\n", file="prompts.txt")
    for name, content in {
        "nothing": "",
        "blank lines": " \n\n",
        "UTF-16": "Count:\n".encode("utf-16"),
        "random bytes": bytes(range(128, 256)),
        "a line that is too long": "one " * 5000,
    }.items():
        generate(f"text of {name}", False, content, file="prompts.txt", says="prompts.txt")
    user, assistant = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    for name, row, is_sound in (
        ("a prompt", {"prompt": "Count:"}, True),
        ("messages", {"messages": [user]}, True),
        ("messages and the answer", {"messages": [user, assistant]}, True),
        ("an answer alone", {"messages": [assistant]}, False),
        ("no message", {"messages": []}, False),
        ("messages that are text", {"messages": "a"}, False),
        ("a message that is text", {"messages": ["a"]}, False),
        ("a message without a role", {"messages": [{"content": "a"}]}, False),
        ("a role that is a number", {"messages": [{"role": 3, "content": "a"}]}, False),
        ("content that is a number", {"messages": [{"role": "user", "content": 3}]}, False),
        ("tools that are a number", {"messages": [user], "tools": 3}, None),
        ("an empty prompt", {"prompt": ""}, False),
        ("a prompt that is a number", {"prompt": 3}, False),
        ("a prompt that is null", {"prompt": None}, False),
        ("a prompt that is a list", {"prompt": []}, False),
        ("a prompt that is an object", {"prompt": {"a": 1}}, False),
        ("a lone surrogate", {"prompt": "\ud800"}, False),
        ("other columns", {"question": "a"}, False),
        ("an answer that is there", {"prompt": "a", "generated": "b"}, False),
        ("a prompt that is too long", {"prompt": "one " * 5000}, False),
        ("a column that is a list", {"prompt": "a", "tags": ["x", None, 3]}, True),
        ("nothing", {}, False),
    ):
        generate(name, is_sound, lines({"prompt": "Say:"}, row), says="" if is_sound is not False else "prompts.jsonl")
    for name, content in NO_JSON.items():
        generate(f"a file that is {name}", False, content, says="prompts.jsonl")
    for text in (*NO_COUNT, "0"):
        is_sound = None if text == "1" + "0" * 18 else False
        generate(f"--batch-size {shown(text)}", is_sound, lines({"prompt": "a"}), "--batch-size", text)
    generate("an output that exists", False, lines({"prompt": "a"}), arrange=writes("answers.jsonl", "mine"))
    same = ["generate", "run", "train.jsonl", "--output", "train.jsonl"]
    cases.append(Case("generate: an output that is the prompts", same, False, run, says="train.jsonl"))
    return cases


def checkpoints(template: Path, rng: random.Random) -> list[Case]:
    args = ["train", "recipe.yaml", "--resume", "--set", "output=stopped", "--set", "training.save_every=1"]
    newest = sorted(path.name for path in (template / "stopped/checkpoints").glob("checkpoint-*"))[-1]
    place = f"stopped/checkpoints/{newest}"
    seal = f"{place}/echo_checkpoint.json"
    cases = [
        Case("as it is", args, True, ("stopped", *RECIPE), makes=("stopped",)),
        Case(
            "not resumed",
            ["train", "recipe.yaml", "--set", "output=stopped"],
            False,
            ("stopped", *RECIPE),
            says="resume",
        ),
        Case(
            "another recipe",
            [*args, "--set", "training.learning_rate=0.02"],
            False,
            ("stopped", *RECIPE),
            says="learning_rate",
        ),
        Case("another rank", [*args, "--set", "lora.r=2"], False, ("stopped", *RECIPE)),
        Case("without the echo", [*args, "--set", "echo=false"], False, ("stopped", *RECIPE)),
    ]

    def add(name: str, arrange: Arrange, is_sound: bool | None = False, says: str = "") -> None:
        cases.append(Case(name, args, is_sound, ("stopped", *RECIPE), arrange, says=says, makes=("stopped",)))

    for name, content in NO_JSON.items():
        add(f"the seal is {name}", writes(seal, content), says=newest)
    for key in ("files", "configuration", "initial_adapter_sha256"):
        for value in (3, None, [], "x", {}, True, REMOVED):
            is_taste = key == "initial_adapter_sha256" or (key == "files" and value == {})
            add(f"{key} = {value!r} in the seal", setting(seal, key, value), None if is_taste else False)
    for path in ("../../run.json", "/etc/passwd", "a\0b", "x" * 5000, "", "."):
        add(
            f"the seal lists {shown(path)}",
            edited(seal, lambda found, path=path: found["files"].update({path: "0" * 64})),
            says=newest,
        )
    add(
        "a digest that is a number",
        edited(seal, lambda found: found["files"].update(dict.fromkeys(found["files"], 3))),
        says=newest,
    )
    files = sorted(path.name for path in (template / place).iterdir() if path.name != "echo_checkpoint.json")
    for name in files:
        add(f"{name} is missing", lambda folder, name=name: (folder / place / name).unlink(), says=newest)
        add(f"{name} is cut", bytes_of(f"{place}/{name}", lambda old: old[:-1]), says=newest)

    def resealed(name: str, change: Callable[[bytes], bytes]) -> Arrange:
        """A file that is damaged, in a checkpoint whose seal says that it is sound."""

        def arrange(folder: Path) -> None:
            import hashlib

            path = folder / place / name
            path.write_bytes(change(path.read_bytes()))
            found = json.loads((folder / seal).read_text())
            found["files"][name] = hashlib.sha256(path.read_bytes()).hexdigest()
            (folder / seal).write_text(json.dumps(found))

        return arrange

    for name in files:
        if name not in ("README.md", "training_args.bin", "adapter_config.json") and not name.startswith(
            ("tokenizer", "special", "chat_template")
        ):
            add(f"{name} is cut, and sealed", resealed(name, lambda old: old[: len(old) // 2]), says="checkpoint")
            add(f"{name} is empty, and sealed", resealed(name, lambda old: b""), says="checkpoint")
            if name.endswith((".pt", ".bin", ".pth")):
                add(
                    f"{name} is harmful, and sealed",
                    resealed(name, lambda old: pickle.dumps(Pwned())),
                    says="checkpoint",
                )
    for key, value in {
        "global_step": -1,
        "max_steps": "x",
        "log_history": 3,
        "epoch": "x",
        "stateful_callbacks": 3,
        "nothing": 3,
    }.items():
        change = lambda old, key=key, value=value: json.dumps(json.loads(old) | {key: value}).encode()  # noqa: E731
        add(
            f"{key} = {value!r} in trainer_state.json, and sealed",
            resealed("trainer_state.json", change),
            None if key in ("nothing", "epoch") else False,
        )
    for name in (
        "checkpoint-abc",
        "checkpoint-",
        "checkpoint--1",
        "checkpoint-99",
        "checkpoint-1e3",
        "checkpoint-" + "9" * 100,
    ):
        add(
            f"an empty {shown(name)} beside",
            lambda folder, name=name: (folder / "stopped/checkpoints" / name).mkdir(),
            None,
        )
        add(f"a file {shown(name)} beside", writes(f"stopped/checkpoints/{name}", "x"), None)
        copied = lambda folder, name=name: shutil.copytree(folder / place, folder / "stopped/checkpoints" / name)  # noqa: E731
        add(f"a copy as {shown(name)}", copied, None)
    add("no seal on the newest", lambda folder: (folder / seal).unlink(), True)
    add("no seal on any", lambda folder: [path.unlink() for path in (folder / "stopped").rglob("echo_checkpoint.json")])
    add("no checkpoint", lambda folder: shutil.rmtree(folder / "stopped/checkpoints"))
    add(
        "checkpoints that are a file",
        lambda folder: (
            shutil.rmtree(folder / "stopped/checkpoints"),
            (folder / "stopped/checkpoints").write_text("x"),
        ),
    )
    add(
        "checkpoints that are a loop",
        lambda folder: (
            shutil.rmtree(folder / "stopped/checkpoints"),
            (folder / "stopped/checkpoints").symlink_to("checkpoints"),
        ),
    )
    for name, content in NO_JSON.items():
        add(f"started.json is {name}", writes("stopped/checkpoints/started.json", content), None)
    for number in range(20):
        changed = bytearray((template / seal).read_bytes())
        at = rng.randrange(len(changed))
        changed[at : at + rng.choice((0, 1, 3))] = rng.choice((b"", b"9", b'"', b"[", b"-", b"null", b"\xff"))
        add(f"changed seal {number}", writes(seal, bytes(changed)), None)
    return cases


# ---------------------------------------------------------------------------------------------------------- studies


def study_keys() -> list[Case]:
    cases: list[Case] = []
    keys: dict[str, tuple[list[str], list[str]]] = {
        "title": (["on", "2024-01-01", "a"], [*NO_TEXT, "~"]),
        "question": (["a", "''"], ["3", "[]", "~"]),
        "recipe": (["recipe.yaml"], [*NO_TEXT, "~", "nowhere.yaml", "general.txt", "study.yaml"]),
        "set": (
            ["{}", "{lora.r: 2}", "{training.steps: 2}"],
            [
                "3",
                "[]",
                "on",
                "{lora.rr: 2}",
                "{lora.r: 1:30}",
                "{seeds.routing: 3}",
                "{3: 4}",
                "{lora.r: .nan}",
                "{output: x}",
                "{lora.r: 2024-01-01}",
                "{'': 3}",
                "{training.steps: 1.0e+18}",
            ],
        ),
        "arms": (
            [],
            [
                "3",
                "[]",
                "{}",
                "{a: {}}",
                "{a: {}, b: 3}",
                "{lora: {}, 'a/b': {}}",
                "{lora: {}, '': {}}",
                "{lora: {}, '..': {}}",
                "{lora: {}, on: ~}",
                "{lora: {}, 3: {}}",
                "{lora: {}, b: {sett: {}}}",
                "{lora: {}, b: {role: x}}",
                "{lora: {}, b: {learning_rates: []}}",
                "{lora: {}, b: {learning_rates: [1e-3]}}",
                "{lora: {}, b: {label: 3}}",
                "{lora: {}, b: {keep_echo_on: yes}}",
                "{lora: {}, b: {set: {training.learning_rate: 1}}}",
                "{lora: {}, b: {label: ''}}",
                "{lora: {}, %s: {}}" % ("x" * 300),
                '{lora: {}, "b\\n": {}}',
                "{lora: {}, b: {set: {echo_config: 3}}}",
                "{lora: {}, b: {learning_rates: [.nan, 1]}}",
                "{lora: {}, b: {learning_rates: [-1, 1]}}",
            ],
        ),
        "baseline": (["echo"], ["3", "''", "nothing", "~", "[lora]"]),
        "comparisons": (
            ["[[echo, lora]]", "~"],
            [
                "3",
                "[]",
                "[[]]",
                "[[lora]]",
                "[[lora, lora]]",
                "[[lora, nothing]]",
                "[lora, echo]",
                "{}",
                "[[lora, echo, lora]]",
                "[[echo, lora], [echo, lora]]",
            ],
        ),
        "learning_rates": (
            ["[1e-3]", "[1e-3, 2e-3]"],
            [
                "3",
                "[]",
                "[0]",
                "[-1]",
                "[.nan]",
                "[.inf]",
                "[1e400]",
                "[1:30]",
                "[yes]",
                "['1e-3']",
                "[1e-3, 1e-3]",
                "[1e-3, 0.001]",
                "[~]",
                "{}",
                "[1e30]",
                "[0.001, 0.0010000001]",
            ],
        ),
        "tuning_seeds": (
            ["[0]", "[3, 4]"],
            [
                "3",
                "[]",
                "[1]",
                "[-1]",
                "[0, 0]",
                "[1.5]",
                "[true]",
                "[on]",
                "[1:30]",
                "[~]",
                "[1000000000000000000]",
                "[010]",
            ],
        ),
        "tune_on": (["accuracy"], [*NO_CHOICE, "~", "loss"]),
        "seeds": (
            ["[1]", "[1, 2, 3]"],
            [
                "3",
                "[]",
                "[0]",
                "[-1]",
                "[1, 1]",
                "[1.5]",
                "[true]",
                "[1:30]",
                "[1, 1000000000000000000]",
                "[~]",
                "['1']",
                "[010, 1]",
                "{}",
            ],
        ),
        "score_on": (["test", "validation"], [*NO_CHOICE, "~"]),
        "smallest_effect": (["0.01", "0.5"], [*NO_NUMBER, "0", "1", "-0.1", "1.5", "~"]),
        "margin": (["0.01", "0.5", "~"], [*NO_NUMBER, "0", "1", "-0.1", "1.5"]),
        "looks": (["~"], ["3", "[]", "[2]", "[3]", "[1, 2]", "[true]", "[x]", "[1000000000000000000]", "{}"]),
        "general": (
            ["~", "{file: general.txt, tokens: 5}"],
            [
                "3",
                "[]",
                "general.txt",
                "{}",
                "{file: nowhere.txt}",
                "{file: 3}",
                "{file: ''}",
                "{file: general.txt, tokens: 1}",
                "{file: general.txt, tokens: 1:30}",
                "{file: general.txt, tokens: 1000000000000000000}",
                "{file: general.txt, token: 5}",
                "{file: .}",
            ],
        ),
        "output": (["study-out", "2024-01-01"], [*NO_TEXT, "~"]),
        "nothing": ([], ["3"]),
    }

    def in_study(key: str, text: str) -> Arrange:
        def arrange(folder: Path) -> None:
            document = yaml.safe_load((folder / "study.yaml").read_text())
            document[key] = "@@@"
            if key == "baseline":
                document["comparisons"] = None
            (folder / "study.yaml").write_text(yaml.safe_dump(document, sort_keys=False).replace("'@@@'", text))

        return arrange

    for key, (sound, unsound) in keys.items():
        for text, is_sound in [*((text, True) for text in sound), *((text, False) for text in dict.fromkeys(unsound))]:
            by_file = len(cases) % 2 == 0
            args = ["compare", "study.yaml", "--minutes", "0"] + ([] if by_file else ["--set", f"{key}={text}"])
            arrange = in_study(key, text) if by_file else _nothing
            name = f"{key} = {shown(text)}" + (" in the file" if by_file else "")
            cases.append(
                Case(
                    name,
                    args,
                    is_sound,
                    STUDY,
                    arrange,
                    says="study.yaml" if by_file and not is_sound else "",
                    makes=("study-out", "2024-01-01"),
                )
            )
    extra = {
        "tuned on loss": (["--set", "tune_on=loss"], False),
        "tuned on loss with losses": (["--set", "tune_on=loss", "--set", "set.training.evaluate_every=2"], True),
        "no validation": (["--set", "set={data.validation: ~}"], False),
        "code": (["--set", "set={evaluation.tasks: [{name: a, kind: code}]}"], False),
    }
    for name, (more, is_sound) in extra.items():
        cases.append(
            Case(name, ["compare", "study.yaml", "--minutes", "0", *more], is_sound, STUDY, makes=("study-out",))
        )
    for name, content in {
        "empty": "",
        "a list": "[]",
        "binary": bytes(range(256)),
        "unfinished": "title: [",
        "itself": "x: &x [*x]",
    }.items():
        cases.append(
            Case(
                f"the file is {name}",
                ["compare", "study.yaml"],
                False,
                STUDY,
                writes("study.yaml", content),
                says="study.yaml",
            )
        )
    return cases


def study_records(template: Path, rng: random.Random) -> list[Case]:
    cases: list[Case] = []
    file, archive = "study/study.json", "study/runs.jsonl.gz"

    def add(name: str, arrange: Arrange, is_sound: bool | None = False, says: str = "") -> None:
        cases.append(Case(name, ["report", "study"], is_sound, ("study",), arrange, says=says, makes=("study",)))

    add("as it is", _nothing, True)
    add("no record", lambda folder: (folder / archive).unlink(), True)
    add("no study.json", lambda folder: (folder / file).unlink(), says="study.json")
    for name, content in NO_JSON.items():
        add(f"study.json is {name}", writes(file, content), says="study.json")
        add(
            f"runs.jsonl.gz is {name}",
            writes(archive, content),
            None if name == "empty" else False,
            says="" if name == "empty" else "runs.jsonl.gz",
        )
        add(
            f"a record is {name}",
            lambda folder, content=content: (folder / archive).write_bytes(
                gzip.compress(content.encode() if isinstance(content, str) else content)
            ),
            None if name in ("empty", "white space") else False,
            says="" if name in ("empty", "white space") else "runs.jsonl.gz",
        )
    for key, values in {
        "design/title": [3, None, [], REMOVED],
        "design/baseline": [3, None, "nothing", [], REMOVED],
        "design/arms": [3, None, [], {}, {"lora": 3}, {"lora": {"label": 3}}, {"lora": {}, "../x": {}}, REMOVED],
        "design/arms/lora": [3, None, [], "x"],
        "design/arms/lora/label": [3, [], {}],
        "design/arms/lora/role": [3, [], "x"],
        "design/arms/lora/set": [3, [], "x"],
        "design/comparisons": [
            3,
            [3],
            [[]],
            [["lora"]],
            [["lora", "nothing"]],
            [["lora", 3]],
            [[["lora"], "lora"]],
            {},
            "x",
        ],
        "design/learning_rates": [3, None, [], {}, ["x"], [None], [float("nan")], [0.0], REMOVED],
        "design/tuning_seeds": [3, None, ["x"], [None], [[]], [1.5], [-1]],
        "design/seeds": [3, None, ["x"], [None], [[]], [1.5], [{}], [-1], [True], REMOVED],
        "design/smallest_effect": ["x", None, -1, 0, 7, float("nan"), float("inf"), True, [], REMOVED],
        "design/margin": ["x", -1, 0, 7, float("nan"), float("inf"), True, []],
        "design/looks": [3, [], [2], [3], [3, 2], [1.5], [None], ["x"], [True], {}],
        "design/tune_on": [3, [], "x"],
        "design/score_on": [3, [], "x"],
        "design/question": [3, [], {}],
        "design": [3, [], "x", {"tune_on": 3}, REMOVED],
        "chosen": [3, [], {"lora": "x"}, {"lora": None}, {"nothing": 1}, "x", {"lora": float("nan")}],
        "power": [3, [], "x", {}, {"power": "x"}],
        "versions": [3, [], "x"],
        "recipe": [3, [], "x"],
        "command": [3, [], {}],
        "started": [3, []],
    }.items():
        for value in values:
            add(f"{key} = {value!r}", setting(file, key, value), says="study.json")
    add("a design with a key of another version", setting(file, "design/unknown", 3), True)

    def record(change: Callable[[dict[str, Any]], Any], which: int = -1) -> Arrange:
        def arrange(folder: Path) -> None:
            found = [json.loads(line) for line in gzip.decompress((folder / archive).read_bytes()).splitlines()]
            change(found[which])
            text = "".join(json.dumps(one) + "\n" for one in found)
            (folder / archive).write_bytes(gzip.compress(text.encode()))

        return arrange

    def changed(key: str, value: Any) -> Callable[[dict[str, Any]], None]:
        def change(found: Any) -> None:
            *path, last = key.split("/")
            for part in path:
                found = found[int(part) if isinstance(found, list) else part]
            if value is REMOVED:
                del found[last]
            else:
                found[int(last) if isinstance(found, list) else last] = value

        return change

    nan = float("nan")
    for key, values in {
        "stage": [3, None, "x", [], REMOVED],
        "arm": [3, None, "nothing", "../../x", [], REMOVED],
        "learning_rate": ["x", None, nan, -1, [], True, 10**400, REMOVED],
        "seed": ["x", None, 1.5, [], {}, True, -1, 99, REMOVED],
        "scores": [3, None, "x", [3], [{}], {}, [None], [[]], REMOVED],
        "scores/0/result": [3, None, [], {}],
        "scores/0/result/task": [3, None, [], "", "x" * 10_000],
        "scores/0/result/accuracy": ["x", None, nan, 7, -1, [], True, REMOVED],
        "scores/0/result/correct_per_row": [3, None, [], "x", [3], ["x"], [None], [True], [[True]], {}, REMOVED],
        "scores/0/result/total": [0, -1, "x", None, 10**12, REMOVED],
        "scores/0/result/correct": [-1, "x", 10**12],
        "scores/0/result/unreadable": ["x", nan, 7, None],
        "scores/0/seconds": ["x", nan, -1, None],
        "scores/0/echo": ["x", 3, None],
        "scores/0/part": [3, "x", None],
        "history": [
            3,
            None,
            "x",
            [3],
            [None],
            [[]],
            {},
            [{"step": "x"}],
            [{"step": 4, "ce_off": "x"}],
            [{"loss": 1}],
            [{"step": nan, "ce_off": 1}],
            [{"step": 4, "ce_off": None, "ce_on": None}],
            [{"step": 4, "eval_ce_on": "x", "eval_ce_off": []}],
            REMOVED,
        ],
        "seconds": ["x", nan, -1, None, [], 0, REMOVED],
        "peak_memory": ["x", nan, -1, None, [], REMOVED],
        "steps": ["x", nan, -1, None, 0, REMOVED],
        "deployed_parameters": ["x", nan, None, [], REMOVED],
        "echo_parameters": ["x", nan, None, []],
        "general": [3, "x", [], {}, {"before": "x", "after": 1}, {"before": nan, "after": nan}, {"before": 1}],
        "versions": [3, "x", [], None],
        "rows": [3, "x", [3], None],
        "device": [3, [], None],
        "diverged": [3, "x", None, []],
        "recipe": [3, "x", None, [], REMOVED],
        "initial_adapter_sha256": [3, None, [], "x", REMOVED],
        "unknown": [3],
    }.items():
        strict = key in ("stage", "arm", "learning_rate", "seed", "scores", "history", "scores/0/result") or key in (
            "scores/0/result/task",
            "scores/0/result/accuracy",
            "scores/0/result/correct_per_row",
        )
        for value in values:
            is_empty_list = key in ("scores", "history") and value == []
            free = (
                not strict
                or is_empty_list
                or (key == "seed" and value in (-1, 99))
                or (key.endswith("task") and isinstance(value, str))
            )
            free = free or (key == "history" and isinstance(value, list) and value and isinstance(value[0], dict))
            free = free or (key == "scores/0/result/correct_per_row" and value == [True])
            add(
                f"a record's {key} = {shown(value)}",
                record(changed(key, value)),
                None if free else False,
                says="" if free else "runs.jsonl.gz",
            )
    for which in (0, 1, 5):
        add(
            f"record {which} has an accuracy of 7",
            record(changed("scores/0/result/accuracy", 7), which),
            says="runs.jsonl.gz",
        )

    def twice(folder: Path) -> None:
        text = gzip.decompress((folder / archive).read_bytes())
        (folder / archive).write_bytes(gzip.compress(text + text.splitlines(keepends=True)[0]))

    add("a record twice", twice, says="runs.jsonl.gz")
    sound = (template / archive).read_bytes()
    for share in (0.1, 0.5, 0.9, 0.99):
        add(f"records cut at {share}", writes(archive, sound[: int(share * len(sound))]), says="runs.jsonl.gz")
    bomb = gzip.compress(bytes(300_000_000), 1)
    add("records that unpack to 300 MB", lambda folder: (folder / archive).write_bytes(bomb), says="runs.jsonl.gz")
    for number in range(30):
        for name in (file, archive):
            changed_bytes = bytearray((template / name).read_bytes())
            for _ in range(rng.choice((1, 3))):
                place = rng.randrange(len(changed_bytes))
                changed_bytes[place : place + rng.choice((0, 1, 3))] = rng.choice(
                    (b"", b"9", b'"', b"[", b"-", b"null", b"\xff")
                )
            add(f"changed {name} {number}", writes(name, bytes(changed_bytes)), None)
    add("report.html is a folder", lambda folder: (folder / "study/report.html").mkdir(), None)
    for name, content in NO_JSON.items():
        arrange = writes("study-out/study.json", content)
        cases.append(
            Case(
                f"compare: study.json is {name}",
                ["compare", "study.yaml", "--minutes", "0"],
                False,
                STUDY,
                arrange,
                says="study.json",
            )
        )
    started = {"design": {}, "recipe": {}}
    for name, about in {
        "another design": started,
        "a design that is a list": {"design": [], "recipe": {}},
        "no design": {"recipe": {}},
        "a recipe that is a number": {"design": {}, "recipe": 3},
    }.items():
        arrange = writes("study-out/study.json", json.dumps(about))
        cases.append(
            Case(
                f"compare: {name}", ["compare", "study.yaml", "--minutes", "0"], False, STUDY, arrange, says="study-out"
            )
        )
    good = {"stage": "confirmation", "arm": "lora", "learning_rate": 0.01, "seed": 1}
    for name, one in {
        "a record that is a list": [],
        "a record that is a number": 3,
        "a record without keys": {},
        "an arm that is a path": good | {"arm": "../../../pwned"},
        "an arm that is an absolute path": good | {"arm": "/tmp/pwned"},
        "an arm that is unknown": good | {"arm": "nothing"},
        "a stage that is a path": good | {"stage": "../../pwned"},
        "a seed that is a text": good | {"seed": "../../pwned"},
        "a seed that is a list": good | {"seed": []},
        "a rate that is a text": good | {"learning_rate": "x"},
        "a rate that is null": good | {"learning_rate": None},
        "a record with nothing but its name": good,
    }.items():
        content = gzip.compress(json.dumps(one).encode() + b"\n")
        arrange = writes("study-out/runs.jsonl.gz", content)
        cases.append(
            Case(
                f"compare: {name}",
                ["compare", "study.yaml", "--minutes", "0"],
                False,
                STUDY,
                arrange,
                says="runs.jsonl.gz",
            )
        )
    return cases


# ---------------------------------------------------------------------------------------------------------- imports

BOOLQ = {"instruction": "Is it?", "input": "", "output": "the correct answer is true", "answer": "true"}
PIQA = {"instruction": "Which?", "input": "", "output": "the correct answer is solution1", "answer": "solution1"}
GSM8K = {"question": "2 + 2?", "answer": "It is 4.\n#### 4"}
MMLU = {"subject": "art", "question": "Which?", "choices": ["a", "b", "c", "d"], "answer": 1}
HUMANEVAL = {
    "task_id": "H/0",
    "prompt": "def f():\n",
    "canonical_solution": "    return 1\n",
    "test": "def check(c):\n    assert c() == 1\n",
    "entry_point": "f",
}
SOUND = {"boolq": BOOLQ, "piqa": PIQA, "gsm8k": GSM8K, "mmlu": MMLU, "humaneval": HUMANEVAL}


def dataset(task: str = "boolq", changes: dict[str, Any] | None = None, **files: Any) -> Arrange:
    """A folder as LLM-Adapters has it, with one task, whose test row is changed."""

    def arrange(folder: Path) -> None:
        place = folder / "dataset" / task
        place.mkdir(parents=True)
        row = dict(SOUND[task])
        for key, value in (changes or {}).items():
            if value is REMOVED:
                del row[key]
            else:
                row[key] = value
        parts = {"test": [SOUND[task], row]} | ({"dev": [MMLU] * 5} if task == "mmlu" else {}) | files
        for part, content in parts.items():
            if content is not None:
                (place / f"{part}.json").write_text(content if isinstance(content, str) else json.dumps(content))

    return arrange


def imports(rng: random.Random) -> list[Case]:
    cases: list[Case] = []

    def add(
        name: str, arrange: Arrange, is_sound: bool | None, *more: str, says: str = "", source: str = "dataset"
    ) -> None:
        cases.append(
            Case(
                name,
                ["data", "import", source, "imported", *more],
                is_sound,
                (),
                arrange,
                says=says,
                makes=("imported",),
            )
        )

    for task in SOUND:
        add(f"{task} as it is", dataset(task), True)
        for column in SOUND[task]:
            if column != "input":
                add(f"{task} without {column}", dataset(task, {column: REMOVED}), False, says="test.json")
            for value in (None, 3, True, [], {}, "", " ", 1.5, ["a"], "x\0"):
                if column == "input" and not value:
                    continue
                is_sound = None if value == "x\0" or (column == "answer" and task == "mmlu" and value == 3) else False
                if column in ("task_id",) and isinstance(value, str):
                    is_sound = None
                add(
                    f"{task} with {column} = {value!r}",
                    dataset(task, {column: value}),
                    is_sound,
                    says="test.json" if is_sound is False else "",
                )
    for value in (-1, 4, 10**12, "A", "1", "B", 0.5, 1.0, True, [1], float("nan")):
        add(f"mmlu answers {value!r}", dataset("mmlu", {"answer": value}), False, says="test.json")
    for value in (
        ["a"],
        ["a", "b", "c"],
        list("abcde"),
        ["a", "b", "c", 4],
        ["a", "b", "c", None],
        "abcd",
        ["a", "a", "a", "a"],
        ["", "", "", ""],
    ):
        is_sound = None if value == ["a", "a", "a", "a"] else False
        add(
            f"mmlu has the choices {value!r}",
            dataset("mmlu", {"choices": value}),
            is_sound,
            says="test.json" if is_sound is False else "",
        )
    add("mmlu without dev", dataset("mmlu", dev=None), False, says="dev")
    add("mmlu with an empty dev", dataset("mmlu", dev=[]), False, says="dev")
    add("mmlu with another subject in dev", dataset("mmlu", dev=[MMLU | {"subject": "law"}] * 5), False)
    add("mmlu with four rows in dev", dataset("mmlu", dev=[MMLU] * 4), None)
    for value in ("no number", "####", "#### x", "#### 4 apples", "####4", "It is 4."):
        is_sound = None if "4" in value else False
        add(
            f"gsm8k answers {value!r}",
            dataset("gsm8k", {"answer": value}),
            is_sound,
            says="test.json" if is_sound is False else "",
        )
    for value in ("maybe", "True", "yes", "true ", "truefalse", "true\n", "solution1", "TRUE", "0"):
        add(f"boolq answers {value!r}", dataset("boolq", {"answer": value}), False, says="test.json")
    for value in ("solution0", "solution3", "solution", "answer1", "1", "solution1 ", "solution12"):
        add(
            f"piqa answers {value!r}",
            dataset("piqa", {"answer": value, "output": f"the correct answer is {value}"}),
            False,
            says="test.json",
        )
    for value in (
        "the correct answer is false",
        "",
        "the correct answer is",
        "the correct answer is truefalse",
    ):
        rows = [BOOLQ, BOOLQ | {"output": value}]
        add(f"boolq answers true but its output is {value!r}", dataset("boolq", train=rows), False, says="train.json")
    for value in ("1f", "f()", "g", "import os", "f g", "", "f\n", "__import__('os').mkdir('pwned')"):
        add(f"humaneval calls {value!r}", dataset("humaneval", {"entry_point": value}), False, says="test.json")
    native = {"question": "Is it", "choices": ["true", "false"], "label": 0}
    for changes in (
        {"label": 7},
        {"label": -1},
        {"label": "x"},
        {"choices": 3},
        {"choices": []},
        {"label": 1},
        {"question": 3},
    ):
        add(f"boolq with {changes}", dataset("boolq", native | changes), False, says="test.json")
    add("boolq with native columns", dataset("boolq", native), True)
    for name, content in {key: value for key, value in NO_JSON.items() if isinstance(value, str)}.items():
        add(f"a file that is {name}", dataset("boolq", test=content), False, says="test.json")
    add("a file of NaN", dataset("boolq", test='[{"instruction": NaN}]'), False, says="test.json")
    add("no file", dataset("boolq", test=None), False, says="boolq")
    add(
        "two files of a part",
        both(dataset("boolq"), writes("dataset/boolq/test.jsonl", lines(BOOLQ))),
        False,
        says="test.json",
    )
    add(
        "a part that is a folder",
        lambda folder: (folder / "dataset/boolq/test.json").mkdir(parents=True),
        False,
        says="boolq",
    )
    add(
        "a part that is a loop",
        lambda folder: (
            (folder / "dataset/boolq").mkdir(parents=True),
            (folder / "dataset/boolq/test.json").symlink_to("test.json"),
        ),
        False,
        says="boolq",
    )
    add(
        "a part that is a pipe",
        lambda folder: ((folder / "dataset/boolq").mkdir(parents=True), os.mkfifo(folder / "dataset/boolq/test.json")),
        False,
        says="boolq",
    )
    add("a task that is a file", writes("dataset/boolq", "x"), False, says="dataset")
    add("no task", lambda folder: (folder / "dataset").mkdir(), False, says="dataset")
    add("a lone surrogate", dataset("boolq", {"instruction": "\ud800"}), False, says="test.json")
    add("an instruction of a megabyte", dataset("boolq", {"instruction": "x " * 500_000}), None)
    add("the file of all", writes("all.json", json.dumps([BOOLQ])), True, source="all.json")
    add(
        "the file of all, of other rows",
        writes("all.json", json.dumps([GSM8K])),
        False,
        source="all.json",
        says="all.json",
    )
    add(
        "the file of all, with a task",
        writes("all.json", json.dumps([BOOLQ])),
        False,
        "--task",
        "boolq",
        source="all.json",
        says="all.json",
    )
    train = dataset("boolq", train=[BOOLQ | {"instruction": f"Is it {i}?"} for i in range(4)])
    for text, is_sound in {
        "0": True,
        "1": True,
        "3": True,
        "4": False,
        "1000000000000000000": False,
        "-1": False,
        "x": False,
        "1.5": False,
        "1:30": False,
    }.items():
        add(f"--hold-out {text}", train, is_sound, "--hold-out", text)
    for text in ("nothing", "", "BOOLQ", "mmlu", "../boolq", "boolq\0", "x" * 10_000):
        add(f"--task {shown(text)}", dataset(), False, "--task", text)
    add("--task boolq", dataset(), True, "--task", "boolq")
    add("--task twice", dataset(), None, "--task", "boolq", "--task", "boolq")
    add("--hub offline", _nothing, False, "--hub")
    cases.append(Case("--hub offline, alone", ["data", "import", "imported", "--hub", "--task", "boolq"], False))
    cases.append(Case("no output", ["data", "import", "dataset"], False, (), dataset()))
    for number in range(30):
        text = bytearray(json.dumps([BOOLQ] * 2).encode())
        place = rng.randrange(len(text))
        text[place : place + rng.choice((0, 1, 3))] = rng.choice((b"", b"9", b'"', b"[", b"-", b"null"))
        add(f"changed {number}", dataset("boolq", test=text.decode()), None)
    return cases


# ---------------------------------------------------------------------------------------------------------- options

NO_COUNT = ["-1", "x", "1.5", "1:30", "", "1e3", "½", "0x10", "1_0 0", "nan", "1" + "0" * 18, "9" * 5000, "on"]


def options() -> list[Case]:
    cases: list[Case] = []

    def add(
        args: list[str],
        is_sound: bool | None = False,
        needs: tuple[str, ...] = RECIPE,
        makes: tuple[str, ...] = (),
        says: str = "",
    ) -> None:
        cases.append(Case(" ".join(shown(arg) for arg in args), args, is_sound, needs, makes=makes, says=says))

    for command in typer.main.get_command(app).commands:
        add([command, "--help"], True)
        add([command, "--nothing"])
        add([command, "--set"])
    for text in NO_COUNT:
        add(["preview", "recipe.yaml", "--rows", text], None if text in ("1" + "0" * 18,) else False)
        add(["bench", "recipe.yaml", "--rows", text])
        add(["bench", "recipe.yaml", "--rounds", text])
        add(["compare", "study.yaml", "--minutes", "0", "--workers", text], needs=STUDY)
    add(["preview", "recipe.yaml", "--rows", "0"], True)
    add(["bench", "recipe.yaml", "--rows", "0"])
    add(["bench", "recipe.yaml", "--rounds", "1"])
    for text in ("-1", "x", "nan", "inf", "-inf", "1e400", "", "1:30", "0x1"):
        add(["compare", "study.yaml", "--minutes", text], needs=STUDY)
    for text in (
        "0x1",
        "1x0",
        "x",
        "1",
        "1X1",
        "-1x1",
        "1x1x1",
        "1e3x1",
        "1.5x1",
        "٤x1",
        " 1x1",
        "1x1\n",
        "",
        "1000000000000x1",
        "1x1000000000000",
        "9" * 5000 + "x1",
        "96×8",
    ):
        add(["bench", "recipe.yaml", "--shape", text], says="--shape")
    for text in ("float64", "", "float", "3", "fp16"):
        add(["merge", "a", "b", "--dtype", text])
    for text in (
        "",
        "x",
        "=",
        "=3",
        "nothing=3",
        "timeout_min=x",
        "timeout_min=-1",
        "timeout_min=",
        "timeout_min=1:30",
        "a\0b=3",
    ):
        add(["compare", "study.yaml", "--slurm", text], needs=STUDY)
    add(["compare", "study.yaml", "--slurm", "timeout_min=5", "--minutes", "1"], needs=STUDY)
    add(["compare"])
    add(["train"])
    add(["train", "a", "b"])
    add(["nothing"])
    add(["--nothing"])
    add(["--version"], True)
    add([""])
    add(["train", "recipe.yaml", "--resume", "--resume", "--set", "output=new"])
    add(
        ["eval", "recipe.yaml", "--adapter", "run/adapter", "--base", "--output", "scores.json"],
        True,
        ("run", *RECIPE),
        ("scores.json",),
    )
    add(["eval", "recipe.yaml", "--set", "evaluation.tasks=[{name: a, kind: code}]"])
    add(["merge", "run/adapter", "merged", "--verify"], True, ("run",), ("merged",))
    add(["merge", "run/adapter", "run/adapter"], False, ("run",))
    add(["merge", "run/adapter", "run"], False, ("run",))
    add(["doctor", "run/adapter"], True, ("run",))
    add(["doctor", "run"], False, ("run",))
    add(["doctor"], True, ())
    add(["report", "run"], False, ("run",))
    add(["plan", "run/run.json"], False, ("run", *RECIPE))
    add(["plan", "train.jsonl"])
    add(["plan", "run/adapter/adapter_model.safetensors"], False, ("run", *RECIPE))
    add(["compare", "recipe.yaml", "--minutes", "0"], False, STUDY)
    add(["plan", "study.yaml"], False, STUDY)
    add(["plan", "tiny", "--traceback", "--set", "output=new"], None)
    return cases


def processes() -> list[Case]:
    """As from a shell."""
    full = Path("/dev/full")
    plan = ["plan", "recipe.yaml"]
    real = [
        Case("plan", plan, True, RECIPE),
        Case("an unknown recipe", ["plan", "nothing"], False),
        Case("a full disk for what is printed", plan, False, RECIPE, stdout=full),
        Case("ASCII", plan, True, RECIPE, env={"PYTHONIOENCODING": "ascii", "LC_ALL": "C"}),
        Case("Latin-1 and a recipe of another name", ["plan", "é.yaml"], False, env={"PYTHONIOENCODING": "ascii"}),
        Case(
            "a preview in ASCII",
            ["preview", "recipe.yaml"],
            True,
            RECIPE,
            writes("train.jsonl", lines({"prompt": "漢字 é", "completion": " ½"})),
            env={"PYTHONIOENCODING": "ascii"},
        ),
        Case("a name that is no UTF-8", ["plan", os.fsdecode(b"\xff.yaml")], False),
        Case("a number of threads", plan, None, RECIPE, env={"OMP_NUM_THREADS": "abc"}),
        Case("OMP_NUM_THREADS=0", plan, None, RECIPE, env={"OMP_NUM_THREADS": "0"}),
        Case("a log level", plan, None, RECIPE, env={"TRANSFORMERS_VERBOSITY": "nonsense"}),
        Case("a home of Hugging Face that is a file", plan, None, RECIPE, env={"HF_HOME": "recipe.yaml"}),
        Case(
            "precision of accelerate",
            ["train", "recipe.yaml", "--set", "output=new"],
            False,
            RECIPE,
            env={"ACCELERATE_MIXED_PRECISION": "nonsense"},
        ),
        Case("a warning that is an error", plan, None, RECIPE, env={"PYTHONWARNINGS": "nonsense"}),
        Case("no place for temporary files", ["eval", "recipe.yaml"], None, RECIPE, env={"TMPDIR": "/dev/null"}),
        Case("a module of the same name", plan, None, RECIPE, env={"COLUMNS": "-3"}),
    ]
    return [replace(case, is_real=True) for case in real]
