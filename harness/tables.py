"""Tidy rows in, tables out: one summary line per task, model, policy and budget.

A row is one sample; results/README.md lists the columns. Scores, bytes and times are summarised
over the same rows: those with status "ok". A failed row is counted in num_samples only.
"""

import re
import sys
import warnings
from pathlib import Path
from typing import Any, TextIO

import pandas as pd
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from kvarena.harness.budget import parse_budget
from kvarena.harness.errors import UsageError
from kvarena.harness.files import replacing

CELL = ["task", "model", "policy", "budget"]
MEASURES = ["score", "kv_bytes_kept", "kv_bytes_peak", "ttft_sec", "decode_tokens_per_sec"]
MAX_COLUMNS = 100


def require_columns(rows: pd.DataFrame, columns: list[str]) -> None:
    """Raises UsageError when there are no rows or a column is missing; names what is missing."""
    missing = [name for name in columns if name not in rows.columns]
    if missing:
        raise UsageError(f"rows lack the columns {', '.join(missing)} (see results/README.md)")
    if rows.empty:
        raise UsageError("no rows to summarise; run something first")


def summarise(rows: pd.DataFrame) -> pd.DataFrame:
    """One line per (task, model, policy, budget), small budgets first, best score first.

    score_mean (0-1), its standard error score_se (NaN below two scores), the medians of
    kv_bytes_kept, ttft_sec and decode_tokens_per_sec, and the largest kv_bytes_peak are taken over
    rows with status "ok". num_samples counts all rows, num_ok the good ones, slots is the largest.
    """
    require_columns(rows, [*CELL, "sample_id", "seed", "status", "slots", *MEASURES])
    _warn_of_repeats(rows)
    ok = rows["status"] == "ok"
    measures = rows[MEASURES].apply(pd.to_numeric).where(ok)
    labels = rows[CELL].astype(str)
    cells = pd.concat([labels, measures, ok.rename("ok"), rows["slots"]], axis=1)
    summary = cells.groupby(CELL, sort=False).agg(
        num_samples=("ok", "size"),
        num_ok=("ok", "sum"),
        score_mean=("score", "mean"),
        score_se=("score", "sem"),
        kv_bytes_kept=("kv_bytes_kept", "median"),
        kv_bytes_peak=("kv_bytes_peak", "max"),
        ttft_sec=("ttft_sec", "median"),
        decode_tokens_per_sec=("decode_tokens_per_sec", "median"),
        slots=("slots", "max"),
    )
    return _ordered(summary.reset_index())


def _ordered(summary: pd.DataFrame) -> pd.DataFrame:
    ascending = sorted(summary["budget"].unique(), key=lambda label: parse_budget(label).sort_key)
    rank = summary["budget"].map({label: place for place, label in enumerate(ascending)})
    by = ["task", "model", "rank", "score_mean", "policy"]
    ranked = summary.assign(rank=rank).sort_values(by, ascending=[True, True, True, False, True])
    return ranked.drop(columns="rank").reset_index(drop=True)


def _warn_of_repeats(rows: pd.DataFrame) -> None:
    # Two runs of one cell under different settings would otherwise be averaged without a word,
    # and the repeated samples would make the standard error too small.
    repeats = rows[rows.duplicated([*CELL, "sample_id", "seed"])]
    if len(repeats):
        cells = repeats[["policy", "budget"]].astype(str).agg(" ".join, axis=1).unique()
        warnings.warn(
            f"{len(repeats)} rows repeat a sample of the same cell ({', '.join(cells[:5])}); "
            "they are averaged together, select one run_id per cell if that is not meant",
            stacklevel=3,
        )


def print_summary(summary: pd.DataFrame, stream: TextIO | None = None) -> None:
    """Print one table per (task, model): rich on a terminal, plain text elsewhere.

    Plain lines are at most 100 columns wide and carry no escape codes.
    """
    stream = stream or sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    if summary.empty:
        print("no results", file=stream)
        return
    for (task, model), lines in summary.groupby(["task", "model"], sort=False):
        title = f"{task}, {model}"
        if stream.isatty() and encoding.lower().startswith("utf"):
            _print_rich(title, lines, stream)
        else:
            # An ASCII-only stream has no plus-minus sign, which must not end a finished run.
            text = _plain_table(title, lines).encode(encoding, "replace").decode(encoding)
            print(text, file=stream)
    print(_footnote(summary), file=stream)


def _header(lines: pd.DataFrame) -> list[str]:
    failed = (lines["num_ok"] < lines["num_samples"]).any()
    counts = ["ok/n"] if failed else []
    measures = ["KV kept MB", "KV peak MB", "TTFT s", "tok/s"]
    return ["policy", "budget", "score % ± se", *counts, *measures]


def _cell_texts(line: Any, header: list[str]) -> list[str]:
    """The texts of one summary line. `line` is a named tuple of itertuples, hence Any."""
    texts = {
        "policy": line.policy,
        "budget": line.budget,
        "score % ± se": _score_text(line.score_mean, line.score_se),
        "ok/n": f"{line.num_ok}/{line.num_samples}",
        "KV kept MB": _number(line.kv_bytes_kept / 1e6, 1),
        "KV peak MB": _number(line.kv_bytes_peak / 1e6, 1),
        "TTFT s": _number(line.ttft_sec, 3),
        "tok/s": _number(line.decode_tokens_per_sec, 1),
    }
    return [texts[name] for name in header]


def _number(value: float, digits: int) -> str:
    return "-" if pd.isna(value) else f"{value:.{digits}f}"


def _score_text(mean: float, error: float) -> str:
    # Same width with and without the error, so that the points stand below each other.
    tail = "" if pd.isna(error) else f"± {100 * error:4.1f}"
    return "-" if pd.isna(mean) else f"{100 * mean:.1f} {tail:6}"


def markdown(summary: pd.DataFrame) -> str:
    """One GitHub table of one task and model: score and memory.

    Times are left out: among neighbours they depend on when those read and write.
    """
    header = [name for name in _header(summary) if name not in ("TTFT s", "tok/s")]
    rows = [header, ["---", *["---:"] * (len(header) - 1)]]
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
        label = re.sub(r" (MB|s)$", r"\n\1", name)
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
    if many == 1:
        return "TTFT and tok/s: medians, as one sequence sees them alone (slots = 1)."
    slots = f"{few} to {many}" if few < many else str(many)
    return (
        f"TTFT and tok/s: medians, as one sequence sees them among {slots} (slots).\n"
        "They depend on when the others read and write; slots=1 shows the policy's own."
    )


def write_csv(frame: pd.DataFrame, path: str | Path) -> Path:
    """Write `frame` without its index; `path` holds the old or the new file, never half of one."""
    with replacing(path) as temporary:
        frame.to_csv(temporary, index=False, lineterminator="\n", encoding="utf-8")
    return Path(path)
