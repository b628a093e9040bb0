"""The pictures of the HTML report, each with a title, how to read it, and its content in words."""

import tempfile
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pandas as pd
from matplotlib import image

from kvarena.harness.analysis.by_turn import has_turns, score_by_turn
from kvarena.harness.analysis.comparison import compare_cells, is_full_cache
from kvarena.harness.analysis.distances import are_forced, score_name
from kvarena.harness.report import budget_charts, needle_maps, turn_charts
from kvarena.harness.report.text_tables import counted, significant

CSS_PIXELS_PER_INCH, PLOT_DPI = 96, 200


class Picture(NamedTuple):
    """uri holds the picture itself; width_px is set where it must keep its size."""

    title: str
    reading: str
    alt: str
    uri: str
    width_px: int | None = None


class Measure(NamedTuple):
    """What a chart shows of the rows: the mean of `column` times `scale`."""

    column: str
    title: str
    ylabel: str
    scale: float
    reading: str


_SCORE = Measure("score", "Score", "score (%)", 100, "Higher is better.")
_AGREEMENT = Measure(
    "score",
    "Top-1 agreement",
    "agreement (%)",
    100,
    "How often the policy's first choice is the full cache's. Higher is better.",
)
_KL = Measure(
    "kl_mean",
    "KL from the full cache",
    "KL(full || policy) (nats per token)",
    1,
    "How far the policy moves the model's predictions. Lower is better.",
)
_RECALL = Measure(
    "attention_recall",
    "Attention recall",
    "attention recall (%)",
    100,
    "Share of the full cache's attention that falls on tokens still held. Higher is better.",
)
_HOW_TO_READ = (
    "Bars: 95 % intervals; dashed: full cache, its interval pale. Points of one budget stand a "
    "little apart."
)
_BRIGHT = "Bright: high {0}, dark: low {0}"


def section_pictures(rows: pd.DataFrame, cells: pd.DataFrame) -> Iterator[Picture]:
    """All but the heat maps by length; rows and cells are of one task, model and variant."""
    measures = (_AGREEMENT, _KL, _RECALL) if are_forced(rows) else (_SCORE,)
    for measure in measures:
        if _has(rows, measure.column):
            yield from _budget_pictures(rows, cells, measure)
    yield from _turn_pictures(rows, cells)
    if cells["score"].notna().any():
        yield memory_picture(cells)
    yield from _bar_pictures(cells)
    yield from _needle_overviews(_complete(rows, cells))


def length_heatmaps(rows: pd.DataFrame, cells: pd.DataFrame) -> Iterator[Picture]:
    """Needle depth by length, a picture per complete cell, where there is more than one length."""
    rows = _complete(rows, cells)
    if (
        not _has(rows, needle_maps.LENGTH, needle_maps.DEPTH)
        or rows[needle_maps.LENGTH].nunique() < 2
    ):
        return
    name = score_name(rows)
    for (policy, budget), own in rows.groupby(["policy", "budget"], sort=False):
        title = "full cache" if is_full_cache(str(policy)) else f"{policy}, budget {budget}"
        means = own.groupby([needle_maps.DEPTH, needle_maps.LENGTH], as_index=False)["score"].mean()
        alt = "; ".join(
            f"depth {depth:g} %, {length:g} tokens: {100 * mean:.0f} %"
            for depth, length, mean in means.itertuples(index=False)
        )
        with tempfile.TemporaryDirectory() as folder:
            path = needle_maps.needle_heatmap(own, Path(folder) / "map.png")
            reading = f"{_BRIGHT.format(name)}; depth 0 is the start of the text."
            yield _png(path, title, reading, f"Heat map of the mean {name}. {alt}.")


def _budget_pictures(
    rows: pd.DataFrame, cells: pd.DataFrame, measure: Measure
) -> Iterator[Picture]:
    if measure.column != "score":
        # Shares lie between 0 and 1; a divergence in nats has no largest value.
        bounds = None if measure.column == "kl_mean" else (0.0, 1.0)
        cells = compare_cells(rows.assign(score=rows[measure.column]), bounds=bounds)
    for kind, frame in budget_charts.by_budget_kind(cells).items():
        svg = budget_charts.budget_chart(frame, kind, measure.ylabel, measure.scale)
        words = _in_words(frame, "score", measure.scale)
        yield Picture(
            f"{measure.title} by budget ({kind})",
            f"{measure.reading} {_HOW_TO_READ}",
            f"Line chart, {measure.ylabel} by budget. {words}.",
            _uri(svg, "svg+xml"),
        )


