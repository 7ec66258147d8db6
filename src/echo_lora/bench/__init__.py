"""What a training step costs on a model and rows of one's own: seconds, paired, and memory.

    programs.py  the steps that are compared: TRL's, ours with and without the echo, the literal method's
    measure.py   run_bench: each program's memory in a process of its own, then all of them in turns
    report.py    medians, intervals and ratios; the table, the Markdown page and the plot

`echo-lora bench` is the command.
"""

from echo_lora.bench.measure import run_bench
from echo_lora.bench.report import NOTES, BenchReport, BenchTable

__all__ = ["NOTES", "BenchReport", "BenchTable", "run_bench"]
