"""How wide the intervals of a study must be that is looked at before all of its seeds are done.

A study that stops when its 95 % interval leaves 0 finds too much: with five looks, a true null is rejected in 14 % of
studies instead of 5 %. Here the error is shared out among the looks, which are fixed before the first run. At look k,
with the share t_k of the seeds, it is spent up to

    α(t) = 4·(1 - Φ(z_{1-α/4} / √t)),    α = 1 - confidence, half of it on each side

(Lan and DeMets 1983, "Discrete sequential boundaries for clinical trials", Biometrika 70:659; this function is the
O'Brien-Fleming type: little early, nearly all at the end). The limit z_k is such that P(|Z_k| ≥ z_k, no earlier
|Z_j| ≥ z_j) = α(t_k) - α(t_{k-1}), by integration from look to look (Armitage, McPherson and Rowe 1969, Journal of the
Royal Statistical Society A 132:235). The interval of look k is an ordinary one at the confidence 2Φ(z_k) - 1. All K of
them together hold the truth with the overall confidence, whatever made the study stop (repeated confidence intervals:
Jennison and Turnbull 1989, JRSS B 51:305). That quantiles of t take the place of the normal's is the approximation by
significance levels of Pocock (1977, Biometrika 64:191).

The limits are those of independent increments, where corr(Z_j, Z_k) = √(t_j/t_k). Seeds answer the same questions, so
the mean of n of them has the variance a/n + b, with b from the questions, and its covariance with an earlier mean is
that same variance: the correlation is √((a/n_k + b)/(a/n_j + b)), which is never below √(n_j/n_k). Looks that agree
more cross symmetric limits less often (Plackett 1954, Biometrika 41:351, gives the derivative by a correlation): the
intervals are conservative, the more so the more of the noise comes from the questions.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import pairwise

import numpy as np
from scipy import stats
from scipy.optimize import brentq

from echo_lora.study.statistics import LEAST_SEEDS

# The first of many looks has next to nothing to spend; 1e-15 lies beyond 8.
WIDEST = 8.0
# Points of the integral. The limits of 100 equal looks agree to 10 digits with those from 1,000 points.
POINTS = 300


def problem_of_looks(looks: Sequence[int], seeds: int) -> str | None:
    """Why a study with so many seeds can't be looked at after these numbers of them; None if it can."""
    if looks and looks[0] >= LEAST_SEEDS and looks[-1] == seeds and all(a < b for a, b in pairwise(looks)):
        return None
    return (
        f"looks = {list(looks)} must be increasing numbers of seeds, from {LEAST_SEEDS} on, the last of them that of "
        f"all seeds, {seeds}"
    )


def confidence_at(looks: Sequence[int], number: int, confidence: float = 0.95) -> float:
    """The confidence that the interval of a look is made at. number: of the look, from 1."""
    return float(1 - 2 * stats.norm.sf(boundaries(tuple(looks), confidence)[number - 1]))


@cache
def boundaries(looks: tuple[int, ...], confidence: float = 0.95) -> tuple[float, ...]:
    """The limit of |Z| at each look: the module's docstring says how it is found."""
    fractions = np.array(looks) / looks[-1]
    alpha = 1 - confidence
    spent = 4 * stats.norm.sf(stats.norm.isf(alpha / 4) / np.sqrt(fractions))  # up to each look
    nodes, weights = np.polynomial.legendre.leggauss(POINTS)
    points, mass = np.zeros(1), np.ones(1)  # where Z·√t may be before any limit was crossed, and how probably
    found = []
    for t, step, to_spend in zip(fractions, np.diff(fractions, prepend=0), np.diff(spent, prepend=0), strict=True):
        sd = np.sqrt(step)
        crossing = (np.sqrt(t), sd, points, mass, to_spend)
        z = float(brentq(_excess, 0, WIDEST, crossing)) if _excess(WIDEST, *crossing) < 0 else WIDEST
        found.append(z)
        inside = z * np.sqrt(t) * nodes
        density = stats.norm.pdf((inside[:, None] - points) / sd) @ mass / sd
        points, mass = inside, z * np.sqrt(t) * weights * density
    return tuple(found)


def _excess(z: float, scale: float, sd: float, points: np.ndarray, mass: np.ndarray, to_spend: float) -> float:
    """The probability of crossing the limit z for the first time at this look, less what it may be."""
    beyond = stats.norm.sf((z * scale - points) / sd) + stats.norm.sf((z * scale + points) / sd)
    return float(mass @ beyond) - to_spend
