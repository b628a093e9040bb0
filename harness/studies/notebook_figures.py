"""What the notebooks on scores share: the rows they read, and two figures that only they show."""

import io
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.image import imread

from kvarena.harness.analysis.row_frame import read_rows, recorded_rows
from kvarena.harness.budget import parse_budget
from kvarena.harness.errors import UsageError
from kvarena.harness.report.budget_charts import default_settings
from kvarena.harness.report.policy_styles import policy_style
from kvarena.harness.store.cell_files import find_cells

WIDTH_IN = 7.6


def notebook_rows(results_dir: Path) -> pd.DataFrame:
    """Rows of one's own runs below ``results_dir``, else the recorded ones in ``reference/``.

    Raises UsageError if there are neither.
    """
    cells = find_cells(results_dir)
    if cells:
        return read_rows(cells)
    frames = [recorded_rows(path) for path in sorted((results_dir / "reference").glob("*.csv"))]
    frames = [frame for frame in frames if "sample_id" in frame]  # summaries lie beside the rows
    if not frames:
        raise UsageError(f"no rows in {results_dir}; run something first, for example: make demo")
    return pd.concat(frames, ignore_index=True)


def difference_figure(cells: pd.DataFrame) -> bytes:
    """Score minus the full cache's with its interval, a panel per budget, as PNG.

    cells: of ``comparison.compare_cells``, of one task, model and variant.
    """
    known = cells.dropna(subset=["difference"])
    budgets = sorted(known["budget"].unique(), key=lambda label: parse_budget(label).sort_key)
    policies = sorted(known["policy"].unique(), reverse=True)
    with default_settings():
        figure = Figure(figsize=(WIDTH_IN, 0.7 + 0.22 * len(policies)), layout="constrained")
        grid = figure.subplots(1, len(budgets), sharex=True, sharey=True, squeeze=False)
        for axes, budget in zip(grid.flat, budgets, strict=True):
            for line in known[known["budget"] == budget].to_dict("records"):
                place, style = policies.index(line["policy"]), policy_style(line["policy"])
                low, high = 100 * line["difference_low"], 100 * line["difference_high"]
                axes.hlines(place, low, high, color=style.colour, lw=1.5)
                axes.plot(100 * line["difference"], place, style.marker, color=style.colour, ms=5)
            axes.axvline(0, color="black", lw=0.8)
            axes.grid(axis="x", color="#dddddd", lw=0.5)
            axes.set_yticks(range(len(policies)), policies)
            axes.set_title(f"budget {budget}", loc="left")
        figure.supxlabel("score minus the full cache's (percentage points)", fontsize=8)
        return as_png(figure)


def contact_sheet(pictures: Sequence[Path], per_line: int = 3) -> bytes:
    """Pictures from files side by side in lines, as PNG."""
    images = [imread(path) for path in pictures]
    height, width = max(image.shape[0] for image in images), max(i.shape[1] for i in images)
    num_lines = -(-len(images) // per_line)
    size_in = WIDTH_IN, WIDTH_IN / per_line * num_lines * height / width
    with default_settings():
        figure = Figure(figsize=size_in)
        for place, image in enumerate(images):
            line, column = divmod(place, per_line)
            left, bottom = column / per_line, 1 - (line + 1) / num_lines
            axes = figure.add_axes((left, bottom, 1 / per_line, 1 / num_lines))
            axes.imshow(image, interpolation="antialiased", interpolation_stage="rgba")
            axes.set(xlim=(0, width), ylim=(height, 0))
            axes.axis("off")
        return as_png(figure)


def as_png(figure: Figure) -> bytes:
    """The picture as PNG, the same bytes in every process."""
    stream = io.BytesIO()
    # Without the version of the program, the drawn data are all that counts.
    figure.savefig(stream, format="png", dpi=120, metadata={"Software": None})
    return stream.getvalue()
