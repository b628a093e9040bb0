"""Needle pictures: written for every grid size, empty places visible, same data same bytes."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib import image
from matplotlib.figure import Figure

from kvarena.harness.errors import UsageError
from kvarena.harness.report.needle_maps import needle_heatmap, needle_overview

SEVEN = ["full", "keydiff", "snapkv", "h2o", "tova", "streaming_llm", "l2norm"]
DEPTHS = [0, 25, 50, 75, 100]


def make_rows(
    policies: Sequence[str], budgets: Sequence[str], depths: Sequence[float], lengths: Sequence[int]
) -> pd.DataFrame:
    """One row per place; scores run through 0, 0.25 ... 1."""
    places = [
        (policy, budget, depth, length)
        for policy in policies
        for budget in (["full"] if policy == "full" else budgets)
        for depth in depths
        for length in lengths
    ]
    columns = ["policy", "budget", "meta_depth_target", "meta_length_target"]
    rows = pd.DataFrame(places, columns=columns)
    scores = np.arange(len(rows)) % 5 / 4
    return rows.assign(task="needle", model="toy", status="ok", score=scores)


def texts(figure: Figure, axes: int = 0) -> list[str]:
    return [text.get_text() for text in figure.axes[axes].texts]


@pytest.mark.parametrize(("num_depths", "num_lengths"), [(1, 1), (5, 2), (2, 11), (35, 35)])
def test_a_heat_map_is_written_for_any_grid(
    tmp_path: Path, num_depths: int, num_lengths: int
) -> None:
    depths, lengths = np.linspace(0, 100, num_depths), range(1000, 1000 + 500 * num_lengths, 500)
    rows = make_rows(["keydiff"], ["512"], list(depths), list(lengths))
    path = needle_heatmap(rows, tmp_path / "new" / "map.png")
    assert path == tmp_path / "new" / "map.png"
    height, width, _ = image.imread(path).shape
    assert max(height, width) < 8 * 200  # inches at 200 dpi
    assert [file.name for file in path.parent.iterdir()] == ["map.png"]


def test_a_cell_shows_the_mean_of_good_rows_and_an_empty_one_none(
    tmp_path: Path, figures: list[Figure]
) -> None:
    rows = make_rows(["keydiff"], ["512"], [0, 100], [1000, 2000]).assign(score=[1, 0, 1, 1])
    rows.loc[3, ["status", "score"]] = ["error", None]
    extra = rows.iloc[[0]].assign(score=0.0)
    needle_heatmap(pd.concat([rows, extra]), tmp_path / "map.png")
    assert texts(figures[0])[:3] == ["50", "0", "100"]
    assert "toy, n = 4; 1 failed; hatched: no score" in texts(figures[0])
    assert "keydiff, budget 512: mean score 50 %" in texts(figures[0])
    low, high = sorted(figures[0].axes[0].get_ylim())
    assert figures[0].axes[0].get_ylim() == (high, low)  # depth 0 is on top


def test_pictures_of_forced_answers_say_agreement(tmp_path: Path, figures: list[Figure]) -> None:
    rows = make_rows(["keydiff"], ["512"], DEPTHS, [1000]).assign(kl_mean=0.1)
    needle_heatmap(rows, tmp_path / "map.png")
    needle_overview(rows, tmp_path / "overview.png")
    assert "keydiff, budget 512: mean agreement 50 %" in texts(figures[0])
    assert "needle: mean agreement by policy and depth" in texts(figures[1])
    for figure in figures:
        assert figure.axes[-1].get_ylabel() == "mean agreement (%)"
    needle_heatmap(rows.assign(kl_mean=None), tmp_path / "map.png")
    assert figures[2].axes[-1].get_ylabel() == "mean score (%)"


def test_an_empty_cell_looks_unlike_any_score(tmp_path: Path) -> None:
    rows = make_rows(["keydiff"], ["512"], [0, 25, 50, 75, 100], [1000, 2000]).assign(score=1.0)
    whole = image.imread(needle_heatmap(rows, tmp_path / "whole.png"))
    gap = image.imread(needle_heatmap(rows.drop(index=9), tmp_path / "gap.png"))
    yellow = [np.all(np.abs(p[..., :3] - (0.996, 0.91, 0.22)) < 0.02, -1) for p in (whole, gap)]
    assert yellow[1].sum() < 0.95 * yellow[0].sum()


def test_the_full_cache_has_no_budget_in_its_title(tmp_path: Path, figures: list[Figure]) -> None:
    needle_heatmap(make_rows(["full"], [], DEPTHS, [1000]), tmp_path / "map.png")
    assert "full cache: mean score 50 %" in texts(figures[0])


def test_large_grids_lose_their_numbers_and_most_ticks(
    tmp_path: Path, figures: list[Figure]
) -> None:
    depths, lengths = np.linspace(0, 100, 35), np.arange(1, 36) * 3000
    needle_heatmap(make_rows(["h2o"], ["2k"], list(depths), list(lengths)), tmp_path / "map.png")
    axes = figures[0].axes[0]
    assert len(axes.texts) == 2  # title and subtitle
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels[0] == "3000"
    assert labels[-1] == "105000"
    assert len(labels) < 13


@pytest.mark.parametrize("column", ["policy", "budget", "model"])
def test_a_heat_map_refuses_a_mixture(tmp_path: Path, column: str) -> None:
    rows = make_rows(["keydiff"], ["512"], DEPTHS, [1000])
    mixed = pd.concat([rows, rows.assign(**{column: "64"})])
    with pytest.raises(UsageError, match=f"one {column}"):
        needle_heatmap(mixed, tmp_path / "map.png")


def test_rows_of_another_task_are_refused(tmp_path: Path) -> None:
    rows = make_rows(["keydiff"], ["512"], DEPTHS, [1000]).drop(columns="meta_depth_target")
    with pytest.raises(UsageError, match="meta_depth_target"):
        needle_heatmap(rows, tmp_path / "map.png")


def test_a_cell_that_only_failed_is_drawn_empty(tmp_path: Path, figures: list[Figure]) -> None:
    rows = make_rows(["keydiff"], ["512"], DEPTHS, [1000]).assign(status="error", score=None)
    needle_heatmap(rows, tmp_path / "map.png")
    needle_overview(rows, tmp_path / "overview.png")
    assert "keydiff, budget 512: nothing scored" in texts(figures[0])
    assert "toy, n = 0; 5 failed; hatched: no score" in texts(figures[0])


@pytest.mark.parametrize(
    ("policies", "budgets"),
    [
        (["keydiff"], ["512"]),
        (["full"], []),
        (SEVEN, ["256", "512"]),
        (SEVEN, ["256", "512", "2k", "10%", "25%"]),
        ([f"policy_{i}" for i in range(30)], ["256", "512"]),
    ],
)
@pytest.mark.parametrize("depths", [[50], DEPTHS, list(np.linspace(0, 100, 35))])
def test_an_overview_is_written_for_any_run(
    tmp_path: Path, policies: list[str], budgets: list[str], depths: list[float]
) -> None:
    path = needle_overview(make_rows(policies, budgets, depths, [1000]), tmp_path / "o.png")
    assert image.imread(path).shape[1] < 11 * 200


def test_an_overview_has_a_panel_per_budget_with_full_in_each(
    tmp_path: Path, figures: list[Figure]
) -> None:
    scores = {"full": 1.0, "h2o": 0.25, "tova": 0.75}
    rows = make_rows(list(scores), ["2k", "25%", "512"], DEPTHS, [1000, 2000])
    needle_overview(rows.assign(score=rows["policy"].map(scores)), tmp_path / "o.png")
    panels = figures[0].axes[:3]
    titles = ["budget 512 tokens", "budget 2k tokens", "budget 25%"]
    assert [axes.get_title() for axes in panels] == titles
    for place, axes in enumerate(panels):
        labels = [label.get_text() for label in axes.get_xticklabels()]
        assert labels == ["full", "tova", "h2o"]
        assert texts(figures[0], place)[-3 - 2 * (place == 0) :][:3] == ["100", "75", "25"]


def test_a_policy_that_misses_a_budget_is_shown_as_missing(
    tmp_path: Path, figures: list[Figure]
) -> None:
    rows = make_rows(["full", "h2o", "tova"], ["256", "512"], DEPTHS, [1000])
    rows = rows[~((rows["policy"] == "tova") & (rows["budget"] == "512"))]
    needle_overview(rows, tmp_path / "o.png")
    assert "-" in texts(figures[0], 1)
    assert "toy, n = 5 per column; hatched: no score; bold: mean" in texts(figures[0])


def test_the_same_data_give_the_same_bytes(tmp_path: Path) -> None:
    rows = make_rows(SEVEN, ["256", "512"], DEPTHS, [1000])
    one = rows[(rows["policy"] == "h2o") & (rows["budget"] == "256")]
    first = [needle_overview(rows, tmp_path / "a"), needle_heatmap(one, tmp_path / "b")]
    shuffled, one = rows.sample(frac=1, random_state=1), one.iloc[::-1]
    with mpl.rc_context({"font.size": 20, "axes.facecolor": "red", "savefig.dpi": 50}):
        again = [needle_overview(shuffled, tmp_path / "c"), needle_heatmap(one, tmp_path / "d")]
        assert mpl.rcParams["font.size"] == 20
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]
