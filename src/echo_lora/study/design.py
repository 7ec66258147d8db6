"""The design of a study: one YAML file, fixed before the first run.

    tuning         every arm × its learning rates × `tuning_seeds`, scored on validation rows: chooses a learning rate
    confirmation   every arm at its chosen rate × `seeds`, scored on test rows: gives the verdict

An arm is the study's recipe with some keys changed. Within a seed, all arms start from the same adapter and see the
same rows in the same order.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, ConfigDict, Field, field_validator, model_validator

from echo_lora.data.sources import expanded
from echo_lora.errors import EchoConfigError, nearest
from echo_lora.recipe.load import load_recipe, shipped_recipes, validated
from echo_lora.recipe.schema import Recipe
from echo_lora.recipe.sections import LARGEST_RATE, LARGEST_SEED, Name, Section
from echo_lora.recipe.yaml_file import find_yaml, is_in, names_in, parse_yaml

SHIPPED = Path(__file__).parent.parent / "studies"
NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}"
LARGEST_TEXT = 100_000_000  # bytes of the general text
KEPT = "+echo"  # behind an arm's name in a comparison: its model with the echo kept on
# The study sets these for each run; an arm must not.
GIVEN = ("seeds", "output", "training.learning_rate")


def side_of(name: str) -> tuple[str, bool]:
    """The arm that a side of a comparison names, and whether it is scored with the echo kept on, as in `arm+echo`."""
    return name.removesuffix(KEPT), name.endswith(KEPT)


def _is_arm(name: str) -> str:
    if not re.fullmatch(NAME, name):
        raise ValueError(f"the arm name {name!r} must consist of at most 100 letters, digits, _, . and -")
    return name


def _leaves_given(values: dict[str, Any]) -> dict[str, Any]:
    for key in values:
        if key.startswith(GIVEN):
            raise ValueError(f"the study sets {key} for each run; remove it")
    return values


Stage = Literal["tuning", "confirmation"]
ArmName = Annotated[str, AfterValidator(_is_arm)]
Rate = Annotated[float, Field(gt=0, le=LARGEST_RATE)]
Settings = Annotated[dict[Name, Any], AfterValidator(_leaves_given)]  # of a recipe


class Arm(Section):
    """The study's recipe with some keys changed."""

    label: Name | None = Field(None, description="name in reports; default: the arm's key")
    role: Literal["method", "control"] = Field("method", description="controls are marked in the report")
    set: Settings = Field({}, description="recipe keys and their values, as in {echo: false}")
    learning_rates: Annotated[list[Rate], Field(min_length=1)] | None = Field(
        None, description="the arm's own learning rates, as many as every other arm tries"
    )
    keep_echo_on: bool = Field(
        False,
        description="score a second time with the echo on while generating: what there is to distil",
    )


class GeneralText(Section):
    """Text unrelated to the task: a higher loss on it after training is forgetting."""

    file: Name = Field(
        description="text file; the path starts at the study's folder, in a shipped study at the working directory"
    )
    tokens: int = Field(2048, description="number of first tokens that are scored", ge=2, le=10_000_000)


@dataclass(frozen=True)
class RunKey:
    """One run of a study. learning_rate: None until the arm's rate has been chosen."""

    stage: Stage
    arm: str
    learning_rate: float | None
    seed: int

    @classmethod
    def of(cls, record: Mapping[str, Any]) -> RunKey:
        """The run that a record is of."""
        return cls(record["stage"], record["arm"], record["learning_rate"], record["seed"])

    @property
    def identity(self) -> tuple[str, str, int, float | None]:
        """Unique in a study: an arm has one confirmation run per seed, whatever its learning rate."""
        return self.stage, self.arm, self.seed, self.learning_rate if self.stage == "tuning" else None

    @property
    def folder(self) -> str:
        """Its folder, in the study's."""
        return f"runs/{self.stage}/{self.arm}/lr-{self.learning_rate:g}/seed-{self.seed}"

    def __str__(self) -> str:
        return f"{self.stage} {self.arm} lr {self.learning_rate:g} seed {self.seed}"


