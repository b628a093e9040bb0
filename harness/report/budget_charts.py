"""Charts of compared cells, as SVG: a measure against budget or memory, and dots or bars per cell.

Every frame is one that ``comparison.compare_cells`` gives, of one task, model and variant. A cell
without a value is left out, and a line breaks there. Drawn with matplotlib's object API under its
default settings, so neither pyplot's state nor a personal matplotlibrc changes a picture, and the
same frame gives the same bytes. Letters are drawn as paths: no font is needed to show them.
"""

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

from kvarena.harness.analysis.comparison import Line, is_full_cache
from kvarena.harness.budget import parse_budget
from kvarena.harness.report.policy_styles import PolicyStyle, policy_styles
from kvarena.harness.report.text_tables import significant

# Narrow enough that a phone shows the letters at nearly their own size.
WIDTH_IN, HEIGHT_IN = 4.2, 2.6  # the legend's height comes on top
DOTS_WIDTH_IN, COLUMN_POINTS = 7.2, 64
KINDS = ("tokens", "% of the prompt", "MB")  # by the first part of Budget.sort_key


@contextmanager
def default_settings() -> Iterator[None]:
    """Matplotlib as it comes, with small type, and "$" in a label as a dollar sign."""
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rc("font", size=8)
        mpl.rc("axes", linewidth=0.6)
        mpl.rc("hatch", linewidth=0.6)
        mpl.rc("text", parse_math=False)
        mpl.rc("svg", hashsalt="kvarena")  # ids inside the file are random without one
        yield


