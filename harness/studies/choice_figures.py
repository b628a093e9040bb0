"""Pictures of score, protection and shape that only their notebook shows, as PNG.

The frames are those of ``score_protection_shape``: summary of ``summarise``, pairs of ``compare``.
"""

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from kvarena.harness.analysis.comparison import Line
from kvarena.harness.report.budget_charts import default_settings
from kvarena.harness.report.policy_styles import policy_style
from kvarena.harness.studies.notebook_figures import WIDTH_IN, as_png
from kvarena.harness.studies.score_protection_shape import MARKERS

ALPHA = 0.05
# A symbol beside the colour, so that neither a grey print nor an eye has to tell colours apart.
VERDICTS = {"less": ("<", "#9ecae1"), "more": (">", "#fdd0a2"), "same": ("=", "#c7e9c0")}


def kl_by_protection(summary: pd.DataFrame) -> bytes:
    """A line per score under an even budget: KL with nothing protected beside that under 4+64."""
    even = summary[summary["shape"] == "uniform"]
    # The least KL, under whichever protection, comes on top.
    rules = even.groupby("score_rule")["kl_mean"].min().sort_values(ascending=False).index
    with default_settings():
        figure, axes = _lines(list(rules))
        for place, rule in enumerate(rules):
            own, style = even[even["score_rule"] == rule], policy_style(rule)
            axes.hlines(place, own["kl_mean"].min(), own["kl_mean"].max(), color=style.colour, lw=1)
            for protect, kl in zip(own["protect"], own["kl_mean"], strict=True):
                fill = "none" if protect == "none" else "full"
                axes.plot(kl, place, "o", color=style.colour, fillstyle=fill, ms=6)
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(FuncFormatter(_steps))
        axes.xaxis.set_minor_formatter(FuncFormatter(_steps))
        axes.tick_params(axis="x", which="both", length=3, pad=3)
        axes.set_xlabel(
            "KL to the full cache, nats per token (log)\n"
            "hollow: nothing protected; filled: 4 first and 64 newest tokens"
        )
        axes.grid(axis="x", color="#dddddd", lw=0.5)
        return as_png(figure)


def kl_by_shape(summary: pd.DataFrame) -> bytes:
    """A line per score and protection that have several shapes, and a marker per shape."""
    num_shapes = summary.groupby(["score_rule", "protect"])["shape"].transform("nunique")
    shaped = summary[num_shapes > 1]
    choices = shaped.groupby(["score_rule", "protect"])["kl_mean"].min()
    names = list(choices.sort_values(ascending=False).index)
    with default_settings():
        figure, axes = _lines([f"{rule}, {protect}" for rule, protect in names], line_in=0.36)
        for number, (shape, marker) in enumerate(MARKERS.items()):
            own, fill = shaped[shaped["shape"] == shape], "none" if shape == "uniform" else "full"
            for line in own.to_dict("records"):
                place = names.index((line["score_rule"], line["protect"]))
                # One above the other, since two shapes may well have the same KL.
                height = place + 0.2 * (1.5 - number)
                colour = policy_style(line["score_rule"]).colour
                axes.plot(line["kl_mean"], height, marker, color=colour, fillstyle=fill, ms=5)
            axes.plot([], [], marker, color="black", fillstyle=fill, ls="", ms=5, label=shape)
        for place in range(1, len(names)):
            axes.axhline(place - 0.5, color="#dddddd", lw=0.5)
        axes.margins(x=0.03)
        axes.set_xlabel("KL to the full cache, nats per token")
        axes.grid(axis="x", color="#dddddd", lw=0.5)
        figure.legend(loc="outside upper left", ncols=len(MARKERS), frameon=False)
        return as_png(figure)


def verdict_grid(summary: pd.DataFrame, pairs: pd.DataFrame) -> bytes:
    """Every two scores under an even budget, a panel per protection, best score on top."""
    even = summary[summary["shape"] == "uniform"].sort_values("kl_mean")
    pairs = pairs[(pairs["varied"] == "score_rule") & (pairs["shape"] == "uniform")]
    protections = list(even["protect"].unique())
    most = even.groupby("protect")["score_rule"].nunique().max()
    with default_settings():
        figure = Figure(figsize=(WIDTH_IN, 2.2 + 0.155 * most), layout="constrained")
        grid = figure.subplots(1, len(protections), squeeze=False)
        for axes, protect in zip(grid.flat, protections, strict=True):
            rules = list(even.loc[even["protect"] == protect, "score_rule"])
            for place in range(len(rules)):
                _fill(axes, place, place, "#eeeeee")
            for pair in pairs[pairs["protect"] == protect].to_dict("records"):
                line, column = rules.index(pair["score_rule"]), rules.index(pair["other"])
                _mark(axes, line, column, verdict(pair))
                _mark(axes, column, line, verdict(pair, -1))
            axes.set(xlim=(-0.5, len(rules) - 0.5), ylim=(len(rules) - 0.5, -0.5), aspect="equal")
            axes.set_xticks(range(len(rules)), rules, rotation=90)
            axes.set_yticks(range(len(rules)), rules)
            axes.tick_params(length=0)
            axes.set_title(f"protected: {protect}", loc="left")
        figure.supxlabel(
            "row against column: < less KL, > more KL, = the same, empty: not told apart",
            fontsize=8,
        )
        return as_png(figure)


def verdict(pair: Line, sign: int = 1) -> str:
    """What a line of ``compare`` says of its first choice (sign -1: of its second)."""
    if pair["same"]:
        return "same"
    if pair["p_holm"] >= ALPHA:
        return "open"
    return "less" if sign * pair["kl_difference"] < 0 else "more"


def _mark(axes: Axes, line: int, column: int, said: str) -> None:
    if said in VERDICTS:
        symbol, colour = VERDICTS[said]
        _fill(axes, line, column, colour)
        axes.text(column, line, symbol, ha="center", va="center", fontsize=7)


def _fill(axes: Axes, line: int, column: int, colour: str) -> None:
    axes.fill_between([column - 0.5, column + 0.5], line - 0.5, line + 0.5, color=colour, lw=0)


def _lines(labels: list[str], line_in: float = 0.22) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH_IN, 0.9 + line_in * len(labels)), layout="constrained")
    axes = figure.add_subplot()
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(-0.6, len(labels) - 0.4)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _steps(value: float, place: int | None) -> str:
    """1, 2 and 5 of each decade get a number, since the axis may span little more than one."""
    return f"{value:g}" if f"{value:e}"[0] in "125" else ""
