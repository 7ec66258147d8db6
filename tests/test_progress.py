"""Progress: a bar with the time left on a terminal, plain lines elsewhere, and a word for what takes long."""

from __future__ import annotations

import io
import re

import pytest
from rich.console import Console

from echo_lora import progress
from echo_lora.progress import Steps, counted, duration, stage


@pytest.fixture
def terminal(monkeypatch) -> io.StringIO:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120, highlight=False, soft_wrap=True)
    monkeypatch.setattr(progress, "progress_console", lambda: console)
    return screen


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when a test says so."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def shown(screen: io.StringIO) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", screen.getvalue())


def test_a_terminal_shows_a_bar_with_loss_and_time_left_below_the_lines(terminal, clock):
    steps = Steps("Training", 10)
    clock[0] += 4
    steps.advance(2)
    steps.note("loss 1.25")
    steps.say("step 2/10  loss 1.25")
    steps.close()
    assert "step 2/10  loss 1.25" in shown(terminal)
    assert re.search(r"Training .*2/10 2 s/step, 0:16 left loss 1\.25", shown(terminal))
    assert terminal.getvalue().endswith("\x1b[2K")  # the bar is removed, the lines stay


def test_the_time_of_a_resumed_run_counts_its_own_steps(clock):
    steps = Steps("Training", 10, done=6)
    assert steps.timing() == ""
    clock[0] += 6
    steps.advance(8)
    assert steps.timing() == "3 s/step, 0:06 left"
    clock[0] += 2  # in the middle of a step
    assert steps.timing() == "3 s/step, 0:04 left"


def test_elsewhere_lines_are_plain_and_few(capsys, clock):
    with counted("Answering", 1000) as count:
        for done in range(1, 1001):
            count(done)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Answering 1000 ..."
    assert lines[-1].startswith("1000/1000  ")
    assert len(lines) == 11
    assert "\x1b" not in "".join(lines)


def test_slow_work_says_so_before_a_tenth_is_done(capsys, clock):
    with counted("Answering", 1000) as count:
        count(1)
        clock[0] += progress.PATIENCE + 1
        count(2)
        assert "2/1000" in capsys.readouterr().err


def test_a_stage_without_a_line_gets_one_if_it_takes_long(capsys, monkeypatch):
    with stage("Starting", line=False):
        pass
    assert capsys.readouterr().err == ""

    class AtOnce(progress.Timer):
        def start(self) -> None:
            assert self.interval == progress.PATIENCE < 5
            self.function(*self.args, **self.kwargs)

    monkeypatch.setattr(progress, "Timer", AtOnce)
    with stage("Starting", line=False):
        assert capsys.readouterr().err == "Starting ...\n"


def test_a_stage_of_a_terminal_is_a_bar_that_vanishes(terminal):
    with stage("Loading"):
        pass
    assert "Loading" in shown(terminal)
    assert terminal.getvalue().endswith("\x1b[2K")


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (725, "12:05"), (11220, "3:07:00")])
def test_durations_are_read_at_a_glance(seconds, text):
    assert duration(seconds) == text
