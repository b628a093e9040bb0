"""Plans as a table on a screen: what a command would take, cell by cell and in all."""

from collections.abc import Sequence

from kvarena.harness.cells.plan import Plan
from kvarena.harness.report.listing import ListedCell, print_cells

_PLACE = ("task", "model", "budget")


def print_plans(plans: Sequence[Plan]) -> None:
    """One line per cell, then the sums (of memory the largest, of the minutes if all are known)."""
    # full is one cell at any budget
    plans = list({(plan.path, plan.shard): plan for plan in plans}.values())
    listed = [
        ListedCell(
            path=plan.path,
            identity=plan.identity,
            note=f"shard {plan.shard}" if plan.shard else "",
            texts=(
                plan.state,
                f"{plan.num_done}/{plan.num_samples}",
                f"{plan.num_tokens:,}",
                f"{plan.kv_bytes_full / 1e6:.1f}",
                f"{plan.kv_bytes_budget / 1e6:.1f}",
                _binds(plan),
                _minutes([plan]),
            ),
        )
        for plan in plans
    ]
    headings = ("state", "samples", "tokens\nleft", "KV MB\nfull", "KV MB\nbudget", "binds")
    print_cells(listed, (*headings, "minutes\nleft"))
    num_done = sum(plan.num_done for plan in plans)
    num_samples = sum(plan.num_samples for plan in plans)
    num_tokens = sum(plan.num_tokens for plan in plans)
    largest = [max(p.kv_bytes_full for p in plans), max(p.kv_bytes_budget for p in plans)]
    full, budget = (f"{num_bytes / 1e6:.1f}" for num_bytes in largest)
    print(f"all {len(plans)} cells: {num_done}/{num_samples} samples, {num_tokens:,} tokens left")
    print(f"minutes left: {_minutes(plans)}; largest KV MB: {full} full, {budget} budget")
    for note in _notes(plans):
        print(note)


def _binds(plan: Plan) -> str:
    if not plan.evicts:
        return "-"
    return f"{'?' if plan.num_binding is None else plan.num_binding}/{plan.num_samples}"


def _minutes(plans: Sequence[Plan]) -> str:
    """Of all of them; "?" unless all are known."""
    etas = [plan.eta_sec for plan in plans]
    known = [eta for eta in etas if eta is not None]
    return "?" if len(known) < len(etas) else f"{sum(known) / 60:.1f}"


def _notes(plans: Sequence[Plan]) -> list[str]:
    """What the figures leave open, a line each."""
    notes = ["binds: samples whose prompt and longest answer do not fit the budget"]
    for plan in plans:
        if plan.never_binds:
            task, model, budget = (plan.identity[kind]["name"] for kind in _PLACE)
            notes.append(
                f"{task}, {model}: at {budget} nothing would be evicted: the longest prompt and "
                f"answer take {plan.longest_tokens:,} tokens"
            )
    if any(plan.num_binding is None for plan in plans):
        notes.append("?: how many tokens a budget in bytes comes to is measured when the cell runs")
    if any(plan.identity["codec"]["name"] != "none" for plan in plans):
        notes.append("KV MB leave codecs out; what is coded takes less, see a row's bits_per_value")
    notes += [f"not noted for make status: {plan.not_noted}" for plan in plans if plan.not_noted]
    return list(dict.fromkeys(notes))