def _turn_pictures(rows: pd.DataFrame, cells: pd.DataFrame) -> Iterator[Picture]:
    """Score by turn, a picture per budget, so that each fits a narrow screen."""
    if not has_turns(rows):
        return
    scores, name = score_by_turn(rows, cells), score_name(rows)
    for budget in turn_charts.budgets_of(scores):
        panel = scores[scores["budget"].isin([budget, "full"])]
        if panel.empty:
            continue
        words = "; ".join(
            f"{policy}: " + ", ".join(significant(100 * score) for score in own["score"])
            for policy, own in panel.groupby("policy")
        )
        yield Picture(
            f"{name.capitalize()} by turn, {turn_charts.budget_title(budget)}",
            "Turn 1 was asked first of its context. Bars: 95 % intervals, by context; dashed: full "
            "cache, its interval pale. Points of one turn stand a little apart.",
            f"Line chart, mean {name} in percent from the first turn to the last. {words}.",
            _uri(turn_charts.turn_chart(panel, f"{name} (%)"), "svg+xml"),
        )


def memory_picture(cells: pd.DataFrame) -> Picture:
    """Score, or agreement of forced answers, by bytes kept, with the Pareto front."""
    measure = _AGREEMENT if are_forced(cells) else _SCORE
    megabytes = _in_words(cells, "kv_bytes_kept", 1e-6)
    return Picture(
        f"{measure.title} by memory kept",
        "Up and to the left is better. No cell in bounded memory beats a ringed one in both memory "
        "and mean score; intervals may still overlap.",
        f"Scatter chart, {measure.ylabel} by KV cache kept. MB kept: {megabytes}.",
        _uri(budget_charts.memory_chart(cells, measure.ylabel), "svg+xml"),
    )


def _bar_pictures(cells: pd.DataFrame) -> Iterator[Picture]:
    few, many = cells["slots"].min(), cells["slots"].max()
    slots = f"{few:g} to {many:g} sequences" if few < many else counted(many, "sequence")
    beside = f"with at most {slots} side by side; only times of equal numbers compare"
    for columns, title, xlabel, scale, reading in (
        (
            ["ttft_sec"],
            "Time to first token",
            "TTFT (s)",
            1,
            f"Median {beside}. Shorter is better.",
        ),
        (
            ["decode_tokens_per_sec"],
            "Decoding speed",
            "tokens per second of one sequence",
            1,
            f"Median {beside}. Longer is better.",
        ),
        (
            ["kv_bytes_kept", "kv_bytes_peak"],
            "KV cache memory",
            "kept / peak (MB)",
            1e-6,
            "Full colour: median kept between passes; pale: the most held at any moment. Shorter "
            "is better.",
        ),
    ):
        if _has(cells, *columns):
            svg = budget_charts.bar_chart(cells, columns, xlabel, scale)
            alt = f"Bar chart, {xlabel}. {_in_words(cells, columns[-1], scale)}."
            yield Picture(title, reading, alt, _uri(svg, "svg+xml"))


def _needle_overviews(rows: pd.DataFrame) -> Iterator[Picture]:
    """Depth by policy, a picture per budget, so that each fits a narrow screen."""
    if not _has(rows, needle_maps.LENGTH, needle_maps.DEPTH):
        return
    name = score_name(rows)
    is_full = rows["policy"].map(is_full_cache)
    for budget in rows.loc[~is_full, "budget"].unique():
        panel = rows[is_full | (rows["budget"] == budget)]
        means = panel.groupby(["policy", needle_maps.DEPTH])["score"].mean().unstack()
        alt = "; ".join(
            f"{policy}: " + ", ".join(f"{100 * mean:.0f}" for mean in line)
            for policy, line in zip(means.index, means.to_numpy(), strict=True)
        )
        depths = ", ".join(f"{depth:g}" for depth in means.columns)
        with tempfile.TemporaryDirectory() as folder:
            path = needle_maps.needle_overview(panel, Path(folder) / "overview.png")
            reading = (
                f"{_BRIGHT.format(name)}, from the start of the text (depth 0) to its end. The "
                "number above a column is the policy's mean."
            )
            alt = f"Heat map, mean {name} in percent at depths {depths} %. {alt}."
            title = f"{name.capitalize()} by needle depth, budget {budget}"
            yield _png(path, title, reading, alt)


def _complete(rows: pd.DataFrame, cells: pd.DataFrame) -> pd.DataFrame:
    """The rows of cells that have a score."""
    scored = cells.loc[cells["score"].notna(), ["policy", "budget"]]
    return rows.merge(scored, on=["policy", "budget"])


def _has(frame: pd.DataFrame, *columns: str) -> bool:
    return all(name in frame and frame[name].notna().any() for name in columns)


def _in_words(cells: pd.DataFrame, column: str, scale: float) -> str:
    """Every value of a chart: "keydiff: 256 5, 512 65; full: full 100"."""
    return "; ".join(
        f"{policy}: "
        + ", ".join(
            f"{budget} " + ("no value" if pd.isna(value) else significant(scale * value))
            for budget, value in zip(own["budget"], own[column], strict=True)
        )
        for policy, own in cells.groupby("policy")
    )


def _png(path: Path, title: str, reading: str, alt: str) -> Picture:
    width = image.imread(path).shape[1] * CSS_PIXELS_PER_INCH // PLOT_DPI
    return Picture(title, reading, alt, _uri(path.read_bytes(), "png"), width)


def _uri(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{b64encode(data).decode()}"
