"""The benchmarks of the method's text, as rows: eight tasks by the protocol of LLM-Adapters, and three more.

    boolq, piqa, social_i_qa, hellaswag, winogrande, ARC-Easy, ARC-Challenge, openbookqa
                 an instruction; "the correct answer is …" is generated with four beams, and its first match is read
    gsm8k        a question; the worked solution is generated, its number is read
    mmlu         five solved questions of the same subject, then one; A, B, C or D by log-likelihood
    humaneval    the head of a Python function; its body is generated and run on the task's test

LLM-Adapters trains and evaluates with prompts that differ in white space, and indents every line but the first by
sixteen blanks (finetune.py and commonsense_evaluate.py at commit 8166572). The rows keep both to the byte. `EvalTask`s
are made by `eval_task`; the task files for lm-evaluation-harness itself are in `lm_eval_tasks/`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from echo_lora.errors import EchoConfigError, EchoDataError, nearest
from echo_lora.evaluate.answers import read_number
from echo_lora.evaluate.tasks import EvalTask

INDENT = " " * 16

RESPONSE = "### Response:"

_HEAD = "Below is an instruction that describes a task. Write a response that appropriately completes the request."

LETTERS = "ABCD"

Row = dict[str, Any]


@dataclass(frozen=True)
class Benchmark:
    """What is published of a data set, and how it is scored."""

    name: str
    published: Mapping[str, int]  # rows of each part
    scored: Mapping[str, Any]  # fields of its EvalTask
    repeats: int = 0  # train rows that are published more than once, beyond the first of each
    intro: str = ""  # of the instruction; empty for the three that have none
    option: str = ""  # what its choices are called
    between: str = " "  # two choices
    before_format: str = "\n\n"  # the line that names the possible answers

    @property
    def has_instructions(self) -> bool:
        """Whether it is one of the eight in the form of LLM-Adapters."""
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

UNION, UNION_ROWS = "commonsense_170k", 170_420  # the eight train files as one, in an order of its own


def benchmark_named(name: str) -> Benchmark:
    """Raises EchoConfigError, with the nearest name, for an unknown one."""
    if name not in BENCHMARKS:
        raise EchoConfigError(f"{name!r} is no benchmark.{nearest(name, list(BENCHMARKS))}")
    return BENCHMARKS[name]


def eval_task(name: str, **changes: Any) -> EvalTask:
    """The EvalTask that scores a benchmark's imported test rows by its protocol. Raises EchoConfigError."""
    return EvalTask(**{"name": name, **benchmark_named(name).scored, **changes})


def commonsense_average(accuracies: Mapping[str, float]) -> float | None:
    """LLM-Adapters' reported average: the unweighted mean of the eight accuracies, by name; None if one is missing."""
    if not accuracies.keys() >= set(COMMONSENSE):
        return None
    return sum(accuracies[name] for name in COMMONSENSE) / len(COMMONSENSE)


# ------------------------------------------------------------------------------------------------ the prompts


def training_prompt(instruction: str) -> str:
    """LLM-Adapters' training text up to the output: two blanks after `request.`, a line of blanks before the response.

    A tokenizer may join the last blanks to what follows; then the boundary lies before them.
    """
    return f"{_HEAD}  \n\n{INDENT}### Instruction:\n{INDENT}{instruction}\n{INDENT}\n{INDENT}{RESPONSE}\n{INDENT}"


def evaluation_prompt(instruction: str) -> str:
    """LLM-Adapters' evaluation prompt: one blank after `request.`, an empty line after the instruction."""
    return f"{_HEAD} \n\n{INDENT}### Instruction:\n{INDENT}{instruction}\n\n{INDENT}{RESPONSE}\n{INDENT}"


def instruction_of(name: str, question: str, choices: Sequence[str]) -> str:
    """A native item in the words of LLM-Adapters. boolq: the question without its `?`."""
    benchmark = benchmark_named(name)
    if not benchmark.option:
        return f"{benchmark.intro}{question}?\n\nAnswer format: true/false"
    option = benchmark.option
    options = benchmark.between.join(f"{option.capitalize()}{i}: {text}" for i, text in enumerate(choices, start=1))
    possible = "/".join(f"{option}{i}" for i in range(1, len(choices) + 1))
    return f"{benchmark.intro}{question}\n\n{options}{benchmark.before_format}Answer format: {possible}"


def answer_of(name: str, choices: Sequence[str], label: int) -> str:
    """The answer's name: `true`, `solution2`, …"""
    option = benchmark_named(name).option
    return f"{option}{label + 1}" if option else choices[label]


# --------------------------------------------------------------------------------------------------- the rows


def benchmark_rows(name: str, part: str, raw: Sequence[Row], examples: Sequence[Row] = ()) -> list[Row]:
    """Rows to train on or to score, with complete prompts, of a part's raw rows.

    raw: with the columns that `docs/data.md` lists. Rows of `test` have no completion: their prompt is not cut to a
    token boundary. examples: the rows of mmlu's part dev. Raises KeyError, of a column that a row does not have,
    EchoDataError if there are fewer than five examples of a subject.
    """
    if benchmark_named(name).has_instructions:
        return [_instructed(row, is_test=part == "test") for row in raw]
    if name == "gsm8k":
        return [_solved(row, is_test=part == "test") for row in raw]
    if name == "mmlu":
        shots = {subject: _shots(subject, examples) for subject in {row["subject"] for row in raw}}
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


def _shots(subject: str, examples: Sequence[Row]) -> str:
    """What stands before a question of the subject, as in lm-eval's mmlu."""
    head = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
    own = [row for row in examples if row["subject"] == subject][:5]
    if len(own) < 5:
        raise EchoDataError(
            f"mmlu: dev has {len(own)} examples of the subject {subject!r}; each prompt needs five. Complete it."
        )
    return head + "".join(f"{_question(row)} {LETTERS[row['answer']]}\n\n" for row in own)


def _question(row: Row) -> str:
    lines = [f"{letter}. {choice}" for letter, choice in zip(LETTERS, row["choices"], strict=True)]
    return "\n".join([row["question"].strip(), *lines, "Answer:"])
