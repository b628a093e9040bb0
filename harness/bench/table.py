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
    """``stem``.csv, -targets.csv and .md; returns the Markdown.

    Lines of the same sections that are there already go, those of other ones stay: a section can be
    measured anew alone, since only figures of one section are ever compared.
    """
    place = list(summary.columns).index("metric") + 1
    tidy = summary.copy()
    tidy.insert(place, "unit", tidy["metric"].map(unit))
    paths = {stem.with_suffix(".csv"): tidy, stem.with_name(f"{stem.name}-targets.csv"): held}
    tables = [_beside(path, own.assign(**columns)) for path, own in paths.items()]
    counts = [name for name in tidy.columns if name.endswith("_tokens")]
    counts += ["slots", "evict_every"]
    tables[0] = tables[0].astype(dict.fromkeys(counts, "Int64"))
    text = markdown(*tables)
    for path, table in zip(paths, tables, strict=True):
        with replacing(path) as new:
            table.to_csv(new, index=False, float_format="%.6g")
    with replacing(stem.with_suffix(".md")) as path:
        path.write_text(text)
    return text


def _beside(path: Path, new: pd.DataFrame) -> pd.DataFrame:
    """What the file holds, with the lines of each section in ``new`` in the place of its own."""
    old = pd.read_csv(path) if path.exists() else new.iloc[:0]
    sections = dict.fromkeys([*old["section"], *new["section"]])
    measured = set(new["section"])
    parts = [
        own[own["section"] == name]
        for name in sections
        for own in (new if name in measured else old,)
    ]
    # Empty columns would else decide the type of what is put below them.
    filled = [part.dropna(axis=1, how="all") for part in parts]
    return pd.concat(filled, ignore_index=True).reindex(columns=new.columns)


def markdown(tidy: pd.DataFrame, held: pd.DataFrame) -> str:
    """Medians by section; quartiles stand in the CSV and behind the figures of the targets."""
    parts = [f"# Bench\n\n{_machines(tidy)}"]
    titles = {
        ("prefill", "prefill_tokens_per_sec"): "Prefill, tokens/s by prompt length",
        ("prefill", "ttft_sec"): "Time to first token, s, by prompt length",
        ("prefill", "peak_extra_bytes"): "Peak memory beside the model, MB, by prompt length",
        ("decode", "decode_tokens_per_sec"): "Decode, tokens/s by slots and cache",
        ("policies", "ttft_sec"): "Policies: time to first token, s",
        ("policies", "pass_sec"): "Policies: decode step, s, by slots and cache",
        ("codecs", "sample_cpu_sec"): "Codecs: CPU time of a sample, s, by slots",
        ("codecs", "sample_sec"): "Codecs: time of a sample, s, by slots",
        ("job", "samples_per_min"): "Jobs, samples per minute",
        ("dtypes", "pass_sec"): "Data types: a pass, s, by slots and cache",
        ("dtypes", "samples_per_min"): "Data types: samples per minute",
        ("neighbour", "decode_tokens_per_sec"): "Beside other work: decode, tokens/s",
        ("neighbour", "prefill_tokens_per_sec"): "Beside other work: prefill, tokens/s",
        ("length", "ttft_sec"): "Time to first token, s, by prompt length",
        ("length", "peak_extra_bytes"): "Peak memory beside the model, MB, by prompt length",
        ("length", "pass_sec"): "Decoding step after such a prompt, s",
        ("cache", "pass_sec"): "Decoding step, s, by slots and cache",
        ("slots", "decode_tokens_per_sec"): "Decode, tokens/s by slots and cache",
        ("end_to_end", "end_to_end_sec"): "Prompt and answer, s",
    }
    for (section, metric), title in titles.items():
        lines = tidy[(tidy["section"] == section) & (tidy["metric"] == metric)]
        if metric.endswith("_bytes"):
            lines = lines.assign(median=lines["median"] / 1e6)
        if not lines.empty:
            parts.append(f"## {title}\n\n{_table(_across(lines))}")
    parts += [_phases(tidy), _roofline(tidy)]
    if not held.empty:
        texts = held.assign(
            median=[
                f"{line.median:.3g} [{line.q1:.3g}, {line.q3:.3g}]"
                for line in held.itertuples(index=False)
            ]
        )[["figure", "median", "bound", "met"]]
        parts.append(f"## Targets\n\nMedian over rounds [quartiles].\n\n{_table(texts)}")
    return "\n".join(part for part in parts if part)


def _machines(tidy: pd.DataFrame) -> str:
    """Where, with what and when each section was measured; those of one run share a line."""
    names = list(tidy.columns[list(tidy.columns).index("rounds") + 1 :])
    about = tidy.drop_duplicates("section")[["section", *names]]
    about = about.astype(object).where(about.notna(), "").astype(str)
    together = about.groupby([name for name in names if name != "date"], sort=False)
    lines = []
    for _, own in together:
        first = own.iloc[0]
        text = ", ".join(f"{name} {first[name]}" for name in names if first[name])
        lines.append(f"- {', '.join(own['section'])}: {text}\n")
    return "".join(lines)


def _across(lines: pd.DataFrame) -> pd.DataFrame:
    """One row per system and policy, one column per size."""
    if lines["beside"].notna().all():
        sizes = "beside " + lines["beside"]
    elif lines["codec"].notna().all():
        sizes = lines["slots"].astype(int).map("{} slots".format).replace("1 slots", "1 slot")
    elif lines["prompt_tokens"].notna().all():
        lines = lines.sort_values("prompt_tokens", kind="stable")
        sizes = lines["prompt_tokens"].astype(int).map("{} tokens".format)
    elif lines["cache_tokens"].notna().all():
        slots = lines["slots"].astype(int).astype(str)
        sizes = slots + " x " + lines["cache_tokens"].astype(int).astype(str)
    else:  # jobs, each of which has a budget of its own
        sizes = lines["what"].str.replace("_", " ")
        lines = lines.assign(budget_tokens=None, what="")
    settings = ["what", "codec", "attention", "budget_tokens", "chunk_tokens", "evict_every"]
    settings.append("waiting")
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