class Design(Section):
    """What is compared with what: a study without the locations of its files. `study.json` holds it."""

    model_config = ConfigDict(extra="allow")  # study.json also has the length of `general`, and keys of other versions

    title: Name = Field(description="head of the report")
    question: str = Field("", description="the question that the study answers, for the report")
    set: Settings = Field({}, description="recipe keys that all arms change")
    arms: dict[ArmName, Arm] = Field(description="what is compared: arms by name", min_length=2)
    baseline: str = Field(description="the arm that the others are compared with")
    comparisons: list[list[str]] | None = Field(
        None,
        description="pairs [arm, other], the primary one first; `arm+echo` is the arm with its echo kept on; "
        "default: every arm with the baseline",
    )
    learning_rates: list[Rate] = Field(description="peak learning rates that every arm tries", min_length=1)
    tuning_seeds: list[int] = Field([0], description="seeds of the runs that choose a learning rate")
    tune_on: Literal["accuracy", "loss"] = Field(
        "accuracy", description="validation accuracy of generated answers, or the last eval_loss"
    )
    seeds: list[int] = Field(description="seeds of the confirmation runs; none may be a tuning seed", min_length=1)
    score_on: Literal["test", "validation"] = Field(
        "test", description="split that confirmation runs are scored on; `validation` is for a search for settings"
    )
    smallest_effect: float = Field(
        description="smallest difference in accuracy that matters, as a share: 0.01 is one point", gt=0, lt=1
    )
    margin: float | None = Field(
        None, description="how much worse an arm may be and still be called `not worse`, as a share", gt=0, lt=1
    )
    looks: list[int] | None = Field(
        None, description="numbers of seeds after which the study may be decided; the last is the number of all seeds"
    )

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        if self.baseline not in self.arms:
            raise ValueError(f"there is no arm {self.baseline!r}.{nearest(self.baseline, list(self.arms))}")
        kept = [name + KEPT for name, arm in self.arms.items() if arm.keep_echo_on]
        for side in (side for pair in self.comparisons or [] for side in pair):
            if side_of(side)[0] not in self.arms:
                raise ValueError(f"there is no arm {side!r}.{nearest(side, [*self.arms, *kept])}")
            if side not in (*self.arms, *kept):
                raise ValueError(
                    f"a comparison names {side}, but arm {side_of(side)[0]} does not set keep_echo_on: true"
                )
        for pair in self.comparisons or []:
            if len(pair) != 2 or pair[0] == pair[1]:
                raise ValueError(f"comparison {pair} must name two different arms")
            if (self.comparisons or []).count(pair) > 1:
                raise ValueError(f"comparison {pair} is given twice; give it once")
        for name in self.arms:
            rates = self.rates(name)
            # as they appear in the names of the runs' folders
            if len(rates) != len(self.learning_rates) or len({f"{rate:g}" for rate in rates}) != len(rates):
                raise ValueError(
                    f"arm {name} tries the learning rates {rates}, but every arm must try {len(self.learning_rates)} "
                    "different ones: an equal budget"
                )
        for seed in self.seeds:
            if seed in self.tuning_seeds and self.tunes:
                raise ValueError(
                    f"seed {seed} is in both seeds and tuning_seeds; confirm with seeds that chose nothing"
                )
        if self.comparisons == []:
            raise ValueError("comparisons = [] compares nothing; name a pair, or leave it out")
        for key in ("seeds", "tuning_seeds"):
            seeds = getattr(self, key)
            if len(set(seeds)) != len(seeds) or any(not 0 <= seed <= LARGEST_SEED for seed in seeds):
                raise ValueError(f"{key} = {seeds} must be different whole numbers from 0 to {LARGEST_SEED}")
        if self.looks is not None:
            from echo_lora.study.looks import problem_of_looks  # imports scipy, which takes a second

            if problem := problem_of_looks(self.looks, len(self.seeds)):
                raise ValueError(problem)
        if self.tunes and not self.tuning_seeds:
            raise ValueError("several learning rates need tuning_seeds to choose among them")
        return self

    def rates(self, arm: str) -> list[float]:
        """The learning rates that an arm tries."""
        return self.arms[arm].learning_rates or self.learning_rates

    @property
    def tunes(self) -> bool:
        """Whether there are learning rates to choose among."""
        return len(self.learning_rates) > 1

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """The comparisons, the primary one first."""
        if self.comparisons is not None:
            return [(first, second) for first, second in self.comparisons]
        return [(name, self.baseline) for name in self.arms if name != self.baseline]

    @property
    def tuning_runs(self) -> list[RunKey]:
        """The runs that choose learning rates, seed by seed; none if there is only one."""
        if not self.tunes:
            return []
        return [
            RunKey("tuning", arm, rate, seed)
            for seed in self.tuning_seeds
            for arm in self.arms
            for rate in self.rates(arm)
        ]

    def confirmation_runs(self, chosen: Mapping[str, float]) -> list[RunKey]:
        """The runs that give the verdict, seed by seed, so that an interrupted study has complete seeds."""
        return [RunKey("confirmation", arm, chosen.get(arm), seed) for seed in self.seeds for arm in self.arms]

    def runs(self, chosen: Mapping[str, float] | None) -> list[RunKey]:
        """All runs of the study. chosen: each arm's learning rate; None before tuning is complete."""
        return self.tuning_runs + self.confirmation_runs(chosen or {})


class Study(Design):
    """A whole study. Made by `load_study`."""

    model_config = ConfigDict(extra="forbid")

    recipe: Name = Field(
        description="recipe of all arms: a YAML file, relative to the study's folder, or the name of a shipped one"
    )
    general: GeneralText | None = Field(None, description="text on which forgetting is measured")
    output: Name = Field(description="folder of the study; default: runs/ and the study's name")

    _home = field_validator("output")(lambda value: str(expanded(value)))

    @property
    def design(self) -> Design:
        """The study without the locations of its files; of `general`, the number of tokens stays."""
        return Design.model_validate(
            self.model_dump(mode="json", exclude={"output": True, "recipe": True, "general": {"file"}})
        )


