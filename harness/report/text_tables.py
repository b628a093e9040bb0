"""Comparisons as tables for a screen and for Markdown, and frames as files can hold them."""

import itertools
import json
import math
import re
import string
import sys
import textwrap
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvarena.harness.analysis.comparison import CONTEST, Line, is_full_cache
from kvarena.harness.analysis.distances import score_name
from kvarena.harness.column import Column
from kvarena.harness.files import replacing
from kvarena.harness.store.columns import all_columns

MAX_COLUMNS = 100
REFERENCE = "a reference, which looks at the whole text first in unbounded memory"
NOTHING_EVICTED = "nothing was evicted: the budget never bound"
_TIMES = ("TTFT s", "tok/s")
_TEXT = pd.StringDtype()
_DTYPES = {int: pd.Int64Dtype(), float: pd.Float64Dtype(), bool: pd.BooleanDtype()}


def print_summary(summary: pd.DataFrame, stream: TextIO | None = None) -> None:
    """Print one table per (task, model, variant): rich on a terminal, plain text elsewhere.

    summary: what compare_cells gives, with or without with_kl. Plain lines are at most 100 columns
    wide and carry no escape codes.
    """
    stream = stream or sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    if summary.empty:
        print("no results", file=stream)
        return
    summary = _with_texts(summary)
    shown: set[str] = set()
    for labels, lines in summary.groupby(CONTEST, sort=False):
        title = ", ".join(str(label) for label in labels if label)
        columns = _columns(lines)
        shown |= columns.keys()
        if stream.isatty() and encoding.lower().startswith("utf"):
            _print_rich(title, columns, lines["budget"].tolist(), stream)
        else:
            # A name that the stream cannot spell must not end a finished run.
            text = _plain_table(title, columns).encode(encoding, "replace").decode(encoding)
            print(text, file=stream)
    for note in _footnotes(summary, shown):
        print(textwrap.fill(note, MAX_COLUMNS), file=stream)


def _with_texts(summary: pd.DataFrame) -> pd.DataFrame:
    """The summary with ``variant`` as texts, and ``mark`` for what notes say of a cell's budget."""
    # A column of empty texts comes back from CSV as not-a-number.
    variant = summary["variant"].astype(object).fillna("")
    notes = evictions(summary)
    return summary.assign(variant=variant, mark=notes.map(eviction_marks(notes)))


def evictions(cells: pd.DataFrame) -> pd.Series:
    """What to say of references, and of cells whose budget did not bind in every sample; else "".

    Nothing is said of what keeps everything, of cells without a bound, and where rows do not tell.
    """

    def said(line: Line) -> str:
        if not line.get("bounded", True):
            return REFERENCE
        keeps_all = is_full_cache(line["policy"].partition("+")[0]) or line["budget"] == "full"
        evicted, num_ok = line.get("num_compressed", math.nan), line["num_ok"]
        if keeps_all or pd.isna(evicted) or evicted >= num_ok:
            return ""
        some = f"evicted in {evicted:.0f} of {counted(num_ok, 'sample')}"
        return some if evicted else NOTHING_EVICTED

    return pd.Series(map(said, cells.to_dict("records")), cells.index, dtype=object)


def eviction_marks(notes: pd.Series) -> dict[str, str]:
    """What evictions says, each text once -> its mark: (a), (b), ...; no text has no mark."""
    letters = string.ascii_lowercase
    marks = (f"({letters[place % 26] * (place // 26 + 1)})" for place in itertools.count())
    return {"": ""} | {text: next(marks) for text in notes.unique() if text}


def marks_in_words(notes: pd.Series) -> str:
    """All marks with what they stand for, as a sentence; "" where there are none."""
    words = "; ".join(f"{mark} {text}" for text, mark in eviction_marks(notes).items() if text)
    return words and f"{words}."


def counted(number: float, noun: str) -> str:
    """1 sample, 2 samples."""
    return f"{number:.0f} {noun}" + ("" if number == 1 else "s")


