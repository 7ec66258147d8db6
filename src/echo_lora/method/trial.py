"""Whether the step is exact on a base model: what it says of itself, and what it does with a few tokens.   [O]

    later tokens       a token must not see them: nothing could be read at the boundary, nor predicted after it
    padding            before a row it must change nothing, or rows start in one column
    positions          counted from 0 at a row's first token, or the model counts them itself
    a prefix           its keys and values must stand for it, or the second pass is run in full

`why_full` knows the architectures that say which of these do not hold. The trial is for those that don't say it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from echo_lora.errors import EchoModelError
from echo_lora.method.injection import outermost_lists
from echo_lora.method.lm_head import without_trace
from echo_lora.method.prefix import PrefixRecorder, PrefixSharing

WORKING = "docs/architectures.md lists the models that work."

PREFIX, SUFFIX, PADDING = 6, 6, 3  # columns of the trial


def refuse_base(base_model: PreTrainedModel) -> None:
    """Raises EchoModelError for a model that says of itself that no step on it could be right."""
    name = type(base_model).__name__
    config = base_model.config.get_text_config()
    if getattr(base_model.config, "is_encoder_decoder", False):
        raise EchoModelError(f"{name} is an encoder-decoder; the echo needs a decoder-only model. {WORKING}")
    if getattr(config, "num_hidden_layers", None) is None:
        raise EchoModelError(
            f"the configuration of {name} has no num_hidden_layers, by which decoder layers are found. {WORKING}"
        )
    lists = [name for name, _ in outermost_lists(base_model)]
    if len(lists) > 1:
        raise EchoModelError(
            f"{name} keeps the parts of its layers in several lists ({', '.join(lists)}), so that no module gives "
            f"the state of a layer. {WORKING}"
        )
    if getattr(config, "local_attn_chunk_length", None) is not None:
        raise EchoModelError(
            f"{name} trains on rows of a multiple of {config.local_attn_chunk_length} tokens only "
            f"(local_attn_chunk_length), which the echo's step does not keep. {WORKING}"
        )
    if getattr(config, "prompt_length", None) and getattr(config, "use_prompt", True):
        raise EchoModelError(
            f"{name} puts {config.prompt_length} tokens of its own before each row (prompt_length), so that the "
            f"boundary is not where the labels say. {WORKING}"
        )
    layers_say = any(getattr(module, "is_decoder", None) is False for module in base_model.modules())
    flags = {
        "is_decoder": layers_say and getattr(config, "is_decoder", None) is False,
        "is_causal": getattr(config, "is_causal", None) is False,
        "causal": getattr(config, "causal", None) is False,
        "use_bidirectional_attention": getattr(config, "use_bidirectional_attention", None) in (True, "all"),
        "attn_type": getattr(config, "attn_type", None) == "bi",
    }
    for flag in (flag for flag, is_set in flags.items() if is_set):
        raise EchoModelError(
            f"the tokens of {name} see later ones (its configuration has {flag}={getattr(config, flag)!r}), so that "
            f"the state at the boundary would know the answer. The echo needs a causal language model. {WORKING}"
        )
    if (getattr(config, "n_recurrent_loops", None) or 1) > 1:
        raise EchoModelError(
            f"{name} runs layers {config.n_recurrent_loops} times in a pass (n_recurrent_loops), where the echo reads "
            f"one state of each. {WORKING}"
        )
    for streams in ("altup_num_inputs", "hc_mult", "hc_count"):
        if (getattr(config, streams, None) or 1) > 1:
            raise EchoModelError(
                f"the layers of {name} hand on {getattr(config, streams)} streams of hidden states ({streams}), where "
                f"the echo reads one state of each token. {WORKING}"
            )


@torch.compiler.disable  # torch.compile of the whole model can't trace into it
def why_full_by_trial(
    forward: Callable[..., Any], base_model: PreTrainedModel, sharing: PrefixSharing | None, device: torch.device
) -> str | None:
    """Why the echo-on pass can't share the prefix, as far as a few tokens tell; None if it can.

    sharing: None asks for later tokens only. forward: the plain PEFT model.
    Raises EchoModelError if the model fails on token ids alone, or if its tokens see later ones.
    """
    name = type(base_model).__name__
    first, second, later, others = _tokens(base_model).to(device).split([PREFIX, PREFIX, SUFFIX, SUFFIX])
    rows = [torch.cat(row) for row in ((first, later), (first, others), (second, later), (second, others))]
    padded = torch.cat([first[:1].expand(PADDING), rows[0][:-PADDING]])
    input_ids = torch.stack([*rows, padded])  # (5, T)
    attention_mask = torch.ones_like(input_ids)
    attention_mask[4, :PADDING] = 0
    position_ids = (attention_mask.cumsum(1) - 1).clamp(min=0)

    def logits(rows: slice, start: int = 0, **kwargs: Any) -> Tensor:
        given = {"input_ids": input_ids[rows, start:], "attention_mask": attention_mask[rows]}
        return forward(**given, use_cache=False, output_router_logits=False, **kwargs).logits.float()  # (rows, T, V)

    # compiled layers run as they are: the shapes of a trial are worth no graph
    with evaluating(base_model), without_trace(device), torch.compiler.set_stance("force_eager"):
        try:
            stock = logits(slice(4))
        except Exception as error:
            raise EchoModelError(
                f"{name} fails on a few tokens: {type(error).__name__}: {error}. The echo needs a model that runs on "
                f"token ids alone. {WORKING}"
            ) from error
        same = _Agreement(base_model, stock)
        # two pairs: a router that is about to choose another expert may differ in one of them by rounding
        if not same(stock[0, :PREFIX], stock[1, :PREFIX]) and not same(stock[2, :PREFIX], stock[3, :PREFIX]):
            raise EchoModelError(
                f"the tokens of {name} see later ones, or two runs of it differ, so that the state at the boundary "
                f"would know the answer. The echo needs a causal language model. {WORKING}"
            )
        if sharing is None:
            return None
        recorder = PrefixRecorder(PREFIX, sharing.depth, is_checkpointed=False)
        try:
            with sharing.using(recorder):
                whole = logits(slice(5), position_ids=position_ids)
            prefix = recorder.prefix()
            with sharing.using(prefix):
                suffix = logits(slice(5), PREFIX, position_ids=position_ids[:, PREFIX:], cache=prefix)
        except Exception as error:
            return f"{name} can't be run on a prefix ({type(error).__name__}: {error})"
    if not same(whole[:4], stock):
        return f"{name} counts positions in its own way"
    if not same(whole[4, PADDING:], stock[0, :-PADDING]):
        return f"padding before a row changes what {name} computes"
    if not same(suffix, whole[:, PREFIX:]):
        return f"{name} computes something else on a prefix than on the whole row"
    return None


class _Agreement:
    """Whether logits are the same at every token, but for half the digits of the dtype that they were computed in."""

    def __init__(self, base_model: PreTrainedModel, logits: Tensor) -> None:
        dtypes = {p.dtype for p in base_model.parameters() if p.dtype.is_floating_point and p.dtype.itemsize > 1}
        kind = logits.device.type
        if torch.is_autocast_enabled(kind):
            dtypes.add(torch.get_autocast_dtype(kind))
        self.bound = max(torch.finfo(dtype).eps for dtype in dtypes) ** 0.5

    def __call__(self, ours: Tensor, theirs: Tensor) -> bool:
        error = (ours - theirs).norm(dim=-1) / theirs.norm(dim=-1).clamp(min=1e-12)
        return bool((error <= self.bound).all())


def _tokens(base_model: PreTrainedModel) -> Tensor:
    """Ids from all over the vocabulary, but of no token that the configuration names: it may stand for an image."""
    count = 2 * (PREFIX + SUFFIX)
    vocabulary = base_model.config.get_text_config().vocab_size
    spread = dict.fromkeys(index * vocabulary // (2 * count) for index in range(2 * count))
    free = [token for token in spread if token not in _named_tokens(base_model.config.to_dict())] or [0]
    return torch.tensor(list(islice(cycle(free), count)))


def _named_tokens(config: dict[str, Any]) -> set[int]:
    named: set[int] = set()
    for key, value in config.items():
        if isinstance(value, dict):
            named |= _named_tokens(value)
        elif str(key).endswith(("token_id", "token_index")):
            named |= set(value) if isinstance(value, list) else {value}
    return named


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """In eval mode, without dropout; each module has its own mode back afterwards."""
    training = [module for module in model.modules() if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
