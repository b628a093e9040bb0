"""The words and figures of the HTML report: results, what is missing, example answers.

Every function gives plain values; the page's template alone turns them into HTML.
"""

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pandas as pd

from kvarena.harness.analysis.comparison import Line, is_full_cache
from kvarena.harness.analysis.distances import score_name
from kvarena.harness.report.text_tables import (
    NOTHING_EVICTED,
    counted,
    eviction_marks,
    evictions,
    percent,
    percent_limits,
    significant,
)

EXAMPLES_PER_CELL = 3
EXAMPLE_CHARACTERS = 240
NO_BREAK_SPACE = "\N{NO-BREAK SPACE}"


class SortedText(NamedTuple):
    """What a place of a table shows, and the number or text it is sorted by ("" stands last).

    href: what it links to, if anything.
    """

    text: str
    sort: float | str
    href: str = ""


class TableColumn(NamedTuple):
    """A heading, what to know to read the column, and its texts, one per cell."""

    heading: str
    reading: str
    texts: list[SortedText]


def table_columns(cells: pd.DataFrame) -> list[TableColumn]:
    """The columns of `cells`, one line each, in their order, which is that of the budgets.

    cells: of one task, model and variant. A column that no line has a value for is left out.
    """
    lines = cells.to_dict("records")
    notes = evictions(cells)
    marks = notes.map(eviction_marks(notes))
    budgets = cells["budget"].str.cat(marks, " ").str.strip()
    ranks = pd.factorize(cells["budget"])[0].tolist()
    name = score_name(cells)
    with_limits = "kl_mean_low" in cells and cells["kl_mean_low"].notna().any()

    def column(heading: str, text: Callable[[Line], SortedText], reading: str = "") -> TableColumn:
        return TableColumn(heading, reading, [text(line) for line in lines])

    columns = [
        column("policy", lambda line: SortedText(line["policy"], line["policy"])),
        TableColumn("budget", "", list(map(SortedText, budgets, ranks))),
        column(f"{name} % [95 % interval]", _score),
        column(
            "KL, nats [95 % interval]" if with_limits else "KL, nats",
            _kl,
            "KL: mean KL(full || policy) per token; lower is better.",
        ),
        column("best at its budget", _standing, "Tie: not significantly below the best."),
        column("samples ok / planned", _counts),
        column(
            "difference to full, points [95 % interval]",
            lambda line: _interval(line, "difference", signed=True),
            "Difference: policy minus full cache on the same samples.",
        ),
        column(
            "p (Holm)",
            lambda line: _p_value(line["p_holm"]),
            "p (Holm): how often chance alone would give such a difference, corrected for the "
            "number of policies at the budget; below 0.05 counts as a difference.",
        ),
        column(
            "detectable, points",
            lambda line: _number(100 * line["detectable"], 1),
            "Detectable: the smallest difference that this many samples would show four times out "
            "of five.",
        ),
        column(
            "published, %",
            _published,
            "Published: what a paper reports for the same model, tasks, policy and budget; "
            "results/published/README.md explains the grades.",
        ),
        column(
            "KV kept, MB", lambda line: _number(line["kv_bytes_kept"] / 1e6, 1), "KV kept: median."
        ),
        column(
            "KV peak, MB",
            lambda line: _number(line["kv_bytes_peak"] / 1e6, 1),
            "KV peak: the largest.",
        ),
        column("TTFT, s", lambda line: _significant(line["ttft_sec"])),
        column("decode, tokens/s", lambda line: _significant(line["decode_tokens_per_sec"])),
        column(
            "slots",
            lambda line: _number(line["slots"], 0),
            "Times are medians and compare only between equal slots.",
        ),
    ]
    return [one for one in columns if any(shown.text not in ("", "-") for shown in one.texts)]


