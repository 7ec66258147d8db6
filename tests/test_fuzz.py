"""Bad input, in a fixed sample here and at length in the slow one: see `fuzz.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from fuzz import judge
from fuzz_cases import Case

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="cases run in forks")

HARNESS = Path(__file__).parent / "fuzz.py"
# Every case of these takes long: training, and interpreters of their own.
SLOW_FAMILIES = "checkpoint,process,base,environment"


def harness(folder: Path, *options: str, seconds: float) -> dict:
    report = folder / "report.json"
    command = [sys.executable, str(HARNESS), "--json", str(report), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    assert report.is_file(), done.stderr[-2000:]
    return json.loads(report.read_text())


def test_a_sample_of_bad_input_ends_in_clear_errors(tmp_path):
    found = harness(tmp_path, "--cases", "100", "--without", SLOW_FAMILIES, seconds=300)
    assert found["bad"] == []
    assert found["touched"] == []
    # not vacuous: most cases are unsound, some are sound
    assert found["counts"]["clear error"] >= 60
    assert found["counts"]["accepted"] >= 6
    assert sum(found["counts"].values()) >= 90


def test_the_harness_does_see_what_is_bad():
    """A program that believes everything, leaves a part, or raises is found out."""
    unsound, sound = Case("a", ["plan"], False, says="here"), Case("b", ["plan"], True, makes=("new",))
    clear = "Error: here is wrong. Correct it."
    for case, status, text, left, expected in [
        (unsound, 1, clear, [], "clear error"),
        (unsound, 2, "Usage: plan\nError: here", [], "clear error"),
        (sound, 0, "", ["new", "new/x"], "accepted"),
        (unsound, 0, clear, [], "nonsense accepted"),
        (sound, 1, clear, [], "sound refused"),
        (unsound, 1, clear, ["new"], "partial output"),
        (sound, 0, "", [".new.tmp"], "partial output"),
        (unsound, 1, "Error: wrong", [], "unclear error"),
        (unsound, 1, "", [], "unclear error"),
        (unsound, 1, clear + "x" * 10_000, [], "unclear error"),
        (unsound, 1, "Traceback (most recent call last)\n" + clear, [], "traceback"),
        (unsound, -11, clear, [], "traceback"),
        (unsound, None, "", [], "too slow"),
    ]:
        assert judge(case, status, text, left)[0] == expected


@pytest.mark.slow
def test_fifteen_hundred_cases_end_in_clear_errors(tmp_path):
    found = harness(tmp_path, "--cases", "1500", seconds=3600)
    assert found["bad"] == []
    assert found["touched"] == []
    assert sum(found["counts"].values()) >= 1450
