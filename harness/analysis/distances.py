"""What rows of forced answers say: how often a policy agrees with the full cache, and its distance.

Such rows have ``kl_mean``, which no row of a generated answer has; their ``score`` is the share of
tokens at which the policy's first choice is the full cache's.
"""

import pandas as pd

from kvarena.harness.analysis.comparison import CELL, compare_cells

_MEASURES = ("kl_mean", "kl_max", "nll_difference", "attention_recall")


def are_forced(frame: pd.DataFrame) -> bool:
    """Whether rows, or cells from with_kl, are of forced answers."""
    return "kl_mean" in frame and bool(frame["kl_mean"].notna().any())


def score_name(frame: pd.DataFrame) -> str:
    """What ``score`` is in rows, or in cells from with_kl."""
    return "agreement" if are_forced(frame) else "score"


def with_kl(cells: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """``cells`` with their mean KL in nats as ``kl_mean``, over parts as scores are.

    cells: what compare_cells gives of ``rows``; as they are if no answer was forced. A cell without
    a score has no KL either.
    """
    if not are_forced(rows):
        return cells
    texts = {name: rows[name].fillna("") if name in rows else "" for name in ("variant", "part")}
    rows = rows.assign(**texts)
    by_part = rows[rows["status"] == "ok"].groupby([*CELL, "part"])["kl_mean"].mean()
    joined = cells.join(by_part.groupby(CELL).mean(), on=CELL)
    return joined.assign(kl_mean=joined["kl_mean"].where(joined["score"].notna()))


def with_kl_limits(cells: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """``cells`` from with_kl with the 95 % interval of each KL, kl_mean_low and kl_mean_high."""
    if not are_forced(rows):
        return cells
    own = compare_cells(rows.assign(score=rows["kl_mean"]), bounds=None).set_index(CELL)
    ends = {f"score_{end}": f"kl_mean_{end}" for end in ("low", "high")}
    return cells.join(own[list(ends)].rename(columns=ends), on=CELL)


def distances(rows: pd.DataFrame) -> pd.DataFrame:
    """One line per model, variant, policy and budget: means over samples and standard errors."""
    columns = [name for name in _MEASURES if name in rows.columns]
    cells = rows[rows["status"] == "ok"].groupby(CELL[1:])[columns]
    return pd.concat([cells.mean(), cells.sem().add_suffix("_se")], axis=1).reset_index()
