"""The report of a study: its numbers are those of the records, its page self-contained, no study too small for it."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import numpy as np
import pytest
from typer.testing import CliRunner

from echo_lora.cli import app
from echo_lora.errors import EchoConfigError, EchoDataError
from echo_lora.study.folder import read_study
from echo_lora.study.looks import confidence_at
from echo_lora.study.report.page import summary_lines, write_report
from echo_lora.study.report.plots import STYLES, Axis, Panel, Rows, axis, style_of
from echo_lora.study.report.texts import percent_text
from echo_lora.study.report.verdict import SIGN
from echo_lora.study.statistics import VERDICTS, compare_arms
from study_records import RECIPE, without_history, write_runs, write_study

VOID = {"meta", "link", "br", "hr", "img"}
SECTIONS = [
    *("Is the study complete?", "All comparisons", "Differences by task", "Accuracy of each run", "Controls"),
    *("Choice of the learning rate", "Losses", "Does the echo know more?", "Strength of the echo"),
    *("What the echo itself could do", "Cost", "Forgetting", "Unreadable answers", "Each seed by itself", "Settings"),
]


class Page(HTMLParser):
    """A page's headings, cells, texts of figures and attributes; every element that is opened is closed, in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str, str | None]] = []
        self.texts: list[tuple[str, str]] = []  # innermost element, text
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value) for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, self.getpos()

    def handle_data(self, data: str) -> None:
        if data.strip():
            self.texts.append((self.open[-1], data.strip()))

    def of(self, *tags: str) -> list[str]:
        return [text for tag, text in self.texts if tag in tags]


def read(folder: Path) -> tuple[Page, str, str]:
    """The page, its text, and the Markdown, written again."""
    html = write_report(folder)
    assert html == folder / "report.html"
    text = html.read_text(encoding="utf-8")
    return Page(text), text, (folder / "report.md").read_text(encoding="utf-8")


def correct_of(folder: Path, arm: str, *, echo: bool = False) -> dict[str, np.ndarray]:
    """By task, bool (seeds, questions), without the code that is tested; echo: of the answers with the echo kept on."""
    found: dict[str, list[list[bool]]] = {}
    for run in read_study(folder).runs:
        if run["stage"] == "confirmation" and run["arm"] == arm:
            for score in run["scores"]:
                if score["echo"] == echo:
                    found.setdefault(score["result"]["task"], []).append(score["result"]["correct_per_row"])
    return {task: np.array(rows) for task, rows in found.items()}


def signed(share: float) -> str:
    return f"{100 * share:+.2f}".replace("-", "−")


@pytest.fixture(scope="module")
def full(tmp_path_factory) -> Path:
    """A complete study of three arms, one of them a control that no comparison with the baseline was declared for."""
    folder = tmp_path_factory.mktemp("studies") / "full"
    return write_study(
        folder,
        arms=["lora", "echo-lora", "zero"],
        comparisons=[("echo-lora", "lora"), ("echo-lora", "zero")],
        shift={"echo-lora": 0.6},
        questions=120,
        about={"power": {"power": 0.37, "effect": 0.01, "smallest_detectable": 0.0234, "source": "tuning runs"}},
    )


@pytest.fixture(scope="module")
def made(full) -> tuple[Page, str, str]:
    """What `read` gives of the complete study."""
    return read(full)


# ------------------------------------------------------------------------------------------------ what it says


def test_numbers_on_the_page_and_in_its_twin_are_those_of_the_statistics(full, made):
    page, _, markdown = made
    for arm, other in [("echo-lora", "lora"), ("echo-lora", "zero")]:
        expected = compare_arms(arm, other, correct_of(full, arm), correct_of(full, other), smallest_effect=0.01)
        effects = [expected.overall, *expected.tasks.values()]
        assert len(effects) == 3
        for effect in effects:
            interval = f"{signed(effect.low)} to {signed(effect.high)}"
            assert f"{signed(effect.estimate)} ({interval})" in page.of("text")
            assert interval in page.of("td")
            assert f"| {signed(effect.estimate)} | {interval} |" in markdown
        assert expected.verdict in page.of("td")
        for task in expected.tasks.values():
            assert (
                f"| {' | '.join(f'{p:.3f}' if p >= 0.001 else '< 0.001' for p in [task.p_value, task.p_holm])} |"
                in (markdown.replace("\\<", "<"))
            )
            for first, second in zip(task.only_arm, task.only_baseline, strict=True):
                assert any(cell.startswith(f"{first} : {second}, p ") for cell in page.of("td"))


def test_every_number_in_a_table_of_the_page_is_in_its_twin(made):
    page, _, markdown = made
    cells = {cell for cell in page.of("td", "th") if cell[0] in "+−–<" or cell[0].isdigit()}
    assert len(cells) > 150
    rows = [line.replace("\\", "") for line in markdown.splitlines() if line.startswith("|")]
    assert [cell for cell in sorted(cells) if not any(f"| {cell} |" in row for row in rows)] == []


