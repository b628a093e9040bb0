"""Pictures of needle runs, as PNG files: one heat map per cell, one overview of all.

Drawn with matplotlib's object API under its default settings, so neither pyplot's state nor a
personal matplotlibrc changes a picture: the same rows give the same bytes.
Scores are means over rows with status "ok"; a place without such a row is hatched. The score of
forced answers is called what it is, agreement.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from kvarena.harness.analysis.comparison import is_full_cache, require_columns
from kvarena.harness.analysis.distances import score_name
from kvarena.harness.budget import parse_budget
from kvarena.harness.errors import UsageError
from kvarena.harness.files import replacing
from kvarena.harness.report.budget_charts import default_settings
from kvarena.tasks.base import DEPTH_TARGET, LENGTH_TARGET

LENGTH, DEPTH = LENGTH_TARGET.name, DEPTH_TARGET.name
MARGIN_IN = 0.6  # room around the tiles, in inches; what labels leave unused is cropped


class Layout(NamedTuple):
    """A panel of equal tiles; sizes in inches."""

    num_columns: int
    num_rows: int
    tile_width_in: float
    tile_height_in: float

    @property
    def size_in(self) -> tuple[float, float]:
        return self.num_columns * self.tile_width_in, self.num_rows * self.tile_height_in

    @property
    def font_size(self) -> float:
        """Points at which "100" fits into a tile."""
        return min(8.5, 29 * self.tile_width_in, 47 * self.tile_height_in)


def needle_heatmap(rows: pd.DataFrame, path: str | Path) -> Path:
    """Draw depth (y) by context length (x) for the rows of one policy and one budget."""
    require_columns(rows, ["model", "policy", "budget", "status", "score", LENGTH, DEPTH])
    model, policy, budget = (_only(rows, name) for name in ("model", "policy", "budget"))
    lengths, depths = sorted(rows[LENGTH].unique()), sorted(rows[DEPTH].unique())
    grid = _mean_grid(rows, LENGTH, lengths, depths)
    width = _clamped(5.2 / len(lengths), 0.16, max(1.1, 2.0 / len(lengths)))
    layout = Layout(len(lengths), len(depths), width, _clamped(3.6 / len(depths), 0.14, 0.8))
    label = (
        "full cache" if is_full_cache(policy) and budget == "full" else f"{policy}, budget {budget}"
    )
    mean, measure = _scores(rows)["score"].mean(), f"mean {score_name(rows)}"
    title = f"{label}: {'nothing scored' if math.isnan(mean) else f'{measure} {100 * mean:.0f} %'}"
    with default_settings():
        figure = _figure(*layout.size_in)
        axes = _place(figure, 0, 0, *layout.size_in)
        _draw_grid(axes, grid, layout)
        _label_lengths(axes, lengths, layout)
        _label_depths(axes, depths, layout)
        _colour_bar(figure, *layout.size_in, measure)
        _headings(figure, title, f"{model}, {_counted(rows, grid)}", 6)
        return save_png(figure, path, title)


def needle_overview(rows: pd.DataFrame, path: str | Path) -> Path:
    """Draw depth (y) by policy (x), one panel per budget; "full" is in every panel.

    A tile is the mean over lengths and seeds. The number above a column is the policy's mean score
    under that budget; policies stand in the order of their mean over all budgets, "full" first.
    """
    require_columns(rows, ["task", "model", "policy", "budget", "status", "score", LENGTH, DEPTH])
    task, model = _only(rows, "task"), _only(rows, "model")
    panels, policies = _panels(rows), _policies_by_score(rows)
    depths = sorted(rows[DEPTH].unique())
    grids = [_mean_grid(panel, "policy", policies, depths) for panel in panels.values()]
    layout, per_line = _overview_layout(len(panels), len(policies), len(depths))
    width, height = layout.size_in
    names_in = 0.05 * max(map(len, policies)) + 0.1  # the longest name at 45 degrees
    across, down = width + 0.25, height + names_in + 0.45
    total_width, num_lines = across * per_line - 0.25, math.ceil(len(panels) / per_line)
    measure = f"mean {score_name(rows)}"
    title = f"{task}: {measure} by policy and depth"
    subtitle = f"{model}, {_counted(rows, *grids)}; bold: mean"
    with default_settings():
        figure = _figure(total_width, down * (num_lines - 1) + height)
        for place, (budget, panel) in enumerate(panels.items()):
            line, column = divmod(place, per_line)
            axes = _place(figure, column * across, line * down, width, height)
            _draw_grid(axes, grids[place], layout)
            _label_policies(axes, policies, panel)
            _label_depths(axes, depths, layout, named=column == 0)
            axes.set_title(_budget_title(budget), fontsize=9, pad=17)
        _colour_bar(figure, total_width, height, measure)
        _headings(figure, title, subtitle, 34)
        return save_png(figure, path, title)


def _overview_layout(num_panels: int, num_policies: int, num_depths: int) -> tuple[Layout, int]:
    """The layout of one panel, and how many panels stand side by side.

    A line of panels has at most 24 columns, which stays readable at a paper's text width.
    """
    num_lines = math.ceil(num_panels / max(1, 24 // num_policies))
    per_line = math.ceil(num_panels / num_lines)
    num_columns = per_line * num_policies
    width = _clamped(6.4 / num_columns, 0.3, max(0.45, 2.0 / num_columns))
    return Layout(num_policies, num_depths, width, _clamped(2.2 / num_depths, 0.08, 0.8)), per_line


def _only(rows: pd.DataFrame, column: str) -> str:
    values = sorted(rows[column].astype(str).unique())
    if len(values) != 1:
        raise UsageError(f"a picture shows one {column}, got {', '.join(values)}; select one first")
    return values[0]


def _scores(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows that count: status "ok" and a score."""
    scores = rows.assign(score=pd.to_numeric(rows["score"]))
    return scores[(rows["status"] == "ok") & scores["score"].notna()]


