"""What a training step costs with your model and rows: paired seconds, and memory. `echo-lora bench` is the command.

programs.py  the steps that are compared: TRL's, ours with and without the echo, the literal method's
floors.py    the arithmetic of each: operations of the decoder layers and of the output layer
estimate.py  how long the rest will take
report.py    medians, intervals and ratios; the table, the Markdown page and the plot
record.py    the output folder: written after every round, read again to resume
measure.py   run_bench: the memory of each in a process of its own, then the seconds of all in turns
"""

from echo_lora.bench.measure import run_bench
from echo_lora.bench.report import NOTES, BenchReport, BenchTable

__all__ = ["NOTES", "BenchReport", "BenchTable", "run_bench"]