@pytest.mark.parametrize(
    "pair", [("echo-lora+echo", "lora"), ("echo-lora+echo", "echo-lora"), ("zero", "echo-lora+echo")]
)
def test_a_side_of_a_comparison_may_keep_its_echo_on(tmp_path, pair):
    folder = write_study(tmp_path / "study", arms=["lora", "echo-lora", "zero"], comparisons=[pair], questions=120)
    _, _, markdown = read(folder)
    arms = [side.removesuffix("+echo") for side in pair]
    correct = [correct_of(folder, arm, echo=arm != side) for arm, side in zip(arms, pair, strict=True)]
    expected = compare_arms(*pair, *correct, smallest_effect=0.01)
    assert expected != compare_arms(*pair, *(correct_of(folder, arm) for arm in arms), smallest_effect=0.01)
    labels = {"echo-lora+echo": "Echo-LoRA (echo on)", "echo-lora": "Echo-LoRA", "lora": "LoRA"}
    name = " − ".join(labels.get(side, "zero (R-Drop)") for side in pair)
    effect = expected.overall
    line = f"{name} | {signed(effect.estimate)} | {signed(effect.low)} to {signed(effect.high)} | {expected.verdict}"
    assert f"| {line} |" in markdown.replace("\\", "")
    assert any(name in one for one in summary_lines(folder))
    means = {side: np.mean(rows["chain_sum"]) for side, rows in zip(pair, correct, strict=True)}
    for side, mean in means.items():
        assert f"| {labels.get(side, 'zero (R-Drop)')} | chain_sum | {mean:.1%} |" in markdown.replace("\\", "")
    assert "which no deployed adapter does" in markdown


def test_a_kept_echo_that_no_run_was_scored_with_is_named(tmp_path):
    folder = small(tmp_path, comparisons=[("echo-lora+echo", "lora")], change=only_plain_answers)
    with pytest.raises(EchoDataError, match=r"arm echo-lora, seed \d, has no answers with its echo kept on"):
        write_report(folder)


def test_a_task_that_only_a_kept_echo_answers_can_show_a_difference(tmp_path):
    def answer_nothing_without_the_echo(run):
        for score in run["scores"]:
            if not score["echo"]:
                score["result"]["correct_per_row"] = [False] * len(score["result"]["correct_per_row"])

    for comparison, is_dull in ((("echo-lora+echo", "lora"), False), (("echo-lora", "lora"), True)):
        folder = small(tmp_path / comparison[0], comparisons=[comparison], change=answer_nothing_without_the_echo)
        assert any("can show no difference" in line for line in summary_lines(folder)) == is_dull


@pytest.mark.parametrize(("tuning_seeds", "warns"), [([0], True), ([0, 6, 7], False)])
def test_rates_that_few_seeds_chose_are_named_with_the_difference(tmp_path, tuning_seeds, warns):
    def confirm_lora_at_another_rate(record):
        if record["stage"] == "confirmation" and record["arm"] == "lora":
            record["learning_rate"] = 0.001
            record["recipe"]["training"]["learning_rate"] = 0.001

    folder = write_study(
        tmp_path / "study",
        arms=("lora", "echo-lora"),
        rates=(0.001, 0.002),
        change=confirm_lora_at_another_rate,
        about={"chosen": {"lora": 0.001, "echo-lora": 0.002}},
        design={"tuning_seeds": tuning_seeds},
    )
    (line,) = [line for line in summary_lines(folder) if "Echo-LoRA − LoRA" in line]
    text = "They ran at different learning rates, 0.002 and 0.001, chosen with 1 seed: the difference may be that of"
    assert (text in line) == warns


def test_the_verdict_heads_the_page(full, made):
    page, text, markdown = made
    expected = compare_arms(
        "echo-lora", "lora", correct_of(full, "echo-lora"), correct_of(full, "lora"), smallest_effect=0.01
    )
    assert expected.verdict == "better"
    assert page.of("title")[0].endswith("Better")
    sentence = (
        f"Echo-LoRA − LoRA: {signed(expected.overall.estimate)} percentage points (95 % interval "
        f"{signed(expected.overall.low)} to {signed(expected.overall.high)}), 5 seeds × 240 questions in 2 tasks; "
        "smallest effect of interest 1 point."
    )
    assert sentence in page.of("p")
    assert text.index(sentence) < text.index("<h2")
    assert markdown.index("Better.**") < markdown.index(sentence) < markdown.index("\n## ")
    assert summary_lines(full)[0] == f"better: {sentence}"
    assert len(summary_lines(full)) == 2


def test_sections_come_in_their_order(made):
    page, _, markdown = made
    assert page.of("h2") == SECTIONS
    assert re.findall(r"^## (.+)$", markdown, re.MULTILINE) == SECTIONS


def test_every_arm_is_compared_with_the_baseline_and_what_was_not_planned_is_marked(made):
    page, _, markdown = made
    assert "zero (R-Drop) − LoRA (not planned)" in page.of("th")
    assert "| zero (R-Drop) − LoRA (not planned) |" in markdown
    assert "Echo-LoRA − LoRA (not planned)" not in markdown


