"""Which policies survive questions that they have not seen: eight questions about one text.

``python -m kvarena.harness.studies.shared_contexts`` makes table and picture anew from the recorded
rows, ``results/shared-contexts/shared-contexts.csv``. With a results folder as its argument it
takes the cells there, which ``make shared-contexts`` ran, and records their rows first.

A text is compressed with each question in sight, before any question is known, or once for a
dialogue of eight turns. The yardstick is the same policy with the question in sight; differences
are paired by question, and texts are what the intervals count.
"""

import pandas as pd
from matplotlib.figure import Figure

from kvarena.harness.analysis.by_turn import prefill_saved
from kvarena.harness.analysis.intervals import holm
from kvarena.harness.entry import one_line_errors
from kvarena.harness.report import budget_charts
from kvarena.harness.report.policy_styles import policy_style
from kvarena.harness.studies import recorded_study

NAME = "shared-contexts"
FOLDER = recorded_study.folder_of(NAME)
SIGHT, UNSEEN, DIALOGUE = "in sight", "unseen", "dialogue"
WAYS = {
    ("inside", "independent"): SIGHT,
    ("after", "independent"): UNSEEN,
    ("after", "dialogue"): DIALOGUE,
}
MARKERS = {SIGHT: "o", UNSEEN: "s", DIALOGUE: "^"}


def main() -> None:
    """Write everything, from the cells below the folder that the argument names if there is one."""
    with one_line_errors():
        renew(recorded_study.rows_to_record(FOLDER, __doc__))


def renew(rows: pd.DataFrame) -> None:
    """Write rows, summary and picture, and the table of the page beside them."""
    summary = summarise(rows)
    recorded_study.write(FOLDER, rows, summary, picture(summary))
    recorded_study.write_table(FOLDER / "README.md", NAME, markdown(summary))


def summarise(rows: pd.DataFrame) -> pd.DataFrame:
    """One line per task, policy and way of asking that has all samples.

    value: mean score, or mean KL of forced answers; change: by which it differs from the same
    questions in sight, with its interval; saved_ratio: share of all prompt tokens that were not
    computed; p_holm: over all that is compared.
    """
    ways = [WAYS[way] for way in zip(rows["question"], rows["turns"], strict=True)]
    measure = rows["kl_mean"].fillna(rows["score"]) if "kl_mean" in rows else rows["score"]
    rows = rows.assign(way=ways, value=measure)
    cells = recorded_study.complete_cells(rows, ["task", "policy", "way"])
    lines = []
    for (task, policy, way), own in cells.items():
        line = {
            "task": task,
            "policy": policy,
            "way": way,
            "num_samples": len(own),
            "num_texts": own["document"].nunique(),
            "value": own["value"].mean(),
            "saved_ratio": prefill_saved(own),
            **dict.fromkeys(("change", "change_low", "change_high", "p")),
        }
        seen = cells.get((task, policy, SIGHT))
        if seen is not None and way != SIGHT:
            change = recorded_study.difference(own, seen, "value")
            line |= {**recorded_study.with_limits("change", change), "p": change.p_value}
        lines.append(line)
    summary = pd.DataFrame(lines)
    order = {way: place for place, way in enumerate(MARKERS)}
    return summary.assign(p_holm=holm(summary["p"].astype(float))).sort_values(
        ["task", "policy", "way"],
        key=lambda column: column.map(order) if column.name == "way" else column,
        ignore_index=True,
    )


def markdown(summary: pd.DataFrame) -> str:
    """The table for people: a task after the other, a line per policy and way of asking."""
    lines = [
        "| task | policy | question | score or KL | less in sight [95 %] | Holm p | saved |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for line in summary.to_dict("records"):
        compared = ["", ""]
        if pd.notna(line["change"]):
            limits = f"[{line['change_low']:+.3f}, {line['change_high']:+.3f}]"
            if pd.isna(line["change_low"]):  # fewer than six texts differ
                limits = "(no interval)"
            compared = [f"{line['change']:+.3f} {limits}", f"{line['p_holm']:.3f}"]
        names = [line[name] for name in ("task", "policy", "way")]
        saved = f"{100 * line['saved_ratio']:.0f} %"
        lines.append("| " + " | ".join([*names, f"{line['value']:.3f}", *compared, saved]) + " |")
    return "\n".join(lines) + "\n"


def picture(summary: pd.DataFrame) -> bytes:
    """A panel per task, a line per policy, a mark per way of asking."""
    tasks = list(dict.fromkeys(summary["task"]))
    most = max(summary.groupby("task")["policy"].nunique())
    with budget_charts.default_settings():
        figure = Figure(figsize=(3.6 * len(tasks), 1.2 + 0.26 * most), layout="constrained")
        panels = figure.subplots(1, len(tasks), squeeze=False)[0]
        for axes, task in zip(panels, tasks, strict=True):
            own = summary[summary["task"] == task]
            policies = list(own.groupby("policy")["value"].max().sort_values().index)
            is_kl = task.startswith("fidelity")
            if is_kl:
                policies.reverse()  # less is better
            for place, policy in enumerate(policies):
                values = own[own["policy"] == policy]
                colour = policy_style(policy).colour
                axes.hlines(place, values["value"].min(), values["value"].max(), color=colour, lw=1)
                for line in values.to_dict("records"):
                    axes.plot(
                        line["value"], place, MARKERS[line["way"]], color=colour, ms=6,
                        fillstyle="full" if line["way"] == SIGHT else "none",
                    )  # fmt: skip
            axes.set_yticks(range(len(policies)), policies)
            axes.set_title(task)
            axes.set_xlabel("KL to the full cache, nats" if is_kl else "score")
            axes.set_xlim(left=0)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(color="#dddddd", lw=0.5, axis="x")
        figure.supxlabel(
            "filled: question in sight; square: unseen; triangle: in a dialogue", fontsize="small"
        )
        return budget_charts.as_svg(figure)


if __name__ == "__main__":
    main()
