"""The study of score, protection and shape: shares, intervals, sameness, and what is left out."""

import numpy as np
import pandas as pd
import pytest

from kvarena.harness.analysis.row_frame import recorded_rows
from kvarena.harness.studies import choice_figures as figures
from kvarena.harness.studies import score_protection_shape as study

NUM = 12


def cell(rule: str, kl: np.ndarray, protect: str = "none", shape: str = "uniform") -> pd.DataFrame:
    options = [f"shape={shape}"] * (shape != "uniform") + [f"protect={protect}"]
    return pd.DataFrame(
        {
            "policy": f"{rule}({','.join(options)})",
            "protect": protect,
            "shape": shape,
            "sample_id": [f"s{n}" for n in range(NUM)],
            "document": [f"d{n}" for n in range(NUM)],
            "status": "ok",
            "num_planned": NUM,
            "kept_tokens": 512,
            "score": 0.5,
            "kl_mean": kl,
        }
    )


@pytest.fixture
def rows() -> pd.DataFrame:
    floor = np.linspace(1, 2, NUM)
    wobble = np.where(np.arange(NUM) % 2, 0.01, -0.01)
    return pd.concat(
        [
            cell("random", floor),
            cell("good", floor / 4),
            cell("alike", floor + wobble),
            cell("good", floor / 8, shape="ada"),
            cell("random", floor / 2, protect="4+64"),
            cell("good", floor / 4, protect="4+64"),
            cell("half", floor, protect="4+64").iloc[: NUM // 2],
        ],
        ignore_index=True,
    )


def test_a_choice_is_measured_against_random_under_its_own_protection(rows: pd.DataFrame) -> None:
    summary = study.summarise(rows).set_index(study.CHOICE)
    closed = summary["closed_ratio"]
    assert closed["good", "none", "uniform"] == pytest.approx(0.75)
    assert closed["good", "none", "ada"] == pytest.approx(0.875)
    assert closed["good", "4+64", "uniform"] == pytest.approx(0.5)
    assert closed["random"].isna().all()
    gain = summary.loc[("good", "none", "uniform")]
    assert gain["kl_gain"] == pytest.approx(0.75 * 1.5)
    assert gain["kl_gain_low"] < gain["kl_gain"] < gain["kl_gain_high"]
    assert gain["p"] == pytest.approx(2 / 2**NUM)
    assert gain["p_holm"] == pytest.approx(4 * 2 / 2**NUM)


def test_regret_is_measured_against_the_oracle_under_the_same_protection(
    rows: pd.DataFrame,
) -> None:
    floor = np.linspace(1, 2, NUM)
    rows = pd.concat([rows, cell("oracle", floor / 8, protect="4+64")], ignore_index=True)
    summary = study.summarise(rows).set_index(study.CHOICE)
    good = summary.loc[("good", "4+64", "uniform")]
    assert good["regret"] == pytest.approx(1.5 / 8)
    assert good["regret_low"] < good["regret"] < good["regret_high"]
    # random 1/2, good 1/4, oracle 1/8 of the same: two of the three eighths are closed
    assert good["distance_closed_ratio"] == pytest.approx(2 / 3)
    assert summary["regret"]["random", "4+64", "uniform"] == pytest.approx(1.5 * 3 / 8)
    assert summary.loc[("oracle", "4+64", "uniform"), study.REGRET].isna().all()
    assert summary.xs("none", level="protect")["regret"].isna().all()  # has no oracle


def test_pairs_differ_in_one_respect_and_are_adjusted_within_it(rows: pd.DataFrame) -> None:
    pairs = study.compare(rows)
    assert pairs["varied"].value_counts().to_dict() == {"score_rule": 4, "protect": 2, "shape": 1}
    [shape] = pairs[pairs["varied"] == "shape"].to_dict("records")
    assert (shape["score_rule"], shape["shape"], shape["other"]) == ("good", "ada", "uniform")
    assert shape["kl_difference"] == pytest.approx(-1.5 / 8)
    assert shape["p_holm"] == shape["p"]
    scores = pairs[pairs["varied"] == "score_rule"]
    assert scores["p_holm"].min() == pytest.approx(4 * scores["p"].min())
    same = scores[scores["same"]].iloc[0]
    assert (same["score_rule"], same["other"]) == ("alike", "random")


def test_the_same_is_a_finding_and_a_cell_that_lacks_samples_is_none(rows: pd.DataFrame) -> None:
    summary = study.summarise(rows)
    assert summary.set_index(study.CHOICE)["same"].eq(True).sum() == 1
    assert summary.loc[summary["same"].eq(True), "score_rule"].tolist() == ["alike"]
    assert "half" not in set(summary["score_rule"])


def with_oracle(rows: pd.DataFrame) -> pd.DataFrame:
    kl = np.linspace(1, 2, NUM) / 8
    oracles = [cell("oracle", kl, protect=protect) for protect in ("none", "4+64")]
    return pd.concat([rows, *oracles], ignore_index=True)


def test_table_and_picture_name_every_choice(rows: pd.DataFrame) -> None:
    summary = study.summarise(with_oracle(rows))
    lines = study.markdown(summary).splitlines()
    assert len(lines) == 2 + len(summary)
    assert len({line.count("|") for line in lines}) == 1
    assert next(line for line in lines if "alike" in line).count(", the same") == 1
    picture = study.picture(summary).decode()
    assert all(name in picture for name in ("good, ada", "good, uniform", "alike, uniform"))


def test_the_overview_has_a_line_per_score_under_the_common_protection(rows: pd.DataFrame) -> None:
    head, rule, *lines = study.overview(study.summarise(with_oracle(rows))).splitlines()
    assert [line.split("`")[1] for line in lines] == ["oracle", "good", "random"]
    assert len({line.count("|") for line in (head, rule, *lines)}) == 1
    good = [part.strip() for part in lines[1].split("|")]
    assert good[2:4] == ["0.38", "0.38"]  # a quarter of 1.5, under either protection
    assert good[-2] == "67"
    assert lines[-1].endswith("|  |  |  |")


def test_two_scores_are_the_same_different_or_not_told_apart(rows: pd.DataFrame) -> None:
    pair = {"same": False, "p_holm": 0.04, "kl_difference": -0.2}
    assert (figures.verdict(pair), figures.verdict(pair, -1)) == ("less", "more")
    assert figures.verdict(pair | {"p_holm": 0.05}) == "open"
    assert figures.verdict(pair | {"same": True}) == "same"  # a difference that nobody need mind


def test_the_notebooks_pictures_show_what_is_recorded(rows: pd.DataFrame) -> None:
    def pictures(rows: pd.DataFrame) -> list[bytes]:
        summary, pairs = study.summarise(rows), study.compare(rows)
        return [
            figures.kl_by_protection(summary),
            figures.kl_by_shape(summary),
            figures.verdict_grid(summary, pairs),
        ]

    drawn = pictures(rows)
    assert drawn == pictures(rows)
    assert all(picture.startswith(b"\x89PNG") for picture in drawn)
    worse = rows.assign(kl_mean=rows["kl_mean"].where(rows["shape"] == "uniform", 3.0))
    assert [a == b for a, b in zip(drawn, pictures(worse), strict=True)] == [True, False, True]


def test_the_page_is_made_of_the_recorded_rows() -> None:
    summary = study.summarise(recorded_rows(study.FOLDER / f"{study.NAME}.csv"))
    page = (study.FOLDER / "README.md").read_text()
    assert study.markdown(summary) in page
    assert (study.FOLDER / f"{study.NAME}.svg").read_bytes() == study.picture(summary)
