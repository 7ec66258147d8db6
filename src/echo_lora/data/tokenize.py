"""From rows to token ids and labels, the same as TRL's SFTTrainer makes.

The echo requires more of a row than TRL does: a **boundary**, which is the last token before its first answer token,
and its whole answer. A row without them is an error that names it. Content that is not trained on, because the chat
template leaves it out or the turn is not the assistant's, is a warning that names the row.

`row` is the index of a row in its source, from 0; in a JSON Lines file it is on line `row + 1`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from echo_lora.data.forms import checked_row, is_learned, row_number
from echo_lora.data.template import Template
from echo_lora.errors import EchoDataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


IGNORED = -100
ANSWER = "completion_mask"  # column that is 1 at answer tokens, if labels cover prompt tokens too


@dataclass(frozen=True)
class TokenizedRow:
    """Token ids and labels (-100 where nothing is learned) of one row, both of length T."""

    input_ids: list[int]
    labels: list[int]
    row: int = 0
    merged_tokens: int = 0  # prompt tokens that change when the answer follows; TRL drops them from the prompt
    untrained: tuple[str, ...] = ()  # content outside the prompt that is not trained on

    @property
    def answer_start(self) -> int:
        """Column of the first answer token; T if there is none."""
        return next((i for i, label in enumerate(self.labels) if label != IGNORED), len(self.labels))


def tokenize_row(
    row: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    chat: bool = False,
    where: str | None = None,
    assistant_only: bool = False,
) -> TokenizedRow:
    """Ids and labels of `row`, as TRL's SFTTrainer makes them when it trains on the assistant's turns only.

    chat: put a plain prompt and completion through the chat template, as a user's and an assistant's message.
    assistant_only: train only on what the template marks as the assistant's, in a completion of messages too.
    where: how errors name the row. Raises EchoDataError for a row without a prompt or without an answer.
    """
    number = row_number(row, 0)
    where = where or f"row {number}"
    row = checked_row(row, where)
    if "messages" in row:
        return _tokenize_marked(row, [], row["messages"], tokenizer, where, number)
    row = _as_chat(row) if chat else row
    if not isinstance(row["prompt"], str):
        prompt, completion = row["prompt"], row["completion"]
        if assistant_only or not all(map(is_learned, completion)):
            return _tokenize_marked(row, prompt, completion, tokenizer, where, number)
        template = Template(row, tokenizer, where)
        messages, left_out = template.fit(prompt + completion, len(prompt))
        prompt_ids = template.tokenize(messages[: len(prompt)], add_generation_prompt=True)
        ids = template.tokenize(messages)
    else:
        left_out = ()
        if tokenizer.eos_token is None:
            raise EchoDataError(
                f"{where} can't be terminated: {tokenizer.name_or_path} has no end-of-sequence token. "
                "Set tokenizer.eos_token."
            )
        text = row["prompt"] + row["completion"].removesuffix(tokenizer.eos_token) + tokenizer.eos_token
        prompt_ids = tokenizer(text=row["prompt"])["input_ids"]
        ids = tokenizer(text=text)["input_ids"]
    start = _common_prefix(prompt_ids, ids)
    labels = [IGNORED] * start + list(ids[start:])
    return TokenizedRow(list(ids), labels, number, len(prompt_ids) - start, left_out)


def _tokenize_marked(
    row: Mapping[str, Any],
    prompt: list[dict[str, Any]],
    completion: list[dict[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    where: str,
    number: int,
) -> TokenizedRow:
    """A row of several turns; the turns that the template marks as the assistant's are trained on."""
    template = Template(row, tokenizer, where, has_marks=True)
    messages, left_out = template.fit(prompt + completion, len(prompt))
    ids, mask = template.tokenize_marked(messages)
    start = merged = 0
    if prompt:
        prompt_ids = template.tokenize(messages[: len(prompt)], add_generation_prompt=True)
        start = _common_prefix(prompt_ids, ids)
        merged = len(prompt_ids) - start
    turns = [message for message in prompt + completion if message["role"] == "assistant"]
    if not all(map(is_learned, turns)):
        mask = _without_weight(mask, [is_learned(turn) for turn in turns], where)
    labels = [
        token if marked and column >= start else IGNORED
        for column, (token, marked) in enumerate(zip(ids, mask, strict=True))
    ]
    if labels.count(IGNORED) == len(labels):
        raise EchoDataError(
            f"{where} has no answer token: the chat template of {tokenizer.name_or_path} marks nothing as the "
            "assistant's. Put the assistant's content between {% generation %} and {% endgeneration %} in the "
            "template, or write the row as prompt and completion."
        )
    foreign = {f"turns of the {m['role']} in its completion" for m in completion if m["role"] != "assistant"}
    return TokenizedRow(ids, labels, number, merged, left_out + tuple(sorted(foreign)) if prompt else left_out)