def test_a_complete_study_says_so_and_that_its_arms_are_paired(made):
    page, text, _ = made
    assert "27 of 27 runs of the design are done. The study is complete." in page.of("p")
    assert any("started from the same adapter: their sha256 before training is equal" in p for p in page.of("p"))
    assert 'class="warning"' not in text


def test_the_power_estimate_is_told(made):
    (line,) = [p for p in made[0].of("p") if "estimated to detect" in p]
    assert "1 point in 37% of cases" in line
    assert "one of 2.34 points" in line


def test_accuracies_chosen_rates_and_costs_are_those_of_the_records(full, made):
    _, _, markdown = made
    study = read_study(full)
    means = [100 * rows.mean() for rows in correct_of(full, "zero").values()]
    assert f"| zero (R-Drop) | mean of the tasks | {np.mean(means):.1f}% |" in markdown
    assert re.search(r"\| zero \(R-Drop\) \| 0.002 \| \d+\.\d% \| chosen \|", markdown)
    assert markdown.count("| chosen |\n") == 3 + 1  # and the head of the settings' table
    pairs = [(study.confirmation(arm)[seed]["seconds"]) for arm in ("zero", "lora") for seed in study.design.seeds]
    ratios = np.array(pairs[:5]) / np.array(pairs[5:])
    assert f"| {np.mean(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f}) |" in markdown
    changes = [run["general"]["after"] - run["general"]["before"] for run in study.confirmation("zero").values()]
    assert f"| {np.mean(changes):+.3f} ({min(changes):+.3f} to {max(changes):+.3f}) |" in markdown


def test_curves_are_means_over_the_seeds_with_their_range(full, made):
    _, _, markdown = made
    runs = read_study(full).confirmation("echo-lora").values()
    last = [next(e for e in reversed(run["history"]) if "eval_ce_on" in e) for run in runs]
    gaps = [entry["eval_ce_on"] - entry["eval_ce_off"] for entry in last]
    numbers = [f"{value:.4g}".replace("-", "−") for value in (np.mean(gaps), min(gaps), max(gaps))]
    row = f"| CE(on) − CE(off) on validation rows | Echo-LoRA | 80 | {' | '.join(numbers)} |"
    assert row in markdown


def test_every_setting_is_there(made):
    page, _, _ = made
    cells = page.of("td", "th")
    for expected in (
        *("echo-lora compare small --workers 2", "AMD EPYC, 2 cores", "0123456789abcdef0123456789abcdef01234567"),
        *('echo_config.echo_kind = "zero"', "lora.dropout", "training.schedule", "0.0005, 0.001, 0.002, 0.004"),
        *("version of torch", "2.9.0", "1, 2, 3, 4, 5", "1 percentage point"),
    ):
        assert expected in cells, expected


def test_every_verdict_has_a_sign_of_its_own():
    assert tuple(SIGN) == VERDICTS
    assert len(set(SIGN.values())) == len(SIGN)


@pytest.mark.parametrize(
    ("confidence", "text"), [(0.95, "95 %"), (0.953801, "95.4 %"), (0.99264, "99.26 %"), (1 - 1.08e-6, "99.99989 %")]
)
def test_a_confidence_is_never_rounded_to_certainty(confidence, text):
    assert percent_text(confidence) == text


@pytest.mark.parametrize(("margin", "is_shown"), [(0.05, True), (0.001, False)])
def test_a_margin_says_of_every_comparison_whether_it_is_not_worse(tmp_path, margin, is_shown):
    page, _, markdown = read(
        small(tmp_path, arms=["lora", "echo-lora", "zero"], questions=400, design={"margin": margin})
    )
    lines = summary_lines(tmp_path)
    for arm, label, line in zip(["echo-lora", "zero"], ["Echo-LoRA", "zero (R-Drop)"], lines, strict=True):
        data = correct_of(tmp_path, arm), correct_of(tmp_path, "lora")
        expected = compare_arms(arm, "lora", *data, smallest_effect=0.01, margin=margin)
        assert (expected.overall.low > -margin) == is_shown  # or the test shows half of what it is to show
        assert line.startswith(f"{expected.verdict}: {label} − LoRA: ")
        what = f"that {label} is not worse than LoRA by more than the margin of {100 * margin:g} point"
        assert f"It is {'' if is_shown else 'not '}shown {what}" in line
        row = next(row for row in markdown.splitlines() if row.startswith(f"| {label} − LoRA |"))
        assert f"| {expected.verdict} | {'shown' if is_shown else 'not shown'} |" in row
    assert any(what in text for text in page.of("p") for what in ["is not worse than LoRA by more than the margin"])
    assert f"{100 * margin:g} percentage points" in page.of("td")


def looked_at(folder: Path, seeds: int, **changes) -> Path:
    """A study with looks at 3, 5 and 8 seeds, of which so many have been run."""
    settings = {"seeds": range(1, 9), "design": {"looks": [3, 5, 8]}, "questions": 120}
    return small(folder, keep=lambda r: r["stage"] == "tuning" or r["seed"] <= seeds, **(settings | changes))


