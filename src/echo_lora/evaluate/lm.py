"""The lm-evaluation-harness model class for prompts that are rendered already.

lm-eval expects prompts that it builds itself. Five of its behaviours are switched off:

    adding a BOS token                              the chat template has added it where it belongs
    moving a prompt's final white space             chat templates end in a newline, which belongs to the prompt
    cutting long prompts                            `check_fits` refuses them instead
    keeping text after the end token                happens if the model's end token is not the tokenizer's
    dropping the space at the start of an answer    happens where a tokenizer drops the one before the first word
"""

from __future__ import annotations

import time
from collections.abc import Callable
from itertools import groupby
from typing import TYPE_CHECKING, Any

from lm_eval.models.huggingface import HFLM

from echo_lora.errors import EchoDataError

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class RenderedPromptLM(HFLM):
    """HFLM for rendered prompts: the model reads exactly `tokenizer(prompt, add_special_tokens=False)`.

    `seconds` holds the time of each task after lm-eval has run. The model's generation_config applies, except for
    sampling and lengths.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int,
        shows_progress: bool,
    ) -> None:
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            add_bos_token=False,
            softmax_dtype="float32",  # in bfloat16 the log-likelihoods of close choices would tie
        )
        self.shows_progress = shows_progress
        self.seconds: dict[str, float] = {}

    def check_fits(self, where: str, prompt: str, answer: int | list[str]) -> None:
        """Raise EchoDataError if the model can't process a prompt with its answer.

        answer: the number of tokens to generate, or the choices to compare.
        """
        ids = self.tok_encode(prompt)
        choices = [] if isinstance(answer, int) else [self._encode_pair(prompt, text)[1] for text in answer]
        if not ids or not all(choices):
            raise EchoDataError(f"{where}: the prompt or a choice has no tokens. Leave the row out.")
        rows, largest = self._embeddings(), max(map(max, [ids, *choices]))
        if rows is not None and largest >= rows:
            token = self.tokenizer.convert_ids_to_tokens(largest)
            raise EchoDataError(
                f"{where}: token {token!r} has id {largest}, but the model has embeddings for {rows} tokens. "
                "Use the model's own tokenizer, or resize the model's embeddings."
            )
        room = answer if isinstance(answer, int) else max(map(len, choices))
        if len(ids) + room > self.max_length:
            raise EchoDataError(
                f"{where}: the prompt has {len(ids)} tokens and the answer up to {room}, but the model's limit is "
                f"{self.max_length}. Shorten the prompt, lower max_new_tokens, or leave the row out."
            )

    def _embeddings(self) -> int | None:
        """The number of token embeddings; None if the model does not tell."""
        try:
            return getattr(self.model.get_input_embeddings(), "num_embeddings", None)
        except NotImplementedError:  # transformers raises it for unusual embeddings
            return None

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return self._by_task(super().loglikelihood, requests)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        return self._by_task(super().generate_until, requests)

    def _by_task(self, run: Callable[..., list[Any]], requests: list[Instance]) -> list[Any]:
        """Responses in the order of requests. Batches don't mix tasks, so no task affects another one's scores."""
        responses = []
        for name, of_task in groupby(requests, key=lambda request: request.task_name):
            start = time.perf_counter()
            responses += run(list(of_task), disable_tqdm=not self.shows_progress)
            self.seconds[name] = time.perf_counter() - start
        return responses

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Token ids of the prompt, the same for all its choices, and of the choice as it follows the prompt."""
        prompt, whole = self.tok_encode(context), self.tok_encode(context + continuation)
        if whole[: len(prompt)] == prompt and len(whole) > len(prompt):
            return prompt, whole[len(prompt) :]
        return prompt, self.tok_encode(continuation)  # a token would span both

    def tok_decode(self, tokens: int | list[int], skip_special_tokens: bool = True) -> str:
        """Decode tokens as they follow other text."""
        if isinstance(tokens, int) or not tokens:
            return super().tok_decode(tokens, skip_special_tokens)
        before = self.tok_encode("a")
        start = super().tok_decode(before, skip_special_tokens)
        return super().tok_decode([*before, *tokens], skip_special_tokens)[len(start) :]

    def _model_generate(self, context: Tensor, max_length: int, stop: list[str], **kwargs: Any) -> Tensor:
        """Let a stop that is a single added token end its row: decoding may drop the token but not what follows."""
        own = self.model.generation_config.eos_token_id
        ends = {self.tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
        ends |= {index for index, token in self.tokenizer.added_tokens_decoder.items() if token.content in stop}
        # max_length must not yield to a max_new_tokens of the model's generation_config
        return super()._model_generate(
            context, max_length, stop, eos_token_id=sorted(ends), max_new_tokens=None, **kwargs
        )
