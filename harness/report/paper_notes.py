"""What the tables for papers say around themselves: captions, marks, intervals, tests in words."""

from collections.abc import Iterator, Sequence

import pandas as pd

from kvarena.harness.analysis.comparison import CONTEST, is_full_cache
from kvarena.harness.analysis.sign_flips import LEAST_DOCUMENTS, SIGNIFICANCE
from kvarena.harness.budget import parse_budget
from kvarena.harness.report import text_tables
from kvarena.harness.report.paper_markup import (
    AT_LEAST,
    DIFFERS,
    REFERENCE,
    TIE,
    UNBOUND,
    StyledText,
)

_NO_INTERVALS = (
    "No intervals: a part has one document only, which says nothing of how its scores spread."
)


def caption(what: str, cells: pd.DataFrame, rows: pd.DataFrame, budgets: Sequence[str]) -> str:
    """One sentence for readers who do not know kvarena.

    what: a form that takes the measure's name; cells: compare_cells' lines of ``rows``, of one
    task, model and variant
    """
    is_forced = "kl_mean" in rows and rows["kl_mean"].notna().any()
    measure = "token agreement with the full cache" if is_forced else "score"
    task, model, variant = (str(label) for label in cells.iloc[0][CONTEST])
    settings = f" ({variant})" if variant else ""
    about = f"the task {task} with the model {model}{settings}, {_under(budgets)}"
    return f"{what.format(measure)} {about}."


def _under(budgets: Sequence[str]) -> str:
    """Budgets of any kind in words."""
    kinds: dict[str, list[str]] = {}
    for label in budgets:
        budget = parse_budget(label)
        if budget.is_full:
            continue
        unit = " tokens per layer and KV head" if budget.tokens else " of the prompt's tokens"
        kinds.setdefault("" if budget.bytes else unit, []).append(label)
    if not kinds:
        return "without a budget"
    texts = [_listed(labels) + unit for unit, labels in kinds.items()]
    thousands = " (k = 1024)" if any(label.endswith("k") for label in budgets) else ""
    return f"at a cache budget of {' or '.join(texts)}{thousands}"


def _listed(texts: Sequence[str]) -> str:
    return " or ".join(filter(None, [", ".join(texts[:-1]), texts[-1]]))


def intervals(cells: pd.DataFrame) -> str:
    """How the intervals of scores are made; cells: compare_cells' lines."""
    if cells["score_low"].isna().all() and cells["score"].notna().any():
        return _NO_INTERVALS
    return (
        "In brackets: 95 % confidence intervals (Wilson's, with Student's t and the sample size "
        "that has the standard error over documents)."
    )


def marks(texts: Sequence[StyledText], per: str) -> Iterator[str]:
    """What bold and the marks mean that are there; per: budget or part."""
    shown = "".join(one.text for one in texts)
    if any(one.bold for one in texts):
        yield f"Bold: best of the policies that hold less than the full cache, per {per}."
    if TIE in shown:
        yield (
            f"{TIE} not significantly below the best (p {AT_LEAST} {SIGNIFICANCE}; paired "
            "sign-flip test over documents, not corrected for several tests)."
        )
    if UNBOUND in shown:
        yield f"{UNBOUND} nothing was evicted: the budget never bound."
    if REFERENCE in shown:
        yield f"{REFERENCE} {text_tables.REFERENCE}: it competes for nothing."


def difference(cells: pd.DataFrame) -> str:
    """How differences to the full cache are compared; cells: compare_cells' lines."""
    num_pairs = cells.loc[cells["num_pairs"] > 0, "num_pairs"]
    note = (
        f"Over the {counted(num_pairs, 'sample')} that both have. In brackets: 95 % confidence "
        "intervals (the differences that a paired sign-flip test over documents does not reject, "
        "wider where few documents differ; not corrected for several tests). "
        f"{DIFFERS} differs from the full cache (p < {SIGNIFICANCE}; the same test, Holm's "
        "correction over the policies at a budget)."
    )
    detectable = 100 * cells["detectable"].dropna()
    power = f" Detectable with 80 % power: {span(detectable)} points." if len(detectable) else ""
    return note + power


def too_few(cells: pd.DataFrame) -> Iterator[str]:
    """Warns of cells with so few documents that no test can tell them apart.

    cells: compare_cells' lines.
    """
    numbers = cells.loc[cells["num_documents"].between(1, LEAST_DOCUMENTS - 1), "num_documents"]
    if len(numbers):
        yield (
            f"{counted(numbers, 'document')}: no difference can be significant; at least "
            f"{LEAST_DOCUMENTS} are needed."
        )


def partly_evicted(cells: pd.DataFrame) -> Iterator[str]:
    """Names cells in which the budget bound for some samples only; cells: compare_cells' lines."""
    evicting = cells[~cells["policy"].map(keeps_all)]
    some = evicting["num_compressed"].between(1, evicting["num_ok"] - 1)
    for (budget, few), own in evicting[some].groupby(["budget", "num_compressed"], sort=False):
        is_everyone = len(own) == (evicting["budget"] == budget).sum()
        who = "" if is_everyone else f" by {', '.join(own['policy'])}"
        samples = counted(own["num_ok"], "sample")
        yield f"At {budget}, something was evicted{who} in {few:.0f} of {samples}."


def keeps_all(policy: str) -> bool:
    """Whether a policy's label names one that evicts nothing, with a codec or without."""
    return is_full_cache(policy.partition("+")[0])


def counted(numbers: pd.Series, noun: str) -> str:
    """How many, from the least to the largest, with the noun in the right number."""
    return f"{span(numbers)} {noun}{'' if numbers.max() == 1 else 's'}"


def span(values: pd.Series) -> str:
    """The least and the largest, or the one value that all are."""
    few, many = f"{values.min():.0f}", f"{values.max():.0f}"
    return few if few == many else f"{few} to {many}"
