"""How far a needle is found as texts grow, with every score under the same budget and protection.

``python -m kvarena.harness.studies.needle_lengths`` makes table and picture anew from the recorded
rows, ``results/needle-lengths/needle-lengths.csv``. With a results folder as its argument it takes
the cells there, which ``make needle-lengths`` ran, and records their rows first.
"""

import pandas as pd
from matplotlib.figure import Figure

from kvarena.harness.analysis.comparison import compare_cells, compare_pairs
from kvarena.harness.entry import one_line_errors
from kvarena.harness.report import budget_charts
from kvarena.harness.report.policy_styles import policy_style
from kvarena.harness.studies import recorded_study

NAME = "needle-lengths"
PROTECT = "4+64"  # as conf/experiment/needle_lengths.yaml has it
FOLDER = recorded_study.folder_of(NAME)


def main() -> None:
    """Write everything, from the cells below the folder that the argument names if there is one."""
    with one_line_errors():
        renew(recorded_study.rows_to_record(FOLDER, __doc__))


def renew(rows: pd.DataFrame) -> None:
    """Write rows, summary and picture, and the tables of the page beside them."""
    summary, pairs = summarise(rows), pairs_of(rows)
    recorded_study.write(FOLDER, rows, summary, picture(summary))
    recorded_study.write_table(FOLDER / "README.md", NAME, scores_table(summary, pairs))
    recorded_study.write_table(FOLDER / "README.md", f"{NAME} pairs", pairs_table(pairs))


def summarise(rows: pd.DataFrame) -> pd.DataFrame:
    """compare_cells' lines by length, each a contest of its own, with the column ``length``."""
    return _by_length(compare_cells(_contests(rows)))


def pairs_of(rows: pd.DataFrame) -> pd.DataFrame:
    """compare_pairs' lines by length, of policies at the same budget; Holm within a length."""
    return _by_length(compare_pairs(_contests(rows)))


def _contests(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows of cells that have every sample, with the length in their task."""
    complete = recorded_study.complete_cells(rows, ["policy", "budget", "run_id"])
    whole = pd.concat(complete.values())
    whole["policy"] = whole["policy"].str.removesuffix(f"(protect={PROTECT})")  # all have it
    whole["task"] = "needle-" + whole["meta_length_target"].astype(int).astype(str)
    planned = whole.groupby(["task", "policy", "budget"])["sample_id"].transform("nunique")
    return whole.assign(num_planned=planned)


def _by_length(lines: pd.DataFrame) -> pd.DataFrame:
    lengths = lines["task"].str.removeprefix("needle-").astype(int)
    return lines.assign(length=lengths).sort_values("length", kind="stable", ignore_index=True)


def scores_table(summary: pd.DataFrame, pairs: pd.DataFrame) -> str:
    """A line per policy, a column per length; the last line says what could have been seen."""
    lengths = list(dict.fromkeys(summary["length"]))
    scores = summary.pivot(index="policy", columns="length", values="score")
    order = scores.dropna(axis=1).mean(axis=1).sort_values(ascending=False).index
    lines = [
        "| policy | " + " | ".join(f"{length} tokens" for length in lengths) + " |",
        "| --- |" + " ---: |" * len(lengths),
    ]
    cells = summary.set_index(["policy", "length"])
    for policy in order:
        texts = []
        for length in lengths:
            if pd.isna(scores.loc[policy, length]):
                texts.append("not run")
                continue
            cell = cells.loc[(policy, length)]
            low, high = 100 * cell["score_low"], 100 * cell["score_high"]
            texts.append(f"{100 * cell['score']:.0f} [{low:.0f}, {high:.0f}]")
        lines.append(f"| `{policy}` | " + " | ".join(texts) + " |")
    detectable = pairs.groupby("length")["detectable"].median().reindex(lengths)
    texts = ["" if pd.isna(value) else f"{100 * value:.0f}" for value in detectable]
    lines.append("| smallest detectable difference, median pair | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def pairs_table(pairs: pd.DataFrame) -> str:
    """The pairs of which one is better after Holm's correction, by length."""
    found = pairs[pairs["verdict"].str.endswith("is better")]
    lines = [
        "| tokens | better | worse | points [95 %] | Holm p |",
        "| ---: | --- | --- | ---: | ---: |",
    ]
    for pair in found.to_dict("records"):
        sign = 1 if pair["difference"] > 0 else -1
        better, worse = (pair["policy"], pair["other"])[::sign]
        limits = sorted(100 * sign * pair[f"difference_{end}"] for end in ("low", "high"))
        lines.append(
            f"| {pair['length']} | `{better}` | `{worse}` | {100 * abs(pair['difference']):.0f} "
            f"[{limits[0]:.0f}, {limits[1]:.0f}] | {pair['p_holm']:.3f} |"
        )
    return "\n".join(lines) + "\n"


def picture(summary: pd.DataFrame) -> bytes:
    """Share of needles found by length, a line per policy, with 95 % intervals, as SVG."""
    with budget_charts.default_settings():
        figure = Figure(figsize=(7.0, 3.6), layout="constrained")
        axes = figure.subplots()
        policies = list(dict.fromkeys(summary["policy"]))
        for place, policy in enumerate(policies):
            own = summary[summary["policy"] == policy]
            # Moved apart a little, or intervals would hide each other.
            lengths = own["length"] * (1 + 0.012 * (place - len(policies) / 2))
            around = [own["score"] - own["score_low"], own["score_high"] - own["score"]]
            style = policy_style(policy)
            axes.errorbar(
                lengths, 100 * own["score"], yerr=[100 * side for side in around],
                color=style.colour, marker=style.marker, ms=5, lw=1.2, elinewidth=0.7, label=policy,
            )  # fmt: skip
        axes.set_xscale("log")
        lengths = sorted(set(summary["length"]))
        axes.set_xticks(lengths, [str(length) for length in lengths])
        axes.minorticks_off()
        axes.set_xlabel("tokens of the prompt")
        axes.set_ylabel("needles found, %")
        axes.set_ylim(-3, 103)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(color="#dddddd", lw=0.5, axis="y")
        return budget_charts.as_svg(figure)


if __name__ == "__main__":
    main()
