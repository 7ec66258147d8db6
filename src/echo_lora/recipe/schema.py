"""The keys of a recipe, in the order of a run: name, type, default and one line of help each.

Contradictory settings are errors. `sections.py` has some of the keys, and `load.py` reads the files. Neither imports
torch or transformers.
"""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import Field, create_model, field_validator, model_validator

from echo_lora.data.formats import FormatName
from echo_lora.data.sources import expanded, is_hub_name
from echo_lora.evaluate.tasks import EvalTask
from echo_lora.method.config import EchoConfig
from echo_lora.recipe.sections import (
    CHANGING,
    LARGEST_SEED,
    MOST,
    MOST_ROWS,
    LoraSection,
    Name,
    Section,
    SeedSection,
    TrainingSection,
    option,
)

SPLITS = ("train", "validation", "test")

# ------------------------------------------------------------------- the model


class _EchoChecks(Section):
    @model_validator(mode="after")
    def _is_an_echo_config(self) -> _EchoChecks:
        if "routing_seed" in self.model_fields_set:
            raise ValueError("routing_seed is set by seeds.routing; move it there")
        self.build(0)
        return self

    def build(self, routing_seed: int) -> EchoConfig:
        """The EchoConfig of these fields. Raises EchoConfigError."""
        return EchoConfig.from_dict(self.model_dump() | {"routing_seed": routing_seed})


# One definition per field: those of EchoConfig become the keys of this section.
_ECHO_FIELDS: dict[str, Any] = {
    f.name: (get_type_hints(EchoConfig)[f.name], Field(f.default, description=f.metadata["help"]))
    for f in dataclasses.fields(EchoConfig)
}

EchoSection: Any = create_model("EchoSection", __base__=_EchoChecks, **_ECHO_FIELDS)

# -------------------------------------------------------------------- the data


