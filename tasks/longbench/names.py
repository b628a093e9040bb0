"""The tasks of LongBench and LongBench-E: categories, metrics, and what a choice can name."""

import difflib
from collections.abc import Sequence

# Six categories, in the order of the paper.
CATEGORIES = {
    "single-document QA": ("narrativeqa", "qasper", "multifieldqa_en", "multifieldqa_zh"),
    "multi-document QA": ("hotpotqa", "2wikimqa", "musique", "dureader"),
    "summarization": ("gov_report", "qmsum", "multi_news", "vcsum"),
    "few-shot learning": ("trec", "triviaqa", "samsum", "lsht"),
    "synthetic": ("passage_count", "passage_retrieval_en", "passage_retrieval_zh"),
    "code": ("lcc", "repobench-p"),
}
TASKS = tuple(task for tasks in CATEGORIES.values() for task in tasks)
CHINESE = ("multifieldqa_zh", "dureader", "vcsum", "lsht", "passage_retrieval_zh")
EN_CODE_16 = tuple(task for task in TASKS if task not in CHINESE)
NOT_IN_E = (*CHINESE, "narrativeqa", "musique", "qmsum")
E_TASKS = tuple(f"{task}_e" for task in TASKS if task not in NOT_IN_E)
GROUPS = {"all": TASKS, "en_code16": EN_CODE_16, "e": E_TASKS}
METRICS = {
    "qa_f1": "narrativeqa qasper multifieldqa_en hotpotqa 2wikimqa musique triviaqa",
    "qa_f1_zh": "multifieldqa_zh",
    "rouge": "gov_report qmsum multi_news samsum",
    "rouge_zh": "dureader vcsum",
    "classification": "trec lsht",
    "count": "passage_count",
    "retrieval": "passage_retrieval_en passage_retrieval_zh",
    "code": "lcc repobench-p",
}
METRIC_OF = {task: metric for metric, tasks in METRICS.items() for task in tasks.split()}
NEEDS_JIEBA = tuple(task for task, metric in METRIC_OF.items() if metric.endswith("_zh"))
# Rows of the official files; LongBench-E's are not listed, as no copy was at hand to count them.
NUM_ROWS = dict.fromkeys(TASKS, 200) | {"multifieldqa_en": 150, "lcc": 500, "repobench-p": 500}


def base_task(task: str) -> str:
    """The task whose prompt and metric a LongBench-E task uses: ``qasper`` for ``qasper_e``."""
    return task.removesuffix("_e") if task in E_TASKS else task


def chosen_tasks(names: str | Sequence[str]) -> tuple[str, ...]:
    """The tasks that a group, a name, or a list of names stands for, each once, in the given order.

    A text may hold several names with commas between them. Raises ValueError for an unknown name.
    """
    if isinstance(names, str):
        names = names.split(",")
    given = [str(name).strip() for name in names]
    for name in given:
        if name not in GROUPS and name not in TASKS and name not in E_TASKS:
            known = (*GROUPS, *TASKS, *E_TASKS)
            near = difflib.get_close_matches(name, known, n=1)
            guess = f" Did you mean {near[0]}?" if near else ""
            raise ValueError(f"unknown LongBench task {name!r}.{guess} Known: {', '.join(known)}")
    found = tuple(dict.fromkeys(task for name in given for task in GROUPS.get(name, (name,))))
    if not found:
        raise ValueError(f"tasks must name at least one task, got {names!r}")
    return found
