"""Scoring, against likelihoods and intervals computed here and against a model with scripted answers."""

from __future__ import annotations

import json
import logging
import math
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lm_eval.api.task
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from pydantic import BaseModel, ValidationError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    GenerationMixin,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from echo_lora.errors import EchoConfigError, EchoDataError, EchoError, EchoModelError
from echo_lora.evaluate import EvalTask, TaskResult, score, write_task
from echo_lora.evaluate.lm import RenderedPromptLM

BOS, EOS, PAD, USER, ASSISTANT = "<s>", "</s>", "<pad>", "<|user|>", "<|assistant|>"


def rendered(question: str) -> str:
    """A prompt as a chat template renders it: BOS in the text, a newline at the end."""
    return f"{BOS}{USER}\n{question}\n{ASSISTANT}\n"


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE that adds BOS by default and merges across "\\n": a worst case."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        show_progress=False,
        special_tokens=[PAD, BOS, EOS, USER, ASSISTANT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    text = ["\nyes", "\nyes sir", "\nno", "the answer is 42", "the sky is blue\n", "what is the colour of"]
    backend.train_from_iterator(text * 20, trainer)
    backend.post_processor = processors.TemplateProcessing(f"{BOS} $A", special_tokens=[(BOS, 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[USER, ASSISTANT],
    )


def llama(tokenizer: PreTrainedTokenizerFast, seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=128,
        initializer_range=0.5,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **sizes | changes,
    )
    return LlamaForCausalLM(config)


class Scripted(PreTrainedModel, GenerationMixin):
    """Answers each prompt with scripted tokens. A prompt that differs by one token is an error."""

    config_class = LlamaConfig

    def __init__(self, tokenizer: PreTrainedTokenizerFast, script: dict[str, str]) -> None:
        # no end of sequence in the generation config: the tokenizer's must be used
        super().__init__(LlamaConfig(vocab_size=len(tokenizer), eos_token_id=None, max_position_embeddings=128))
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.script = {
            tuple(tokenizer(prompt, add_special_tokens=False)["input_ids"]): tokenizer(
                answer, add_special_tokens=False
            )["input_ids"]
            for prompt, answer in script.items()
        }
        self.seen: set[tuple[int, ...]] = set()
        self.longest = 0
        self.post_init()

    def prepare_inputs_for_generation(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any
    ) -> dict[str, Any]:
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any
    ) -> CausalLMOutputWithPast:
        logits = torch.zeros(*input_ids.shape, self.config.vocab_size)
        mask_BT = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        for row, (ids, mask) in enumerate(zip(input_ids, mask_BT, strict=True)):
            text = tuple(ids[mask.bool()].tolist())
            [prompt] = [prompt for prompt in self.script if text[: len(prompt)] == prompt]
            said = len(text) - len(prompt)
            if said == 0:
                self.seen.add(text)
            self.longest = max(self.longest, said)
            logits[row, -1, [*self.script[prompt], *[0] * 200][said]] = 1.0
        return CausalLMOutputWithPast(logits=logits)


def wilson(correct: int, total: int) -> tuple[float, float]:
    """E. B. Wilson, 1927, equation for the 95 % interval."""
    z, share = 1.959963984540054, correct / total
    centre = share + z**2 / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    return (centre - spread) / (1 + z**2 / total), (centre + spread) / (1 + z**2 / total)


# ------------------------------------------------------------------------------------------------ generate


def run_script(
    tokenizer: PreTrainedTokenizerFast, dialogue: list[tuple[str, str, str]], **options: Any
) -> tuple[TaskResult, Scripted]:
    """Score (prompt, scripted answer, expected answer) triples."""
    model = Scripted(tokenizer, {prompt: said for prompt, said, _ in dialogue})
    rows = [{"prompt": prompt, "answer": answer} for prompt, _, answer in dialogue]
    [result] = score(model, tokenizer, [(EvalTask(name="quiz", **options), rows)], batch_size=3)
    return result, model


def test_generated_answers_are_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    dialogue = [
        (rendered("right"), f"the answer is 42.{EOS}", "42"),
        (rendered("the first match counts"), f"is 42, no, is 43{EOS}", "43"),
        (rendered("unreadable"), f"who knows{EOS}", "42"),
        (rendered("right, and much longer than the other ones"), f"\nis 7{EOS}", " 7\n"),
        (rendered("silent"), EOS, "1"),
    ]
    result, _ = run_script(tokenizer, dialogue, answer_pattern=r"is (\d+)")
    assert result.predictions == ["42", "42", "", "7", ""]
    assert result.correct_per_row == [True, False, False, True, False]
    assert (result.correct, result.total, result.accuracy, result.unreadable) == (2, 5, 0.4, 0.4)
    assert (result.low, result.high) == pytest.approx(wilson(2, 5), rel=1e-12)
    assert (result.task, result.kind, result.metric, result.filter) == (
        "quiz",
        "generate",
        "exact_match",
        "extract",
    )
    assert json.loads(json.dumps(result.to_dict()))["lm_eval_version"].startswith("0.")


def test_the_model_reads_exactly_the_prompt_tokens(tokenizer: PreTrainedTokenizerFast) -> None:
    prompts = [
        rendered("one"),
        rendered("one that is rather longer"),
        "  no template, spaces around  ",
        "\nyes \n\n",
    ]
    _, model = run_script(tokenizer, [(prompt, f"yes{EOS}", "yes") for prompt in prompts])
    expected = {tuple(tokenizer(prompt, add_special_tokens=False)["input_ids"]) for prompt in prompts}
    assert model.seen == expected
    # not vacuous: by default the tokenizer would change them
    assert expected.isdisjoint({tuple(tokenizer(prompt)["input_ids"]) for prompt in prompts})


def test_nothing_after_the_end_of_an_answer_is_read(tokenizer: PreTrainedTokenizerFast) -> None:
    dialogue = [
        (rendered("ends, and goes on"), f"1{EOS} 2", "1"),
        (rendered("ends with a special token"), f"3{USER} 4", "3"),
        (rendered("ends with text"), "5 STOP 6", "5"),
        (rendered("takes long"), f"{'long ' * 5}{EOS}", "1"),
    ]
    result, model = run_script(tokenizer, dialogue, answer_pattern=r"(\d) *$", stop=["STOP", USER])
    assert result.predictions == ["1", "3", "5", ""]
    assert model.longest > 8  # the batch continued after the first rows had ended


def test_answer_is_as_long_as_the_task_allows(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = rendered("count")
    model = Scripted(tokenizer, {prompt: "a" * 60})
    model.generation_config.max_new_tokens = 3
    rows = [{"prompt": prompt, "answer": "a" * 40}]
    [result] = score(model, tokenizer, [(EvalTask(name="count", max_new_tokens=40), rows)])
    assert result.predictions == ["a" * 40]


def test_first_line_is_read_by_default(tokenizer: PreTrainedTokenizerFast) -> None:
    dialogue = [
        (rendered("first line"), f" \n  blue sky \nnot this{EOS}", "blue sky"),
        (rendered("blank"), f" \n {EOS}", "x"),
    ]
    result, _ = run_script(tokenizer, dialogue)
    assert (result.predictions, result.unreadable) == (["blue sky", ""], 0.5)


@pytest.mark.parametrize("answer", ["2024-01-31", "007", "[1, 2]", "None", "{{ x }}", "1.0", "a\u2028b", "ß🙂"])
def test_answers_are_never_parsed_as_other_types(tokenizer: PreTrainedTokenizerFast, answer: str) -> None:
    result, _ = run_script(tokenizer, [(rendered("{{ y }} {% z %}"), f"{answer}{EOS}", answer)])
    assert (result.predictions, result.accuracy) == ([answer], 1.0)


def test_any_pattern_round_trips_through_the_task_file(tokenizer: PreTrainedTokenizerFast) -> None:
    pattern = r"""(?i)'"answer":\s*#\s*(?:\[(\d+)\]|([ä-ü]+))"""
    dialogue = [
        (rendered("first group"), f'\'"ANSWER": #[12]{EOS}', "12"),
        (rendered("second group"), f'\'"answer":\n# äöü{EOS}', "äöü"),
    ]
    result, _ = run_script(tokenizer, dialogue, answer_pattern=pattern)
    assert result.predictions == ["12", "äöü"]


# -------------------------------------------------------------------------------------------------- choice

CHOICES = ["yes", "yes sir", "no", " blue", "the answer is 42"]
QUESTIONS = ["is it?", "what is the colour of the sky", "the answer is", "yes", "a", "b b", "c c c", "zebra?"]


def choice_rows() -> list[dict[str, Any]]:
    prompts = [*map(rendered, QUESTIONS), "7"]  # lm-eval would read a number as an index
    return [
        {"prompt": prompt, "choices": CHOICES[: 2 + index % 4], "label": index % 4 % 3}
        for index, prompt in enumerate(prompts)
    ]


def loglikelihood(model: Any, tokenizer: PreTrainedTokenizerFast, prompt: str, choice: str) -> float:
    """log p(choice | prompt) of one row without padding, with prompt and choice tokenised separately."""
    before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    after = tokenizer(choice, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logp = model(torch.tensor([before + after])).logits.log_softmax(-1)[0]
    return sum(logp[len(before) - 1 + i, token].item() for i, token in enumerate(after))


def best_choices(model: Any, tokenizer: PreTrainedTokenizerFast, rows: list[dict[str, Any]]) -> list[str]:
    return [max(r["choices"], key=lambda c: loglikelihood(model, tokenizer, r["prompt"], c)) for r in rows]


def test_choice_of_highest_likelihood_is_taken(tokenizer: PreTrainedTokenizerFast) -> None:
    model, rows = llama(tokenizer).eval(), choice_rows()
    expected = best_choices(model, tokenizer, rows)
    assert len(set(expected)) > 2  # not vacuous: the answers differ
    [result] = score(model, tokenizer, [(EvalTask(name="pick", kind="choice"), rows)], batch_size=3)
    right = [best == row["choices"][row["label"]] for best, row in zip(expected, rows, strict=True)]
    assert 0 < sum(right) < len(rows)
    assert (result.predictions, result.correct_per_row) == (expected, right)
    assert (result.low, result.high) == pytest.approx(wilson(sum(right), len(rows)), rel=1e-12)
    assert (result.metric, result.filter, result.unreadable) == ("acc", "none", 0.0)


def test_choices_follow_the_exact_prompt(tokenizer: PreTrainedTokenizerFast) -> None:
    model, rows, seen = llama(tokenizer), choice_rows(), set()
    model.register_forward_pre_hook(lambda _, args: seen.update(map(tuple, args[0].tolist())))
    score(model, tokenizer, [(EvalTask(name="pick", kind="choice"), rows)], batch_size=1)
    expected, joint = set(), 0
    for row in rows:
        for choice in row["choices"]:
            ids = tokenizer([row["prompt"], choice], add_special_tokens=False)["input_ids"]
            expected.add(tuple(ids[0] + ids[1][:-1]))
            joint += tokenizer(row["prompt"] + choice, add_special_tokens=False)["input_ids"] != ids[0] + ids[1]
    assert seen == expected
    assert joint > 0  # not vacuous: tokenised together, some choices would take the prompt's last token


def test_a_choice_is_tokenised_as_a_continuation(tokenizer: PreTrainedTokenizerFast) -> None:
    """A sentencepiece tokenizer adds a space before the first word of a text, but a choice follows a prompt."""
    backend = Tokenizer(models.WordLevel({"?": 0, "<unk>": 1, "▁": 2, "▁yes": 3, "yes": 4, EOS: 5}, "<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="first"), pre_tokenizers.Split("yes", "isolated")]
    )
    backend.add_special_tokens([EOS])
    sentencepiece = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=EOS, unk_token="<unk>")
    alone = sentencepiece("yes", add_special_tokens=False)["input_ids"]
    lm = RenderedPromptLM(llama(tokenizer), sentencepiece, batch_size=1, shows_progress=False)
    _, choice = lm._encode_pair("?", "yes")
    assert choice == [4]
    assert alone != choice


def test_close_choices_do_not_tie_in_bfloat16(tokenizer: PreTrainedTokenizerFast) -> None:
    """bfloat16 has steps of 1/32 near -6, where log p is, and finer ones near 0, where the logits are."""
    model = llama(tokenizer).to(torch.bfloat16).eval()
    model.lm_head.weight.data *= 0.01
    choices = list("abcdefghijklmnopqrstuvwxyz")
    rows = [{"prompt": rendered(question), "choices": choices, "label": 0} for question in QUESTIONS]
    prompts = [tokenizer(row["prompt"], add_special_tokens=False, return_tensors="pt") for row in rows]
    letters = tokenizer.convert_tokens_to_ids(choices)
    with torch.no_grad():
        logits = [model(**prompt).logits[0, -1, letters] for prompt in prompts]
    [result] = score(model, tokenizer, [(EvalTask(name="pick", kind="choice"), rows)], batch_size=1)
    assert result.predictions == [choices[row.argmax()] for row in logits]


# ----------------------------------------------------------------------------------------- score as a whole


@pytest.fixture
def quick(tokenizer: PreTrainedTokenizerFast) -> tuple[PreTrainedModel, list[dict[str, Any]]]:
    return llama(tokenizer), [{"prompt": rendered(q), "answer": "x"} for q in QUESTIONS[:3]]


def test_tasks_are_scored_in_order_and_independently(tokenizer: PreTrainedTokenizerFast) -> None:
    model, rows = llama(tokenizer), choice_rows()
    generate = [row | {"answer": "x"} for row in rows]
    tasks = [
        (EvalTask(name="b-2", kind="choice", limit=5), iter(rows)),
        (EvalTask(name="a_1", max_new_tokens=4), generate[:2]),
        (EvalTask(name="c", kind="choice"), rows),
    ]
    results = score(model, tokenizer, tasks, batch_size=4)
    assert [(r.task, r.total) for r in results] == [("b-2", 5), ("a_1", 2), ("c", len(rows))]
    assert results[0].predictions == results[2].predictions[:5] == best_choices(model, tokenizer, rows)[:5]
    assert all(r.seconds > 0 for r in results)


def test_an_adapter_is_scored_with_its_weights(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = choice_rows()
    tasks = [
        (EvalTask(name="pick", kind="choice"), rows),
        (EvalTask(name="say", max_new_tokens=4), [row | {"answer": "x"} for row in rows]),
    ]
    base = llama(tokenizer)
    before = [r.predictions for r in score(base, tokenizer, tasks)]
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft_model = get_peft_model(base, config)  # lora_B is zero
    assert [r.predictions for r in score(peft_model, tokenizer, tasks)] == before
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=20.0)
    changed = score(peft_model, tokenizer, tasks)
    assert changed[0].predictions == best_choices(peft_model.eval(), tokenizer, rows) != before[0]


@pytest.mark.parametrize("fails", [False, True], ids=["scored", "failed"])
def test_scoring_restores_modes_padding_and_random_states(
    tokenizer: PreTrainedTokenizerFast, quick: Any, fails: bool
) -> None:
    model, rows = quick
    model.train()
    model.model.layers[0].eval()  # such as a frozen module
    tokenizer.pad_token = None
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    expected = random.random(), np.random.rand(), torch.rand(1)
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    task = EvalTask(name="quiz", max_new_tokens=120 if fails else 2)
    if fails:
        with pytest.raises(EchoDataError):
            score(model, tokenizer, [(task, rows)])
    else:
        score(model, tokenizer, [(task, rows)])
    assert model.training
    assert model.model.layers[1].training
    assert not model.model.layers[0].training
    assert not model.model.layers[0].mlp.training
    assert tokenizer.pad_token is None
    assert (random.random(), np.random.rand(), torch.rand(1)) == expected


def test_scoring_happens_in_eval_mode(tokenizer: PreTrainedTokenizerFast) -> None:
    model, rows = llama(tokenizer, attention_dropout=0.9), choice_rows()
    task = EvalTask(name="pick", kind="choice")
    [result] = score(model.train(), tokenizer, [(task, rows)])
    assert result.predictions == best_choices(model.eval(), tokenizer, rows)


def test_seed_reaches_the_model(tokenizer: PreTrainedTokenizerFast, quick: Any) -> None:
    model, rows = quick
    seeds = set()
    model.register_forward_pre_hook(lambda *_: seeds.add(torch.initial_seed()))
    score(model, tokenizer, [(EvalTask(name="quiz", max_new_tokens=1), rows)], seed=5)
    assert seeds == {5}


@pytest.mark.parametrize("on_terminal", [False, True], ids=["file", "terminal"])
def test_progress_bars_are_shown_on_terminals_only(
    tokenizer: PreTrainedTokenizerFast,
    quick: Any,
    on_terminal: bool,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, rows = quick
    tasks = [
        (EvalTask(name="say", max_new_tokens=2), rows),
        (EvalTask(name="pick", kind="choice"), choice_rows()),
    ]
    monkeypatch.setattr(sys.stderr, "isatty", lambda: on_terminal)
    monkeypatch.chdir("/")  # not a git repository: git would print an error
    caplog.set_level(logging.INFO, logger="lm_eval")
    bar = lm_eval.api.task.tqdm
    score(model, tokenizer, tasks)
    out, err = capfd.readouterr()
    assert out == ""
    assert ("Running generate_until" in err) == ("Running loglikelihood" in err) == on_terminal
    if not on_terminal:
        assert err == ""
    score(model, tokenizer, tasks, progress=False)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    assert (lm_eval.api.task.tqdm, logging.getLogger("lm_eval").level) == (bar, logging.INFO)


# --------------------------------------------------------------------------------------------------- errors


def refusal(error: type[EchoError], tokenizer: Any, tasks: list[Any], model: Any = None) -> str:
    with pytest.raises(error) as caught:
        score(model or llama(tokenizer), tokenizer, tasks)
    return str(caught.value)


GOOD_CHOICE = {"prompt": "p", "choices": ["a", "b"], "label": 1}
GOOD_CODE = {"prompt": "def f(x):\n", "test": "def check(f):\n    assert f(1) == 1\n", "entry_point": "f"}


@pytest.mark.parametrize(
    ("kind", "row", "where"),
    [
        ("generate", {"prompt": "p"}, "field 'answer' is missing. Present: prompt"),
        ("generate", {}, "is missing. Present: none"),
        ("generate", {"prompt": "p", "answer": " "}, "answer = ' '"),
        ("generate", {"prompt": "p", "answer": 7}, "answer = 7"),
        ("generate", {"prompt": "", "answer": "a"}, "prompt = ''"),
        ("generate", {"prompt": "p\ud800", "answer": "a"}, "prompt holds half of a character, '\\ud800' at position 1"),
        ("generate", {"prompt": "p", "answer": "\ud800"}, "answer holds half of a character"),
        ("choice", GOOD_CHOICE | {"choices": ["a", "\udfff"]}, "choices holds half of a character"),
        ("generate", "text", "'text' is not an object"),
        ("choice", None, "None is not an object"),
        ("generate", {"prompt": "p", "answer": "a\nb"}, "answer_pattern"),
        ("choice", {"choices": ["a", "b"], "label": 0}, "field 'prompt' is missing"),
        ("choice", {"prompt": "p", "label": 0}, "field 'choices' is missing"),
        ("choice", {"prompt": "p", "choices": ["a", "b"]}, "field 'label' is missing"),
        ("choice", GOOD_CHOICE | {"choices": ["a"]}, "choices = ['a']"),
        ("choice", GOOD_CHOICE | {"choices": ["a", "a"]}, "choices = ['a', 'a']"),
        ("choice", GOOD_CHOICE | {"choices": ["a", ""]}, "choices = ['a', '']"),
        ("choice", GOOD_CHOICE | {"choices": "ab"}, "choices = 'ab'"),
        ("choice", GOOD_CHOICE | {"label": 2}, "label = 2 must be the index of a choice. Use 0 to 1"),
        ("choice", GOOD_CHOICE | {"label": -1}, "label = -1"),
        ("choice", GOOD_CHOICE | {"label": True}, "label = True"),
        ("choice", GOOD_CHOICE | {"label": "1"}, "label = '1'"),
        ("code", GOOD_CODE | {"entry_point": "f(x)"}, "entry_point = 'f(x)' must be the name of a function"),
        ("code", GOOD_CODE | {"test": "def check(f) assert f(1)"}, "test is not valid Python: "),
        ("code", GOOD_CODE | {"test": "assert f(1) == 1"}, "test does not define check(candidate)"),
        ("code", GOOD_CODE | {"prompt": "Write a function that doubles."}, "is not the start of a Python program"),
        ("code", GOOD_CODE | {"prompt": "<|im_start|>user\ndef f(x):\n"}, "is not the start of a Python program"),
        ("code", GOOD_CODE | {"prompt": "def f(x):\n    return x\0"}, "is not the start of a Python program"),
    ],
)
def test_a_bad_row_is_an_error_that_names_it(tmp_path: Path, kind: Any, row: dict[str, Any], where: str) -> None:
    good = GOOD_CODE if kind == "code" else {"prompt": "p", "answer": "a"} | GOOD_CHOICE
    with pytest.raises(EchoDataError) as caught:
        write_task(EvalTask(name="t", kind=kind, file="test.jsonl"), [good, row], tmp_path)
    assert str(caught.value).startswith("test.jsonl: row 1: ")
    assert where in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "prompt",
    [
        "def f(x):\n",
        "def f(x):\n    ",
        "def f(x):\n    for i in x:\n",
        'def f(x):\n    """Double.',
        'def f(x):\n    """Double."""\n',
        "def f(x):\n    return",
        "def f(x):\n    return x +",
        "x = (1,\n",
        "import",
        "# Double.\n",
        "if True:\n    x = 1\nelse",
    ],
)
def test_a_code_prompt_may_end_anywhere(tmp_path: Path, prompt: str) -> None:
    write_task(EvalTask(name="t", kind="code"), [GOOD_CODE | {"prompt": prompt}], tmp_path)


def test_an_empty_task_is_an_error_that_names_it(tmp_path: Path) -> None:
    with pytest.raises(EchoDataError, match=r"^t: no rows"):
        write_task(EvalTask(name="t"), [], tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"kind": "essay"},
            "evaluation task 't': kind = 'essay' must be 'choice', 'generate', 'number' or 'code'.",
        ),
        ({"limt": 3}, "evaluation task 't': unknown field 'limt'. Did you mean 'limit'?"),
        ({"answer_pattern": "(\\d"}, "answer_pattern = '(\\\\d' must be a valid regular expression: missing )"),
        ({"answer_pattern": ""}, "answer_pattern = ''"),
        ({"max_new_tokens": 0}, "max_new_tokens = 0"),
        ({"limit": 0}, "limit = 0"),
        ({"stop": [""]}, "stop.0 = ''"),
        ({"name": "a b"}, "name = 'a b'"),
        ({"kind": "choice", "answer_pattern": "x"}, "answer_pattern works with kind 'generate' only"),
        ({"kind": "choice", "stop": ["x"]}, "stop works with generated answers only"),
        ({"kind": "choice", "num_beams": 4}, "num_beams works with generated answers only"),
        (
            {"kind": "code", "answer_pattern": "x"},
            "answer_pattern works with kind 'generate' only, not with 'code'",
        ),
        ({"num_beams": 0}, "num_beams = 0"),
        ({"num_beams": 10**9}, "num_beams = 1000000000"),
        ({"name": "a" * 300}, "name = 'aaa"),
    ],
)
def test_a_bad_field_is_an_error_that_names_it(values: dict[str, Any], message: str) -> None:
    with pytest.raises(EchoConfigError) as caught:
        EvalTask(**{"name": "t"} | values)
    assert message in str(caught.value)


def test_a_missing_task_name_is_an_error() -> None:
    with pytest.raises(EchoConfigError, match="name is missing"):
        EvalTask()


def test_a_bad_field_inside_a_recipe_is_an_error_that_names_it() -> None:
    class Recipe(BaseModel):
        tasks: list[EvalTask]

    with pytest.raises(ValidationError, match=r"tasks\.1\n.*max_new_tokens = 0"):
        Recipe.model_validate({"tasks": [{"name": "a"}, {"name": "b", "max_new_tokens": 0}]})
    recipe = Recipe.model_validate({"tasks": [{"name": "a", "kind": "choice"}]})
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


def test_every_field_has_a_description() -> None:
    assert all(field.description for field in EvalTask.model_fields.values())


def test_duplicate_task_names_are_refused(tokenizer: PreTrainedTokenizerFast, quick: Any) -> None:
    task = EvalTask(name="quiz"), quick[1]
    assert "'quiz' is given 2 times" in refusal(EchoConfigError, tokenizer, [task, task])
    # one file on a case-insensitive file system
    assert "'quiz' is given 2 times" in refusal(EchoConfigError, tokenizer, [task, (EvalTask(name="Quiz"), quick[1])])
    assert "no evaluation tasks" in refusal(EchoConfigError, tokenizer, [])


@pytest.mark.parametrize("size", [0, -1, 1.5, "auto", True])
def test_a_bad_batch_size_is_refused(tokenizer: PreTrainedTokenizerFast, quick: Any, size: Any) -> None:
    with pytest.raises(EchoConfigError, match="batch_size = "):
        score(quick[0], tokenizer, [(EvalTask(name="quiz"), quick[1])], batch_size=size)


def test_tasks_may_be_a_generator(tokenizer: PreTrainedTokenizerFast, quick: Any) -> None:
    tasks = ((EvalTask(name=name, max_new_tokens=2), quick[1]) for name in "ab")
    assert [result.total for result in score(quick[0], tokenizer, tasks)] == [3, 3]
    code = ((EvalTask(name="c", kind="code"), [GOOD_CODE]) for _ in range(1))
    with pytest.raises(EchoConfigError, match="--run-generated-code"):
        score(quick[0], tokenizer, code)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("generate", {"prompt": "p<new>"}),
        ("choice", {"prompt": "p<new>"}),
        ("choice", {"choices": ["a", "<new>"]}),
    ],
)
def test_a_token_without_embedding_is_an_error_that_names_it(
    tokenizer: PreTrainedTokenizerFast, kind: Any, changes: dict[str, Any]
) -> None:
    model = llama(tokenizer)
    tokenizer.add_tokens(["<new>"])
    row = {"prompt": "p", "answer": "a", "choices": ["a", "b"], "label": 0}
    task = EvalTask(name="quiz", kind=kind, max_new_tokens=2)
    assert score(model, tokenizer, [(task, [row])])[0].total == 1
    size = model.config.vocab_size
    message = refusal(EchoDataError, tokenizer, [(task, [row | changes])], model)
    assert message.startswith(f"quiz: row 0: token '<new>' has id {size}, but the model has embeddings for {size}")


