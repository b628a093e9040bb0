"""Comparisons as tables for a screen and for Markdown, and frames as files can hold them."""

import json
import re
import sys
from pathlib import Path
from typing import Any, TextIO

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvarena.harness.comparison import SECTION
from kvarena.harness.files import replacing

MAX_COLUMNS = 100
SCORE = "score % [95 %]"


def print_summary(summary: pd.DataFrame, stream: TextIO | None = None) -> None:
    """Print one table per (task, model, variant): rich on a terminal, plain text elsewhere.

    Plain lines are at most 100 columns wide and carry no escape codes.
    """
    stream = stream or sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    if summary.empty:
        print("no results", file=stream)
        return
    summary = _with_texts(summary)
    for labels, lines in summary.groupby(SECTION, sort=False):
        title = ", ".join(str(label) for label in labels if label)
        if stream.isatty() and encoding.lower().startswith("utf"):
            _print_rich(title, lines, stream)
        else:
            # A name that the stream cannot spell must not end a finished run.
            text = _plain_table(title, lines).encode(encoding, "replace").decode(encoding)
            print(text, file=stream)
    if summary["slots"].notna().any():  # else no sample was answered, and there are no times
        print(_footnote(summary), file=stream)


def _with_texts(summary: pd.DataFrame) -> pd.DataFrame:
    # A column of empty texts comes back from CSV as not-a-number.
    return summary.assign(variant=summary["variant"].astype(object).fillna(""))


def _header(lines: pd.DataFrame) -> list[str]:
    incomplete = (lines["num_ok"] < lines["num_planned"]).any()
    counts = ["ok/planned"] if incomplete else []
    measures = ["KV kept MB", "KV peak MB", "TTFT s", "tok/s"]
    return ["policy", "budget", SCORE, *counts, *measures]


def _cell_texts(line: Any, header: list[str]) -> list[str]:
    """The texts of one summary line. `line` is a named tuple of itertuples, hence Any."""
    texts = {
        "policy": line.policy,
        "variant": line.variant,
        "budget": line.budget,
        SCORE: _score_text(line.score, line.score_low, line.score_high),
        "ok/planned": f"{line.num_ok}/{line.num_planned}",
        "KV kept MB": _number(line.kv_bytes_kept / 1e6, 1),
        "KV peak MB": _number(line.kv_bytes_peak / 1e6, 1),
        "TTFT s": _number(line.ttft_sec, 3),
        "tok/s": _number(line.decode_tokens_per_sec, 1),
    }
    return [texts[name] for name in header]


def _number(value: float, digits: int) -> str:
    return "-" if pd.isna(value) else f"{value:.{digits}f}"


def _score_text(mean: float, low: float, high: float) -> str:
    # Same width with and without the interval, so that the points stand below each other.
    interval = "" if pd.isna(low) else f"[{100 * low:.0f}, {100 * high:.0f}]"
    return "-" if pd.isna(mean) else f"{100 * mean:.1f} {interval:10}"


def markdown(summary: pd.DataFrame) -> str:
    """One GitHub table of one task and model: score and memory.

    Times are left out: among neighbours they depend on when those read and write.
    """
    summary = _with_texts(summary)
    variant = ["variant"] if summary["variant"].ne("").any() else []
    header = [name for name in _header(summary) if name not in ("TTFT s", "tok/s")]
    header[1:1] = variant
    rows = [header, ["---" if name in ("policy", "variant") else "---:" for name in header]]
    rows += [_cell_texts(line, header) for line in summary.itertuples(index=False)]
    return "".join(f"| {' | '.join(text.strip() for text in row)} |\n" for row in rows)


def _clip(text: str, width: int) -> str:
    """`text`, or its two ends around "..." when it is longer than `width`."""
    if len(text) <= width:
        return text
    tail = (width - 3) // 2
    return text[: width - 3 - tail] + "..." + text[len(text) - tail :]


def _plain_table(title: str, lines: pd.DataFrame) -> str:
    header = _header(lines)
    table = [header] + [_cell_texts(line, header) for line in lines.itertuples(index=False)]
    widths = [max(len(row[i]) for row in table) for i in range(len(header))]
    widths[0] = min(widths[0], MAX_COLUMNS - sum(widths[1:]) - 2 * (len(widths) - 1))
    texts = [_clip(title, MAX_COLUMNS)]
    for row in table:
        rest = [text.rjust(width) for text, width in zip(row[1:], widths[1:], strict=True)]
        texts.append("  ".join([_clip(row[0], widths[0]).ljust(widths[0]), *rest]).rstrip())
    texts.insert(2, "  ".join("-" * width for width in widths))
    return "\n".join(texts) + "\n"


def _print_rich(title: str, lines: pd.DataFrame, stream: TextIO) -> None:
    header = _header(lines)
    table = Table(title=Text(title, style="bold"), title_justify="left", box=box.SIMPLE_HEAD)
    table.show_edge, table.padding = False, (0, 1, 0, 0)
    for name in header:
        # Units go to a second header line, which lets the table fit 80 columns as well.
        label = re.sub(r"(?: (MB|s)$|(?<=/)(planned))", r"\n\1\2", name)
        if name == "policy":
            table.add_column(label, overflow="fold")
        else:
            table.add_column(label, justify="right", no_wrap=True)
    last_budget = None
    for line in lines.itertuples(index=False):
        if last_budget not in (None, line.budget):
            table.add_section()
        last_budget = line.budget
        # Text, not str: rich reads square brackets in a plain string as markup.
        table.add_row(*[Text(text) for text in _cell_texts(line, header)])
    console = Console(file=stream, highlight=False)
    # On a narrow screen the terminal may break lines; rich would leave whole columns out.
    console.width = max(console.width, MAX_COLUMNS)
    console.print(table)


def _footnote(summary: pd.DataFrame) -> str:
    few, many = int(summary["slots"].min()), int(summary["slots"].max())
    slots = f"{few} to {many}" if few < many else str(many)
    hidden = ((summary["num_ok"] > 0) & summary["score"].isna()).any()
    lines = ["No score where samples are missing: those left are another test."] if hidden else []
    if many == 1:
        lines += ["TTFT and tok/s: medians, as one sequence sees them alone (slots = 1)."]
    else:
        lines += [
            f"TTFT and tok/s: medians, as one sequence sees them among {slots} (slots).",
            "They depend on when the others read and write; slots=1 shows the policy's own.",
        ]
    return "\n".join(lines)


def write_csv(frame: pd.DataFrame, path: str | Path) -> Path:
    """Write `frame` without its index; `path` holds the old or the new file, never half of one."""
    with replacing(path) as temporary:
        frame.to_csv(temporary, index=False, lineterminator="\n", encoding="utf-8")
    return Path(path)


def storable(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows that Parquet and CSV can hold: one type per column, missing values in any.

    Lists and dictionaries become JSON text, and so does all else in a column of several types.
    """
    return rows.apply(_one_type)


def _one_type(column: pd.Series) -> pd.Series:
    if column.name == "budget":
        return column.astype(str)
    if column.isna().all():
        return column.astype("string")
    kind = pd.api.types.infer_dtype(column, skipna=True)
    if kind in ("boolean", "integer", "floating", "mixed-integer-float"):
        return column.convert_dtypes()
    if column.dtype == object:
        return column.map(_as_text, na_action="ignore").astype("string")
    return column


def _as_text(value: Any) -> str:  # Any: a JSON value
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    # JSON can spell half a surrogate pair, which no file can hold.
    return text.encode("utf-8", "replace").decode()