def turn_columns(table: pd.DataFrame) -> list[TableColumn]:
    """The columns of what by_turn.turn_table gives for one task, model and variant."""
    lines = table.to_dict("records")
    ranks = pd.factorize(table["budget"])[0].tolist()

    def column(heading: str, text: Callable[[Line], SortedText], reading: str = "") -> TableColumn:
        return TableColumn(heading, reading, [text(line) for line in lines])

    return [
        column("policy", lambda line: SortedText(line["policy"], line["policy"])),
        TableColumn("budget", "", list(map(SortedText, table["budget"], ranks))),
        column(
            "first turn, % [95 % interval]",
            lambda line: _interval(line, "score_first"),
            "First and last turn: the questions asked first and last of each context.",
        ),
        column("last turn, % [95 % interval]", lambda line: _interval(line, "score_last")),
        column(
            "last minus first, points [95 % interval]",
            lambda line: _interval(line, "difference", signed=True),
            "They are other questions, so compare their difference with the full cache's.",
        ),
        column("contexts", lambda line: _number(line["num_documents"], 0)),
        column(
            "prefill saved, %",
            lambda line: _number(100 * line["prefill_saved"], 1),
            "Prefill saved: the share of all prompt tokens that were not computed, because the "
            "context, or an earlier turn, had been read already.",
        ),
    ]


def _published(line: Line) -> SortedText:
    """A paper's figure for the same model, task, parts, policy and budget, with its grade."""
    value = line.get("published")
    if value is None or math.isnan(value):
        return SortedText("-", "")
    source, grade = line["published_source"], line["published_confidence"]
    return SortedText(f"{100 * value:.1f} ({source}, grade {grade})", value)


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
        have = f"{line['num_ok']} of {counted(line['num_planned'], 'sample')}"
        yield f"{line['policy']}, budget {line['budget']}: {have} ({lost})"


def findings(cells: pd.DataFrame) -> list[dict[str, str]]:
    """Per budget the best policy with its interval and those that tie with it, or why none is best.

    No policy can be where each kept every token.
    """
    cells = cells.assign(note=evictions(cells))
    found = []
    for budget, own in cells.groupby("budget", sort=False):
        best, ties = (
            [_with_score(line) for line in own[own[flag]].to_dict("records")]
            for flag in ("is_best", "ties_best")
        )
        if best:
            ties_text = f"; no significant difference to {', '.join(ties)}" if ties else ""
            found.append({"budget": f"budget {budget}", "text": ", ".join(best) + ties_text})
        elif own["note"].eq(NOTHING_EVICTED).all():
            found.append({"budget": f"budget {budget}", "text": f"none, since {NOTHING_EVICTED}"})
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


def _number(value: float, digits: int) -> SortedText:
    return (
        SortedText("-", "") if pd.isna(value) else SortedText(f"{value:.{digits}f}", float(value))
    )


def _significant(value: float) -> SortedText:
    return SortedText(significant(value), "" if pd.isna(value) else float(value))


def _p_value(value: float) -> SortedText:
    if pd.isna(value):
        return SortedText("-", "")
    return SortedText("< 0.001" if value < 0.001 else f"{value:.3f}", float(value))


def _counts(line: Line) -> SortedText:
    return SortedText(f"{line['num_ok']} / {line['num_planned']}", line["num_ok"])


def _with_score(line: Line) -> str:
    """The policy and its score, which no line of text may tear from its interval, and its note."""
    note = f" ({line['note']})" if line["note"] else ""
    return f"{line['policy']} {_score(line).text.replace(' ', NO_BREAK_SPACE)}{note}"


def _score(line: Line) -> SortedText:
    if line["num_ok"] < line["num_planned"] and pd.isna(line["score"]):
        return SortedText("incomplete", "")
    return _interval(line, "score")


def _standing(line: Line) -> SortedText:
    if line["is_best"]:
        return SortedText("best", 0)
    return SortedText("tie", 1) if line["ties_best"] else SortedText("", "")


def _kl(line: Line) -> SortedText:
    shown = _number(line.get("kl_mean", math.nan), 3)
    low, high = line.get("kl_mean_low", math.nan), line.get("kl_mean_high", math.nan)
    if pd.isna(low) or not shown.sort:
        return shown
    return shown._replace(text=f"{shown.text} [{low:.3f}, {high:.3f}]")


def _interval(line: Line, name: str, *, signed: bool = False) -> SortedText:
    """A share or a difference of shares and its interval, in percent."""
    value, low, high = (line[name + end] for end in ("", "_low", "_high"))
    if pd.isna(value):
        return SortedText("-", "")
    text = f"{100 * value:+z.1f}" if signed else percent(value)
    return SortedText(f"{text} {percent_limits(value, low, high)}".rstrip(), float(value))
