"""The recipe: one YAML file that shows a whole run, as typed fields with one line of help each.

`load_recipe` reads it, `recipe_table` lists its keys for the documentation. What a recipe does not say keeps
its default; a key it should not say is an error that names file, line and key. Neither torch nor transformers
is imported here.

Paths of rows in a recipe start at the recipe's folder; those of `--set`, and `output`, at the working directory.
"""

from __future__ import annotations

import dataclasses
import json
import re
import types
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, field_validator, model_validator
from pydantic.fields import FieldInfo

from echo_lora.config import EchoConfig, nearest
from echo_lora.errors import EchoConfigError
from echo_lora.evaluate.tasks import EvalTask

SHIPPED = Path(__file__).parent / "recipes"
PARTS = ("train", "validation", "test")


class Section(BaseModel):
    """Unknown keys are refused; a number is a number, not a text that looks like one."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def _option(default: Any, help: str, **limits: Any) -> Any:
    return Field(default, description=help, **limits)


# ------------------------------------------------------------------- the model


class LoraSection(Section):
    r: int = _option(16, "rank of the adapter", ge=1)
    alpha: int = _option(32, "scale of the adapter's update: alpha / r, or alpha / sqrt(r) with rslora", ge=1)
    dropout: float = _option(0.0, "share of the adapter's inputs that is dropped in training", ge=0, lt=1)
    target_modules: str | list[str] = _option("all-linear", "modules that get an adapter, by the end of their names")


class _NoSeed(Section):
    @model_validator(mode="after")
    def _is_an_echo_config(self) -> _NoSeed:
        if "routing_seed" in self.model_fields_set:
            raise ValueError("routing_seed is given by seeds.routing; move it there")
        self.build(0)
        return self

    def build(self, routing_seed: int) -> EchoConfig:
        """The EchoConfig of these fields. Raises EchoConfigError."""
        return EchoConfig.from_dict(self.model_dump() | {"routing_seed": routing_seed})


# One definition per field: those of EchoConfig become the keys of this section.
EchoSection: Any = create_model(
    "EchoSection",
    __base__=_NoSeed,
    **{
        f.name: (get_type_hints(EchoConfig)[f.name], Field(f.default, description=f.metadata["help"]))
        for f in dataclasses.fields(EchoConfig)
    },
)

# -------------------------------------------------------------------- the data


class Source(Section):
    """Rows of a file, or rows that a reasoning-gym task generates. A text stands for {file: text}."""

    file: str | None = _option(None, "JSON Lines, JSON list or Parquet; the path starts at the recipe's folder")
    part: str | None = _option(None, "keep the file's rows whose column `part` has this value")
    task: str | None = _option(None, "task of reasoning-gym that generates the rows")
    count: int | None = _option(None, "number of rows to generate", ge=1)
    params: dict[str, Any] | None = _option(None, "parameters of the task")
    seed: int | None = _option(None, "seed of the task; parts with equal seed and params share no question; default: 0", ge=0)

    @model_validator(mode="after")
    def _file_or_task(self) -> Source:
        if (self.file is None) == (self.task is None):
            raise ValueError("give either file or task")
        kind, others = ("file", ("count", "params", "seed")) if self.file else ("task", ("part",))
        for name in others:
            if getattr(self, name) is not None:
                raise ValueError(f"{name} has no meaning together with {kind}; leave it out")
        if self.task is not None and self.count is None:
            raise ValueError("count is missing: say how many rows of the task to generate")
        return self

    @property
    def name(self) -> str:
        """How errors and results name it."""
        return Path(self.file).name if self.file is not None else str(self.task)

    @property
    def rows_key(self) -> str:
        """Equal for sources that draw from the same rows."""
        return json.dumps([self.file, self.part, self.task, self.params or {}, self.seed or 0], sort_keys=True)


def _as_list(value: Any) -> Any:
    """One source, or one path, is a list of one."""
    items = value if isinstance(value, list) else [value]
    return [{"file": item} if isinstance(item, str) else item for item in items]


Sources = Annotated[list[Source], Field(min_length=1)]


class DataSection(Section):
    train: Sources = Field(description="rows to train on: a file, a task, or a list of them")
    validation: Sources | None = _option(None, "rows for training.evaluate_every")
    test: Sources | None = _option(None, "rows that the default evaluation scores")
    columns: dict[str, str] | None = _option(None, "our column name to the files' own, as in {prompt: question}")
    chat: bool = _option(False, "put plain prompts and completions into the model's chat template")
    max_length: int | None = _option(1024, "longest row in tokens; higher costs memory; null: no limit", ge=2)
    on_overlength: Literal["error", "drop", "truncate_prompt"] = _option(
        "error", "what happens to a longer row; its answer is never cut"
    )
    limit: int | None = _option(None, "use only this many first rows of each source, for a trial run", ge=1)

    _one_or_many = field_validator(*PARTS, mode="before")(lambda value: None if value is None else _as_list(value))

    @field_validator(*PARTS)
    @classmethod
    def _named_once(cls, sources: list[Source] | None) -> list[Source] | None:
        for place, source in enumerate(sources or []):
            same = [other for other in (sources or [])[:place] if other.rows_key == source.rows_key]
            if same:
                raise ValueError(f"{source.name} is given twice with the same rows; give it once, with all its rows")
        return sources

    @model_validator(mode="after")
    def _agrees(self) -> DataSection:
        sources = [source for part in PARTS for source in getattr(self, part) or []]
        if self.columns is not None and all(source.file is None for source in sources):
            raise ValueError("columns renames the columns of files, but every source is a task; leave it out")
        if self.on_overlength != "error" and self.max_length is None:
            raise ValueError(f"on_overlength = {self.on_overlength} needs a max_length, which is null")
        return self


# ---------------------------------------------------------------- the training


class TrainingSection(Section):
    epochs: float | None = _option(None, "passes over the training rows; default: 1, unless steps is given", gt=0)
    steps: int | None = _option(None, "optimizer steps, instead of epochs", ge=1)
    batch_size: int = _option(8, "rows per forward and backward pass; higher costs memory", ge=1)
    gradient_accumulation: int = _option(1, "passes per optimizer step; multiplies the batch without its memory", ge=1)
    learning_rate: float = _option(2e-4, "peak learning rate of the adapter", gt=0)
    schedule: Literal["linear", "cosine", "constant"] = _option("linear", "how the learning rate falls after warm-up")
    warmup_steps: int = _option(0, "steps in which the learning rate rises from 0", ge=0)
    weight_decay: float = _option(0.0, "decay of the weights per step, relative to the learning rate", ge=0)
    max_grad_norm: float = _option(1.0, "longest gradient; longer ones are scaled down; 0: never", ge=0)
    optimizer: Literal[
        "adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit", "paged_adamw_8bit", "adafactor", "sgd"
    ] = _option("adamw_torch", "optimizer, by its name in transformers; the 8-bit ones need bitsandbytes")
    gradient_checkpointing: bool = _option(
        False, "recompute activations: less memory, slower, and the echo-on pass runs in full"
    )
    bf16: bool = _option(False, "compute in bfloat16 (autocast); for hardware that has it")
    save_every: int = _option(100, "steps between checkpoints", ge=1)
    keep_checkpoints: int = _option(2, "number of newest checkpoints to keep", ge=1)
    log_every: int = _option(10, "steps between lines of metrics", ge=1)
    evaluate_every: int | None = _option(None, "steps between losses on data.validation; default: never", ge=1)
    report_to: list[str] = _option([], "experiment trackers, by their names in transformers, as in [tensorboard]")

    @model_validator(mode="after")
    def _agrees(self) -> TrainingSection:
        if self.epochs is not None and self.steps is not None:
            raise ValueError(f"epochs = {self.epochs:g} and steps = {self.steps} contradict; set one of them to null")
        if self.steps is not None and self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps = {self.warmup_steps} leaves none of the {self.steps} steps; lower it")
        return self


class SeedSection(Section):
    initialisation: int = _option(0, "seed of the adapter's and the echo's initial weights, and of dropout", ge=0)
    data_order: int = _option(0, "seed of the order of the rows", ge=0)
    routing: int = _option(0, "seed of the routing draws and of the noise control", ge=0)


# -------------------------------------------------------------- the evaluation

_EVAL_TASK: Any = create_model(
    "_EVAL_TASK",
    __base__=Section,
    **{name: (field.annotation, field) for name, field in EvalTask.model_fields.items() if name != "file"},
)


class EvaluationTask(_EVAL_TASK):  # type: ignore[misc, valid-type]
    data: Sources | None = _option(None, "rows to score; default: data.test")

    _one_or_many = field_validator("data", mode="before")(lambda value: None if value is None else _as_list(value))

    @model_validator(mode="after")
    def _is_a_task(self) -> EvaluationTask:
        self.build()
        return self

    def build(self, **values: Any) -> EvalTask:
        """The EvalTask of these fields, some of them replaced. Raises EchoConfigError."""
        return EvalTask(**self.model_dump(exclude={"data"}) | values)


class EvaluationSection(Section):
    tasks: list[EvaluationTask] = _option(
        [], "what to score; default: generate an answer to each test row, which must match exactly"
    )
    batch_size: int = _option(16, "rows scored at a time; higher is faster and costs memory", ge=1)

    @field_validator("tasks")
    @classmethod
    def _named_once(cls, tasks: list[EvaluationTask]) -> list[EvaluationTask]:
        names = [task.name for task in tasks]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"the name {name!r} is given {names.count(name)} times; rename all but one")
        return tasks


class Recipe(Section):
    """A whole run. Made by `load_recipe`."""

    model: str = Field(description="base model: a folder, a hub id, or packaged:smollm2-135m")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = _option("auto", "type of the base's weights")
    attn_implementation: Literal["sdpa", "eager", "flash_attention_2"] | None = _option(
        None, "attention of transformers; the echo-on pass shares its prefix with sdpa and eager only"
    )
    quantization: Literal["4bit", "8bit"] | None = _option(None, "load the base quantised by bitsandbytes (QLoRA)")
    trust_remote_code: bool = _option(False, "run code that comes with the model: only for models you trust")
    method: Literal["lora", "dora", "rslora"] = _option("lora", "kind of adapter")
    echo: bool = _option(True, "train with the echo; false: the plain adapter, by the same program")
    lora: LoraSection = _option(LoraSection(), "the adapter")
    echo_config: EchoSection = _option(EchoSection(), "the echo; without effect when echo is false")
    data: DataSection = Field(description="the rows")
    training: TrainingSection = _option(TrainingSection(), "the optimisation")
    seeds: SeedSection = _option(SeedSection(), "what is random, each with a seed of its own")
    evaluation: EvaluationSection = _option(EvaluationSection(), "what `echo-lora eval` scores")
    output: str = Field(description="folder that training makes; default: runs/ and the recipe's name")

    @model_validator(mode="after")
    def _agrees(self) -> Recipe:
        training = self.training
        if training.evaluate_every is not None and self.data.validation is None:
            raise ValueError("training.evaluate_every needs rows to evaluate: give data.validation")
        if training.bf16 and self.dtype == "float16":
            raise ValueError("training.bf16 = true contradicts dtype = float16; choose one")
        if self.echo and training.gradient_checkpointing and self.echo_config.echo_step == "shared_prefix":
            raise ValueError(
                "training.gradient_checkpointing = true contradicts echo_config.echo_step = shared_prefix: "
                "it keeps no keys and values to share; use echo_step = auto"
            )
        return self

    def build_echo_config(self) -> EchoConfig:
        return self.echo_config.build(self.seeds.routing)


# --------------------------------------------------------------------- loading


def load_recipe(source: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe of a YAML file, or of the name of one that is shipped with the package.

    overrides: `key.path=value`, the value in YAML, as in `training.steps=20`. Raises EchoConfigError, which
    names file, line and key.
    """
    path = _find(str(source))
    tree, document = _parse(path)
    _rebase(document, path.parent)
    changed = {}
    for text in overrides:
        keys, value = _override(text)
        _set(document, keys, value, text)
        changed[tuple(keys)] = text
    document.setdefault("output", f"runs/{path.stem}")
    try:
        return Recipe.model_validate(document)
    except ValidationError as error:
        raise EchoConfigError(_explain(error, document, str(source), tree, changed)) from None


