"""What the tables for papers say below themselves: marks, intervals and tests in words."""

import pandas as pd

from kvarena.harness.sign_flips import LEAST_DOCUMENTS, SIGNIFICANCE

TIE, DIFFERS, AT_LEAST = "\N{DAGGER}", "*", "\N{GREATER-THAN OR EQUAL TO}"
_NO_INTERVALS = (
    "No intervals: a part has one document only, which says nothing of how its scores spread."
)


def intervals(cells: pd.DataFrame) -> str:
    """How the intervals of scores are made; cells: compare_cells' lines."""
    if cells["score_low"].isna().all() and cells["score"].notna().any():
        return _NO_INTERVALS
    return (
        "In brackets: 95 % confidence intervals (Wilson's, with Student's t and the sample size "
        "that has the standard error over documents)."
    )


def bold(what: str) -> str:
    """What bold and the dagger mean; what: budget or part."""
    return (
        f"Bold: best policy that evicts, per {what}. {TIE} not significantly below it (p "
        f"{AT_LEAST} {SIGNIFICANCE}; paired sign-flip test over documents, not corrected for "
        "several tests)."
    )


def difference(cells: pd.DataFrame) -> str:
    """How differences to the full cache are compared; cells: compare_cells' lines."""
    num_pairs = span(cells.loc[cells["num_pairs"] > 0, "num_pairs"])
    note = (
        f"Over the {num_pairs} samples that both have. In brackets: 95 % confidence intervals (the "
        "differences that a paired sign-flip test over documents does not reject, wider where few "
        f"documents differ; not corrected for several tests). {DIFFERS} differs from the full "
        f"cache (p < {SIGNIFICANCE}; the same test, Holm's correction over the policies at a "
        "budget)."
    )
    detectable = 100 * cells["detectable"].dropna()
    power = f" Detectable with 80 % power: {span(detectable)} points." if len(detectable) else ""
    return note + power


def too_few(cells: pd.DataFrame) -> str:
    """Warns of cells with so few documents that no test can tell them apart; "" if there are none.

    cells: compare_cells' lines.
    """
    numbers = cells.loc[cells["num_documents"].between(1, LEAST_DOCUMENTS - 1), "num_documents"]
    if numbers.empty:
        return ""
    documents = f"{span(numbers)} document{'' if numbers.max() == 1 else 's'}"
    return f"{documents}: no difference can be significant; at least {LEAST_DOCUMENTS} are needed."


def span(values: pd.Series) -> str:
    """The least and the largest, or the one value that all are."""
    few, many = f"{values.min():.0f}", f"{values.max():.0f}"
    return few if few == many else f"{few} to {many}"
