"""The evaluation of LLM-Adapters, written again from its description and sharing nothing with `src/`.

One prompt at a time, no padding: four beams, 32 new tokens, no sampling. What follows the first `### Response:` is
stripped, its first match of the task's pattern is the prediction, and no match is wrong.
"""

from __future__ import annotations

import re
from typing import Any

import torch

PATTERNS = {
    "boolq": r"true|false",
    "piqa": r"solution1|solution2",
    "social_i_qa": r"answer1|answer2|answer3|answer4|answer5",
    "hellaswag": r"ending1|ending2|ending3|ending4",
    "winogrande": r"option1|option2",
    "ARC-Easy": r"answer1|answer2|answer3|answer4|answer5",
    "ARC-Challenge": r"answer1|answer2|answer3|answer4|answer5",
    "openbookqa": r"answer1|answer2|answer3|answer4|answer5",
}


def train_text(instruction: str, output: str) -> str:
    """What their training reads; `_` marks the blanks at the ends of lines, which editors remove."""
    text = """\
Below is an instruction that describes a task. Write a response that appropriately completes the request.__

                ### Instruction:
                {instruction}
________________
                ### Response:
                {output}"""
    return text.replace("_", " ").replace("{instruction}", instruction).replace("{output}", output)


def test_text(instruction: str) -> str:
    """What their evaluation reads."""
    text = """\
Below is an instruction that describes a task. Write a response that appropriately completes the request._

                ### Instruction:
                {instruction}

                ### Response:
________________"""
    return text.replace("_", " ").replace("{instruction}", instruction)


test_text.__test__ = False  # the name is not pytest's to collect


def extract_answer(task: str, sentence: str) -> str:
    found = re.findall(PATTERNS[task], sentence.strip())
    return found[0] if found else ""


@torch.no_grad()
def evaluate(model: Any, tokenizer: Any, task: str, rows: list[dict[str, Any]]) -> tuple[list[str], list[bool]]:
    """Predictions ("" where nothing matched) and whether each is right."""
    predictions = []
    for row in rows:
        inputs = tokenizer(test_text(row["instruction"]), return_tensors="pt").to(model.device)
        generated = model.generate(**inputs, num_beams=4, max_new_tokens=32, do_sample=False)
        text = tokenizer.decode(generated[0], skip_special_tokens=True)
        predictions.append(extract_answer(task, text.split("### Response:")[1].strip()))
    return predictions, [said == row["answer"] for said, row in zip(predictions, rows, strict=True)]