def shipped_recipes() -> list[str]:
    """Names that `load_recipe` takes without a file."""
    return sorted(path.stem for path in SHIPPED.glob("*.yaml"))


def _find(source: str) -> Path:
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if source in shipped_recipes():
        return SHIPPED / f"{source}.yaml"
    raise EchoConfigError(
        f"{source}: there is no such recipe file, and no shipped recipe of this name.{nearest(source, shipped_recipes())}"
    )


class _Loader(yaml.SafeLoader):
    """YAML in which 1e-3 is a number (as in YAML 1.2) and a key given twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        for key, _ in node.value:
            if keys.count(key.value) > 1:
                raise yaml.MarkedYAMLError(problem=f"the key {key.value!r} is given twice", problem_mark=key.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _parse(path: Path) -> tuple[yaml.Node, dict[str, Any]]:
    """The tree, which knows lines, and the document. Raises EchoConfigError with file and line."""
    try:
        loader = _Loader(path.read_text(encoding="utf-8"))
        tree = loader.get_single_node()
        document = loader.construct_document(tree) if tree is not None else None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        problem = getattr(error, "problem", None) or str(error)
        raise EchoConfigError(f"{where}: not a YAML recipe: {problem}. Correct this line.") from error
    if not isinstance(document, dict):
        raise EchoConfigError(f"{path}: a recipe is a list of `key: value` lines, as in `model: packaged:smollm2-135m`.")
    return tree, document


def _rebase(document: dict[str, Any], folder: Path) -> None:
    """Let the file's relative paths of rows and of the model start at the file's folder."""

    def rebased(value: Any) -> Any:
        if isinstance(value, list):
            return [rebased(item) for item in value]
        if isinstance(value, dict) and isinstance(value.get("file"), str):
            return value | {"file": str(folder / value["file"])}
        return str(folder / value) if isinstance(value, str) else value

    model, data, evaluation = (document.get(key) for key in ("model", "data", "evaluation"))
    if isinstance(model, str) and model.startswith("."):
        document["model"] = rebased(model)
    tasks = evaluation.get("tasks") if isinstance(evaluation, dict) else None
    for holder, keys in ((data, PARTS), *((task, ("data",)) for task in (tasks if isinstance(tasks, list) else []))):
        for key in keys:
            if isinstance(holder, dict) and key in holder:
                holder[key] = rebased(holder[key])


def _override(text: str) -> tuple[list[str], Any]:
    key, is_given, value = text.partition("=")
    if not is_given or not key.strip():
        raise EchoConfigError(f"--set {text}: write it as key=value, for example --set training.steps=20.")
    try:
        return key.strip().split("."), yaml.load(value, _Loader)
    except yaml.YAMLError as error:
        raise EchoConfigError(f"--set {text}: the value is not YAML: {getattr(error, 'problem', error)}.") from error


def _set(document: dict[str, Any], keys: list[str], value: Any, text: str) -> None:
    for depth, key in enumerate(keys[:-1]):
        document = document.setdefault(key, {})
        if not isinstance(document, dict):
            raise EchoConfigError(f"--set {text}: {'.'.join(keys[: depth + 1])} is not a section. Set it as a whole.")
    document[keys[-1]] = value


# ---------------------------------------------------------------------- errors


def _explain(
    error: ValidationError, document: Any, source: str, tree: yaml.Node, changed: dict[tuple[str, ...], str]
) -> str:
    """One line per wrong key: where it stands, which it is, what is wrong, what is allowed."""
    problems: dict[tuple[Any, ...], list[str]] = {}
    for problem in error.errors():
        path = _written_path(problem["loc"], document)
        shown = ".".join(map(str, path))
        message = problem["msg"].removeprefix("Value error, ").replace("Input should be", "must be")
        if problem["type"] == "extra_forbidden":
            message = f"unknown key {shown}.{nearest(str(path[-1]), _keys(problem['loc'][:-1]))}"
        elif problem["type"] == "missing":
            message = f"the key {'.'.join([shown, str(problem['loc'][-1])]).lstrip('.')} is missing. Add it."
        elif problem["type"] == "value_error":
            message = f"{shown + ': ' if shown else ''}{message.rstrip('.')}."
        else:
            message = f"{shown} = {problem['input']!r} {message}."
        problems.setdefault(path, []).append(message)
    lines = []
    for path, messages in problems.items():
        lines.append(f"{_where(path, source, tree, changed)}: {' '.join(dict.fromkeys(messages))}")
    return "\n".join(lines)


def _written_path(loc: tuple[Any, ...], document: Any) -> tuple[Any, ...]:
    """The location as the user wrote it: without pydantic's names of types, and of lists that we made."""
    path = []
    for part in loc:
        is_there = isinstance(document, dict) and part in document
        is_item = isinstance(document, list) and isinstance(part, int) and part < len(document)
        if is_there or is_item:
            path.append(part)
            document = document[part]
    return tuple(path)