def _without_weight(mask: list[int], learned: list[bool], where: str) -> list[int]:
    """The mask without the turns of weight 0; each assistant turn is one run of marked tokens."""
    runs = [(bool(marked), len(list(tokens))) for marked, tokens in groupby(mask)]
    spans, turns = sum(marked for marked, _ in runs), iter(learned)
    if spans != len(learned):
        raise EchoDataError(
            f"{where} has a turn with weight 0, but the chat template marks {spans} spans as the assistant's, who has "
            f"{len(learned)} turns, so the tokens of that turn can't be found. Write the row as prompt and completion, "
            "with such turns in the prompt."
        )
    return [value for marked, length in runs for value in [int(marked and next(turns))] * length]


def render_prompt(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, chat: bool = False, where: str | None = None
) -> str:
    """The prompt as text, special tokens included, for generation and scoring.

    Tokenised with `add_special_tokens=False`, it gives the ids before the row's first answer token. A conversation is
    rendered up to the first message that is trained on; a row without a completion is rendered whole. Raises
    EchoDataError if no text gives these ids.
    """
    where = where or f"row {row_number(row, 0)}"
    if row.get("messages") is None and row.get("completion") is None:
        is_chat = isinstance(row.get("prompt"), list)
        completion = [{"role": "assistant", "content": "?"}] if is_chat else "?"
        return _prompt_text(checked_row({**row, "completion": completion}, where), tokenizer, chat, where)
    tokenized = tokenize_row(row, tokenizer, chat, where)
    ids = tokenized.input_ids[: tokenized.answer_start]
    text = _prompt_text(checked_row(row, where), tokenizer, chat, where)
    for candidate in (text, tokenizer.decode(ids, clean_up_tokenization_spaces=False)):
        if tokenizer(candidate, add_special_tokens=False)["input_ids"] == ids:
            return candidate
    raise EchoDataError(
        f"{where}: no text reproduces the token ids of its prompt with the tokenizer {tokenizer.name_or_path}. "
        "End the prompt on a token boundary, for example without a trailing space."
    )


def _prompt_text(row: dict[str, Any], tokenizer: PreTrainedTokenizerBase, chat: bool, where: str) -> str:
    row = _as_chat(row) if chat else row
    if "messages" in row:
        first = next(i for i, message in enumerate(row["messages"]) if is_learned(message))
        messages = row["messages"][:first]
    elif isinstance(row["prompt"], str):
        with_special, plain = (
            tokenizer(row["prompt"], add_special_tokens=special)["input_ids"] for special in (True, False)
        )
        added = with_special[: len(with_special) - len(plain)]  # usually a beginning-of-sequence token
        return "".join(tokenizer.convert_ids_to_tokens(added)) + row["prompt"]
    else:
        messages = row["prompt"]
    template = Template(row, tokenizer, where)
    return template.render(template.fit(messages, len(messages))[0], add_generation_prompt=True)


def _as_chat(row: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(row.get("prompt"), str):
        return row
    return row | {
        "prompt": [{"role": "user", "content": row["prompt"]}],
        "completion": [{"role": "assistant", "content": row["completion"]}],
    }


def _common_prefix(ids: list[int], others: list[int]) -> int:
    shorter = min(len(ids), len(others))
    return next((i for i in range(shorter) if ids[i] != others[i]), shorter)


def end_token_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Ids of the end-of-sequence token and of the special tokens that the chat template puts after an answer."""
    ends = {tokenizer.eos_token_id} - {None}
    if tokenizer.chat_template is None:
        return ends
    answer = "the-answer-of-the-assistant"
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]
    text = Template({}, tokenizer, "An example").render(messages)
    after = tokenizer(text.partition(answer)[2], add_special_tokens=False)["input_ids"]
    special = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return ends | (special.intersection(after) - {tokenizer.bos_token_id})
