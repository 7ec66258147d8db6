"""Score a model on local rows with lm-evaluation-harness. Use `score`, `EvalTask`, `TaskResult` and `write_task`.

    tasks.py      EvalTask, checks of its rows, and lm-eval's task files
    harness.py    score: correct answers with a 95 % interval
    lm.py         the model class for lm-eval: prompts reach the model token by token as in training
    answers.py    how answers are read and marked; named in task files
    programs.py   run generated code, in two processes (worker.py)

Neither torch nor lm-eval is imported before `score` is called.
"""

from echo_lora.evaluate.harness import TaskResult, score
from echo_lora.evaluate.tasks import EvalTask, write_task

__all__ = ["EvalTask", "TaskResult", "score", "write_task"]
