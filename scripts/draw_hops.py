"""Draw CE(on) - CE(off) against the number of hops, from the records of the depth studies.

    python scripts/draw_hops.py results/study/depth

FOLDER/hops-N holds a study of N hops. Writes FOLDER/README.md, with every seed's difference, and FOLDER/hops.png.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from matplotlib.figure import Figure

from echo_lora.files import write_text
from echo_lora.study.folder import StudyRecords, read_study
from echo_lora.study.records import mean_of, run_accuracy, tuned_on
from echo_lora.study.report.texts import with_minus

INTRODUCTION = """# Does the echo know more where a task needs more steps?

Slightly, at four hops with many rows, and by less than the 0.05 nats that [the plan](../PLAN.md) asks for; elsewhere
hardly or not.

A hop is one of the swaps that an answer composes. The table has the last CE(on) − CE(off) on validation rows, in nats
per answer token: below 0 the echo-on pass predicts answers better. Few rows are 800, a tenth of them with a wrong
answer; many are 8,000. With two hops there are only 387 and 389, so that "many rows" means 39 steps there and 750
elsewhere. *Gradient through z* is `source_gradient: true`, *standardised* `normalization: standardize`, x1
`echo_lr_multiplier: 1`; "…" stands for the setting of the row above. All else is in the studies' reports: {reports}.

Accuracies don't rank the settings: all ran at one learning rate, 2e-3. With four hops and many rows LoRA answers 37 to
39 % at 4e-3, no less than with any echo kept on at 2e-3. With tuned rates and fresh seeds the distilled adapter shows
no gain there: [confirm/kept](../confirm/kept/report.md).

```
python scripts/pretrain_tracker.py --output runs/tracker      # the model and its rows, two minutes
echo-lora compare results/study/depth/hops-6/study.yaml       # and so on; its records are copied to here
python scripts/draw_hops.py results/study/depth
```

![CE(on) − CE(off) against the number of hops, one line for each setting of the echo.](hops.png)
"""


def differences(study: StudyRecords, arm: str) -> list[float]:
    """CE(on) - CE(off) at the end of training, seed by seed; empty for an arm without the echo."""
    found = [[entry for entry in run["history"] if "eval_ce_on" in entry] for run in study.confirmation(arm).values()]
    return [entries[-1]["eval_ce_on"] - entries[-1]["eval_ce_off"] for entries in found if entries]


def signed(nats: float) -> str:
    return with_minus(f"{nats:+.3f}")


def table(studies: dict[int, StudyRecords]) -> list[str]:
    lines = [
        "| hops | setting | CE(off) | CE(on) − CE(off): mean, and each seed | accuracy | with the echo kept on |",
        "|---|---|---|---|---|---|",
    ]
    for hops, study in studies.items():
        for arm in study.design.arms:
            runs = list(study.confirmation(arm).values())
            if not runs:
                continue
            found = differences(study, arm)
            each = f"{signed(mean_of(found))} ({', '.join(map(signed, found))})" if found else ""
            kept = f"{mean_of(run_accuracy(run, echo=True) for run in runs):.1%}" if found else ""
            loss = mean_of(tuned_on(run, "loss") for run in runs)
            accuracy = mean_of(run_accuracy(run) for run in runs)
            lines.append(f"| {hops} | {study.label(arm)} | {loss:.3f} | {each} | {accuracy:.1%} | {kept} |")
    return lines


def draw(studies: dict[int, StudyRecords], path: Path) -> None:
    figure = Figure(figsize=(6.4, 4.8), layout="constrained")
    axes = figure.subplots()
    arms = {arm: study.label(arm) for study in studies.values() for arm in study.design.arms if differences(study, arm)}
    for (arm, label), marker in zip(arms.items(), "osD^vP", strict=False):
        found = {hops: differences(study, arm) for hops, study in studies.items()}
        hops = [number for number, values in found.items() if values]
        line = axes.plot(hops, [mean_of(found[number]) for number in hops], f"{marker}-", markersize=4, label=label)[0]
        for number in hops:
            axes.plot([number, number], [min(found[number]), max(found[number])], color=line.get_color(), linewidth=1)
    axes.axhline(0, color="black", linewidth=0.8)
    axes.set_xlabel("hops; vertical lines: range over seeds")
    axes.set_xticks(list(studies))
    axes.set_ylabel("CE(on) − CE(off), nats")
    figure.legend(fontsize="small", loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    found = sorted(
        (int(path.parent.name.removeprefix("hops-")), path.parent) for path in folder.glob("hops-*/study.json")
    )
    studies = {hops: read_study(path) for hops, path in found}
    draw(studies, folder / "hops.png")
    reports = ", ".join(f"[{hops} hops](hops-{hops}/report.md)" for hops in studies)
    write_text(folder / "README.md", "\n".join([INTRODUCTION.format(reports=reports), *table(studies), ""]))


if __name__ == "__main__":
    main()