def _mean_grid(rows: pd.DataFrame, column: str, values: list, depths: list) -> np.ndarray:
    """Mean scores [depths, values], NaN where no row counts."""
    means = _scores(rows).groupby([DEPTH, column])["score"].mean().unstack(column)
    return means.reindex(index=depths, columns=values).to_numpy(dtype=float)


def _panels(rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Budget label -> its rows, ascending; the rows of policy "full" belong to every budget."""
    budgets, is_full = rows["budget"].astype(str), rows["policy"].map(is_full_cache)
    found = budgets[~is_full].unique()
    labels = sorted(found, key=lambda label: parse_budget(label).sort_key) or ["full"]
    return {label: rows[is_full | (budgets == label)] for label in labels}


def _policies_by_score(rows: pd.DataFrame) -> list[str]:
    means = _scores(rows).groupby("policy")["score"].mean().to_dict()
    policies = rows["policy"].astype(str).unique()
    return sorted(
        policies, key=lambda name: (not is_full_cache(name), -means.get(name, -1.0), name)
    )


def _budget_title(budget: str) -> str:
    bound = parse_budget(budget)
    unit = " tokens" if bound.tokens is not None else ""
    return "full cache" if bound.is_full else f"budget {budget}{unit}"


def _counted(rows: pd.DataFrame, *grids: np.ndarray) -> str:
    """How many scores a policy has under a budget, and what is missing."""
    scores = _scores(rows)
    sizes = scores.groupby(["policy", "budget"]).size()
    few, many = (sizes.min(), sizes.max()) if len(sizes) else (0, 0)
    per_cell = " per column" if len(sizes) > 1 else ""
    failed = f"; {len(rows) - len(scores)} failed" if len(scores) < len(rows) else ""
    hatched = "; hatched: no score" if any(np.isnan(grid).any() for grid in grids) else ""
    return f"n = {few if few == many else f'{few} to {many}'}{per_cell}{failed}{hatched}"


def _clamped(value: float, low: float, high: float) -> float:
    return max(low, min(value, high))


def _figure(width_in: float, height_in: float) -> Figure:
    """A figure with a margin on all sides; _place counts from inside it."""
    return Figure(figsize=(width_in + 2 * MARGIN_IN, height_in + 2 * MARGIN_IN))


def _place(figure: Figure, left: float, top: float, width: float, height: float) -> Axes:
    """Axes at inches from the top left corner inside the margin."""
    total_width, total_height = figure.get_size_inches()
    x, y = left + MARGIN_IN, total_height - MARGIN_IN - top - height
    box = (x / total_width, y / total_height, width / total_width, height / total_height)
    return figure.add_axes(box)


def _draw_grid(axes: Axes, grid: np.ndarray, layout: Layout) -> None:
    """Colour the tiles of `grid` [rows, columns], the first row on top, with numbers that fit."""
    num_rows, num_columns = grid.shape
    axes.set_facecolor("#eeeeee")
    axes.patch.set(hatch="/////", edgecolor="#aaaaaa", linewidth=0)
    edges = [np.arange(count + 1) - 0.5 for count in (num_columns, num_rows)]
    tiles = axes.pcolormesh(*edges, np.ma.masked_invalid(grid), cmap="cividis", vmin=0, vmax=1)
    tiles.set(edgecolor="white", linewidth=min(1.0, 3 * layout.tile_height_in))
    axes.invert_yaxis()
    axes.tick_params(length=2)
    if layout.font_size >= 5.5:
        for row, column in np.argwhere(~np.isnan(grid)):
            _write_score(axes, column, row, grid[row, column], layout.font_size)


def _write_score(axes: Axes, x: float, y: float, score: float, size: float) -> None:
    red, green, blue, _ = mpl.colormaps["cividis"](float(score))
    ink = "white" if 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.45 else "black"
    axes.text(x, y, f"{100 * score:.0f}", color=ink, size=size, ha="center", va="center")


def _tick_places(num_values: int, tile_in: float, label_in: float) -> list[int]:
    """Every so many tiles that labels of `label_in` inches fit, and always the last tile."""
    step = math.ceil(label_in / tile_in)
    last = num_values - 1
    return [place for place in range(0, last, step) if last - place >= step] + [last]


def _label_lengths(axes: Axes, lengths: Sequence[float], layout: Layout) -> None:
    texts = [f"{length:.0f}" for length in lengths]
    label_in = 0.066 * max(map(len, texts)) + 0.06
    places = _tick_places(len(lengths), layout.tile_width_in, label_in)
    axes.set_xticks(places, [texts[place] for place in places])
    axes.set_xlabel("context length (tokens)")


def _label_depths(axes: Axes, depths: Sequence[float], layout: Layout, named: bool = True) -> None:
    places = _tick_places(len(depths), layout.tile_height_in, 0.22)
    texts = [f"{depths[place]:.1f}".removesuffix(".0") for place in places]
    axes.set_yticks(places, texts if named else [""] * len(places))
    axes.set_ylabel("needle depth (%)" if named else "")


def _label_policies(axes: Axes, policies: Sequence[str], panel: pd.DataFrame) -> None:
    axes.set_xticks(range(len(policies)), policies, rotation=45, ha="right", rotation_mode="anchor")
    means = _scores(panel).groupby("policy")["score"].mean().to_dict()
    for place, policy in enumerate(policies):
        text = f"{100 * means[policy]:.0f}" if policy in means else "-"
        _write_above(axes, text, 4, place, ha="center", weight="bold")
    if is_full_cache(policies[0]) and len(policies) > 1:
        axes.axvline(0.5, color="white", linewidth=4)


def _colour_bar(figure: Figure, left_in: float, height_in: float, measure: str) -> None:
    axes = _place(figure, left_in + 0.15, 0, 0.13, height_in)
    bar = figure.colorbar(ScalarMappable(Normalize(0, 1), "cividis"), cax=axes)
    bar.set_ticks([0, 0.25, 0.5, 0.75, 1], labels=["0", "25", "50", "75", "100"])
    bar.set_label(f"{measure} (%)")
    axes.tick_params(length=2)


def _headings(figure: Figure, title: str, subtitle: str, above_points: float) -> None:
    """Title and subtitle, left over the first axes, `above_points` over its upper edge."""
    _write_above(figure.axes[0], subtitle, above_points, -0.5, size=7.5, color="#555555")
    _write_above(figure.axes[0], title, above_points + 12, -0.5, size=10)


def _write_above(axes: Axes, text: str, points: float, column: float, **style: Any) -> None:
    """Write `points` over the upper edge of `axes`, at `column` in tiles. `style` as for Text."""
    style |= {"textcoords": "offset points"}
    axes.annotate(text, (column, 1), (0, points), xycoords=("data", "axes fraction"), **style)


def save_png(figure: Figure, path: str | Path, title: str) -> Path:
    """Write the figure, cropped to what is drawn; returns the path."""
    with replacing(path) as temporary:
        # By default matplotlib writes its version there; the drawn data should be all that counts.
        metadata = {"Software": None, "Title": title}
        figure.savefig(temporary, format="png", dpi=200, bbox_inches="tight", metadata=metadata)
    return Path(path)