@pytest.mark.parametrize(("seeds", "look"), [(3, 1), (4, 1), (5, 2), (7, 2), (8, 3)])
def test_a_report_is_that_of_the_last_look_that_is_complete(tmp_path, seeds, look):
    page, text, markdown = read(looked_at(tmp_path, seeds))
    counted, confidence = [3, 5, 8][look - 1], confidence_at([3, 5, 8], look)
    data = [{task: rows[:counted] for task, rows in correct_of(tmp_path, arm).items()} for arm in ("echo-lora", "lora")]
    expected = compare_arms("echo-lora", "lora", *data, smallest_effect=0.01, confidence=confidence)
    name, effect = f"{percent_text(confidence)} interval", expected.overall
    lines = summary_lines(tmp_path)
    assert f"({name} {signed(effect.low)} to {signed(effect.high)}), {counted} seeds × " in lines[0]
    assert f"Look {look} of 3: {counted} of 8 seeds. Intervals have a nominal confidence of" in lines[1]
    assert ("Runs of later seeds do not count" in lines[1]) == (look < 3)
    assert name in page.of("th")
    assert name in markdown
    assert not re.search(r"\b95 % interval", text.replace("99.95 %", ""))
    assert f"seed {counted}" in page.of("th")
    assert f"seed {counted + 1}" not in page.of("th")
    assert f"compared with {1 - confidence:.2g}, not with 0.05" in text


def test_the_best_of_a_look_is_not_seen_before_all_arms_have_reached_it(tmp_path):
    def keep(run):
        return run["stage"] == "tuning" or run["seed"] <= 4 or (run["seed"] == 5 and run["arm"] == "lora")

    study = read_study(small(tmp_path, seeds=range(1, 9), design={"looks": [3, 5, 8]}, keep=keep))
    assert (study.look, study.counted_seeds) == (1, [1, 2, 3])
    assert list(study.confirmation("lora")) == [1, 2, 3]


def test_before_the_first_look_nothing_is_shown(tmp_path):
    page, text, _ = read(looked_at(tmp_path, 2))
    lines = summary_lines(tmp_path)
    assert lines[0].startswith("too few data: Echo-LoRA − LoRA: no look has been reached yet")
    assert lines[1].startswith("None of the 3 looks that the study declared has been reached.")
    assert "not complete: 12 confirmation runs" in lines[2]
    assert "So far: too few data" in page.of("p")
    assert page.of("h2") == SECTIONS
    assert "percentage points (" not in text


def test_a_study_that_is_decided_is_complete(tmp_path):
    page, text, _ = read(looked_at(tmp_path, 5, shift={"echo-lora": 2.0}))
    assert "Better" in page.of("p")
    assert "18 of 24 runs of the design are done. The study is complete." in page.of("p")
    assert any("is decided: no more seeds are needed." in p for p in page.of("p"))
    assert 'class="warning"' not in text
    assert "missing" not in text
    assert len(summary_lines(tmp_path)) == 2


# ------------------------------------------------------------------------------------------------ the page


def test_the_page_loads_nothing_and_runs_nothing(made):
    page, text, _ = made
    assert "<script" not in text
    loaded = [(t, n, v) for t, n, v in page.attributes if n in ("src", "href", "xlink:href", "srcset", "data")]
    assert loaded
    assert [v for _, _, v in loaded if not v.startswith(("#", "data:,"))] == []
    assert not re.search(r"url\(|@import|https?://", text)


def test_the_page_names_its_language_and_every_figure_and_table(made):
    page, text, _ = made
    assert ("html", "lang", "en") in page.attributes
    figures = [v for t, n, v in page.attributes if t == "svg" and n == "aria-labelledby"]
    assert len(figures) > 12
    ids = [v for _, n, v in page.attributes if n == "id"]
    assert len(ids) == len(set(ids))
    assert {part for value in figures for part in value.split()} <= set(ids)
    assert text.count("<table") == text.count("<caption>") > 8
    assert text.count("<figure>") == text.count("<figcaption>")
    targets = [v for t, n, v in page.attributes if t == "a" and n == "href"]
    assert [target for target in targets if target[1:] not in ids] == []