def load_study(source: str | Path, overrides: Sequence[str] = ()) -> Study:
    """The study of a YAML file, or of the name of one that is shipped with the package.

    overrides: `key.path=value` of the study, as in `output=runs/second`. Reads every arm's recipe, so that a wrong key
    is found at once. Raises EchoConfigError, which names file, line and key.
    """
    path = find_yaml(str(source), SHIPPED, "study")
    tree, document = parse_yaml(path)
    document.setdefault("output", f"runs/{path.stem}")
    recipe, general = document.get("recipe"), document.get("general")
    if isinstance(recipe, str) and recipe.strip() and recipe not in shipped_recipes():
        document["recipe"] = str(path.parent / expanded(recipe))
    if isinstance(general, dict) and isinstance(general.get("file"), str) and not is_in(path, SHIPPED):
        document["general"] = general | {"file": str(path.parent / expanded(general["file"]))}
    study = validated(Study, document, str(source), tree, overrides)
    for name, arm in study.arms.items():
        try:
            recipe = first_recipe(study, name)
        except EchoConfigError as error:
            raise EchoConfigError(f"{source}: {error}") from error
        if (problem := _problem(study, arm, recipe)) is not None:
            raise EchoConfigError(f"{source}: arm {name}: {problem}")
    if study.general is not None:
        _require_text(study.general.file, f"{source}: general.file = {study.general.file}")
    return study


def _require_text(path: str, where: str) -> None:
    """Raises EchoConfigError if a file is missing or is not text."""
    if not os.path.isfile(path):
        advice = "Correct the path."
        if path == "runs/quick-lm/general.txt":  # of the shipped study `quick`
            advice = (
                "In a checkout of echo-lora, `make study-quick` makes it and runs the study; the file and the model "
                "alone come from `python scripts/pretrain_small.py --output runs/quick-lm --rows 20000 --steps 400`."
            )
        raise EchoConfigError(f"{where}: there is no such file. {advice}")
    if os.path.getsize(path) > LARGEST_TEXT:
        raise EchoConfigError(f"{where}: it has more than {LARGEST_TEXT:,} bytes. Use a shorter text.")
    try:
        Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EchoConfigError(f"{where} can't be read: {error}. Name a text file in UTF-8.") from error


def _problem(study: Study, arm: Arm, recipe: Recipe) -> str | None:
    """What would stop the study only after hours of training."""
    tasks = recipe.evaluation.tasks
    if any(task.kind == "code" for task in tasks):
        return (
            "a study does not run generated code; score tasks of kind code with `echo-lora eval --run-generated-code`."
        )
    if arm.keep_echo_on and not recipe.echo:
        return "keep_echo_on needs an echo, but the arm trains without one. Set echo: true, or leave keep_echo_on out."
    if arm.keep_echo_on and any(task.kind == "choice" for task in tasks):
        return (
            "keep_echo_on is for generated answers, but an evaluation task is of kind choice. Leave keep_echo_on out."
        )
    if study.tunes and study.tune_on == "loss" and recipe.training.evaluate_every is None:
        return "tune_on = loss needs losses on validation rows. Set training.evaluate_every."
    if study.score_on == "test" and not (recipe.data.test or (tasks and all(task.data for task in tasks))):
        return "there are no test rows to score. Give data.test, or data in every evaluation task."
    needs_validation = (study.tunes and study.tune_on == "accuracy") or study.score_on == "validation"
    if needs_validation and (not recipe.data.has_validation or any(task.data for task in tasks)):
        return (
            "answers to validation rows must be scored, but data.validation is missing, or the evaluation tasks have "
            "rows of their own. Give data.validation and tasks without data, or use tune_on: loss."
        )
    return None


def shipped_studies() -> list[str]:
    """Names that `load_study` takes without a file."""
    return names_in(SHIPPED)


def recipe_of(study: Study, key: RunKey) -> Recipe:
    """The recipe of one run. Raises EchoConfigError, which names the arm."""
    given = {
        "training.learning_rate": key.learning_rate,
        "seeds.initialisation": key.seed,
        "seeds.data_order": key.seed,
        "seeds.routing": key.seed,
        "output": str(Path(study.output) / key.folder),
    }
    values = study.set | study.arms[key.arm].set | given
    try:
        return load_recipe(study.recipe, [f"{name}={json.dumps(value)}" for name, value in values.items()])
    except EchoConfigError as error:
        raise EchoConfigError(f"arm {key.arm}: {error}") from error


def first_recipe(study: Study, arm: str) -> Recipe:
    """The recipe of an arm's first confirmation run, for what all runs of the arm share."""
    return recipe_of(study, RunKey("confirmation", arm, study.rates(arm)[0], study.seeds[0]))


def slurm_options(texts: Sequence[str]) -> dict[str, Any]:
    """submitit's options from texts such as `slurm_partition=gpu`; digits become a number. Raises EchoConfigError."""
    options: dict[str, Any] = {}
    for text in texts:
        key, is_given, value = text.partition("=")
        if not is_given or not key.strip():
            raise EchoConfigError(f"--slurm {text}: write it as key=value, for example --slurm timeout_min=60.")
        options[key.strip()] = int(value) if re.fullmatch("[0-9]{1,18}", value) else value
    return options