def _columns(lines: pd.DataFrame) -> dict[str, list[str]]:
    """The texts of each column by its heading, but for columns that no line has a value for."""
    score = f"{score_name(lines)} %"
    with_limits = bool(lines["score_low"].notna().any())
    incomplete = (lines["num_ok"] < lines["num_planned"]).any()
    records = lines.to_dict("records")
    columns = {
        "policy": [line["policy"] for line in records],
        "budget": [f"{line['budget']} {line['mark']}".rstrip() for line in records],
        score + with_limits * " [95 %]": [_score_text(line, with_limits) for line in records],
        "KL nats": [_number(line.get("kl_mean", math.nan), 3) for line in records],
        "ok/planned": [
            f"{line['num_ok']}/{line['num_planned']}" if incomplete else "-" for line in records
        ],
        "KV kept MB": [_number(line["kv_bytes_kept"] / 1e6, 1) for line in records],
        "KV peak MB": [_number(line["kv_bytes_peak"] / 1e6, 1) for line in records],
        "TTFT s": [significant(line["ttft_sec"]) for line in records],
        "tok/s": [significant(line["decode_tokens_per_sec"]) for line in records],
    }
    return {
        name: texts
        for place, (name, texts) in enumerate(columns.items())
        if place < 3 or set(texts) != {"-"}
    }


def _number(value: float, digits: int) -> str:
    return "-" if pd.isna(value) else f"{value:.{digits}f}"


def significant(value: float) -> str:
    """Three significant digits and no power of ten: 0.00123, 12.3, 1234; "-" for no value."""
    if pd.isna(value):
        return "-"
    exponent = int(f"{value:.2e}".partition("e")[2])  # of the rounded value: 9.999 is 10.0
    return f"{value:.{max(0, 2 - exponent)}f}"


def _score_text(line: Line, with_limits: bool) -> str:
    """The score of one line; as wide with an interval as without, so that points line up."""
    mean, low, high = (line[f"score{end}"] for end in ("", "_low", "_high"))
    text = "-" if pd.isna(mean) else f"{percent(mean)} {percent_limits(mean, low, high):10}"
    return text if with_limits else text.strip()


def percent(share: float) -> str:
    """A share in percent; 0.0 and 100.0 are nothing and all, never a rounded little or most."""
    text = f"{100 * share:.1f}"
    if text == "0.0" and share > 0:
        return "<0.1"
    return ">99.9" if text == "100.0" and share < 1 else text


def percent_limits(mean: float, low: float, high: float) -> str:
    """Whole percents, as in "[83, 100]", between which the mean as shown lies; "" if unknown."""
    if pd.isna(low):
        return ""
    shown = round(100 * mean, 1)
    first, last = round(100 * low), round(100 * high)
    return f"[{first - (first > shown)}, {last + (last < shown)}]"


def markdown(summary: pd.DataFrame) -> str:
    """One GitHub table of one task and model, score and memory, and below what its marks say.

    Times are left out: among neighbours they depend on when those read and write.
    """
    summary = _with_texts(summary)
    columns = {name: texts for name, texts in _columns(summary).items() if name not in _TIMES}
    variant = {"variant": summary["variant"].tolist()} if summary["variant"].any() else {}
    columns = {"policy": columns.pop("policy")} | variant | columns
    rules = ["---" if name in ("policy", "variant") else "---:" for name in columns]
    rows = [list(columns), rules, *zip(*columns.values(), strict=True)]
    table = "".join(f"| {' | '.join(text.strip() for text in row)} |\n" for row in rows)
    notes = marks_in_words(evictions(summary))
    return table + (f"\n{notes}\n" if notes else "")


def _clip(text: str, width: int) -> str:
    """`text`, or its two ends around "..." when it is longer than `width`."""
    if len(text) <= width:
        return text
    tail = (width - 3) // 2
    return text[: width - 3 - tail] + "..." + text[len(text) - tail :]