def by_budget_kind(cells: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The kinds of budget in `cells`, one axis each -> the cells of that kind, full cache included.

    Lines are in ascending order of the added column budget_size, in tokens, percent or MB.
    """
    budgets = [parse_budget(label) for label in cells["budget"]]
    kinds = np.array([budget.sort_key[0] for budget in budgets])
    sizes = [
        budget.tokens or 100 * (budget.ratio or 0) or (budget.bytes or 0) / 1e6
        for budget in budgets
    ]
    is_full = np.array([budget.is_full for budget in budgets])
    sized = cells.assign(budget_size=sizes)
    return {
        name: sized[(kinds == kind) | is_full].sort_values(["budget_size", "policy"])
        for kind, name in enumerate(KINDS)
        if kind in kinds
    }


def budget_chart(cells: pd.DataFrame, kind: str, ylabel: str, scale: float = 1) -> bytes:
    """Score with error bars by budget, a line per policy; the full cache is a level with a band.

    cells: of one kind, from by_budget_kind. scale: what turns a score into the unit of `ylabel`.
    """
    styles = policy_styles(cells["policy"])
    is_full = cells["budget"] == "full"
    rest = cells[~is_full]
    policies = sorted(rest["policy"].unique())
    span = max(math.log(rest["budget_size"].max() / rest["budget_size"].min()), 1)
    with default_settings():
        figure, axes = _figure(HEIGHT_IN)
        for line in cells[is_full].to_dict("records"):
            low, high = scale * line["score_low"], scale * line["score_high"]
            colour, label = styles[line["policy"]].colour, line["policy"]
            label = label if is_full_cache(label) else f"{label}, budget full"
            axes.axhspan(low, high, color=colour, alpha=0.07, lw=0)
            axes.axhline(scale * line["score"], color=colour, lw=1, ls="--", label=label)
        for place, policy in enumerate(policies):
            own = rest[rest["policy"] == policy]
            # Set apart a little, else the intervals of all policies lie on one another.
            shift = math.exp(0.018 * span * (place - (len(policies) - 1) / 2))
            score_line(axes, policy, styles[policy], own["budget_size"] * shift, own, scale)
        _label_budgets(axes, rest, span)
        axes.set(xlabel=f"budget ({kind})", ylabel=ylabel)
        from_zero(axes, cells, scale)
        return as_svg(figure)


def memory_chart(cells: pd.DataFrame, ylabel: str) -> bytes:
    """Score by bytes kept, a marker per cell; rings mark the cells on the Pareto front."""
    known = cells.dropna(subset=["score", "kv_bytes_kept"]).sort_values("kv_bytes_kept")
    megabytes, percent = known["kv_bytes_kept"] / 1e6, 100 * known["score"]
    styles = policy_styles(cells["policy"])
    front = on_front(known)
    with default_settings():
        figure, axes = _figure(HEIGHT_IN)
        for policy in sorted(known["policy"].unique()):
            own = known["policy"] == policy
            score_line(axes, policy, styles[policy], megabytes[own], known[own], 100)
        grey = "#777777"
        rings = axes.plot(megabytes[front], percent[front], "o:", ms=10, label="Pareto front")
        rings[0].set(color=grey, markerfacecolor="none")
        axes.set_xscale("log")
        few_decades = len(known) == 0 or megabytes.max() < 10 * megabytes.min()
        axes.xaxis.set_major_locator(MaxNLocator(5) if few_decades else LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set(xlabel="KV cache kept (MB)", ylabel=ylabel)
        from_zero(axes, known, 100)
        return as_svg(figure)


def on_front(cells: pd.DataFrame) -> pd.Series:
    """Which cells no other one beats in both score and bytes kept, matching it in the rest.

    Cells without both figures, and references, whose memory nothing bounds, neither are nor beat.
    """
    known = cells[["score", "kv_bytes_kept"]].notna().all(axis=1)
    if "bounded" in cells:
        known &= cells["bounded"].astype(bool)
    found = pd.Series(False, index=cells.index)
    own = cells[known]
    found[known] = pareto_front(own["kv_bytes_kept"].to_numpy(), own["score"].to_numpy())
    return found


def pareto_front(costs: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Mask [n] of the points that no other point matches in both and beats in one."""
    as_good = (costs[:, None] <= costs) & (scores[:, None] >= scores)
    better = (costs[:, None] < costs) | (scores[:, None] > scores)
    return np.logical_not(np.any(as_good & better, axis=0))


def score_chart(cells: pd.DataFrame, xlabel: str, beside: Mapping[str, Sequence[str]]) -> bytes:
    """A dot per cell at its score in percent, with its interval; by budget, best first.

    beside: heading -> a text per line of ``cells``, in a column at the right.
    """
    known = cells.assign(**beside).dropna(subset=["score"])
    known = known.sort_values(["score", "policy"], ascending=[False, True])
    styles = policy_styles(cells["policy"])
    with default_settings():
        figure, axes = _figure(0.6 + 0.18 * _num_lines(known), DOTS_WIDTH_IN)
        places = list(_lines_by_budget(axes, known))
        for column, heading in enumerate(beside, start=1):
            side = {"xycoords": axes.get_yaxis_transform(), "ha": "right"}
            _write(axes, heading, (1, 0), COLUMN_POINTS * column, weight="bold", **side)
            for place, line in places:
                _write(axes, line[heading], (1, place), COLUMN_POINTS * column, **side)
        for place, line in places:
            style = styles[line["policy"]]
            low, high = 100 * line["score_low"], 100 * line["score_high"]
            axes.hlines(place, low, high, color=style.colour, lw=1.2)
            x = 100 * line["score"]
            axes.plot(x, place, style.marker, color="white", ms=5.5)  # no line through an empty one
            dots = axes.plot(x, place, style.marker, ms=5.5)
            dots[0].set(color=style.colour, fillstyle=style.fill)
        axes.set(xlabel=xlabel, xlim=(-2, 102))
        return as_svg(figure)


def bar_chart(cells: pd.DataFrame, columns: list[str], xlabel: str, scale: float = 1) -> bytes:
    """A bar per cell, grouped by budget. A second column is drawn pale behind the first."""
    known = cells.dropna(subset=columns).sort_values("policy")
    styles = policy_styles(cells["policy"])
    with default_settings():
        figure, axes = _figure(0.5 + 0.16 * _num_lines(known))
        for place, line in _lines_by_budget(axes, known):
            _bar(axes, place, styles[line["policy"]], [scale * line[name] for name in columns])
        axes.set(xlabel=xlabel)
        axes.margins(x=0.18)
        return as_svg(figure)


def _num_lines(cells: pd.DataFrame) -> float:
    """The height that _lines_by_budget takes, in lines."""
    return len(cells) + 1.3 * cells["budget"].nunique()


def _lines_by_budget(axes: Axes, cells: pd.DataFrame) -> Iterator[tuple[float, Line]]:
    """Each cell with its place, downwards, small budgets first, else in their order.

    Writes names and headings at the left.
    """
    ranks = cells["budget"].map(lambda label: parse_budget(label).sort_key)
    names: dict[float, str] = {}
    place = 0.0
    cells = cells.loc[ranks.sort_values(kind="stable").index]
    for budget, group in cells.groupby("budget", sort=False):
        heading = "full cache" if budget == "full" else f"budget {budget}"
        side = {"xycoords": axes.get_yaxis_transform(), "ha": "right"}
        _write(axes, heading, (0, place), -4, weight="bold", **side)
        for line in group.to_dict("records"):
            place += 1
            names[place] = line["policy"]
            yield place, line
        place += 1.3
    axes.set_yticks(list(names), list(names.values()))
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(place - 0.5, -0.7)


def _figure(height_in: float, width_in: float = WIDTH_IN) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width_in, height_in), layout="constrained")
    axes = figure.add_subplot()
    tidy(axes)
    return figure, axes


