"""The words and figures of the HTML report: results, what is missing, example answers.

Every function gives plain values; the page's template alone turns them into HTML.
"""

import math
from collections.abc import Hashable, Iterator
from typing import Any, NamedTuple

import pandas as pd

from kvarena.harness.comparison import is_full_cache

EXAMPLES_PER_CELL = 3
EXAMPLE_CHARACTERS = 240

HEADER = (
    "policy",
    "budget",
    "score % [95 % interval]",
    "best at its budget",
    "samples ok / planned",
    "difference to full, points [95 % interval]",
    "p (Holm)",
    "detectable, points",
    "published, %",
    "KV kept, MB",
    "KV peak, MB",
    "TTFT, s",
    "decode, tokens/s",
    "slots",
)
READING = (
    "Difference: policy minus full cache on the same samples. p (Holm): how often chance alone "
    "would give such a difference, corrected for the number of policies at the budget; below 0.05 "
    "counts as a difference. Detectable: the smallest difference that this many samples would "
    "show four times out of five. Published: what a paper reports for the same model, tasks, "
    "policy and budget; results/published/README.md explains the grades. Tie: not significantly "
    "below the best. Memory and times are medians, peak is the largest; times compare only between "
    "equal slots."
)


Line = dict[Hashable, Any]  # a line of a frame, by column


class Entry(NamedTuple):
    """A table cell: what it shows, and the number or text it is sorted by ("" stands last)."""

    text: str
    sort: float | str


def table_lines(cells: pd.DataFrame) -> list[list[Entry]]:
    """One line per cell of `cells`, in their order, which is that of the budgets, under HEADER."""
    ranks = pd.factorize(cells["budget"])[0].tolist()
    return [
        [
            Entry(line["policy"], line["policy"]),
            Entry(line["budget"], rank),
            _score(line),
            _standing(line),
            Entry(f"{line['num_ok']} / {line['num_planned']}", line["num_ok"]),
            _interval(line, "difference", "{:+.1f}"),
            _p_value(line["p_holm"]),
            _number(100 * line["detectable"], 1),
            _published(line),
            _number(line["kv_bytes_kept"] / 1e6, 1),
            _number(line["kv_bytes_peak"] / 1e6, 1),
            _number(line["ttft_sec"], 3),
            _number(line["decode_tokens_per_sec"], 1),
            _number(line["slots"], 0),
        ]
        for rank, line in zip(ranks, cells.to_dict("records"), strict=True)
    ]


def _published(line: Line) -> Entry:
    """A paper's figure for the same model, task, parts, policy and budget, with its grade."""
    value = line.get("published")
    if value is None or math.isnan(value):
        return Entry("-", "")
    source, grade = line["published_source"], line["published_confidence"]
    return Entry(f"{100 * value:.1f} ({source}, grade {grade})", value)


def is_incomplete(cells: pd.DataFrame) -> pd.Series:
    """Which cells lack good rows for some of their samples."""
    return cells["num_ok"] < cells["num_planned"]


def coverage_warnings(rows: pd.DataFrame, cells: pd.DataFrame) -> Iterator[str]:
    """One line per incomplete cell: how many samples are there and what became of the others."""
    for line in cells[is_incomplete(cells)].to_dict("records"):
        own = rows[(rows["policy"] == line["policy"]) & (rows["budget"] == line["budget"])]
        counts = own.loc[own["status"] != "ok", "status"].value_counts().sort_index().to_dict()
        not_run = line["num_planned"] - line["num_ok"] - sum(counts.values())
        counts |= {"not run": not_run} if not_run > 0 else {}
        lost = ", ".join(f"{number} {status}" for status, number in counts.items())
        have = f"{line['num_ok']} of {line['num_planned']} samples"
        yield f"{line['policy']}, budget {line['budget']}: {have} ({lost})"


def findings(cells: pd.DataFrame) -> list[dict[str, str]]:
    """Per budget the best policy with its interval, and those that tie with it."""
    found = []
    for budget, own in cells.groupby("budget", sort=False):
        best, ties = (
            [f"{line['policy']} {_score(line).text}" for line in own[own[flag]].to_dict("records")]
            for flag in ("is_best", "ties_best")
        )
        if best:
            found.append(
                {
                    "budget": f"budget {budget}",
                    "best": ", ".join(best),
                    "ties": ", ".join(ties),
                }
            )
    return found


def examples(rows: pd.DataFrame) -> list[dict[str, Any]]:
    """Per budget a few samples with the answer of every policy and of the full cache."""
    is_full = rows["policy"].map(is_full_cache)
    groups = []
    for budget in rows.loc[~is_full, "budget"].unique() if (~is_full).any() else ["full"]:
        at_budget = rows[~is_full & (rows["budget"] == budget)]
        own = pd.concat([rows[is_full], at_budget.sort_values("policy", kind="stable")])
        ids = sorted(own["sample_id"].unique())[:EXAMPLES_PER_CELL]
        samples = [_example(own[own["sample_id"] == sample_id]) for sample_id in ids]
        groups.append({"title": f"Budget {budget}, beside the full cache", "samples": samples})
    return groups


def _example(rows: pd.DataFrame) -> dict[str, Any]:
    lines = rows.to_dict("records")
    answers = [
        {
            "policy": line["policy"],
            "score": _number(100 * line["score"], 0).text,
            "text": _cut(line["prediction"]),
        }
        if line["status"] == "ok"
        else {"policy": line["policy"], "score": "", "text": f"no answer: {line['status']}"}
        for line in lines
    ]
    return {
        "id": lines[0]["sample_id"],
        "reference": _cut(lines[0]["reference"]),
        "answers": answers,
    }


def _cut(text: object) -> str:
    whole = "" if text is None or text != text else str(text)  # NaN differs from itself
    return whole if len(whole) <= EXAMPLE_CHARACTERS else whole[:EXAMPLE_CHARACTERS] + "..."


def _number(value: float, digits: int) -> Entry:
    return Entry("-", "") if pd.isna(value) else Entry(f"{value:.{digits}f}", float(value))


def _p_value(value: float) -> Entry:
    if pd.isna(value):
        return Entry("-", "")
    return Entry("< 0.001" if value < 0.001 else f"{value:.3f}", float(value))


def _score(line: Line) -> Entry:
    if line["num_ok"] < line["num_planned"] and pd.isna(line["score"]):
        return Entry("incomplete", "")
    return _interval(line, "score", "{:.1f}")


def _standing(line: Line) -> Entry:
    if line["is_best"]:
        return Entry("best", 0)
    return Entry("tie", 1) if line["ties_best"] else Entry("", "")


def _interval(line: Line, name: str, form: str) -> Entry:
    """A share between 0 and 1 and its interval, in percent."""
    value, low, high = (line[name + end] for end in ("", "_low", "_high"))
    if pd.isna(value):
        return Entry("-", "")
    limits = "" if pd.isna(low) else f" [{100 * low:.0f}, {100 * high:.0f}]"
    return Entry(form.format(100 * value) + limits, float(value))
