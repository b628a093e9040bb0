"""Charts: right values at right places, gaps where a score is missing, same cells same bytes."""

import xml.etree.ElementTree as ET
from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from kvarena.harness.report.budget_charts import (
    bar_chart,
    budget_chart,
    by_budget_kind,
    memory_chart,
    pareto_front,
    score_chart,
)
from kvarena.harness.report.policy_styles import policy_style

NAN = float("nan")


def make_cells(scores: dict[tuple[str, str], float], full: float | None = 0.9) -> pd.DataFrame:
    """A line per (policy, budget), with intervals of 0.1 to both sides and made-up sizes."""
    cells = pd.DataFrame(
        [(policy, budget, score) for (policy, budget), score in scores.items()]
        + ([("full", "full", full)] if full is not None else []),
        columns=["policy", "budget", "score"],
    )
    kept = 1e6 * np.arange(1, len(cells) + 1)
    return cells.assign(
        score_low=cells["score"] - 0.1,
        score_high=cells["score"] + 0.1,
        kv_bytes_kept=kept,
        kv_bytes_peak=kept + 5e5,
        ttft_sec=np.arange(1, len(cells) + 1) / 4,
    )


TWO = make_cells(
    {
        ("h2o", "1k"): 0.8,
        ("h2o", "256"): 0.2,
        ("tova", "256"): 0.3,
        ("tova", "512"): 0.5,
        ("tova", "1k"): 0.7,
    }
)


def draw_by_budget(cells: pd.DataFrame, kind: str = "tokens") -> bytes:
    return budget_chart(by_budget_kind(cells)[kind], kind, "score (%)", 100)


def line_of(figure: Figure, label: str) -> Line2D:
    return next(line for line in figure.axes[0].lines if line.get_label() == label)


def tick_labels(figure: Figure, axis: str = "x") -> list[str]:
    return [text.get_text() for text in getattr(figure.axes[0], f"get_{axis}ticklabels")()]


def heights(line: Line2D) -> list[float]:
    return [round(float(y), 6) for y in np.asarray(line.get_ydata())]


def test_cells_are_split_by_kind_of_budget_with_the_full_cache_in_each() -> None:
    cells = make_cells({("h2o", "50%"): 0.1, ("h2o", "2k"): 0.2, ("h2o", "10%"): 0.3})
    kinds = by_budget_kind(cells)
    assert list(kinds) == ["tokens", "% of the prompt"]
    assert set(kinds["tokens"]["budget"]) == {"2k", "full"}
    shares = kinds["% of the prompt"]
    assert [b for b in shares["budget"] if b != "full"] == ["10%", "50%"]
    assert shares.set_index("budget")["budget_size"].drop("full").to_dict() == {
        "10%": 10,
        "50%": 50,
    }
    assert kinds["tokens"].set_index("budget").loc["2k", "budget_size"] == 2048


def test_the_full_cache_alone_has_no_chart_by_budget() -> None:
    assert by_budget_kind(make_cells({})) == {}


def test_a_line_runs_through_its_scores_in_the_order_of_budgets(figures: list[Figure]) -> None:
    draw_by_budget(TWO)
    assert heights(line_of(figures[0], "tova")) == [30, 50, 70]
    assert heights(line_of(figures[0], "h2o")) == [20, 80]
    assert heights(line_of(figures[0], "full")) == [90, 90]
    assert tick_labels(figures[0]) == ["256", "512", "1k"]
    assert figures[0].axes[0].get_xscale() == "log"


def test_points_of_one_budget_stand_apart_but_near_their_budget(figures: list[Figure]) -> None:
    draw_by_budget(TWO)
    h2o, tova = (line_of(figures[0], name).get_xdata() for name in ("h2o", "tova"))
    assert h2o[0] != tova[0]
    np.testing.assert_allclose([h2o[0], tova[0], tova[1]], [256, 256, 512], rtol=0.03)


def test_intervals_are_error_bars_and_only_the_full_cache_has_a_band(
    figures: list[Figure],
) -> None:
    draw_by_budget(TWO)
    axes = figures[0].axes[0]
    uprights = {
        to_hex(collection.get_edgecolor()[0]): [path.vertices[:, 1] for path in paths]
        for collection in axes.collections
        if (paths := collection.get_paths()) and type(collection).__name__ == "LineCollection"
    }
    ours = policy_style("tova").colour.lower()
    np.testing.assert_allclose(uprights[ours], [[20, 40], [40, 60], [60, 80]])
    assert len(axes.collections) == len(uprights) == 2
    ends = [line for line in axes.lines if line.get_marker() == "_"]
    assert [heights(line) for line in ends if to_hex(line.get_color()) == ours] == [
        [20, 40, 60],
        [40, 60, 80],
    ]
    (band,) = axes.patches
    assert to_hex(band.get_facecolor()) == policy_style("full").colour.lower()


