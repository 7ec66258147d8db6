"""Seeded shares of rows: how often an epoch has a row, and which rows are held out for validation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any


def repeats(count: int, weight: float, seed: Sequence[int]) -> list[int]:
    """The places, in `count` rows, of the rows of one epoch.

    There are round(weight · count) of them, at least one: every row floor(weight) times, and the rest drawn from the
    seed, no row twice. The draw is the same in every epoch.
    """
    import numpy as np

    total = max(round(weight * count), 1)
    whole, rest = divmod(total, count)
    drawn = np.random.default_rng(list(seed)).permutation(count)[:rest]
    return list(range(count)) * whole + sorted(drawn.tolist())


def held_out(row: Mapping[str, Any], share: float, seed: int) -> bool:
    """Whether a row is for validation: about `share` of all prompts are.

    Decided from the seed and the prompt alone, so rows with equal prompts are on one side, whatever else a recipe says
    and whatever rows are added.
    """
    digest = hashlib.sha256(f"{seed}\n{_prompt(row)}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def _prompt(row: Mapping[str, Any]) -> str:
    """What comes before the first answer, as text."""
    prompt = row.get("prompt")
    if prompt is None and isinstance(messages := row.get("messages"), list):
        prompt = []
        for message in messages:
            if isinstance(message, Mapping) and message.get("role") == "assistant" and message.get("weight") != 0:
                break
            prompt.append(message)
    return prompt.strip() if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, default=str)