def tidy(axes: Axes) -> None:
    """A pale grid behind the data, and no frame above and at the right."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#dddddd", lw=0.5)
    axes.set_axisbelow(True)


def score_line(
    axes: Axes, label: str, style: PolicyStyle, x: pd.Series, cells: pd.DataFrame, scale: float
) -> None:
    """Markers at the scores, joined, with their intervals as error bars."""
    low, high = scale * cells["score_low"], scale * cells["score_high"]
    axes.vlines(x, low, high, color=style.colour, lw=0.7)
    for ends in (low, high):
        axes.plot(x, ends, "_", color=style.colour, ms=3.5, mew=0.7)
    lines = axes.plot(x, scale * cells["score"], label=label, lw=1.1, ms=4.5)
    lines[0].set(color=style.colour, marker=style.marker, ls=style.line, fillstyle=style.fill)


def from_zero(axes: Axes, cells: pd.DataFrame, whole: float) -> None:
    """Begin the upright axis at zero, with room for half a marker; zeros end it at ``whole``."""
    if not (cells["score"] > 0).any():
        axes.set_ylim(top=1.03 * whole)
    axes.set_ylim(bottom=-0.03 * axes.get_ylim()[1])


def _label_budgets(axes: Axes, cells: pd.DataFrame, span: float) -> None:
    """Budgets as they were asked for; one too close to the label before it stays unnamed."""
    axes.set_xscale("log")
    ticks: dict[float, str] = {}
    for size, label in zip(cells["budget_size"], cells["budget"], strict=True):
        if not ticks or math.log(size / max(ticks)) > 0.07 * span:
            ticks[size] = label
    axes.set_xticks(list(ticks), list(ticks.values()))
    room = math.exp(0.15 * span)
    axes.set_xlim(cells["budget_size"].min() / room, cells["budget_size"].max() * room)
    axes.xaxis.set_minor_locator(NullLocator())


def _bar(axes: Axes, place: float, style: PolicyStyle, values: list[float]) -> None:
    hatch = None if style.line == "-" else "////"
    axes.barh(place, values[-1], 0.75, color=style.colour, alpha=0.3)
    axes.barh(place, values[0], 0.75, color=style.colour, hatch=hatch, edgecolor="white", lw=0)
    text = " / ".join(map(significant, values))
    _write(axes, text, (values[-1], place), 3)


def _write(axes: Axes, text: str, point: tuple[float, float], right: float, **style: Any) -> None:
    """Write so many points to the right of `point`. `style` as for Text, hence Any."""
    style |= {"textcoords": "offset points", "va": "center"}
    axes.annotate(text, point, (right, 0), **style)


def as_svg(figure: Figure, legend_title: str = "") -> bytes:
    """The figure as a file, with the legend of add_legend."""
    add_legend(figure, legend_title)
    stream = io.BytesIO()
    # Without the date and the version of the program, the drawn data are all that counts.
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None})
    return stream.getvalue()


def add_legend(figure: Figure, title: str = "") -> None:
    """Below the figure, which grows by it; of its first axes, none where no line has a name."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    if labels:
        columns = 3 if max(map(len, labels)) < 15 else 2 if max(map(len, labels)) < 28 else 1
        num_rows = math.ceil(len(labels) / columns) + bool(title)
        figure.set_figheight(figure.get_figheight() + 0.1 + 0.17 * num_rows)
        legend: dict[str, Any] = {"ncols": columns, "frameon": False, "handlelength": 2.6}
        legend |= {"title": title} if title else {}
        figure.legend(handles, labels, loc="outside lower center", **legend)