def test_text_of_the_study_can_not_break_the_page_or_its_twin(tmp_path):
    title = 'Is 1 < 2 & "a|b"? <script>alert(1)</script>'
    arms = {"lora": {"label": "a | b <i>", "set": {"x": "|"}}, "echo-lora": {"label": "*"}}
    small(tmp_path, design={"title": title, "arms": arms})
    page, text, markdown = read(tmp_path)
    assert page.of("h1") == [title]
    assert "<script" not in text
    assert markdown.splitlines()[0] == '# Is 1 \\< 2 & "a\\|b"? \\<script>alert(1)\\</script>'
    for table in re.findall(r"(?:^\|.*\n)+", markdown, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1, table


def test_a_folder_of_studies_gets_their_reports_and_one_of_their_verdicts(full, tmp_path):
    names = ["first", "in a/search & more", "second"]
    for name in names:
        shutil.copytree(full, tmp_path / name)
    (tmp_path / "notes").mkdir()
    (tmp_path / "first" / "runs" / "inner").mkdir(parents=True)  # a study's own folders are not looked into
    shutil.copy(full / "study.json", tmp_path / "first" / "runs" / "inner")
    path = write_report(tmp_path)
    page, text, twin = read(tmp_path)
    assert path == tmp_path / "report.html"
    assert len({(tmp_path / name / "report.md").read_bytes() for name in names}) == 1
    lines, study = summary_lines(full), read_study(full)
    assert summary_lines(tmp_path) == [study.design.title, *lines] * 3
    assert page.of("h2") == [study.design.title] * 3
    assert twin.count(lines[0]) == 3
    assert list(tmp_path.rglob("inner/report.*")) == []

    links = [value for tag, name, value in page.attributes if (tag, name) == ("a", "href") and value[0] != "#"]
    assert [(tmp_path / unquote(link)).resolve() for link in links] == [tmp_path / n / "report.html" for n in names] * 2
    places = [value for tag, name, value in page.attributes if name == "id"]
    assert [v[1:] for t, n, v in page.attributes if (t, n) == ("a", "href") and v[0] == "#"] == places
    linked = re.findall(r"\]\(([^)]*)\)", twin)
    assert [(tmp_path / unquote(link)).is_file() for link in linked] == [True] * 6

    assert text.index("<table") < text.index("<nav") < text.index("<h2")
    head, *rows = re.findall(r"<tr>(.*?)</tr>", text, re.DOTALL)
    assert re.findall(r"<th[^>]*>(.*?)</th>", head)[:2] == ["study", "verdict"]
    assert len(rows) == 3
    for row in rows:
        assert re.findall(r"<td[^>]*>(.*?)</td>", row)[0] == "▲ Better"


def test_searches_come_after_what_is_confirmed(tmp_path):
    small(tmp_path / "a-search", design={"title": "Search", "score_on": "validation"})
    small(tmp_path / "b", design={"title": "Confirmed"})
    write_report(tmp_path)
    page, text, markdown = read(tmp_path)
    assert page.of("h2") == ["Confirmed", "Search"]
    confirmed, search = re.findall(r"^\| \[.*", markdown, re.MULTILINE)
    assert confirmed.startswith("| [Confirmed](b/report.md) | ? Too few data |")
    assert search.startswith("| [Search](a-search/report.md) | ? Search: too few data |")
    assert "Searches come last: they are scored on validation rows" in text
    shutil.rmtree(tmp_path / "a-search")
    assert "Searches" not in read(tmp_path)[1]


def test_the_same_records_give_the_same_bytes(full, tmp_path):
    read(full)
    copy = tmp_path / "full"
    copy.mkdir()
    for name in ("study.json", "runs.jsonl.gz"):
        shutil.copy(full / name, copy)
    read(copy)
    for name in ("report.html", "report.md"):
        assert (copy / name).read_bytes() == (full / name).read_bytes()
    assert {path.name for path in copy.iterdir()} == {"study.json", "runs.jsonl.gz", "report.html", "report.md"}


def test_styles_differ_without_colour():
    assert len({(s.marker, s.is_filled) for s in STYLES}) == len(STYLES)
    assert len({s.dash for s in STYLES}) == len(STYLES) - 1  # the baseline and the first arm have solid lines
    assert style_of(0) == style_of(0) != style_of(9)


def test_labels_at_the_ends_of_lines_do_not_lie_on_each_other():
    flat = Axis(0, 1, [])
    panel = Panel("p", "t", "d", flat, flat, labels=["arm 0"])
    for i in range(6):
        panel.line([(0, 0.1), (1, 0.1 + i / 1000)], style_of(i), f"arm {i}")
    places = sorted(float(y) for y in re.findall(r'<text class="end" x="[\d.]+" y="([\d.]+)"', panel.svg()))
    assert len(places) == 6
    assert min(np.diff(places)) > 13
    assert max(places) <= panel.height


@pytest.mark.parametrize("values", [[0.0], [3.0, 3.0], [-2.0, 5.0], [1e-7, 2e-7], [float("nan")], [0.1, float("inf")]])
def test_an_axis_holds_its_values_between_round_ticks(values):
    found = axis(values)
    finite = [value for value in values if np.isfinite(value)]
    assert all(found.low < value < found.high for value in finite)
    assert 2 <= len(found.ticks) <= 12
    for value, label in found.ticks:
        assert found.low <= value <= found.high
        assert float(label.replace("−", "-")) == pytest.approx(value, abs=1e-12)


def test_a_value_that_is_not_finite_is_left_out_of_a_figure():
    rows = Rows("r", "t", "d", Axis(0, 1, [(0.5, "0.5")]), 1)
    rows.add("arm", "–", [0.2, float("nan")], STYLES[1], mean=float("nan"), interval=(float("-inf"), 0.4))
    assert rows.svg().count("<circle") == 1
    assert "nan" not in rows.svg()
    assert "inf" not in rows.svg()


# ------------------------------------------------------------------------------------------------ what is missing


def small(folder: Path, **changes) -> Path:
    settings = {"arms": ["lora", "echo-lora"], "seeds": [1, 2, 3], "questions": 30, "tasks": ["chain_sum"]}
    return write_study(folder, **(settings | changes))


def test_missing_runs_are_named_and_the_verdict_is_only_so_far(tmp_path):
    def keep(run):
        return run["stage"] == "tuning" or not (run["arm"] == "echo-lora" and run["seed"] in (2, 3))

    page, text, markdown = read(small(tmp_path, keep=keep))
    assert "So far: too few data" in page.of("p")
    missing = "missing: confirmation of echo-lora, learning rate 0.002, seeds 2, 3"
    assert missing in page.of("li")
    assert f"- {missing}" in markdown
    state = "This study is not complete: 2 confirmation runs of 14 in all are missing."
    assert any(state in strong for strong in page.of("strong"))
    assert text.index(state) < text.index("<h2")
    assert state in summary_lines(tmp_path)[-1]
    assert "one seed gives no interval" in summary_lines(tmp_path)[0]


@pytest.mark.parametrize("how", ["one answer", "never right"])
def test_a_task_that_can_show_nothing_is_a_warning(tmp_path, how):
    folder = small(tmp_path)
    study = read_study(folder)
    assert not any("can show no difference" in line for line in summary_lines(folder))
    task = study.runs[0]["scores"][0]["result"]["task"]
    for run in study.runs:
        for score in run["scores"]:
            result = score["result"]
            if result["task"] != task:
                continue
            if how == "one answer":
                result["predictions"] = ["1"] * len(result["predictions"])
            else:
                result["correct_per_row"] = [False] * len(result["correct_per_row"])
    write_runs(folder, [json.dumps(run) for run in study.runs])
    found = [line for line in summary_lines(folder) if "can show no difference" in line]
    assert len(found) == 1
    assert task in found[0]


def test_arms_that_did_not_start_from_the_same_adapter_are_a_warning(tmp_path):
    def change(run):
        if (run["stage"], run["arm"], run["seed"]) == ("confirmation", "echo-lora", 2):
            run["initial_adapter_sha256"] = "f" * 64

    page, text, _ = read(small(tmp_path, change=change))
    (warning,) = page.of("strong")
    assert "Not paired: in confirmation seed 2" in warning
    assert "Echo-LoRA (ffffffffffff…)" in warning
    assert "sha256 before training is equal" not in text
    assert summary_lines(tmp_path)[-1] == warning


def test_adapters_of_another_kind_need_not_start_from_the_same_weights(tmp_path):
    def change(run):
        if run["arm"] == "echo-lora":
            run["initial_adapter_sha256"] = f"{run['seed']:064d}"
            run["recipe"] = run["recipe"] | {"method": "dora"}

    page, text, _ = read(small(tmp_path, change=change))
    assert page.of("strong") == []
    assert "sha256" not in text


def test_runs_of_several_versions_or_devices_are_a_warning(tmp_path):
    def change(run):
        if run["seed"] == 3:
            run |= {"device": "cuda", "commit": "abc"}

    warnings = read(small(tmp_path, change=change))[0].of("strong")
    assert ["different commits" in warnings[0], "devices" in warnings[1]] == [True, True]


def test_a_search_on_validation_rows_is_no_test(tmp_path):
    page, _, _ = read(small(tmp_path, design={"score_on": "validation"}))
    assert any("to be confirmed on test rows" in warning for warning in page.of("strong"))
    assert "Correct answers on validation questions" in page.of("caption")


def drop(*keys):
    def change(run):
        for key in keys:
            run.pop(key, None)

    return change


def only_plain_answers(run):
    run["scores"] = [score for score in run["scores"] if not score["echo"]]
    without_history(run)


EMPTY = {
    "nothing has been run": ({"keep": lambda run: False, "about": {"chosen": None}}, {"Losses", "Cost", "Forgetting"}),
    "tuning only": ({"has_confirmation": False}, {"Differences by task", "Accuracy of each run", "Cost"}),
    "half of the tuning": (
        {"has_confirmation": False, "keep": lambda run: run["learning_rate"] < 0.001},
        {"Differences by task"},
    ),
    "nothing to tune": ({"rates": [0.002]}, {"Choice of the learning rate"}),
    "no echo": ({"arms": ["lora", "lora-long"]}, {"Does the echo know more?", "Strength of the echo"}),
    "no history": ({"change": without_history}, {"Losses", "Does the echo know more?", "Strength of the echo"}),
    "no echo kept on": ({"change": only_plain_answers}, {"What the echo itself could do"}),
    "no general text": ({"change": lambda run: run.update(general=None)}, {"Forgetting"}),
    "no control": ({"arms": ["lora", "echo-lora"]}, {"Controls"}),
    "tuned on loss": (
        {"design": {"tune_on": "loss"}, "change": lambda r: r["stage"] == "tuning" and r.update(scores=[])},
        set(),
    ),
    "little is recorded": (
        {
            "change": drop(
                *("recipe", "versions", "commit", "device", "steps", "seconds", "peak_memory", "rows", "general"),
                *("deployed_parameters", "echo_parameters", "initial_adapter_sha256", "adapter_sha256"),
            ),
            "about": dict.fromkeys(["recipe", "command", "versions", "commit", "processor", "started", "power"]),
        },
        {"Cost", "Forgetting"},
    ),
    "one seed": ({"seeds": [1]}, set()),
}


@pytest.mark.parametrize("case", EMPTY)
def test_what_is_missing_is_said_in_its_section(tmp_path, case):
    changes, empty = EMPTY[case]
    page, text, markdown = read(small(tmp_path, **changes))
    assert page.of("h2") == SECTIONS
    assert not re.search(r"\b(nan|inf|None|Undefined)\b", re.sub(r"<style>.*?</style>", "", text, flags=re.DOTALL))
    parts = dict(zip(SECTIONS, re.split(r"^## .+$", markdown, flags=re.MULTILINE)[1:], strict=True))
    assert {title for title in SECTIONS if len(parts[title].strip().splitlines()) == 1} >= empty
    assert all(len(line) > 20 for line in summary_lines(tmp_path))


def test_loss_that_tuned_is_shown(tmp_path):
    changes, _ = EMPTY["tuned on loss"]
    _, _, markdown = read(small(tmp_path, **changes))
    (run,) = read_study(tmp_path).tuning("lora")[0.002]
    loss = [entry["eval_loss"] for entry in run["history"] if "eval_loss" in entry][-1]
    assert f"| LoRA | 0.002 | {loss:.4g} | chosen |" in markdown


@pytest.mark.parametrize("trains_on_prompts", [True, False])
def test_what_training_losses_are_divided_by_is_said_where_prompts_are_trained_on(tmp_path, trains_on_prompts):
    recipe = RECIPE | {"data": {"train_on_prompt": trains_on_prompts}}
    _, _, markdown = read(small(tmp_path, about={"recipe": recipe}))
    for text in ("is then summed over answers but divided by all trained tokens", "divide both by all trained tokens"):
        assert (text in markdown) == trains_on_prompts


def test_values_that_are_not_finite_do_not_break_a_figure(tmp_path):
    def change(run):
        for entry in run["history"]:
            for key in ("eval_loss", "distillation"):
                if key in entry and run["seed"] == 2:
                    entry[key] = float("nan")

    _, text, _ = read(small(tmp_path, change=change))
    numbers = re.findall(r' (?:d|x|y|cx|cy|r|width|height)="([^"]*)"', text)
    assert len(numbers) > 200
    assert [value for value in numbers if re.search("nan|inf", value)] == []


def test_long_curves_are_thinned(tmp_path):
    def change(run):
        run["history"] = [{"step": step, "loss": 1 / step} for step in range(1, 1000)]

    _, text, _ = read(small(tmp_path, change=change))
    assert max(d.count("L") for d in re.findall(r'class="line" d="([^"]+)"', text)) == 59


# ------------------------------------------------------------------------------------------------ what is refused


def test_a_folder_that_is_no_study_is_refused(tmp_path):
    with pytest.raises(
        EchoConfigError, match=r"study\.json can't be read.*Name a folder that `echo-lora compare` wrote"
    ):
        write_report(tmp_path)
    with pytest.raises(EchoConfigError, match=r"nowhere/study\.json"):
        summary_lines(tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ('{\n"title": "a",\n}', r"study\.json:3: not JSON"),
        ("[]", r"study\.json is not a study file: it is a list, not an object"),
        ('{"title": "a"}', r"design is missing"),
        ('{"design": {"title": "a"}}', r"arms is missing"),
    ],
)
def test_a_damaged_study_file_is_named_with_its_line(tmp_path, text, where):
    (tmp_path / "study.json").write_text(text)
    with pytest.raises(EchoConfigError, match=where):
        write_report(tmp_path)


