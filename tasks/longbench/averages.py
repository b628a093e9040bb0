"""LongBench's tables: per task as the official code rounds, and means that say what they are over.

A task's score is 100 x the mean of its rows, rounded to two places; every mean over tasks is the
plain mean of those rounded scores, so it can be checked by hand from the table. KV-cache papers
report the mean over the 16 English and code tasks, the LongBench paper all 21.
"""

from collections.abc import Sequence
from functools import reduce
from operator import add
from typing import Any

import numpy as np
import pandas as pd

from kvarena.tasks.longbench.names import CATEGORIES, E_TASKS, EN_CODE_16, NUM_ROWS, TASKS

# Rows that differ in one of these are never averaged together.
BY = [
    "model",
    "policy",
    "budget",
    "question",
    "meta_data",
    "meta_is_sample",
    "meta_max_length",
    "meta_code_similarity",
]
# LongBench-E compares these ranges of a row's own length: words, or characters in Chinese.
BUCKETS = {"0-4k": (0, 4000), "4-8k": (4000, 8000), "8k+": (8000, float("inf"))}


def macro_averages(rows: pd.DataFrame) -> pd.DataFrame:
    """Tidy scores of LongBench ``rows``, as stored in results: one line per task and per mean.

    kind: task, category or average; name: what it is over, "3 of 4 tasks" when some are missing,
    "sample: ..." when the rows are not the benchmark's; score: 0 to 100; num_tasks and of_tasks;
    num_rows and num_ok: all rows, and those that finished and count; complete: whether every row
    of the official files of every task finished; num_rouge_official_zero: how many rows the
    official code scores lower through its recursion. ValueError when a column is missing.
    """
    found = []
    for keys, group in _groups(rows):
        by_task = group.groupby("meta_dataset")
        tasks = {str(task): _task_line(str(task), lines) for task, lines in by_task}
        known = [task for task in (*TASKS, *E_TASKS) if task in tasks]
        lines = [tasks[task] for task in known]
        for category, members in CATEGORIES.items():
            lines += _mean_line("category", category, members, tasks)
        lines += _mean_line("average", "English + code", EN_CODE_16, tasks)
        if any(task in tasks for task in set(TASKS) - set(EN_CODE_16)):
            lines += _mean_line("average", "all LongBench", TASKS, tasks)
        lines += _mean_line("average", "LongBench-E", E_TASKS, tasks)
        if keys["meta_is_sample"]:
            lines = [{**line, "name": f"sample: {line['name']}"} for line in lines]
        found += [{**keys, **line} for line in lines]
    return pd.DataFrame(found)


def length_buckets(rows: pd.DataFrame) -> pd.DataFrame:
    """LongBench-E by length: one line per task and bucket; score is NaN in an empty one."""
    found = []
    for keys, group in _groups(rows):
        for task, lines in group[group["meta_dataset"].isin(E_TASKS)].groupby("meta_dataset"):
            good = lines[lines["status"] == "ok"]
            for bucket, (low, high) in BUCKETS.items():
                inside = good[(good["meta_length"] >= low) & (good["meta_length"] < high)]
                scores = inside["score"].to_numpy(dtype=float)
                score = round(100 * float(np.mean(scores)), 2) if len(scores) else float("nan")
                line = {"name": task, "bucket": bucket, "score": score, "num_ok": len(scores)}
                found.append({**keys, **line})
    return pd.DataFrame(found)


# Any: what a column holds.
def _groups(rows: pd.DataFrame) -> list[tuple[dict[str, Any], pd.DataFrame]]:
    needed = ["task", "status", "score", "meta_dataset", "meta_length", *BY]
    missing = [name for name in needed if name not in rows.columns]
    if missing:
        raise ValueError(f"LongBench rows lack the columns {', '.join(missing)}")
    own = rows[rows["task"] == "longbench"]
    groups = own.groupby(BY, sort=False, dropna=False)
    return [(dict(zip(BY, keys, strict=True)), group) for keys, group in groups]


def _task_line(task: str, rows: pd.DataFrame) -> dict[str, Any]:
    scores = rows.loc[rows["status"] == "ok", "score"].astype(float).tolist()
    # Added one after the other, as the official code does: other sums can round differently.
    score = round(100 * reduce(add, scores, 0.0) / len(scores), 2) if scores else float("nan")
    differing = rows.get("rouge_official_zero", pd.Series(dtype=float))
    return {
        "kind": "task",
        "name": task,
        "score": score,
        "num_tasks": int(bool(scores)),
        "of_tasks": 1,
        "num_rows": len(rows),
        "num_ok": len(scores),
        "complete": len(scores) == len(rows) == NUM_ROWS.get(task),
        "num_rouge_official_zero": int(differing.fillna(0).sum()),
    }


def _mean_line(
    kind: str, name: str, members: Sequence[str], tasks: dict[str, dict[str, Any]]
) -> list[dict[str, Any]]:
    """One line, or none where no task of ``members`` has a score."""
    there = [tasks[task] for task in members if task in tasks and tasks[task]["num_tasks"]]
    if not there:
        return []
    some = "" if len(there) == len(members) else f"{len(there)} of "
    counted = {
        key: sum(line[key] for line in there)
        for key in ("num_rows", "num_ok", "num_rouge_official_zero")
    }
    return [
        {
            "kind": kind,
            "name": f"{name}, {some}{len(members)} tasks",
            "score": round(sum(line["score"] for line in there) / len(there), 2),
            "num_tasks": len(there),
            "of_tasks": len(members),
            **counted,
            "complete": not some and all(line["complete"] for line in there),
        }
    ]
