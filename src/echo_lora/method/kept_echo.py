"""Generating with the echo kept on: what the distillation could reach at best, not a way to deploy a model.         [O]

The echo of a prompt is read at its last token, the boundary (equations 1 to 3), which then runs a second time on the
cached prefix, with the echo injected (equation 4), as does every generated token.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModelForCausalLM
from torch import Tensor, nn
from transformers import DynamicCache

from echo_lora.errors import EchoModelError
from echo_lora.method.config import EchoConfig
from echo_lora.method.echo import EchoNetworks, apply_control, echo_representation
from echo_lora.method.injection import Injection, Injector
from echo_lora.method.prefix import cache_argument
from echo_lora.method.step import reading


class KeptEchoMixin(PeftModelForCausalLM):
    """`generate` of an EchoModel."""

    echo: EchoNetworks
    echo_config: EchoConfig
    why_full: Callable[[torch.device | None], str | None]
    _injector: Injector
    _source_layers: list[nn.Module]
    _plain_forward: Callable[..., Any]
    _keeps_echo = False

    @contextmanager
    def keeping_echo(self) -> Iterator[None]:
        """Inside, `generate` keeps the echo on: an upper bound for the distillation, not a way to deploy. [O]"""
        self._keeps_echo = True
        try:
            yield
        finally:
            self._keeps_echo = False

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As PEFT's. Inside `keeping_echo`, every answer is generated with the echo of its prompt.

        There, pass input_ids and attention_mask by keyword, padded on the left, for greedy decoding or sampling. Raises
        EchoModelError otherwise, and for a model that can't share a prefix.
        """
        if not self._keeps_echo:
            return super().generate(*args, **kwargs)
        config = kwargs.get("generation_config") or getattr(self.get_base_model(), "generation_config", None)
        several = [kwargs.get(name) or getattr(config, name, None) for name in ("num_beams", "num_return_sequences")]
        if args or "input_ids" not in kwargs or not set(several) <= {None, 1}:
            raise EchoModelError(
                "inside keeping_echo, generate takes input_ids by keyword, no beam search, and one answer to each row. "
                "Call generate(input_ids=…, attention_mask=…) with num_beams=1 and num_return_sequences=1."
            )
        input_ids = kwargs["input_ids"]  # (B, P)
        if (reason := self.why_full(input_ids.device)) is not None:
            raise EchoModelError(
                f"inside keeping_echo, generate runs the boundary a second time on its cached prefix, but {reason}. "
                "Generate without keeping_echo, or use another model."
            )
        attention_mask = kwargs.setdefault("attention_mask", torch.ones_like(input_ids))
        base = self.get_base_model()
        cache = DynamicCache(config=base.config)
        deltas = self._echo_of_prompts(input_ids, attention_mask, cache)
        cache.crop(-1)  # the boundary runs again, now with the echo
        kwargs[cache_argument(base.forward) or "past_key_values"] = cache
        with self._injecting_from_boundary(deltas, torch.ones_like(input_ids[:, :1], dtype=torch.bool)):
            return super().generate(**kwargs)

    @torch.no_grad()  # also keeps these rows out of the statistics of `standardize`
    def _echo_of_prompts(self, input_ids: Tensor, attention_mask: Tensor, cache: DynamicCache) -> dict[str, Tensor]:
        """δ of each prompt, by module name; fills the cache."""
        boundary_B = torch.full((len(input_ids),), input_ids.shape[1] - 1, device=input_ids.device)
        with reading(self._source_layers, boundary_B, input_ids.shape[1]) as hidden:
            self._plain_forward(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=(attention_mask.cumsum(1) - 1).clamp(min=0),
                cache=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        z = echo_representation(hidden, self.echo.standardize)
        deltas, _, _ = self.echo(apply_control(z, self.echo_config.echo_kind))
        return deltas

    @contextmanager
    def _injecting_from_boundary(self, deltas: dict[str, Tensor], everywhere: Tensor) -> Iterator[None]:
        """Inside, inject δ into every pass: the first runs the boundary, each later one an answer token.

        everywhere: (B, 1) bool, all true, since every pass has one column.
        """
        passes = itertools.count()

        def inject(*_: Any) -> None:
            is_boundary = next(passes) == 0
            injected = not is_boundary or self.echo_config.injection_mask == "predictive"
            self._injector.current = Injection(deltas, everywhere & injected)

        handle = self.get_base_model().register_forward_pre_hook(inject)
        try:
            with self._injector.injecting(None):
                yield
        finally:
            handle.remove()