@pytest.mark.parametrize(
    ("design", "where"),
    [
        ({"baseline": "dora"}, "there is no arm 'dora'"),
        ({"comparisons": [["echo-lora", "zero"]]}, "there is no arm 'zero'"),
        ({"comparisons": [["echo-lora"]]}, "comparison \\['echo-lora'\\] must name two different arms"),
        ({"smallest_effect": "1"}, "smallest_effect = '1' must be a valid number"),
        ({"smallest_effect": 7}, "smallest_effect = 7 must be less than 1"),
        ({"margin": 0}, "margin = 0 must be greater than 0"),
        ({"looks": [2, 3]}, r"looks = \[2, 3\] must be increasing numbers of seeds, at least 3"),
        ({"looks": [3, 4]}, r"looks = \[3, 4\] must be .* the number of all seeds, 3"),
        ({"seeds": [1, "2"]}, "seeds.1 = '2' must be a valid integer"),
        ({"arms": {"lora": {}, "../dora": {}}}, "the arm name '../dora' must consist of"),
    ],
)
def test_a_study_that_contradicts_itself_is_refused(tmp_path, design, where):
    with pytest.raises(EchoConfigError, match=rf"study\.json is not a study file: .*{where}"):
        write_report(small(tmp_path, design=design))


def test_a_learning_rate_of_no_arm_is_refused(tmp_path):
    with pytest.raises(EchoConfigError, match="chosen names 'dora'"):
        write_report(small(tmp_path, about={"chosen": {"dora": 1e-3}}))


