"""How LongBench scores an answer: the post-processing and metric of each task, as in its code.

"LongBench: A Bilingual, Multitask Benchmark for Long Context Understanding",
https://arxiv.org/abs/2308.14508; the code is ``LongBench/metrics.py`` and ``eval.py`` of
https://github.com/THUDM/LongBench at 2e00731. Its oddities are part of the scores and stay.

Differs from that code: ROUGE-L of long texts, which its recursion scores 0, and code similarity by
rapidfuzz, whose rounded ratio is what fuzzywuzzy gives with python-Levenshtein ("difflib": what it
gives without).
"""

import difflib
import re
from collections.abc import Callable, Iterable, Sequence

from rapidfuzz import fuzz

from kvarena.tasks.longbench.names import METRIC_OF, base_task
from kvarena.tasks.longbench.rouge_l import rouge_l
from kvarena.tasks.longbench.token_f1 import chinese_segmenter, token_f1, token_f1_zh

CODE_SIMILARITIES = ("rapidfuzz", "difflib")
# ROUGE-L recurses once per step below 9 frames of eval.py, one more in Chinese: so many steps fit
# under Python's default limit of 1000 (measured with CPython 3.11 and rouge 1.0.1).
MOST_STEPS = {"rouge": 990, "rouge_zh": 989}
FIRST_LINE_ONLY = ("trec", "triviaqa", "samsum", "lsht")
GOLD_NUMBER = {"passage_retrieval_en": r"Paragraph (\d+)", "passage_retrieval_zh": r"段落(\d+)"}


def score_prediction(
    task: str,
    prediction: str,
    answers: Iterable[str],
    all_classes: Sequence[str] | None = None,
    *,
    code_similarity: str = "rapidfuzz",
) -> float:
    """The official score of one prediction, 0 to 1: the best over ``answers``.

    all_classes: names to choose from, needed by trec and lsht. Raises ValueError for an unknown
    task or what its metric cannot do with, and when jieba is needed and not installed.
    """
    return all_scores(task, prediction, answers, all_classes, code_similarity)["score"]


def all_scores(
    task: str,
    prediction: str,
    answers: Iterable[str],
    all_classes: Sequence[str] | None,
    code_similarity: str,
) -> dict[str, float]:
    """``score`` and, for ROUGE-L, ``rouge_official_zero``.

    That is 1 where the official code scores the row lower, as its ROUGE-L gives 0 for a text too
    long for its recursion.
    """
    task = base_task(task)
    if task not in METRIC_OF:
        raise ValueError(f"unknown LongBench task {task!r}; known: {', '.join(METRIC_OF)}")
    if isinstance(answers, str):
        raise ValueError(f"answers must be a list of texts, got the text {answers!r}")
    metric = METRIC_OF[task]
    if task in FIRST_LINE_ONLY:
        prediction = prediction.lstrip("\n").split("\n")[0]
    if metric in MOST_STEPS:
        return _rouge_scores(metric, prediction, answers)
    score_one: dict[str, Callable[[str], float]] = {
        "qa_f1": lambda answer: token_f1(prediction, answer),
        "qa_f1_zh": lambda answer: token_f1_zh(prediction, answer),
        "classification": lambda answer: _classification(task, prediction, answer, all_classes),
        "count": lambda answer: _share_of_numbers(prediction, answer),
        "retrieval": lambda answer: _share_of_numbers(prediction, _gold_number(task, answer)),
        "code": lambda answer: _code_similarity(prediction, answer, code_similarity),
    }
    return {"score": max([0.0, *map(score_one[metric], answers)])}


def has_gold_number(task: str, answer: str) -> bool:
    """Whether a gold answer of a retrieval task names a paragraph, as all of them must."""
    return re.search(GOLD_NUMBER[task], answer) is not None


def _rouge_scores(metric: str, prediction: str, answers: Iterable[str]) -> dict[str, float]:
    spaced = _with_spaces if metric == "rouge_zh" else str
    found = [rouge_l(spaced(prediction), spaced(answer)) for answer in answers]
    score = max([0.0, *(result.f for result in found)])
    official = [result.f for result in found if result.num_steps <= MOST_STEPS[metric]]
    return {"score": score, "rouge_official_zero": float(max([0.0, *official]) < score)}


def _with_spaces(text: str) -> str:
    return " ".join(chinese_segmenter()(text))


def _classification(
    task: str, prediction: str, answer: str, all_classes: Sequence[str] | None
) -> float:
    if all_classes is None:
        raise ValueError(f"{task} is scored against all_classes, which is missing")
    named = [name for name in all_classes if name in prediction]
    # The official loop removes names, which are parts of the answer's, from the list it runs
    # over, so the name after a removed one is never looked at.
    index = 0
    while index < len(named):
        if named[index] in answer and named[index] != answer:
            named.remove(named[index])
        index += 1
    return 1.0 / len(named) if answer in named else 0.0


def _gold_number(task: str, answer: str) -> str:
    found = re.search(GOLD_NUMBER[task], answer)
    if found is None:
        raise ValueError(f"the answer must name a paragraph by its number, got {answer!r}")
    return found[1]


def _share_of_numbers(prediction: str, wanted: str) -> float:
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(wanted) / len(numbers) if numbers else 0.0


def _code_similarity(prediction: str, answer: str, code_similarity: str) -> float:
    lines = prediction.lstrip("\n").split("\n")
    no_comment = (line for line in lines if not any(sign in line for sign in ("`", "#", "//")))
    line = next(no_comment, "")
    if code_similarity == "rapidfuzz":
        return round(fuzz.ratio(line, answer)) / 100
    if code_similarity == "difflib":
        if line == answer:
            return 1.0
        return round(100 * difflib.SequenceMatcher(None, line, answer).ratio()) / 100
    raise ValueError(
        f"code_similarity must be one of {', '.join(CODE_SIMILARITIES)}, got {code_similarity!r}"
    )
