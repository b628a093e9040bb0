"""What each of three choices does to fidelity: the score, the protection, the shape of the budget.

``python -m kvarena.harness.studies.score_protection_shape`` makes table and picture anew from the
recorded rows, ``results/score-protection-shape/score-protection-shape.csv``. With a results folder
as its argument it takes the cells there, which ``make score-protection-shape`` ran, and records
their rows first.

The yardstick is random eviction under the same protection and an even budget: what a choice closes
is the share of the way from random's KL to none at all, which is the full cache. Two cells count as
the same where the whole 95 % interval of their difference lies within MARGIN_NATS, which was set
before any result was seen (equivalence by two one-sided tests, at 2.5 % each). The other end is the
oracle under the same protection: regret is the KL that a choice has beyond the oracle's.
"""

import math
from collections.abc import Hashable
from itertools import combinations

import pandas as pd
from matplotlib.figure import Figure

from kvarena.harness.analysis.intervals import Difference, holm
from kvarena.harness.entry import one_line_errors
from kvarena.harness.report import budget_charts
from kvarena.harness.report.policy_styles import policy_style
from kvarena.harness.studies import recorded_study
from kvarena.harness.studies.recorded_study import with_limits
from kvarena.harness.studies.reference import REPOSITORY

NAME = "score-protection-shape"
FOLDER = recorded_study.folder_of(NAME)
FLOOR, ORACLE = "random", "oracle"
MARGIN_NATS = 0.05
REGRET = ["regret", "regret_low", "regret_high", "distance_closed_ratio"]
CHOICE = ["score_rule", "protect", "shape"]
MARKERS = {"uniform": "o", "pyramid": "^", "ada": "s", "global": "D"}


def main() -> None:
    """Write everything, from the cells below the folder that the argument names if there is one."""
    with one_line_errors():
        renew(recorded_study.rows_to_record(FOLDER, __doc__))


def renew(rows: pd.DataFrame) -> None:
    """Write rows, summary and picture, and the table of the page beside them."""
    summary = summarise(rows)
    recorded_study.write(FOLDER, rows, summary, picture(summary))
    recorded_study.write_table(FOLDER / "README.md", NAME, markdown(summary))
    recorded_study.write_table(REPOSITORY / "README.md", "score-protection", overview(summary))


def summarise(rows: pd.DataFrame) -> pd.DataFrame:
    """One line per choice that has all samples; kl_gain is random's KL less the choice's own.

    closed_ratio: share of random's KL that is gone; distance_closed_ratio: share of the distance
    from random to the oracle; same: whether it equals random within the margin; p_holm: over all
    choices that are compared with random. What lacks its yardstick in the rows is NaN.
    """
    cells = _complete_cells(rows)
    lines = []
    for (rule, protect, shape), own in cells.items():
        line = {
            **dict(zip(CHOICE, (rule, protect, shape), strict=True)),
            "num_samples": len(own),
            "kl_mean": own["kl_mean"].mean(),
            "agreement": own["score"].mean(),
            "kept_tokens": own["kept_tokens"].max(),
            **dict.fromkeys(REGRET, math.nan),
        }
        floor = cells.get((FLOOR, protect, "uniform"))
        if floor is not None and rule != FLOOR:
            gain = _kl_difference(floor, own)
            line |= {
                **with_limits("kl_gain", gain),
                "p": gain.p_value,
                "closed_ratio": gain.mean / floor["kl_mean"].mean(),
                "same": _is_same(gain),
            }
        oracle = cells.get((ORACLE, protect, "uniform"))
        if oracle is not None and rule != ORACLE:
            regret = _kl_difference(own, oracle)
            line |= with_limits("regret", regret)
            if "kl_gain" in line:
                whole = line["kl_gain"] + regret.mean  # from random down to the oracle
                line["distance_closed_ratio"] = line["kl_gain"] / whole
        lines.append(line)
    summary = pd.DataFrame(lines)
    return summary.assign(p_holm=holm(summary["p"])).sort_values(
        ["protect", "shape", "kl_mean"], ascending=[False, False, True], ignore_index=True
    )


def compare(rows: pd.DataFrame) -> pd.DataFrame:
    """Every two choices that differ in one respect alone, each with all of its samples.

    varied: that respect, a name in CHOICE, which the second choice has as `other`.
    kl_difference: KL of the first less that of the second, in nats per token; same: whether they
    are equal within the margin; p_holm: over all pairs that vary the same respect.
    """
    cells = _complete_cells(rows)
    lines = []
    for one, other in combinations(cells, 2):
        varied = [place for place in range(len(CHOICE)) if one[place] != other[place]]
        if len(varied) != 1:
            continue
        difference = _kl_difference(cells[one], cells[other])
        lines.append(
            {
                "varied": CHOICE[varied[0]],
                **dict(zip(CHOICE, one, strict=True)),
                "other": other[varied[0]],
                **with_limits("kl_difference", difference),
                "p": difference.p_value,
                "detectable": difference.detectable,
                "same": _is_same(difference),
            }
        )
    pairs = pd.DataFrame(lines)
    return pairs.assign(p_holm=pairs.groupby("varied")["p"].transform(holm))


