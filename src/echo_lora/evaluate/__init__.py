"""Scoring a model on local rows through lm-evaluation-harness.

    tasks.py     EvalTask and the task files that are written for it
    harness.py   score: a model and its tasks in, correct answers with a 95 % interval out
    lm.py        the model as lm-eval sees it: every prompt reaches it token by token as in training

Neither torch nor lm-eval is imported before `score` is called.
"""

from echo_lora.evaluate.harness import TaskResult, score
from echo_lora.evaluate.tasks import EvalTask, write_task

__all__ = ["EvalTask", "TaskResult", "score", "write_task"]