@pytest.mark.parametrize("score", [0.0, NAN])
def test_an_axis_of_zeros_alone_ends_at_a_hundred(figures: list[Figure], score: float) -> None:
    cells = make_cells({("tova", "256"): score, ("tova", "512"): score}, full=score)
    draw_by_budget(cells)
    memory_chart(cells, "score (%)")
    budget_chart(by_budget_kind(cells)["tokens"], "tokens", "KL (nats)", 1)
    bottoms, tops = zip(*(figure.axes[0].get_ylim() for figure in figures), strict=True)
    np.testing.assert_allclose(tops, [100, 100, 1], rtol=0.05)
    np.testing.assert_allclose(bottoms, np.multiply(tops, -0.03))


def test_an_axis_of_small_scores_keeps_to_them(figures: list[Figure]) -> None:
    draw_by_budget(make_cells({("tova", "256"): 0.0, ("tova", "512"): 0.1}, full=0.2))
    assert 30 <= figures[0].axes[0].get_ylim()[1] < 40


DOTS = make_cells(
    {
        ("h2o", "2MB"): 0.2,
        ("keydiff+kivi(bits=4)", "2MB"): 0.8,
        ("tova", "2MB"): 0.8,
        ("tova", "1MB"): 0.3,
        ("snapkv", "2MB"): NAN,
    }
)
BESIDE = {"tokens kept": ["12", "34", "56", "78", "90", "-"], "bits": list("abcdef")}


def test_dots_stand_by_budget_the_best_first_with_texts_beside(figures: list[Figure]) -> None:
    score_chart(DOTS, "score (%)", BESIDE)
    axes = figures[0].axes[0]
    assert tick_labels(figures[0], "y") == ["tova", "keydiff+kivi(bits=4)", "tova", "h2o", "full"]
    places = axes.get_yticks()
    assert places.tolist() == sorted(places)
    assert axes.get_ylim()[0] > axes.get_ylim()[1]  # downwards
    texts = {(text.get_text(), text.xy[1]) for text in axes.texts}
    assert {
        (text, place) for text, place in zip(["78", "34", "56", "12", "-"], places, strict=True)
    } <= texts
    assert {text for text, _ in texts if text[:6] in ("budget", "full c")} == {
        "budget 1MB",
        "budget 2MB",
        "full cache",
    }
    assert "90" not in {text for text, _ in texts}  # a cell without a score has no dot
    dots = {round(float(line.get_ydata()[0]), 1): float(line.get_xdata()[0]) for line in axes.lines}
    np.testing.assert_allclose([dots[round(place, 1)] for place in places], [30, 80, 80, 20, 90])
    np.testing.assert_allclose(axes.get_xlim(), [-2, 102])


def test_dots_have_their_interval_and_the_style_of_their_policy(figures: list[Figure]) -> None:
    score_chart(DOTS, "score (%)", BESIDE)
    axes = figures[0].axes[0]
    place = axes.get_yticks()[tick_labels(figures[0], "y").index("keydiff+kivi(bits=4)")]
    spans = [
        path.vertices
        for collection in axes.collections
        for path in collection.get_paths()
        if path.vertices[0, 1] == place
    ]
    np.testing.assert_allclose(spans[0], [[70, place], [90, place]])
    dot = [line for line in axes.lines if line.get_ydata()[0] == place][-1]
    style = policy_style("keydiff+kivi(bits=4)")
    assert (dot.get_color(), dot.get_marker(), dot.get_fillstyle()) == (
        style.colour,
        style.marker,
        style.fill,
    )


def test_a_cell_without_a_score_breaks_its_line(figures: list[Figure]) -> None:
    scores = {("tova", "256"): 0.3, ("tova", "512"): NAN, ("tova", "1k"): 0.7}
    draw_by_budget(make_cells(scores))
    line = np.asarray(line_of(figures[0], "tova").get_ydata())
    assert np.isnan(line).tolist() == [False, True, False]


def test_a_policy_has_the_same_colour_and_marker_in_every_chart(figures: list[Figure]) -> None:
    draw_by_budget(TWO)
    memory_chart(TWO, "score (%)")
    bar_chart(TWO[TWO["policy"] == "tova"], ["ttft_sec"], "TTFT (s)")
    style = policy_style("tova")
    for figure in figures[:2]:
        line = line_of(figure, "tova")
        assert (line.get_color(), line.get_marker()) == (style.colour, style.marker)
    assert to_hex(figures[2].axes[0].patches[-1].get_facecolor()) == style.colour.lower()