@pytest.mark.parametrize("kind", ["generate", "choice"])
def test_a_long_prompt_is_refused_instead_of_cut(tokenizer: PreTrainedTokenizerFast, kind: Any) -> None:
    def row(length: int) -> dict[str, Any]:
        return {"prompt": "z" * length, "answer": "a", "choices": ["z", "zz"], "label": 0}

    task = EvalTask(name="quiz", kind=kind, max_new_tokens=2)  # the longest choice has two tokens as well
    assert score(llama(tokenizer), tokenizer, [(task, [row(126)])])[0].total == 1
    message = refusal(EchoDataError, tokenizer, [(task, [row(1), row(127)])])
    assert message.startswith("quiz: row 1: the prompt has 127 tokens and the answer up to 2, but")


def test_nan_log_likelihoods_are_an_error(tokenizer: PreTrainedTokenizerFast) -> None:
    model = llama(tokenizer)
    model.lm_head.weight.data.fill_(math.nan)
    task = EvalTask(name="pick", kind="choice"), choice_rows()
    assert refusal(EchoModelError, tokenizer, [task], model).startswith("pick: row 0: ")


def test_a_tokenizer_without_eos_token_is_refused(tokenizer: PreTrainedTokenizerFast, quick: Any) -> None:
    model = llama(tokenizer)
    tokenizer.eos_token = None
    assert "eos_token" in refusal(EchoModelError, tokenizer, [(EvalTask(name="quiz"), quick[1])], model)


