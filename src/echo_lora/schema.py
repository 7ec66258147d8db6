"""The keys of a recipe: name, type, default and one line of help each, in the order of a run.

Settings that contradict each other are refused here. `recipe.py` reads the files. Neither torch nor transformers
is imported.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from pydantic import BaseModel, ConfigDict, Field, create_model, field_validator, model_validator

from echo_lora.config import EchoConfig
from echo_lora.evaluate.tasks import EvalTask
from echo_lora.sources import expanded

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


class _EchoChecks(Section):
    @model_validator(mode="after")
    def _is_an_echo_config(self) -> _EchoChecks:
        if "routing_seed" in self.model_fields_set:
            raise ValueError("routing_seed is given by seeds.routing; move it there")
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
    """Rows of a file, or rows that a reasoning-gym task generates. A text stands for {file: text}."""

    file: str | None = _option(None, "JSON Lines, JSON list or Parquet; the path starts at the recipe's folder")
    part: str | None = _option(None, "keep the file's rows whose column `part` has this value")
    task: str | None = _option(None, "task of reasoning-gym that generates the rows")
    count: int | None = _option(None, "number of rows to generate", ge=1)
    params: dict[str, Any] | None = _option(None, "parameters of the task")
    seed: int | None = _option(
        None, "seed of the task; parts with equal seed and params share no question; default: 0", ge=0
    )

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

    _home = field_validator("file")(lambda value: None if value is None else str(expanded(value)))

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
    ignore_columns: list[str] = _option(
        [], "columns of files that may hold text without being used; any other such column is an error"
    )
    train_on_prompt: bool = _option(
        False, "train on the prompt's tokens too, in the echo-off pass; the echo still acts on answers only"
    )
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
    optimizer: Literal["adamw_torch", "adamw_torch_fused", "adamw_bnb_8bit", "paged_adamw_8bit", "adafactor", "sgd"] = (
        _option("adamw_torch", "optimizer, by its name in transformers; the 8-bit ones need bitsandbytes")
    )
    gradient_checkpointing: bool = _option(False, "recompute activations in backward: less memory, slower")
    bf16: bool = _option(False, "compute in bfloat16 (autocast); for hardware that has it")
    save_every: int = _option(100, "steps between checkpoints", ge=1)
    keep_checkpoints: int = _option(2, "number of newest checkpoints to keep", ge=1)
    log_every: int = _option(10, "steps between lines of metrics", ge=1)
    evaluate_every: int | None = _option(None, "steps between losses on data.validation; default: never", ge=1)
    report_to: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = _option(
        [], "experiment trackers to send the metrics to; each needs its package"
    )

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
    routing: int = _option(0, "seed of the routing draws", ge=0)


# -------------------------------------------------------------- the evaluation

_TASK_FIELDS: dict[str, Any] = {
    name: (field.annotation, field) for name, field in EvalTask.model_fields.items() if name != "file"
}
_TaskSection: Any = create_model("_TaskSection", __base__=Section, **_TASK_FIELDS)


class EvaluationTask(_TaskSection):
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
    """A whole run. Made by `recipe.load_recipe`."""

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

    _home = field_validator("output")(lambda value: str(expanded(value)))

    @model_validator(mode="after")
    def _agrees(self) -> Recipe:
        training = self.training
        if training.evaluate_every is not None and self.data.validation is None:
            raise ValueError("training.evaluate_every needs rows to evaluate: give data.validation")
        if training.bf16 and self.dtype == "float16":
            raise ValueError("training.bf16 = true contradicts dtype = float16; choose one")
        return self

    def build_echo_config(self) -> EchoConfig:
        """The echo, with its seed from `seeds.routing`."""
        return self.echo_config.build(self.seeds.routing)

    def to_dict(self) -> dict[str, Any]:
        """All keys, in a form that JSON takes and that is a recipe again."""
        return self.model_dump(mode="json", exclude={"echo_config": {"routing_seed"}})