def test_a_damaged_record_is_named_with_its_line(tmp_path):
    small(tmp_path)
    lines = [json.dumps(run) for run in read_study(tmp_path).runs]
    for broken, where in [
        ("{", r"runs\.jsonl\.gz:3: not JSON"),
        (json.dumps({"stage": "tuning"}), r"runs\.jsonl\.gz:3: not the record of a run: arm is missing"),
        (lines[2].replace('"tuning"', '"tunning"'), r":3: .*stage = 'tunning' must be 'tuning' or 'confirmation'"),
        (
            lines[2].replace('"arm": "lora"', '"arm": "dora"'),
            r":3: .*arm = 'dora' is not an arm of the study: lora, echo-lora",
        ),
        (lines[2].replace('"accuracy"', '"share"'), r":3: .*scores\.0\.result\.accuracy is missing"),
        (
            re.sub(r'"accuracy": [0-9.]+', '"accuracy": 7', lines[2]),
            r":3: .*accuracy = 7 must be less than or equal to 1",
        ),
        (lines[2].replace('"seed": 0', '"seed": -1'), r":3: .*seed = -1 must be greater than or equal to 0"),
        (lines[0], r":3: a second record of tuning lora seed 0; the first is in line 1"),
    ]:
        write_runs(tmp_path, [*lines[:2], broken, *lines[3:]])
        with pytest.raises(EchoDataError, match=where):
            write_report(tmp_path)
    (tmp_path / "runs.jsonl.gz").write_bytes(b"not gzip")
    with pytest.raises(EchoDataError, match=r"runs\.jsonl\.gz can't be read"):
        write_report(tmp_path)


