"""What a cell would take, worked out from configuration and tokenizer: the model never loads."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from kvarena.harness import models
from kvarena.harness.cell import Cell
from kvarena.harness.errors import UsageError
from kvarena.harness.kv_bytes import bytes_per_token
from kvarena.harness.results import CellFolder, find_cells, read_lines


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One cell before it runs. Tokens are those of the samples still to do, prompt and answer.

    kv_bytes_full, kv_bytes_budget: keys, values and positions of the longest sample under the full
    cache and under the budget with a chunk in work; for one sequence, without a policy's own state.
    eta_sec: by the rate of earlier rows here; None if there are none.
    """

    path: Path
    label: str
    state: str  # missing | incomplete | done
    num_samples: int
    num_done: int
    num_tokens: int
    kv_bytes_full: int
    kv_bytes_budget: int
    eta_sec: float | None


def plan_cell(cell: Cell, results_dir: Path, *, fork: bool = False) -> Plan:
    """Raises UsageError for whatever would stop the run before its model loads.

    Also notes how many samples were planned, so that ``make status`` can tell what is missing.
    """
    folder = CellFolder(results_dir, cell.identity, cell.shard)
    all_samples = cell.samples(models.load_tokenizer(cell.model))
    samples = cell.part(all_samples)
    rows = read_lines(folder.path)
    done = {row["sample_id"] for row in rows if row.get("status") == "ok"}
    left = [sample for sample in samples if sample.id not in done]
    if not fork and not (folder.path / "manifest.json").exists():
        folder.refuse_drift()
    folder.note_plan(len(all_samples))
    longest = [len(s.prompt_token_ids) + s.max_new_tokens for s in samples]
    bounds = [cell.budget_tokens(sample) for sample in samples]
    held = [
        total if bound is None else min(total, bound + cell.chunk_tokens)
        for total, bound in zip(longest, bounds, strict=True)
    ]
    per_token = bytes_per_token(models.load_config(cell.model), cell.torch_dtype.itemsize)
    num_tokens = sum(len(s.prompt_token_ids) + s.max_new_tokens for s in left)
    rate = _tokens_per_sec(results_dir, cell)
    return Plan(
        path=folder.path,
        label=cell.label,
        state="done" if not left else "incomplete" if rows else "missing",
        num_samples=len(samples),
        num_done=len(samples) - len(left),
        num_tokens=num_tokens,
        kv_bytes_full=per_token * max(longest, default=0),
        kv_bytes_budget=cell.bound.bytes or per_token * max(held, default=0),
        eta_sec=num_tokens / rate if rate else None,
    )


def _tokens_per_sec(results_dir: Path, cell: Cell) -> float | None:
    """Tokens per second over all slots in earlier rows of this model and policy; None without."""
    num_tokens, busy_sec = 0, 0.0
    for path in find_cells(results_dir):
        if path.parent.name != cell.model.name:
            continue
        try:
            rows = read_lines(path)
        except UsageError:  # a damaged cell is no reason not to plan another
            continue
        for row in rows:
            if row.get("status") != "ok" or row["policy"] != cell.method_label():
                continue
            num_tokens += row["prompt_tokens"] + row["generated_tokens"]
            rate = row["decode_tokens_per_sec"]
            decode_sec = (row["generated_tokens"] - 1) / rate if rate else 0.0
            busy_sec += (row["ttft_sec"] + decode_sec) / row["slots"]
    return num_tokens / busy_sec if busy_sec else None


def print_plans(plans: Sequence[Plan]) -> None:
    """One line per cell, then the sums (of memory the largest, of the minutes if all are known)."""
    # full is one cell at any budget
    plans = list({(plan.path, plan.label): plan for plan in plans}.values())
    table = Table(box=SIMPLE_HEAD)
    table.add_column("cell", overflow="fold")
    headings = ("state", "samples", "tokens\nleft", "KV MB\nfull", "KV MB\nbudget", "minutes\nleft")
    for name in headings:
        table.add_column(name, justify="right")
    for plan in plans:
        table.add_row(
            plan.label,
            plan.state,
            f"{plan.num_done}/{plan.num_samples}",
            f"{plan.num_tokens:,}",
            f"{plan.kv_bytes_full / 1e6:.1f}",
            f"{plan.kv_bytes_budget / 1e6:.1f}",
            "?" if plan.eta_sec is None else f"{plan.eta_sec / 60:.1f}",
        )
    etas = [plan.eta_sec for plan in plans]
    known = [eta for eta in etas if eta is not None]
    table.add_section()
    table.add_row(
        f"all {len(plans)} cells",
        "",
        f"{sum(plan.num_done for plan in plans)}/{sum(plan.num_samples for plan in plans)}",
        f"{sum(plan.num_tokens for plan in plans):,}",
        f"{max(plan.kv_bytes_full for plan in plans) / 1e6:.1f}",
        f"{max(plan.kv_bytes_budget for plan in plans) / 1e6:.1f}",
        "?" if len(known) < len(etas) else f"{sum(known) / 60:.1f}",
    )
    console = Console(highlight=False)
    console.width = max(console.width, 100)
    console.print(table)
