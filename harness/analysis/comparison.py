"""Rows in, comparisons out: how each policy scores, beside the full cache and beside the others.

A row is one sample; results/README.md lists the columns. Scores, bytes and times are taken over the
same rows: those with status "ok" and a score. Repeats of a sample (several seeds) are averaged
first, samples of one document count as dependent, and a score is the plain mean over parts where a
task has some. Intervals are 95 %, with scores between 0 and 1; see intervals.py.
"""

import itertools
import math
import re
import warnings
from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from kvarena.harness.analysis.intervals import (
    SIGNIFICANCE,
    Bounds,
    Difference,
    Interval,
    holm,
    mean_interval,
    paired_difference,
)
from kvarena.harness.budget import parse_budget
from kvarena.harness.errors import UsageError
from kvarena.harness.store.columns import SUMMARY

# Cells compare with those of the same task, model and variant: together they are a contest.
CONTEST = ["task", "model", "variant"]
CELL = [*CONTEST, "policy", "budget"]
NUMBERS = ["score", "kv_bytes_kept", "kv_bytes_peak", "ttft_sec", "decode_tokens_per_sec"]
# Texts that rows may lack.
_OPTIONAL = ["variant", "part", "document", "run_id"]
RIVALRY = ["policy", "num_compressed", "bounded"]  # what is_rival asks of a cell
_OF_CELLS = [column.name for column in SUMMARY]
_OF_PAIRS = ["budget", "policy", "other", "num_pairs", "difference", "difference_low"]
_OF_PAIRS += ["difference_high", "difference_se", "p_value", "p_holm", "detectable", "verdict"]


def require_columns(rows: pd.DataFrame, columns: list[str]) -> None:
    """Raises UsageError when there are no rows or a column is missing; names what is missing."""
    missing = [name for name in columns if name not in rows.columns]
    if missing:
        raise UsageError(f"rows lack the columns {', '.join(missing)} (see results/README.md)")
    if rows.empty:
        raise UsageError("no rows to summarise; run something first")


def is_full_cache(policy: str) -> bool:
    """Whether a policy's label, as in ``full`` or ``full@3fa9``, names the one that keeps all."""
    return re.split("[(@]", policy)[0] == "full"


def has_codec(policy: str) -> bool:
    """Whether a policy's label, as in ``full+kivi(bits=2)``, names a codec as well."""
    return "+" in re.sub(r"\([^()]*\)", "", policy)


def is_rival(policy: str, num_compressed: float, bounded: bool) -> bool:
    """Whether a cell with this label and count competes for the best one; see compare_cells."""
    if is_full_cache(policy) or not bounded:
        return False
    return has_codec(policy) or num_compressed != 0  # NaN: the rows do not say


CellKey = tuple[str, str]  # policy and budget
Line = Mapping[Hashable, Any]  # of a frame, by column


def compare_cells(
    rows: pd.DataFrame, *, allow_partial: bool = False, bounds: Bounds | None = (0.0, 1.0)
) -> pd.DataFrame:
    """One line per (task, model, variant, policy, budget), small budgets first, best score first.

    What each column says is declared in ``SUMMARY`` of store/columns.py. ``is_best`` and
    ``ties_best`` are given among the rivals at a budget; a codec that stores what was kept in fewer
    bytes needs no eviction to be one (``full+kivi``).

    allow_partial: a cell that lacks rows has a score all the same, in place of NaN.
    bounds: between which scores lie; None for another measure in their place, such as nats

    Raises UsageError for missing columns and no rows; warns of rows that repeat a sample and seed.
    """
    found = [_compare_contest(contest) for contest in _contests(rows, allow_partial, bounds)]
    table = pd.DataFrame(list(itertools.chain(*found)), columns=[*CELL, *_OF_CELLS])
    ascending = sorted(table["budget"].unique(), key=lambda label: parse_budget(label).sort_key)
    rank = table["budget"].map({label: place for place, label in enumerate(ascending)})
    by = [*CONTEST, "rank", "score", "policy"]
    ranked = table.assign(rank=rank).sort_values(by, ascending=[True] * 4 + [False, True])
    return ranked.drop(columns="rank").reset_index(drop=True)


