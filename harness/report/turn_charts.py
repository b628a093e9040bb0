"""Score by turn, where samples ask of one context: a line per policy, a panel per budget.

Every frame is one that ``by_turn.score_by_turn`` gives, of one task, model and variant. What runs
under budget "full" is in every panel, dashed, with its interval pale, as in budget_charts.
"""

import math
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from kvarena.harness.analysis.comparison import is_full_cache
from kvarena.harness.budget import parse_budget
from kvarena.harness.report.budget_charts import (
    HEIGHT_IN,
    WIDTH_IN,
    add_legend,
    as_svg,
    default_settings,
    from_zero,
    score_line,
    tidy,
)
from kvarena.harness.report.needle_maps import save_png
from kvarena.harness.report.policy_styles import PolicyStyle, policy_styles

PANELS_PER_LINE, PANEL_WIDTH_IN = 3, 2.9
WIDEST_SHIFT = 0.5  # of a turn, between the first and the last policy


def turn_chart(scores: pd.DataFrame, ylabel: str) -> bytes:
    """All panels as SVG, the legend below under the names of question and turns."""
    with default_settings():
        return as_svg(_figure(scores, ylabel), how_asked(scores))


def turn_picture(scores: pd.DataFrame, ylabel: str, path: Path) -> Path:
    """The same as a PNG file, with task and model above."""
    title = ", ".join(scores[name].iloc[0] for name in ("task", "model"))
    with default_settings():
        figure = _figure(scores, ylabel)
        figure.suptitle(title, fontsize=10)
        add_legend(figure, how_asked(scores))
        return save_png(figure, path, title)


def how_asked(scores: pd.DataFrame) -> str:
    """As in "question=after, turns=dialogue"; what rows do not say is left out."""
    line = scores.iloc[0]
    return ", ".join(f"{name}={line[name]}" for name in ("question", "turns") if line[name])


def budgets_of(scores: pd.DataFrame) -> list[str]:
    """The budgets that have a panel, ascending: "full" only where there is no other."""
    found = [budget for budget in scores["budget"].unique() if budget != "full"]
    return sorted(found, key=lambda budget: parse_budget(budget).sort_key) or ["full"]


def budget_title(budget: str) -> str:
    """What stands over a panel."""
    return "full cache" if budget == "full" else f"budget {budget}"


def _figure(scores: pd.DataFrame, ylabel: str) -> Figure:
    budgets, styles = budgets_of(scores), policy_styles(scores["policy"])
    down = math.ceil(len(budgets) / PANELS_PER_LINE)
    across = math.ceil(len(budgets) / down)  # four are two and two
    size = max(WIDTH_IN, PANEL_WIDTH_IN * across), HEIGHT_IN * down
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(down, across, sharey=True, squeeze=False)
    for place, axes in enumerate(grid.flat):
        if place >= len(budgets):
            axes.remove()
            continue
        _panel(axes, scores, budgets[place], styles)
        axes.set(xlabel="turn", ylabel=ylabel if place % across == 0 else "")
    from_zero(grid[0, 0], scores, 100)
    return figure


def _panel(axes: Axes, scores: pd.DataFrame, budget: str, styles: dict[str, PolicyStyle]) -> None:
    """All policies have a line in all panels, if only an empty one: the legend is that of one."""
    is_full = scores["budget"] == "full"
    for label, own in scores[is_full].groupby("policy"):
        policy = str(label)
        colour = styles[policy].colour
        name = policy if is_full_cache(policy) else f"{policy}, budget full"
        low, high = 100 * own["score_low"], 100 * own["score_high"]
        axes.fill_between(own["turn"], low, high, color=colour, alpha=0.07, lw=0)
        axes.plot(own["turn"], 100 * own["score"], color=colour, lw=1, ls="--", label=name)
    policies = sorted(scores.loc[~is_full, "policy"].unique())
    step = min(0.08, WIDEST_SHIFT / max(len(policies), 1))
    for place, policy in enumerate(policies):
        own = scores[(scores["policy"] == policy) & (scores["budget"] == budget)]
        # Set apart a little, else the intervals of all policies lie on one another.
        turns = own["turn"] + step * (place - (len(policies) - 1) / 2)
        score_line(axes, policy, styles[policy], turns, own, 100)
    tidy(axes)
    axes.set_title(budget_title(budget), fontsize=8)
    last = scores["turn"].max()
    axes.set_xlim(0.5, last + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(min(last, 8), integer=True, min_n_ticks=1))