def test_missing_lm_eval_says_what_to_install(
    tokenizer: PreTrainedTokenizerFast, quick: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    message = refusal(EchoError, tokenizer, [(EvalTask(name="quiz"), quick[1])])
    assert 'pip install "echo-lora[eval]"' in message


# ---------------------------------------------------------------------------------------------- task files


def test_a_task_file_loads_in_lm_eval(tmp_path: Path) -> None:
    from lm_eval.tasks import TaskManager

    rows: Iterator[dict[str, Any]] = iter([GOOD_CHOICE | {"note": "left out"}] * 3)
    path = write_task(EvalTask(name="pick", kind="choice", limit=2), rows, tmp_path / "new")
    assert sorted(file.name for file in path.parent.iterdir()) == ["pick.jsonl", "pick.yaml"]
    [task] = TaskManager(include_path=str(path.parent), include_defaults=False).load(["pick"])["tasks"].values()
    assert list(task.test_docs()) == [GOOD_CHOICE] * 2
    assert task.VERSION == 1.0


def test_importing_evaluate_imports_nothing_heavy() -> None:
    heavy = {"torch", "lm_eval", "transformers", "datasets", "scipy"}
    command = f"import sys, echo_lora.evaluate; print({heavy} & set(sys.modules))"
    shown = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True).stdout
    assert shown.strip() == "set()"
