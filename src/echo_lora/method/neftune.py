"""NEFTune in a step of two passes: the noise that transformers adds to embeddings.        [O]

Its hook draws from ±alpha / sqrt(columns · d), for the columns that the embedding layer sees. Here these are not those
of the batch: rows are aligned, and the echo-on pass may run on the last columns only. So alpha is scaled to give what a
plain forward of the batch would get, and the echo-on pass gets the noise of the echo-off pass: the noise belongs to the
rows, and the echo alone makes the passes differ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


def with_one_noise(forward: Callable[..., Any], embeddings: nn.Module, columns: int) -> Callable[..., Any]:
    """`forward`, for a first pass over all columns of a step and a second one over the last of them.

    embeddings: the input embeddings, where `activate_neftune` leaves its alpha; without one, nothing changes.
    columns: those of the batch.
    """
    alpha = getattr(embeddings, "neftune_noise_alpha", None)
    if alpha is None or not embeddings.training:
        return forward
    noisy: list[Tensor] = []  # (B, T, d), of the first pass

    def reuse(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        if not noisy:
            noisy.append(output)
        return noisy[0][:, -output.shape[1] :]

    def noisy_forward(**kwargs: Any) -> Any:
        embeddings.neftune_noise_alpha = alpha * (kwargs["input_ids"].shape[1] / columns) ** 0.5
        handle = embeddings.register_forward_hook(reuse)  # runs after the one that adds the noise
        try:
            return forward(**kwargs)
        finally:
            handle.remove()
            embeddings.neftune_noise_alpha = alpha

    return noisy_forward