def compare_pairs(rows: pd.DataFrame, *, allow_partial: bool = False) -> pd.DataFrame:
    """One line per two policies at the same budget of one task, model and variant.

    difference: score of ``policy`` minus score of ``other``, with difference_low, difference_high,
    difference_se, p_value, p_holm (over all pairs at that budget), detectable and num_pairs.
    verdict: which one is better, "tie" when p_holm >= 0.05, "no pairs" without anything to compare.
    Raises and warns as compare_cells does.
    """
    found = []
    for contest in _contests(rows, allow_partial, (0.0, 1.0)):
        for budget in contest.cells["budget"].unique():
            policies = sorted(contest.cells.loc[contest.cells["budget"] == budget, "policy"])
            lines = []
            for policy, other in itertools.combinations(policies, 2):
                difference = contest.difference((policy, budget), (other, budget))
                labels = {"budget": budget, "policy": policy, "other": other}
                lines.append(contest.labels | labels | _columns(difference))
            corrected = holm([line["p_value"] for line in lines]).tolist()
            for line, p_holm in zip(lines, corrected, strict=True):
                found.append(line | {"p_holm": p_holm, "verdict": _verdict(line, p_holm)})
    return pd.DataFrame(found, columns=[*CONTEST, *_OF_PAIRS])


@dataclass(frozen=True)
class _Contest:
    """The cells of one task, model and variant, which compare with each other alone.

    cells: one line per policy and budget, with its counts, medians and largest values.
    samples: of each cell that may show a score: score, document and part by sample_id, in order.
    """

    labels: dict[str, str]
    cells: pd.DataFrame
    samples: dict[CellKey, pd.DataFrame]
    bounds: Bounds | None

    def interval(self, cell: CellKey) -> Interval:
        if cell not in self.samples:
            return mean_interval([])
        own = self.samples[cell]
        return mean_interval(own["score"], own["document"], own["part"], bounds=self.bounds)

    def difference(self, cell: CellKey, other: CellKey | None) -> Difference:
        """Score of ``cell`` minus score of ``other`` over the samples of both."""
        if other is None or cell not in self.samples or other not in self.samples:
            return paired_difference([], [])
        reference = self.samples[other]["score"].rename("reference")
        both = self.samples[cell].join(reference, how="inner")
        return paired_difference(
            both["score"], both["reference"], both["document"], both["part"], bounds=self.bounds
        )


def _compare_contest(contest: _Contest) -> list[dict[str, Any]]:
    """Lines of compare_cells. Any: texts, numbers and flags."""
    names = contest.cells["policy"].tolist()
    keys: list[CellKey] = list(zip(names, contest.cells["budget"], strict=True))
    full = [key for key in keys if is_full_cache(key[0])]
    reference = full[0] if len(full) == 1 else None
    lines = [
        {str(name): value for name, value in line.items()}
        for line in contest.cells.to_dict("records")
    ]
    for key, line in zip(keys, lines, strict=True):
        interval = contest.interval(key)
        line |= contest.labels
        line |= {"score": interval.mean, "score_se": interval.se}
        line |= {"score_low": interval.low, "score_high": interval.high}
        line |= {"is_best": False, "ties_best": False}
        line |= _columns(contest.difference(key, None if key in full else reference))
    for budget in contest.cells["budget"].unique():
        own = [line for line in lines if line["budget"] == budget]
        corrected = holm([line["p_value"] for line in own]).tolist()
        for line, p_holm in zip(own, corrected, strict=True):
            line["p_holm"] = p_holm
        _mark_best(contest, [line for line in own if is_rival(*(line[name] for name in RIVALRY))])
    return lines


def _mark_best(contest: _Contest, lines: list[dict[str, Any]]) -> None:
    scored = [line for line in lines if not math.isnan(line["score"])]
    if len({frozenset(contest.samples[_key(line)].index) for line in scored}) > 1:
        return  # a mean over easier samples is not a better policy
    highest = max((line["score"] for line in scored), default=math.nan)
    for line in scored:
        line["is_best"] = line["score"] >= highest - 1e-12
    best = [line for line in scored if line["is_best"]]
    for line in scored:
        line["ties_best"] = not line["is_best"] and any(
            contest.difference(_key(line), _key(one)).p_value >= SIGNIFICANCE for one in best
        )


def _key(line: dict[str, Any]) -> CellKey:
    return line["policy"], line["budget"]


def _columns(difference: Difference) -> dict[str, float]:
    return {
        "num_pairs": difference.num_pairs,
        "difference": difference.mean,
        "difference_low": difference.low,
        "difference_high": difference.high,
        "difference_se": difference.se,
        "p_value": difference.p_value,
        "detectable": difference.detectable,
    }


