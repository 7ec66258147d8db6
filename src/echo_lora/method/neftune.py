"""NEFTune with two passes: both see the same noise, of the size that a plain forward of the batch would see.        [O]

The hook of transformers draws noise from ±alpha / sqrt(columns · d), for the columns that the embedding layer sees. The
step runs other columns than the batch has, so alpha is scaled accordingly. The echo-on pass reuses the noise of the
echo-off pass, so that only the echo makes the passes differ.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


def with_one_noise(forward: Callable[..., Any], embeddings: nn.Module, columns: int) -> Callable[..., Any]:
    """`forward`, wrapped for a first pass over all columns of a step and a second one over the last of them.

    embeddings: the input embeddings, on which `activate_neftune` stores alpha; without it, nothing changes.
    columns: number of columns of the batch.
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
        handle = embeddings.register_forward_hook(reuse)  # runs after the hook that adds the noise
        try:
            return forward(**kwargs)
        finally:
            handle.remove()
            embeddings.neftune_noise_alpha = alpha

    return noisy_forward
