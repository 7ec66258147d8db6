"""The benchmarks and their protocols: the eight commonsense tasks of LLM-Adapters, GSM8K, MMLU and HumanEval.

    boolq, piqa, social_i_qa, hellaswag, winogrande, ARC-Easy, ARC-Challenge, openbookqa
                 an instruction; "the correct answer is …" is generated with four beams, and the first match is read
    gsm8k        a question; the worked solution is generated, and its number is read
    mmlu         five-shot, with examples of the same subject; A, B, C or D by log-likelihood
    humaneval    the head of a Python function; its body is generated and run on the task's test

LLM-Adapters' training and evaluation prompts differ in white space, and indent every line but the first by sixteen
blanks (finetune.py and commonsense_evaluate.py at commit 8166572). Rows reproduce both to the byte. The task files for
lm-evaluation-harness alone are in `evaluate/lm_eval_tasks/`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from echo_lora.errors import EchoConfigError, EchoDataError, nearest
from echo_lora.evaluate.answers import read_number

INDENT = " " * 16

RESPONSE = "### Response:"

_HEAD = "Below is an instruction that describes a task. Write a response that appropriately completes the request."

LETTERS = "ABCD"

Row = dict[str, Any]


@dataclass(frozen=True)
class Benchmark:
    """A benchmark's published counts and how it is scored."""

    name: str
    published: Mapping[str, int]  # rows of each split
    scored: Mapping[str, Any]  # fields of its EvalTask
    repeats: int = 0  # duplicates among the published train rows, beyond the first of each
    intro: str = ""  # start of the instruction; empty for the three without one
    option: str = ""  # name of its choices
    between: str = " "  # separator of two choices
    before_format: str = "\n\n"  # separator before the line that lists the possible answers

    @property
    def has_instructions(self) -> bool:
        """Whether it is one of LLM-Adapters' eight."""
        return bool(self.intro)


def _commonsense(name: str, *, train: int, test: int, pattern: str, **layout: Any) -> Benchmark:
    scored = {"answer_pattern": pattern, "num_beams": 4, "max_new_tokens": 32, "stop": [RESPONSE]}
    return Benchmark(name, {"train": train, "test": test}, scored, **layout)


_CHOOSE = {
    "pattern": "answer1|answer2|answer3|answer4|answer5",
    "intro": "Please choose the correct answer to the question: ",
    "option": "answer",
}

_LIST = [
    _commonsense(
        "boolq",
        train=9427,
        test=3270,
        pattern="true|false",
        intro="Please answer the following question with true or false, question: ",
    ),
    _commonsense(
        "piqa",
        train=16113,
        test=1838,
        repeats=6,
        pattern="solution1|solution2",
        intro="Please choose the correct solution to the question: ",
        option="solution",
        between="\n\n",
    ),
    _commonsense("social_i_qa", train=33410, test=1954, repeats=24, **_CHOOSE),
    _commonsense(
        "hellaswag",
        train=39905,
        test=10042,
        pattern="ending1|ending2|ending3|ending4",
        intro="Please choose the correct ending to complete the given sentence: ",
        option="ending",
    ),
    _commonsense(
        "winogrande",
        train=63238,
        test=1267,
        repeats=22750,
        pattern="option1|option2",
        intro="Please choose the correct answer to fill in the blank to complete the given sentence: ",
        option="option",
        before_format=" ",
    ),
    _commonsense("ARC-Easy", train=2251, test=2376, **_CHOOSE),
    _commonsense("ARC-Challenge", train=1119, test=1172, repeats=1, **_CHOOSE),
    _commonsense("openbookqa", train=4957, test=500, repeats=5, **_CHOOSE),
    Benchmark(
        "gsm8k",
        published={"train": 7473, "test": 1319},
        scored={"kind": "number", "max_new_tokens": 400, "stop": ["Question:"]},
    ),
    Benchmark("mmlu", published={"dev": 285, "validation": 1531, "test": 14042}, scored={"kind": "choice"}),
    Benchmark(
        "humaneval",
        published={"test": 164},
        scored={"kind": "code", "max_new_tokens": 512, "stop": ["\nclass", "\ndef", "\n#", "\nif", "\nprint"]},
    ),
]

BENCHMARKS = {benchmark.name: benchmark for benchmark in _LIST}

COMMONSENSE = [name for name, benchmark in BENCHMARKS.items() if benchmark.has_instructions]

UNION, UNION_ROWS = "commonsense_170k", 170_420  # the eight train files in one, in its own order


def benchmark_named(name: str) -> Benchmark:
    """Raises EchoConfigError for an unknown name."""
    if name not in BENCHMARKS:
        raise EchoConfigError(f"{name!r} is not a known benchmark.{nearest(name, list(BENCHMARKS))}")
    return BENCHMARKS[name]


