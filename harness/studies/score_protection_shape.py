"""What each of three choices does to fidelity: the score, the protection, the shape of the budget.

``python -m kvarena.harness.studies.score_protection_shape`` makes table and picture anew from the
recorded rows, ``results/score-protection-shape/score-protection-shape.csv``. With a results folder
as its argument it takes the cells there, which ``make score-protection-shape`` ran, and records
their rows first.

The yardstick is random eviction under the same protection and an even budget: what a choice closes
is the share of the way from random's KL to none at all, which is the full cache. Two cells count as
the same where the whole 95 % interval of their difference lies within MARGIN_NATS, which was set
before any result was seen (equivalence by two one-sided tests, at 2.5 % each).
"""

import pandas as pd
from matplotlib.figure import Figure

from kvarena.harness.analysis.intervals import holm, paired_difference
from kvarena.harness.entry import one_line_errors
from kvarena.harness.report import budget_charts
from kvarena.harness.report.policy_styles import policy_style
from kvarena.harness.studies import recorded_study

NAME = "score-protection-shape"
FOLDER = recorded_study.folder_of(NAME)
FLOOR = "random"
MARGIN_NATS = 0.05
CHOICE = ["score_rule", "protect", "shape"]
MARKERS = {"uniform": "o", "pyramid": "^", "ada": "s", "global": "D"}


def main() -> None:
    """Write everything, from the cells below the folder that the argument names if there is one."""
    with one_line_errors():
        renew(recorded_study.rows_to_record(NAME, __doc__))


def renew(rows: pd.DataFrame) -> None:
    """Write rows, summary and picture, and the table of the page beside them."""
    summary = summarise(rows)
    recorded_study.write(NAME, rows, summary, markdown(summary), picture(summary))


def summarise(rows: pd.DataFrame) -> pd.DataFrame:
    """One line per choice that has all samples; differences are random's KL less the choice's own.

    closed_ratio: share of random's KL that is gone; same: whether it equals random within the
    margin; p_holm: over all choices that are compared with random.
    """
    good = rows[rows["status"] == "ok"]
    good = good.assign(score_rule=good["policy"].str.partition("(")[0])
    complete = good.groupby(CHOICE)["sample_id"].transform("nunique") == good["num_planned"]
    lines = []
    cells = dict(list(good[complete].groupby(CHOICE)))
    for (rule, protect, shape), own in cells.items():
        line = {
            **dict(zip(CHOICE, (rule, protect, shape), strict=True)),
            "num_samples": len(own),
            "kl_mean": own["kl_mean"].mean(),
            "agreement": own["score"].mean(),
            "kept_tokens": own["kept_tokens"].max(),
        }
        floor = cells.get((FLOOR, protect, "uniform"))
        if floor is not None and rule != FLOOR:
            both = own.merge(floor, on="sample_id", suffixes=("", "_floor"), validate="1:1")
            gain = paired_difference(both["kl_mean_floor"], both["kl_mean"], both["document"])
            line |= {
                "kl_gain": gain.mean,
                "kl_gain_low": gain.low,
                "kl_gain_high": gain.high,
                "p": gain.p_value,
                "closed_ratio": gain.mean / both["kl_mean_floor"].mean(),
                "same": gain.low > -MARGIN_NATS and gain.high < MARGIN_NATS,
            }
        lines.append(line)
    summary = pd.DataFrame(lines)
    return summary.assign(p_holm=holm(summary["p"])).sort_values(
        ["protect", "shape", "kl_mean"], ascending=[False, False, True], ignore_index=True
    )


def markdown(summary: pd.DataFrame) -> str:
    """The table for people: best first within a protection and a shape."""
    lines = [
        "| score | protection | shape | KL nats | closes % | less than random [95 %] | Holm p |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: |",
    ]
    for line in summary.to_dict("records"):
        compared = ["", "", ""]
        if line["score_rule"] != FLOOR:
            limits = f"[{line['kl_gain_low']:.3f}, {line['kl_gain_high']:.3f}]"
            same = ", the same" if line["same"] else ""
            compared = [
                f"{100 * line['closed_ratio']:.0f}",
                f"{line['kl_gain']:.3f} {limits}{same}",
                f"{line['p_holm']:.3f}",
            ]
        names = [line[name] for name in CHOICE]
        lines.append("| " + " | ".join([*names, f"{line['kl_mean']:.3f}", *compared]) + " |")
    return "\n".join(lines) + "\n"


def picture(summary: pd.DataFrame) -> bytes:
    """A line per score and shape, a dot per protection: what share of random's KL it closes."""
    known = summary.dropna(subset=["closed_ratio"])
    order = known.groupby(["score_rule", "shape"])["closed_ratio"].max().sort_values()
    with budget_charts.default_settings():
        figure = Figure(figsize=(6.4, 0.8 + 0.22 * len(order)), layout="constrained")
        axes = figure.add_subplot()
        for place, (rule, shape) in enumerate(order.index):
            own = known[(known["score_rule"] == rule) & (known["shape"] == shape)]
            colour = policy_style(rule).colour
            axes.hlines(place, 100 * own["closed_ratio"].min(), 100 * own["closed_ratio"].max(),
                        color=colour, lw=1)  # fmt: skip
            for line in own.to_dict("records"):
                is_bare = line["protect"] == "none"
                axes.plot(
                    100 * line["closed_ratio"],
                    place,
                    MARKERS.get(shape, "o"),
                    color=colour,
                    fillstyle="none" if is_bare else "full",
                    ms=6,
                )
        axes.set_ylim(-0.6, len(order) - 0.4)
        axes.axvline(0, color="#888888", lw=0.8)
        axes.set_yticks(range(len(order)), [f"{rule}, {shape}" for rule, shape in order.index])
        axes.set_xlabel(
            "share of random's KL to the full cache that is gone, %\n"
            "hollow: nothing protected; filled: 4 first and 64 newest tokens, for random as well"
        )
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#dddddd", lw=0.5, axis="x")
        return budget_charts.as_svg(figure)


if __name__ == "__main__":
    main()