def _verdict(line: dict[str, Any], p_holm: float) -> str:
    if math.isnan(p_holm):
        return "no pairs"
    better = line["policy"] if line["difference"] > 0 else line["other"]
    return f"{better} is better" if p_holm < SIGNIFICANCE else "tie"


def _contests(rows: pd.DataFrame, allow_partial: bool, bounds: Bounds | None) -> Iterator[_Contest]:
    needed = ["task", "model", "policy", "budget", "sample_id", "seed", "status", "slots"]
    if "status" in rows and not (rows["status"] == "ok").any():  # nothing was ever measured
        rows = rows.assign(**{name: math.nan for name in [*NUMBERS, "slots"] if name not in rows})
    require_columns(rows, [*needed, *NUMBERS])
    for _, own in _with_defaults(rows).groupby(CONTEST, sort=False):
        ok = own[own["ok"]]
        measures = own[NUMBERS].where(own["ok"]).join(own[["policy", "budget", "ok"]])
        cells = measures.join(own["slots"]).groupby(["policy", "budget"], sort=False)
        table = cells.agg(
            num_ok=("ok", "sum"),
            kv_bytes_kept=("kv_bytes_kept", "median"),
            kv_bytes_peak=("kv_bytes_peak", "max"),
            ttft_sec=("ttft_sec", "median"),
            decode_tokens_per_sec=("decode_tokens_per_sec", "median"),
            slots=("slots", "max"),
        )
        folders = own.groupby(["policy", "budget", "run_id", "seed"])["num_planned"].first()
        table["num_planned"] = folders.groupby(["policy", "budget"]).sum().astype(int)
        documents = ok.drop_duplicates(["policy", "budget", "part", "document"])
        counts = documents.groupby(["policy", "budget"]).size()
        table["num_documents"] = counts.reindex(table.index, fill_value=0)
        told = ok.groupby(["policy", "budget"])["compressed"].agg(["count", "sum"])
        told = told.reindex(table.index, fill_value=0)
        known = (told["count"] == table["num_ok"]) & (table["num_ok"] > 0)
        table["num_compressed"] = told["sum"].where(known)
        bounded = ok.groupby(["policy", "budget"])["bounded"].all()
        table["bounded"] = bounded.reindex(table.index, fill_value=True)
        complete = table["num_ok"] >= table["num_planned"]
        shown = table.index[complete | allow_partial]
        samples = {
            (str(policy), str(budget)): of_cell.groupby("sample_id").agg(
                score=("score", "mean"), document=("document", "first"), part=("part", "first")
            )
            for (policy, budget), of_cell in ok.groupby(["policy", "budget"])
            if (policy, budget) in shown
        }
        labels = {name: str(own[name].iloc[0]) for name in CONTEST}
        yield _Contest(labels, table.reset_index(), samples, bounds)


def _with_defaults(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows with every column that comparisons read, numbers as numbers, and ``ok``."""
    # A column of empty texts comes back from CSV as not-a-number, one of plain budgets as numbers.
    rows = rows.reset_index(drop=True)
    texts = {
        name: rows[name].astype(object).fillna("").astype(str) if name in rows else ""
        for name in _OPTIONAL
    }
    labels = {name: rows[name].astype(str) for name in ("task", "model", "policy", "budget")}
    rows = rows.assign(**texts, **labels, **rows[NUMBERS].apply(pd.to_numeric).to_dict("series"))
    repeats = rows[rows.duplicated([*CELL, "sample_id", "seed"])]
    if len(repeats):
        cells = repeats[["policy", "budget"]].agg(" ".join, axis=1).unique()
        warnings.warn(
            f"{len(repeats)} rows repeat a sample of the same cell ({', '.join(cells[:5])}); "
            "they are averaged together, select one run_id per cell if that is not meant",
            stacklevel=4,
        )
    planned = rows.groupby([*CELL, "run_id", "seed"])["status"].transform("size")
    if "num_planned" in rows:
        planned = pd.to_numeric(rows["num_planned"]).fillna(planned)
    documents = rows["document"].where(rows["document"] != "", rows["sample_id"])
    ok = (rows["status"] == "ok") & rows["score"].notna()
    told = rows["compressed"] if "compressed" in rows else pd.Series(pd.NA, index=rows.index)
    evicted = told.astype("boolean").to_numpy(float, na_value=math.nan)
    # Rows from before there were references do not say.
    bounded = rows["bounded"].astype("boolean").fillna(True) if "bounded" in rows else True
    rows = rows.assign(num_planned=planned, document=documents, compressed=evicted)
    return rows.assign(bounded=bounded, ok=ok)