def _where(path: tuple[Any, ...], source: str, tree: yaml.Node, changed: dict[tuple[str, ...], str]) -> str:
    for keys, text in changed.items():
        if keys == path[: len(keys)]:
            return f"--set {text}"
    line = tree.start_mark.line
    for part in path:
        if isinstance(tree, yaml.MappingNode):
            found = [(key, value) for key, value in tree.value if key.value == part]
            if not found:  # then the section consists of what --set gave
                texts = [f"--set {text}" for keys, text in changed.items() if keys[: len(path)] == path]
                return ", ".join(texts) or source
            line, tree = found[0][0].start_mark.line, found[0][1]
        elif isinstance(tree, yaml.SequenceNode) and part < len(tree.value):
            tree = tree.value[part]
            line = tree.start_mark.line
    return f"{source}:{line + 1}" if path else source


def _keys(loc: tuple[Any, ...]) -> list[str]:
    """The keys that are known at a location."""
    model: Any = Recipe
    for part in loc:
        if isinstance(part, str):
            model = _section(model.model_fields[part].annotation)
    return list(model.model_fields)


def _section(annotation: Any) -> Any:
    """The section inside an annotation such as `list[Source] | None`; None if there is none."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return annotation
    return next(filter(None, map(_section, get_args(annotation))), None)


# --------------------------------------------------------------- documentation


def recipe_table() -> list[tuple[str, str, str, str]]:
    """Key, type, default and help of every key, for the documentation."""
    return list(_rows(Recipe, ""))


def _rows(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, str, str]]:
    for name, field in section.model_fields.items():
        key, inner = f"{prefix}{name}", _section(field.annotation)
        if key == "echo_config.routing_seed":  # seeds.routing
            continue
        if inner is None:
            yield key, _type(field.annotation), _default(field), str(field.description)
        elif inner is Source:
            yield key, "source or list of sources", _default(field), str(field.description)
        else:
            is_list = get_origin(field.annotation) is list
            yield key, "list of sections" if is_list else "section", "", str(field.description)
            yield from _rows(inner, f"{key}[]." if is_list else f"{key}.")
    if section is DataSection:
        yield from _rows(Source, "source: ")


def _type(annotation: Any) -> str:
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(args[0])
    if origin is Literal:
        return ", ".join(map(str, args))
    if origin in (Union, types.UnionType):
        return " or ".join(_type(arg) for arg in args if arg is not type(None))
    if origin is list:
        return f"list of {_type(args[0])}"
    names = {str: "text", int: "whole number", float: "number", bool: "true or false"}
    return names.get(annotation, "mapping")


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required" if field.alias is None else ""
    value = field.get_default(call_default_factory=True)
    return {None: "", True: "true", False: "false"}.get(value) if isinstance(value, bool | None) else str(value)  # type: ignore[return-value]