def _plain_table(title: str, columns: Mapping[str, Sequence[str]]) -> str:
    table = [list(columns), *zip(*columns.values(), strict=True)]
    widths = [max(map(len, texts)) for texts in zip(*table, strict=True)]
    widths[0] = min(widths[0], MAX_COLUMNS - sum(widths[1:]) - 2 * (len(widths) - 1))
    texts = [_clip(title, MAX_COLUMNS)]
    for row in table:
        rest = [text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True)]
        texts.append("  ".join([_clip(row[0], widths[0]).ljust(widths[0]), *rest]).rstrip())
    texts.insert(2, "  ".join("-" * width for width in widths))
    return "\n".join(texts) + "\n"


def _print_rich(
    title: str, columns: Mapping[str, Sequence[str]], budgets: Sequence[str], stream: TextIO
) -> None:
    table = Table(title=Text(title, style="bold"), title_justify="left", box=box.SIMPLE_HEAD)
    table.show_edge, table.padding = False, (0, 1, 0, 0)
    for name in columns:
        # Units go to a second header line, which lets the table fit 80 columns as well.
        label = re.sub(r"(?: (MB|s|nats)$|(?<=/)(planned))", r"\n\1\2", name)
        if name == "policy":
            table.add_column(label, overflow="fold")
        else:
            table.add_column(label, justify="right", no_wrap=True)
    for place, row in enumerate(zip(*columns.values(), strict=True)):
        if place and budgets[place - 1] != budgets[place]:
            table.add_section()
        # Text, not str: rich reads square brackets in a plain string as markup.
        table.add_row(*[Text(text) for text in row])
    console = Console(file=stream, highlight=False)
    # On a narrow screen the terminal may break lines; rich would leave whole columns out.
    console.width = max(console.width, MAX_COLUMNS)
    console.print(table)


def _footnotes(summary: pd.DataFrame, shown: Collection[str]) -> Iterator[str]:
    """What is to be said of the columns that are ``shown``, and of marks."""
    if notes := marks_in_words(evictions(summary)):
        yield notes
    if "KL nats" in shown:
        yield "Agreement: how often the policy's first choice is the full cache's."
        yield "KL: mean KL(full || policy) per token, in nats; lower is better."
    if ((summary["num_ok"] > 0) & summary["score"].isna()).any():
        yield "No score where samples are missing: those left are another test."
    times = " and ".join(name.removesuffix(" s") for name in _TIMES if name in shown)
    if times and summary["slots"].notna().any():
        few, many = int(summary["slots"].min()), int(summary["slots"].max())
        slots = f"{few} to {many}" if few < many else f"{many}"
        if many == 1:
            yield f"{times}: medians, as one sequence sees them alone (slots = 1)."
        else:
            yield f"{times}: medians, as one sequence sees them among {slots} (slots)."
            yield "They depend on when the others read and write; slots=1 shows the policy's own."


def write_csv(frame: pd.DataFrame, path: str | Path) -> Path:
    """Write `frame` without its index; `path` holds the old or the new file, never half of one."""
    with replacing(path) as temporary:
        frame.to_csv(temporary, index=False, lineterminator="\n", encoding="utf-8")
    return Path(path)


def storable(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows that Parquet and CSV can hold: each column of its declared type, missing values in any.

    Lists become JSON text. A column that is not declared has the type of its values, and is text
    where they are of several.
    """
    columns = all_columns()
    return rows.apply(lambda values: _one_type(values, columns.get(str(values.name))))


def _one_type(values: pd.Series, declared: Column | None) -> pd.Series:
    dtype = _DTYPES.get(declared.dtype, _TEXT) if declared else None
    if values.isna().all():
        return values.astype(dtype or _TEXT)
    kind = pd.api.types.infer_dtype(values, skipna=True)
    if dtype != _TEXT and kind in ("boolean", "integer", "floating", "mixed-integer-float"):
        found = values.convert_dtypes()
        # Numbers that happen to be whole in these rows are numbers all the same.
        return found.astype(dtype) if dtype == _DTYPES[float] and kind != "boolean" else found
    if dtype == _TEXT or values.dtype == object:
        return values.map(_as_text, na_action="ignore").astype(_TEXT)
    return values


def _as_text(value: Any) -> str:  # Any: a JSON value
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    # JSON can spell half a surrogate pair, which no file can hold.
    return text.encode("utf-8", "replace").decode()