class Source(Section):
    """Rows of a file or of the hub, or rows that a reasoning-gym task generates. A string is a file, or a hub name."""

    file: Name | None = option(
        None,
        "JSON, JSON Lines, CSV, TSV, Parquet, Arrow or text, also compressed; a pattern (data/*.jsonl); or a folder; "
        "the path is relative to the recipe's folder",
    )
    hub: Name | None = option(None, "data set of the hub, as owner/name")
    split: Name | None = option(
        None, "split of a data set of the hub or of a folder; default: train, validation or test, like the key"
    )
    revision: Name | None = option(None, "branch, tag or commit of a data set of the hub; default: its newest")
    config: Name | None = option(None, "configuration of a data set of the hub or of a folder that has several")
    weight: float | None = option(
        None,
        "how often an epoch has the source's rows: 2 takes each twice, 0.5 a seeded half of them; only in data.train; "
        "default: 1",
        gt=0,
        le=1000,
    )
    part: Name | None = option(None, "keep only the rows whose column `part` has this value")
    task: Name | None = option(None, "reasoning-gym task that generates the rows")
    count: int | None = option(None, "number of rows to generate", ge=1, le=MOST_ROWS)
    params: dict[str, Any] | None = option(None, "parameters of the task")
    seed: int | None = option(
        None, "seed of the task; splits with equal seed and params share no question; default: 0", ge=0, le=LARGEST_SEED
    )

    @model_validator(mode="after")
    def _file_or_task(self) -> Source:
        given = [name for name in ("file", "hub", "task") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError("set one of file, hub and task")
        kind = given[0]
        generated = ("count", "params", "seed")
        others = {
            "file": ("revision", *generated),
            "hub": generated,
            "task": ("part", "split", "revision", "config"),
        }
        for name in others[kind]:
            if getattr(self, name) is not None:
                raise ValueError(f"{name} has no effect together with {kind}; leave it out")
        if self.task is not None and self.count is None:
            raise ValueError("count is missing: set the number of rows to generate")
        return self

    _home = field_validator("file")(lambda value: None if value is None else str(expanded(value)))

    @field_validator("hub")
    @classmethod
    def _is_on_the_hub(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", name):
            raise ValueError(f"{name!r} is no name of the hub; write it as owner/name, or use file for a path")
        return name

    @property
    def name(self) -> str:
        """Its name in errors and results."""
        return Path(self.file).name if self.file is not None else str(self.hub or self.task)

    @property
    def rows_key(self) -> str:
        """Equal for sources that draw from the same rows."""
        place = [self.file, self.hub, self.split, self.revision, self.config, self.part]
        return json.dumps([*place, self.task, self.params or {}, self.seed or 0], sort_keys=True)


def _as_list(value: Any) -> Any:
    """A single source or path becomes a list of one; null stays null."""
    if value is None:
        return None
    items = value if isinstance(value, list) else [value]
    return [source_of(item, Path()) if isinstance(item, str) else item for item in items]


def source_of(text: str, folder: Path) -> dict[str, str]:
    """A source that is only a text: a file, or `owner/name` of the hub if there is nothing of that name in `folder`."""
    return {"hub": text} if is_hub_name(text, folder) else {"file": text}


Sources = Annotated[list[Source], Field(min_length=1)]
_WrittenSources = Source | str | list[Source | str] | None  # what `_as_list` makes Sources of


class DataSection(Section):
    train: Sources = Field(description="rows to train on: a file, a data set of the hub, a task, or a list of them")
    validation: Sources | None = option(None, "rows for the losses of training.evaluate_every")
    validation_share: float | None = option(
        None,
        "hold out about this share of the training rows as data.validation, by prompt and seeds.validation",
        gt=0,
        lt=1,
    )
    test: Sources | None = option(None, "rows that the default evaluation scores")
    format: Literal["auto", FormatName] = option(
        "auto", "format of the rows of files and of the hub; auto decides for each source from its columns, and says so"
    )
    columns: dict[Name, Name] | None = option(None, "maps our column names to the files', as in {prompt: question}")
    ignore_columns: list[Name] = option(
        [], "columns of files whose text or weight may go unused; any other unused column of that kind is an error"
    )
    train_on_prompt: bool = option(
        False, "train on the prompt's tokens too, in the echo-off pass; the echo still acts on answers only"
    )
    chat: bool = option(False, "put plain prompts and completions through the model's chat template")
    max_length: int | None = option(
        1024, "maximum length of a row in tokens; higher costs memory; null: no limit", ge=2, le=MOST
    )
    on_overlength: Literal["error", "drop", "truncate_prompt"] = option(
        "error", "what to do with a row longer than max_length; an answer is never cut"
    )
    limit: int | None = option(
        None, "number of rows to use from the start of each source, or of each file of a pattern", ge=1, le=MOST
    )
    stream: bool = option(
        False, "read, tokenise and check training rows as they come, for data larger than memory; needs training.steps"
    )
    shuffle_buffer: int = option(
        1000, "rows that a stream holds and draws from, by seeds.data_order; higher mixes better", ge=1, le=MOST_ROWS
    )

    _one_or_many = field_validator(*SPLITS, mode="before", json_schema_input_type=_WrittenSources)(_as_list)

    @field_validator(*SPLITS)
    @classmethod
    def _named_once(cls, sources: list[Source] | None) -> list[Source] | None:
        for place, source in enumerate(sources or []):
            same = [other for other in (sources or [])[:place] if other.rows_key == source.rows_key]
            if same:
                raise ValueError(f"{source.name} is listed twice with the same rows; list it once, with all its rows")
        return sources

    @field_validator("columns")
    @classmethod
    def _tell_apart(cls, columns: dict[str, str] | None) -> dict[str, str] | None:
        prompt = (columns or {}).get("prompt")
        if prompt is not None and (columns or {}).get("completion") == prompt:
            raise ValueError(f"prompt and completion both map to the column {prompt!r}; map completion to another one")
        return columns

    @model_validator(mode="after")
    def _agrees(self) -> DataSection:
        sources = [source for split in SPLITS for source in getattr(self, split) or []]
        if self.columns is not None and all(source.task is not None for source in sources):
            raise ValueError("columns maps the columns of files, but every source is a task; leave it out")
        if self.on_overlength != "error" and self.max_length is None:
            raise ValueError(f"on_overlength = {self.on_overlength} needs max_length, which is null; set max_length")
        if self.validation_share is not None and self.validation is not None:
            raise ValueError("validation and validation_share contradict; leave one of them out")
        for split in SPLITS:
            for source in getattr(self, split) or []:
                if source.weight is not None and (split != "train" or self.stream):
                    why = "a stream does not know how many rows it has" if split == "train" else "only train is mixed"
                    raise ValueError(f"{split}: weight of {source.name} has no effect, since {why}; leave it out")
        return self

    @property
    def has_validation(self) -> bool:
        """Whether there are validation rows."""
        return self.validation is not None or self.validation_share is not None


# -------------------------------------------------------------- the evaluation

_TASK_FIELDS: dict[str, Any] = {
    name: (field.annotation, field) for name, field in EvalTask.model_fields.items() if name != "file"
}

_TaskSection: Any = create_model("_TaskSection", __base__=Section, **_TASK_FIELDS)


class EvaluationTask(_TaskSection):
    data: Sources | None = option(None, "rows to score; default: data.test")

    @field_validator("data")
    @classmethod
    def _unweighted(cls, sources: list[Source] | None) -> list[Source] | None:
        if any(source.weight is not None for source in sources or []):
            raise ValueError("weight has no effect on rows to score; leave it out")
        return sources

    _one_or_many = field_validator("data", mode="before", json_schema_input_type=_WrittenSources)(_as_list)

    @model_validator(mode="after")
    def _is_a_task(self) -> EvaluationTask:
        self.build()
        return self

    def build(self, **values: Any) -> EvalTask:
        """The EvalTask of these fields, with the given values replaced. Raises EchoConfigError."""
        return EvalTask(**self.model_dump(exclude={"data"}) | values)


class EvaluationSection(Section):
    tasks: list[EvaluationTask] = option(
        [], "what to score; default: generate an answer to each test row and require an exact match"
    )
    batch_size: int = option(16, "rows scored at a time; higher is faster and costs memory", ge=1, le=MOST_ROWS)

    @field_validator("tasks")
    @classmethod
    def _named_once(cls, tasks: list[EvaluationTask]) -> list[EvaluationTask]:
        names = [task.name for task in tasks]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"{names.count(name)} tasks have the name {name!r}; rename all but one")
        return tasks


class Recipe(Section):
    """A whole run; `load_recipe` reads it."""

    model: Name = Field(description="base model: a folder, a hub id, or packaged:smollm2-135m")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option("auto", "dtype of the base's weights")
    attn_implementation: Literal["sdpa", "eager", "flex_attention", "flash_attention_2", "flash_attention_3"] | None = (
        option(None, "attention implementation of transformers")
    )
    quantization: Literal["4bit", "8bit"] | None = option(None, "load the base quantised by bitsandbytes (QLoRA)")
    trust_remote_code: bool = option(False, "run code that comes with the model; only for models you trust")
    method: Literal["lora", "dora", "rslora"] = option("lora", "kind of adapter")
    echo: bool = option(False, "train with the echo; false trains the plain adapter with the same program")
    lora: LoraSection = option(LoraSection(), "the adapter")
    echo_config: EchoSection = option(EchoSection(), "the echo; needs echo = true")
    data: DataSection = Field(description="the rows")
    training: TrainingSection = option(TrainingSection(), "the optimisation")
    seeds: SeedSection = option(SeedSection(), "random seeds")
    evaluation: EvaluationSection = option(EvaluationSection(), "what `echo-lora eval` scores")
    output: Name = Field(description="folder that training creates; default: runs/ and the recipe's name")

    _home = field_validator("output")(lambda value: str(expanded(value)))

    @model_validator(mode="after")
    def _agrees(self) -> Recipe:
        training = self.training
        if self.echo_config.model_fields_set and "echo" not in self.model_fields_set:
            names = ", ".join(f"echo_config.{name}" for name in sorted(self.echo_config.model_fields_set))
            raise ValueError(
                f"the echo is off by default, but it has settings ({names}): set echo = true, or echo = false to train "
                "the plain adapter all the same"
            )
        if training.evaluate_every is not None and not self.data.has_validation:
            raise ValueError(
                "training.evaluate_every needs rows to evaluate: set data.validation, or data.validation_share"
            )
        if self.data.stream and training.steps is None:
            raise ValueError("data.stream needs training.steps: the number of rows is not known in advance")
        if training.answer_weight != 1 and not self.data.train_on_prompt:
            raise ValueError(
                f"training.answer_weight = {training.answer_weight:g} weighs answers against prompts, but only answers "
                "are trained on: set data.train_on_prompt, or leave it out"
            )
        if self.lora.init.startswith(CHANGING) and (self.method == "dora" or self.quantization is not None):
            other = "method = dora" if self.method == "dora" else f"quantization = {self.quantization}"
            raise ValueError(
                f"lora.init = {self.lora.init} subtracts the initial adapter from the base, and with {other} the "
                "result can't be saved as an adapter of the base as it is; use lora.init = default"
            )
        if training.bf16 and self.dtype == "float16":
            raise ValueError("training.bf16 = true contradicts dtype = float16; choose one")
        return self

    def build_echo_config(self) -> EchoConfig:
        """The EchoConfig, with its seed from `seeds.routing`."""
        return self.echo_config.build(self.seeds.routing)

    def to_dict(self) -> dict[str, Any]:
        """All keys, ready for JSON; the result is a valid recipe."""
        return self.model_dump(mode="json", exclude={"echo_config": {"routing_seed"}})