def test_a_policy_run_without_bound_is_a_level_of_its_own_name(figures: list[Figure]) -> None:
    draw_by_budget(make_cells({("h2o", "256"): 0.2, ("h2o", "full"): 0.8}))
    assert heights(line_of(figures[0], "h2o")) == [20]
    assert heights(line_of(figures[0], "h2o, budget full")) == [80, 80]


def test_budgets_too_close_to_the_one_before_stay_unnamed(figures: list[Figure]) -> None:
    draw_by_budget(make_cells({("h2o", b): 0.5 for b in ("256", "257", "1k", "4k")}))
    assert tick_labels(figures[0]) == ["256", "1k", "4k"]


def test_the_pareto_front_leaves_out_what_another_point_beats() -> None:
    costs = np.array([1, 2, 2, 3, 4, 4, 5])
    scores = np.array([0.2, 0.5, 0.4, 0.5, 0.9, 0.9, 0.1])
    assert pareto_front(costs, scores).tolist() == [True, True, False, False, True, True, False]


def test_rings_stand_on_the_pareto_front_only(figures: list[Figure]) -> None:
    # Bytes grow by 1 MB from line to line, so h2o at 512 costs more than tova and scores less.
    cells = make_cells({("tova", "256"): 0.5, ("h2o", "512"): 0.4, ("snapkv", "512"): NAN})
    memory_chart(cells, "score (%)")
    ring = line_of(figures[0], "Pareto front")
    assert ring.get_xdata().tolist() == [1, 4]
    assert heights(ring) == [50, 90]


def test_bars_are_grouped_by_budget_and_unknown_values_left_out(figures: list[Figure]) -> None:
    cells = TWO.assign(ttft_sec=[1.0, 2.0, NAN, 4.0, 5.0, 6.0])
    bar_chart(cells, ["ttft_sec"], "TTFT (ms)", 1000)
    assert tick_labels(figures[0], "y") == ["h2o", "tova", "h2o", "tova", "full"]
    headings = [text.get_text() for text in figures[0].axes[0].texts]
    assert [text for text in headings if not text[0].isdigit()] == [
        "budget 256",
        "budget 512",
        "budget 1k",
        "full cache",
    ]
    widths = [patch.get_width() for patch in figures[0].axes[0].patches]
    assert widths[1::2] == [2000, 4000, 1000, 5000, 6000]


def test_a_second_column_is_a_pale_bar_behind_the_first(figures: list[Figure]) -> None:
    bar_chart(make_cells({}), ["kv_bytes_kept", "kv_bytes_peak"], "MB", 1e-6)
    pale, solid = figures[0].axes[0].patches
    assert (pale.get_width(), solid.get_width()) == (1.5, 1.0)
    assert pale.get_alpha() < 0.5
    assert "1.00 / 1.50" in [text.get_text() for text in figures[0].axes[0].texts]


def test_large_values_are_written_without_powers_of_ten(figures: list[Figure]) -> None:
    bar_chart(make_cells({}), ["kv_bytes_kept", "kv_bytes_peak"], "kB", 1e-3)
    assert "1000 / 1500" in [text.get_text() for text in figures[0].axes[0].texts]


def all_charts(cells: pd.DataFrame) -> Sequence[bytes]:
    return [
        draw_by_budget(cells),
        memory_chart(cells, "score (%)"),
        bar_chart(cells, ["kv_bytes_kept", "kv_bytes_peak"], "MB"),
        score_chart(cells, "score (%)", {"MB": (cells["kv_bytes_kept"] / 1e6).astype(str)}),
    ]


def test_the_same_cells_give_the_same_bytes() -> None:
    first = all_charts(TWO)
    with mpl.rc_context({"font.size": 20, "axes.facecolor": "red"}):
        assert all_charts(TWO.sample(frac=1, random_state=1)) == first
        assert mpl.rcParams["font.size"] == 20


def test_charts_are_svg_that_needs_no_font_and_no_other_file() -> None:
    for chart in all_charts(TWO):
        tags = {element.tag.rpartition("}")[2] for element in ET.fromstring(chart).iter()}
        assert "path" in tags
        assert not tags & {"text", "image", "script", "style_sheet", "foreignObject"}


def test_labels_are_taken_as_they_are() -> None:
    # "$" would start a formula, and this one is broken; "<" and "--" would end a comment.
    cells = make_cells({("a$\\frac{$ <b> --> &", "256"): 0.5, ("_hidden", "512"): 0.5})
    for chart in all_charts(cells):
        ET.fromstring(chart)