def _complete_cells(rows: pd.DataFrame) -> dict[tuple[Hashable, ...], pd.DataFrame]:
    """Score, protection and shape -> the rows of a cell of which no sample is missing."""
    rules = rows["policy"].str.partition("(")[0]
    return recorded_study.complete_cells(rows.assign(score_rule=rules), CHOICE)


def _kl_difference(one: pd.DataFrame, other: pd.DataFrame) -> Difference:
    return recorded_study.difference(one, other, "kl_mean")


def _is_same(difference: Difference) -> bool:
    return difference.low > -MARGIN_NATS and difference.high < MARGIN_NATS


def markdown(summary: pd.DataFrame) -> str:
    """The table for people: best first within a protection and a shape."""
    lines = [
        "| score | protection | shape | KL nats | less than random [95 %] | Holm p | closes % |"
        " to oracle % |",
        "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for line in summary.to_dict("records"):
        compared = ["", "", "", ""]
        if line["score_rule"] != FLOOR:
            limits = f"[{line['kl_gain_low']:.3f}, {line['kl_gain_high']:.3f}]"
            same = ", the same" if line["same"] else ""
            compared = [
                f"{line['kl_gain']:.3f} {limits}{same}",
                f"{line['p_holm']:.3f}",
                _percent(line["closed_ratio"]),
                _percent(line["distance_closed_ratio"]),
            ]
        names = [line[name] for name in CHOICE]
        lines.append("| " + " | ".join([*names, f"{line['kl_mean']:.3f}", *compared]) + " |")
    return "\n".join(lines) + "\n"


def overview(summary: pd.DataFrame) -> str:
    """The README's table: each score under an even budget, by its KL where all protect alike."""
    even = summary[summary["shape"] == "uniform"]
    bare, alike = (even[even["protect"] == protect] for protect in ("none", "4+64"))
    unprotected = dict(zip(bare["score_rule"], bare["kl_mean"], strict=True))
    lines = [
        "| score | KL, none protected | KL, 4 + 64 protected | less than random [95 %] | Holm p |"
        " to oracle % |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for line in alike.sort_values("kl_mean").to_dict("records"):
        rule = line["score_rule"]
        compared = ["", "", ""]
        if rule != FLOOR:
            limits = f"[{line['kl_gain_low']:.2f}, {line['kl_gain_high']:.2f}]"
            compared = [
                f"{line['kl_gain']:.2f} {limits}",
                f"{line['p_holm']:.3f}",
                "100" if rule == ORACLE else _percent(line["distance_closed_ratio"]),
            ]
        without = f"{unprotected[rule]:.2f}" if rule in unprotected else ""
        row = [f"`{rule}`", without, f"{line['kl_mean']:.2f}", *compared]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines) + "\n"


def _percent(ratio: float) -> str:
    return "" if math.isnan(ratio) else f"{100 * ratio:.0f}"


def picture(summary: pd.DataFrame) -> bytes:
    """A line per score and shape, a dot per protection: how far it gets to the oracle."""
    known = summary.dropna(subset=["distance_closed_ratio"])
    # From the best up under the common protection, which comes last in the summary.
    lines = known.groupby(["score_rule", "shape"], sort=False)["distance_closed_ratio"].last()
    order = lines.sort_values()
    with budget_charts.default_settings():
        figure = Figure(figsize=(6.4, 0.8 + 0.22 * len(order)), layout="constrained")
        axes = figure.add_subplot()
        for place, (rule, shape) in enumerate(order.index):
            own = known[(known["score_rule"] == rule) & (known["shape"] == shape)]
            colour = policy_style(rule).colour
            shares = 100 * own["distance_closed_ratio"]
            axes.hlines(place, shares.min(), shares.max(), color=colour, lw=1)
            for line in own.to_dict("records"):
                is_bare = line["protect"] == "none"
                axes.plot(
                    100 * line["distance_closed_ratio"],
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
            "share of the way from random's KL to the oracle's, under the same protection, %\n"
            "hollow: nothing protected; filled: 4 first and 64 newest tokens, for random as well"
        )
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#dddddd", lw=0.5, axis="x")
        return budget_charts.as_svg(figure)


if __name__ == "__main__":
    main()
