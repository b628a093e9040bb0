"""What was measured as a tidy CSV and as short Markdown tables."""

import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import transformers

from kvarena.harness import openmp
from kvarena.harness.bench.phases import PHASES
from kvarena.harness.bench.subjects import Subject
from kvarena.harness.files import replacing
from kvarena.harness.provenance import commit_label, now

# By the end of a metric's name, the longest first.
_UNITS = {
    "_tokens_per_sec": "tokens/s",
    "_flops_per_sec": "flop/s",
    "_bytes_per_sec": "bytes/s",
    "flops_per_sec": "flop/s",
    "bytes_per_sec": "bytes/s",
    "_per_min": "1/min",
    "_bytes": "bytes",
    "_passes": "passes",
    "_ratio": "1",
    "_mean": "slots",
    "_sec": "s",
}


def unit(metric: str) -> str:
    """Of a metric, by the end of its name."""
    return next(unit for end, unit in _UNITS.items() if metric.endswith(end))


def machine_columns(subject: Subject) -> dict[str, str | int]:
    """What every line of the CSV says of the machine and the software."""
    return {
        "model": subject.name,
        "dtype": subject.dtype,
        "device": subject.device.type,
        "processor": _processor(subject.device),
        "threads": torch.get_num_threads(),
        "thread_waiting": openmp.waiting(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit_label(),
        "date": now(),
    }


def write_tables(
    summary: pd.DataFrame, held: pd.DataFrame, columns: Mapping[str, str | int], stem: Path
) -> str:
    """``stem``.csv, -targets.csv and .md; returns the Markdown."""
    place = list(summary.columns).index("metric") + 1
    tidy = summary.copy()
    tidy.insert(place, "unit", tidy["metric"].map(unit))
    counts = [name for name in tidy.columns if name.endswith("_tokens") or name == "slots"]
    tidy = tidy.astype(dict.fromkeys(counts, "Int64")).assign(**columns)
    text = markdown(summary, held, columns)
    with replacing(stem.with_suffix(".csv")) as path:
        tidy.to_csv(path, index=False, float_format="%.6g")
    with replacing(stem.with_name(f"{stem.name}-targets.csv")) as path:
        held.assign(**columns).to_csv(path, index=False, float_format="%.6g")
    with replacing(stem.with_suffix(".md")) as path:
        path.write_text(text)
    return text


def markdown(summary: pd.DataFrame, held: pd.DataFrame, columns: Mapping[str, str | int]) -> str:
    """Medians by section; quartiles stand in the CSV and behind the figures of the targets."""
    about = ", ".join(f"{name} {value}" for name, value in columns.items() if value != "")
    parts = [f"# Bench\n\n{about}\n"]
    titles = {
        ("prefill", "prefill_tokens_per_sec"): "Prefill, tokens/s by prompt length",
        ("prefill", "ttft_sec"): "Time to first token, s, by prompt length",
        ("prefill", "peak_extra_bytes"): "Peak memory beside the model, MB, by prompt length",
        ("decode", "decode_tokens_per_sec"): "Decode, tokens/s by slots and cache",
        ("policies", "ttft_sec"): "All policies: time to first token, s",
        ("policies", "pass_sec"): "All policies: decode step, s, by slots and cache",
        ("job", "samples_per_min"): "Jobs, samples per minute",
        ("dtypes", "pass_sec"): "Data types: a pass, s, by slots and cache",
        ("dtypes", "samples_per_min"): "Data types: samples per minute",
        (
            "neighbour",
            "decode_tokens_per_sec",
        ): "Beside other work: decode, tokens/s of all workers",
        (
            "neighbour",
            "prefill_tokens_per_sec",
        ): "Beside other work: prefill, tokens/s of all workers",
        ("end_to_end", "end_to_end_sec"): "Prompt and answer, s",
    }
    for (section, metric), title in titles.items():
        lines = summary[(summary["section"] == section) & (summary["metric"] == metric)]
        if metric.endswith("_bytes"):
            lines = lines.assign(median=lines["median"] / 1e6)
        if not lines.empty:
            parts.append(f"## {title}\n\n{_table(_across(lines))}")
    parts += [_phases(summary), _roofline(summary)]
    if not held.empty:
        texts = held.assign(
            median=[
                f"{line.median:.3g} [{line.q1:.3g}, {line.q3:.3g}]"
                for line in held.itertuples(index=False)
            ]
        ).drop(columns=["q1", "q3"])
        parts.append(f"## Targets\n\nMedian over rounds [quartiles].\n\n{_table(texts)}")
    return "\n".join(part for part in parts if part)


def _across(lines: pd.DataFrame) -> pd.DataFrame:
    """One row per system and policy, one column per size."""
    if lines["beside"].notna().all():
        sizes = "beside " + lines["beside"]
    elif lines["prompt_tokens"].notna().all():
        lines = lines.sort_values("prompt_tokens", kind="stable")
        sizes = lines["prompt_tokens"].astype(int).map("{} tokens".format)
    elif lines["cache_tokens"].notna().all():
        slots = lines["slots"].astype(int).astype(str)
        sizes = slots + " x " + lines["cache_tokens"].astype(int).astype(str)
    else:  # jobs, each of which has a budget of its own
        sizes = lines["what"].str.replace("_", " ")
        lines = lines.assign(budget_tokens=None)
    settings = ("attention", "budget_tokens", "chunk_tokens", "evict_every", "waiting")
    rows = ["system", "policy", *(name for name in settings if lines[name].nunique() > 1)]
    keyed = lines.assign(size=sizes)
    for name in rows:
        keyed[name] = keyed[name].map(lambda value: "" if pd.isna(value) else _text(value))
    wide = keyed.pivot_table(index=rows, columns="size", values="median", sort=False)
    return wide.reset_index()


def _phases(summary: pd.DataFrame) -> str:
    """Percent of a pass by phase."""
    lines = summary[summary["section"] == "phases"]
    if lines.empty:
        return ""
    names = {f"{phase}_sec": phase for phase in PHASES}
    wide = lines.pivot_table(
        index=["what", "slots", "policy"], columns="metric", values="median", sort=False
    )
    shares = wide[list(names)].rename(columns=names)
    shares = 100 * shares.div(shares.sum(axis=1), axis=0)
    shares["pass s"] = wide["pass_sec"]
    shares["clocks %"] = 100 * wide["clock_overhead_ratio"]
    return f"## Split of a pass, percent\n\n{_table(shares.reset_index())}"


def _roofline(summary: pd.DataFrame) -> str:
    lines = summary[summary["section"] == "roofline"]
    if lines.empty:
        return ""
    rates = lines[lines["system"] == "machine"].set_index("metric")["median"]
    wide = lines[lines["system"] != "machine"].pivot_table(
        index=["what", "policy", "slots", "cache_tokens", "chunk_tokens"],
        columns="metric",
        values="median",
        sort=False,
        dropna=False,
    )
    wide = wide.dropna(how="all")[["pass_sec", "of_matmul_rate_ratio", "of_bandwidth_ratio"]]
    limits = (
        f"The machine: {rates['matmul_flops_per_sec'] / 1e9:.3g} Gflop/s in matrix products, "
        f"{rates['memory_bytes_per_sec'] / 1e9:.3g} GB/s of memory."
    )
    return f"## Roofline\n\n{limits}\n\n{_table(wide.reset_index())}"


def _table(frame: pd.DataFrame) -> str:
    """GitHub's Markdown; numbers to three digits."""
    rows = [[str(name) for name in frame.columns], ["---"] * len(frame.columns)]
    rows += [[_text(value) for value in line] for line in frame.itertuples(index=False)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _text(value: Any) -> str:  # Any: a cell of a frame
    if isinstance(value, str):
        return value
    if pd.isna(value):
        return ""
    number = float(value)
    return f"{number:.0f}" if abs(number) >= 100 or number == int(number) else f"{number:.3g}"


def _processor(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()
