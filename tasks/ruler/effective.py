"""RULER's effective length: up to where a model is as good as another one is on short prompts."""

import pandas as pd

EFFECTIVE_PERCENT = 85.6  # Llama-2-7B at 4k tokens: the paper's bar for a length in real use


def effective_length(rows: pd.DataFrame) -> pd.DataFrame:
    """One line for each model, policy and budget of RULER ``rows``, as stored in results.

    effective_length: the longest length whose mean score is over 85.6 percent, 0 if none is; the
    mean is over the samples of a task, then over the tasks that the length has. mean_percent: those
    means by length; num_tasks: how many tasks every length has, 13 for a complete RULER. Rows with
    a status other than "ok" are left out.
    """
    rows = rows[(rows["task"] == "ruler") & (rows["status"] == "ok")]
    cell = ["model", "policy", "budget"]
    place = [*cell, "meta_length_target"]
    by_task = rows.groupby([*place, "meta_ruler_task"], as_index=False)["score"].mean()
    by_length = by_task.groupby(place, as_index=False).agg(
        mean=("score", "mean"), num_tasks=("score", "size")
    )
    lines = []
    for names, part in by_length.groupby(cell):
        percents = dict(zip(part["meta_length_target"], 100 * part["mean"], strict=True))
        good = [length for length, percent in percents.items() if percent > EFFECTIVE_PERCENT]
        lines.append(
            dict(zip(cell, names, strict=True))
            | {"effective_length": max(good, default=0), "num_tasks": part["num_tasks"].min()}
            | {"mean_percent": percents}
        )
    return pd.DataFrame(lines)