def commonsense_average(accuracies: Mapping[str, float]) -> float | None:
    """LLM-Adapters' average: the unweighted mean of the eight accuracies, by name; None if one is missing."""
    if not accuracies.keys() >= set(COMMONSENSE):
        return None
    return sum(accuracies[name] for name in COMMONSENSE) / len(COMMONSENSE)


# ------------------------------------------------------------------------------------------------ the prompts


def training_prompt(instruction: str) -> str:
    """LLM-Adapters' training text before the output: two blanks after `request.`, a line of blanks before the response.

    A tokenizer may merge the last blanks with the output; the boundary then lies before them.
    """
    return f"{_HEAD}  \n\n{INDENT}### Instruction:\n{INDENT}{instruction}\n{INDENT}\n{INDENT}{RESPONSE}\n{INDENT}"


def evaluation_prompt(instruction: str) -> str:
    """LLM-Adapters' evaluation prompt: one blank after `request.`, an empty line after the instruction."""
    return f"{_HEAD} \n\n{INDENT}### Instruction:\n{INDENT}{instruction}\n\n{INDENT}{RESPONSE}\n{INDENT}"


def instruction_of(name: str, question: str, choices: Sequence[str]) -> str:
    """LLM-Adapters' instruction for a question of the original data set. boolq: the question comes without its `?`."""
    benchmark = benchmark_named(name)
    if not benchmark.option:
        return f"{benchmark.intro}{question}?\n\nAnswer format: true/false"
    option = benchmark.option
    options = benchmark.between.join(f"{option.capitalize()}{i}: {text}" for i, text in enumerate(choices, start=1))
    possible = "/".join(f"{option}{i}" for i in range(1, len(choices) + 1))
    return f"{benchmark.intro}{question}\n\n{options}{benchmark.before_format}Answer format: {possible}"


def answer_of(name: str, choices: Sequence[str], label: int) -> str:
    """The answer as LLM-Adapters names it: `true`, `solution2`, …"""
    option = benchmark_named(name).option
    return f"{option}{label + 1}" if option else choices[label]


# --------------------------------------------------------------------------------------------------- the rows


def benchmark_rows(name: str, split: str, raw: Sequence[Row], dev: Sequence[Row] = ()) -> list[Row]:
    """Rows to train on or to score, with complete prompts, from a split's raw rows.

    raw: rows with the columns listed in `docs/data.md`. dev: mmlu's dev split, the few-shot examples. Test rows have no
    completion. Raises KeyError for a missing column, EchoDataError for a subject with fewer than five examples.
    """
    if benchmark_named(name).has_instructions:
        return [_instructed(row, is_test=split == "test") for row in raw]
    if name == "gsm8k":
        return [_solved(row, is_test=split == "test") for row in raw]
    if name == "mmlu":
        shots = {subject: _shots(subject, dev) for subject in {row["subject"] for row in raw}}
        return [
            {
                "prompt": shots[row["subject"]] + _question(row),
                "choices": [f" {letter}" for letter in LETTERS],
                "label": row["answer"],
                "group": row["subject"],
            }
            for row in raw
        ]
    names = ("task_id", "prompt", "test", "entry_point", "canonical_solution")
    return [{column: row[column] for column in names} for row in raw]


def _instructed(row: Row, *, is_test: bool) -> Row:
    native = {column: row[column] for column in ("question", "choices", "label", "part") if row.get(column) is not None}
    if is_test:
        return {"prompt": evaluation_prompt(row["instruction"]), "answer": row["answer"]} | native
    texts = {"prompt": training_prompt(row["instruction"]), "completion": row["output"], "answer": row["answer"]}
    return texts | native


def _solved(row: Row, *, is_test: bool) -> Row:
    prompt = f"Question: {row['question']}\nAnswer:"
    answer = {"answer": read_number(row["answer"])}
    return {"prompt": prompt} | ({} if is_test else {"completion": f" {row['answer']}"}) | answer


def _shots(subject: str, dev: Sequence[Row]) -> str:
    """The prompt before a question of the subject, as in lm-eval's mmlu."""
    head = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
    own = [row for row in dev if row["subject"] == subject][:5]
    if len(own) < 5:
        raise EchoDataError(
            f"mmlu: dev has {len(own)} examples of the subject {subject!r}; each prompt needs five. Add the others."
        )
    return head + "".join(f"{_question(row)} {LETTERS[row['answer']]}\n\n" for row in own)


def _question(row: Row) -> str:
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, row["choices"], strict=True)]
    return "\n".join([row["question"].strip(), *lines, "Answer:"])