def test_runs_that_answered_other_questions_are_refused(tmp_path):
    def change(run):
        if (run["stage"], run["arm"], run["seed"]) == ("confirmation", "lora", 2):
            run["scores"][0]["result"]["correct_per_row"].pop()

    with pytest.raises(
        EchoDataError, match=r"arm lora did not all answer the same questions of task chain_sum: 30, 29, 30"
    ):
        write_report(small(tmp_path, change=change))


# ------------------------------------------------------------------------------------------------ the command


def test_the_command_prints_the_verdict_and_where_the_page_is(full):
    done = CliRunner().invoke(app, ["report", str(full)], catch_exceptions=False)
    assert done.exit_code == 0
    assert done.stdout.splitlines()[:2] == summary_lines(full)
    assert f"Written to {full / 'report.html'}" in done.stdout
    assert "\x1b" not in done.output


def test_the_command_refuses_a_folder_that_is_no_study(tmp_path):
    done = CliRunner().invoke(app, ["report", str(tmp_path)], catch_exceptions=False)
    assert done.exit_code == 1
    assert f"Error: {tmp_path / 'study.json'} can't be read" in done.stderr


# ------------------------------------------------------------------------------------------------ without an echo


@pytest.mark.parametrize("has_runs", [True, False])
def test_the_report_of_a_study_without_an_echo_does_not_speak_of_one(tmp_path, has_runs):
    arms = {"lora": {"label": "LoRA"}, "lora-long": {"label": "five epochs", "set": {"training.epochs": 5}}}
    recipe = RECIPE | {"echo": False}

    def change(record):
        record["recipe"] = recipe

    write_study(
        tmp_path,
        arms=["lora", "lora-long"],
        design={"arms": arms, "title": "Is longer better?", "question": "Are five epochs better than four?"},
        about={"recipe": recipe},
        change=change,
        keep=lambda record: has_runs,
    )
    page, text, markdown = read(tmp_path)
    for written in (text, markdown, *summary_lines(tmp_path)):
        assert "echo" not in re.sub(r"echo[-_]lora", "", written, flags=re.IGNORECASE).lower()
    about_echo = ["Does the echo know more?", "Strength of the echo", "What the echo itself could do"]
    assert page.of("h2") == [title for title in SECTIONS if title not in about_echo]
    assert ("five epochs − LoRA" in page.of("text")) == has_runs


@pytest.mark.parametrize(
    ("shared", "arms", "of_runs", "expected"),
    [
        ({}, {"lora": False, "echo-lora": None}, None, True),  # true is the recipe's default
        ({}, {"lora": None, "echo-lora": None}, None, False),  # as in the baseline's recipe
        ({"echo": False}, {"lora": None, "echo-lora": None}, None, False),
        ({"echo": False}, {"lora": None, "echo-lora": True}, None, True),
        ({}, {"lora": False, "echo-lora": None}, False, False),  # the recipe's file says so
    ],
)
def test_whether_a_study_has_an_echo_is_read_from_its_design_and_its_runs(tmp_path, shared, arms, of_runs, expected):
    sets = {arm: {} if echo is None else {"set": {"echo": echo}} for arm, echo in arms.items()}

    def change(record):
        record["recipe"] = RECIPE | {"echo": of_runs}

    write_study(
        tmp_path,
        arms=list(arms),
        design={"arms": sets, "set": shared},
        about={"recipe": RECIPE | {"echo": False}},
        change=change,
        keep=lambda record: of_runs is not None,
    )
    assert read_study(tmp_path).has_echo == expected
