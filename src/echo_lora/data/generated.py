"""Rows of reasoning-gym tasks, generated from a seed, without overlap between splits."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from echo_lora.environment import require_package
from echo_lora.errors import EchoDataError, nearest

_SEEDS_PER_SPLIT = 1_000_000


def reasoning_gym_rows(
    task: str, count: int, seed: int, params: Mapping[str, Any] | None = None
) -> list[dict[str, str]]:
    """`count` rows of a reasoning-gym task: `prompt` is the question, `completion` the answer.

    Row i is drawn with seed + i, so neighbouring seeds share rows; those of `reasoning_gym_splits` don't. Raises
    EchoDataError for an unknown task or parameter.
    """
    require_package("reasoning-gym", f"the task {task!r}", error=EchoDataError)
    import reasoning_gym

    names = list(reasoning_gym.factory.DATASETS)
    if task not in names:
        raise EchoDataError(f"{task!r} is not a task of reasoning-gym.{nearest(task, names)}")
    for field in dataclasses.fields(reasoning_gym.factory.DATASETS[task][1]):
        value = (params or {}).get(field.name)
        usual = abs(field.default) if isinstance(field.default, (int, float)) else 1
        if isinstance(value, (int, float)) and abs(value) > max(10_000, 1000 * usual):
            raise EchoDataError(
                f"{task!r} with {field.name} = {value!r} would generate questions too long for any model; the default "
                f"is {field.default!r}. Lower it."
            )
    try:
        items = list(reasoning_gym.create_dataset(task, size=count, seed=seed, **params or {}))
    except (TypeError, ValueError, AssertionError) as error:
        fields = [f.name for f in dataclasses.fields(reasoning_gym.factory.DATASETS[task][1])]
        raise EchoDataError(
            f"reasoning-gym can't generate {task!r} with {dict(params or {})} and seed {seed}: {error}. Correct its "
            f"parameters: {', '.join(sorted(set(fields) - {'seed', 'size'}))}."
        ) from error
    if not all(isinstance(item["answer"], str) for item in items):
        raise EchoDataError(
            f"the task {task!r} has questions without a text answer. Choose another task, such as chain_sum."
        )
    return [{"prompt": item["question"], "completion": item["answer"]} for item in items]


def reasoning_gym_splits(
    task: str, sizes: Mapping[str, int], seed: int, params: Mapping[str, Any] | None = None
) -> dict[str, list[dict[str, str]]]:
    """Splits of a task, by name, from disjoint seeds; no question occurs twice.

    The last split is drawn first: if that is test, its rows don't depend on the size of train. Raises EchoDataError if
    the task has too few different questions.
    """
    seen: set[str] = set()
    splits = {}
    for place, (name, size) in reversed(list(enumerate(sizes.items()))):
        start = (seed * len(sizes) + place) * _SEEDS_PER_SPLIT
        fresh: dict[str, dict[str, str]] = {}
        for drawn in range(0, min(20 * size + 1000, _SEEDS_PER_SPLIT), size):
            for row in reasoning_gym_rows(task, size, start + drawn, params):
                if row["prompt"] not in seen and len(fresh) < size:
                    fresh.setdefault(row["prompt"], row)
            if len(fresh) == size:
                break
        else:
            raise EchoDataError(
                f"{task!r} has only {len(fresh)} different questions left for the {size} rows of {name!r}. "
                "Lower the count, or set params that allow more questions."
            )
        seen |= fresh.keys()
        splits[name] = list(fresh.values())
    return {name: splits[name] for name in sizes}
