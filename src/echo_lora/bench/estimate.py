"""How long a measurement will take: the seconds of the steps so far, scaled by arithmetic to those yet to come."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, median

from echo_lora.bench.programs import Case
from echo_lora.progress import duration


class TimeLeft:
    """Keeps the seconds of steps, and estimates what is left.

    operations: of a step of each case, for each batch. Each case's memory is measured in `memory_steps` steps.
    """

    def __init__(self, operations: Sequence[Mapping[Case, float]], memory_steps: int) -> None:
        self.operations, self.memory_steps = operations, memory_steps
        self._steps: dict[tuple[int, Case], list[float]] = {}
        self._starts: list[float] = []

    def add_step(self, batch: int, case: Case, *seconds: float) -> None:
        """Seconds that steps took."""
        self._steps.setdefault((batch, case), []).extend(seconds)

    def add_process(self, batch: int, case: Case, seconds: float, step: float) -> None:
        """Seconds that a process took to measure memory, and those of one step in it."""
        self.add_step(batch, case, step)
        self._starts.append(max(seconds - self.memory_steps * step, 0.0))

    def seconds(self, memory: Sequence[tuple[int, Case]], rounds: Sequence[Mapping[Case, int]]) -> float | None:
        """Seconds left; None before the first step.

        memory: the batch and case of each memory yet to be measured. rounds: by batch, the steps that each case is yet
        to take, warm-up included.
        """
        if not self._steps:
            return None
        start = fmean(self._starts) if self._starts else 0.0  # of a process: its imports, the model
        left = sum(start + self.memory_steps * self._step(*key) for key in memory)
        left += start * bool(memory)  # the model is loaded once more for the rounds
        return left + sum(
            count * self._step(batch, case) for batch, counts in enumerate(rounds) for case, count in counts.items()
        )

    def _step(self, batch: int, case: Case) -> float:
        """Seconds of a step: as seen, or those of other steps for each of its operations."""
        if (batch, case) in self._steps:
            return median(self._steps[batch, case])
        rates = [median(found) / self.operations[b][c] for (b, c), found in self._steps.items()]
        return fmean(rates) * self.operations[batch][case]


def left_text(seconds: float | None) -> str:
    """As in `, about 4:10 left`; nothing without an estimate."""
    return "" if seconds is None else f", about {duration(seconds)} left"
