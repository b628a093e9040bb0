"""How scores change with the turn where samples ask of one context, and what reading once saves.

``turn`` numbers the questions about one context (``document``), 1 being asked first. Questions of
one context are not independent, so intervals count contexts; means are plain ones over parts.
Columns are declared in ``TURNS`` of store/columns.py.
"""

import math
from typing import Any

import pandas as pd

from kvarena.harness.analysis.comparison import CELL
from kvarena.harness.analysis.intervals import mean_interval, paired_difference
from kvarena.harness.store.columns import TURNS

_CONTEXT = ["part", "document"]  # the same label in two parts means two documents
_BOUNDS = (0.0, 1.0)
_TOKENS = ["prompt_tokens", "prefill_tokens_computed"]


def has_turns(rows: pd.DataFrame) -> bool:
    """Whether some of the rows are one of several questions about one context."""
    return "turn" in rows and bool(rows["turn"].notna().any())


def score_by_turn(rows: pd.DataFrame, cells: pd.DataFrame) -> pd.DataFrame:
    """One line per cell and turn: the mean score of its questions, with its 95 % interval.

    rows: with turns; cells: what compare_cells gives of them. A cell without a score, which lacks
    samples, has no lines here either.
    """
    lines = []
    for cell, own in _asked_in(rows, cells):
        for turn, asked in _questions(own).groupby("turn"):
            mean = mean_interval(asked["score"], asked["document"], asked["part"], bounds=_BOUNDS)
            found = {"turn": turn, "score": mean.mean}
            lines.append(cell | found | {"score_low": mean.low, "score_high": mean.high})
    scores = ["score", "score_low", "score_high"]
    return pd.DataFrame(lines, columns=[*CELL, "question", "turns", "turn", *scores])


def turn_table(rows: pd.DataFrame, cells: pd.DataFrame) -> pd.DataFrame:
    """One line per cell: its first and its last turn, what lies between, and prefill saved.

    rows, cells: as for score_by_turn. Contexts count whose first and last question both count.
    """
    lines = []
    for cell, own in _asked_in(rows, cells):
        both = _first_and_last(own)
        where = both["document"], both["part"]
        line = cell | {"num_turns": int(own["turn"].max()), "num_documents": len(both)}
        for name in ("first", "last"):
            mean = mean_interval(both[name], *where, bounds=_BOUNDS)
            ends = zip(("", "_low", "_high"), (mean.mean, mean.low, mean.high), strict=True)
            line |= {f"score_{name}{end}": value for end, value in ends}
        change = paired_difference(both["last"], both["first"], *where, bounds=_BOUNDS)
        line |= {"difference": change.mean, "p_value": change.p_value}
        line |= {"difference_low": change.low, "difference_high": change.high}
        lines.append(line | {"prefill_saved": prefill_saved(own)})
    return pd.DataFrame(lines, columns=[*CELL, *(column.name for column in TURNS)])


def _asked_in(
    rows: pd.DataFrame, cells: pd.DataFrame
) -> list[tuple[dict[str, Any], pd.DataFrame]]:  # Any: labels are texts
    """The labels of each cell that has a score and turns, in the order of `cells`, and its rows."""
    rows = rows[rows["turn"].notna()]
    texts = {
        name: rows[name].astype(object).fillna("").astype(str) if name in rows else ""
        for name in ("variant", "part", "question", "turns")
    }
    score = pd.to_numeric(rows["score"]).where(rows["status"] == "ok")
    groups = dict(list(rows.assign(**texts, score=score).groupby(CELL)))
    found = []
    for key in cells.loc[cells["score"].notna(), CELL].itertuples(index=False, name=None):
        if key in groups:
            own = groups[key]
            how = {name: own[name].iloc[0] for name in ("question", "turns")}
            found.append((dict(zip(CELL, key, strict=True)) | how, own))
    return found


def _questions(rows: pd.DataFrame) -> pd.DataFrame:
    """part, document, turn, score of every question that counts; its repeats are averaged."""
    counted = rows[rows["score"].notna()]
    return counted.groupby([*_CONTEXT, "turn"])["score"].mean().reset_index()


def _first_and_last(rows: pd.DataFrame) -> pd.DataFrame:
    """part, document, first, last: the scores at turn 1 and at the last turn of each context."""
    last = rows.groupby(_CONTEXT)["turn"].max().reset_index()
    questions = _questions(rows)
    first = questions[questions["turn"] == 1].rename(columns={"score": "first"})
    end = last[last["turn"] > 1].merge(questions).rename(columns={"score": "last"})
    return first.drop(columns="turn").merge(end.drop(columns="turn"), on=_CONTEXT)


def prefill_saved(rows: pd.DataFrame) -> float:
    """The share of prompt tokens that were not computed; NaN where rows do not say."""
    if not set(_TOKENS) <= set(rows):
        return math.nan
    prompt, computed = rows[rows["status"] == "ok"].dropna(subset=_TOKENS)[_TOKENS].sum()
    return 1 - computed / prompt if prompt else math.nan
