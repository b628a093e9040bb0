"""How LongBench scores an answer: the post-processing and metric of each task, as in its code.

"LongBench: A Bilingual, Multitask Benchmark for Long Context Understanding",
https://arxiv.org/abs/2308.14508; the code is ``LongBench/metrics.py`` and ``eval.py`` of
https://github.com/THUDM/LongBench at 2e00731. Its oddities are part of the scores and stay.

Differs from that code: ROUGE-L of long texts, which its recursion scores 0, and code similarity by
rapidfuzz, whose rounded ratio is what fuzzywuzzy gives with python-Levenshtein ("difflib": what it
gives without).
"""

import difflib
import logging
import re
import string
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache

from rapidfuzz import fuzz

from kvarena.tasks.longbench_names import base_task
from kvarena.tasks.rouge_l import rouge_l

CODE_SIMILARITIES = ("rapidfuzz", "difflib")
# ROUGE-L recurses once per step below 9 frames of eval.py, one more in Chinese: so many steps fit
# under Python's default limit of 1000 (measured with CPython 3.11 and rouge 1.0.1).
MOST_STEPS = {"rouge": 990, "rouge_zh": 989}
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
FIRST_LINE_ONLY = ("trec", "triviaqa", "samsum", "lsht")
GOLD_NUMBER = {"passage_retrieval_en": r"Paragraph (\d+)", "passage_retrieval_zh": r"段落(\d+)"}
ARTICLES = re.compile(r"\b(a|an|the)\b")
# The official list by code point. It lacks some signs, the opening title mark U+300A for one.
_CJK_RANGES = """2013-2014 2018-2019 201b-201f 2026-2027 3001-3003 300b-3011 3014-301f 3030-3030
303e-303f fe4f-fe4f ff01-ff0d ff0f-ff0f ff1a-ff20 ff3b-ff40 ff5b-ff64"""
CJK_PUNCTUATION = "".join(
    chr(point)
    for first, last in (ends.split("-") for ends in _CJK_RANGES.split())
    for point in range(int(first, 16), int(last, 16) + 1)
)
DROP_ASCII = str.maketrans("", "", string.punctuation)
DROP_ALL = str.maketrans("", "", string.punctuation + CJK_PUNCTUATION)


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
        "qa_f1": lambda answer: _qa_f1(prediction, answer),
        "qa_f1_zh": lambda answer: _qa_f1_zh(prediction, answer),
        "classification": lambda answer: _classification(task, prediction, answer, all_classes),
        "count": lambda answer: _share_of_numbers(prediction, answer),
        "retrieval": lambda answer: _share_of_numbers(prediction, _gold_number(task, answer)),
        "code": lambda answer: _code_similarity(prediction, answer, code_similarity),
    }
    return {"score": max([0.0, *map(score_one[metric], answers)])}


def has_gold_number(task: str, answer: str) -> bool:
    """Whether a gold answer of a retrieval task names a paragraph, as all of them must."""
    return re.search(GOLD_NUMBER[task], answer) is not None


@lru_cache(maxsize=1)
def chinese_segmenter() -> Callable[[str], list[str]]:
    """jieba's words of a text. Raises ValueError with a hint when jieba is not installed."""
    try:
        import jieba
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{', '.join(NEEDS_JIEBA)} are scored by words, for which jieba is needed: install it "
            "with `pip install jieba==0.42.1`, or leave these tasks out"
        ) from error
    jieba.setLogLevel(logging.WARNING)
    # jieba trusts any file named jieba.cache in the temporary folder, even one that is stale or
    # somebody else's; so the dictionary is read from the package, which takes a second.
    segmenter = jieba.Tokenizer()
    segmenter.FREQ, segmenter.total = segmenter.gen_pfdict(segmenter.get_dict_file())
    segmenter.initialized = True
    return segmenter.lcut


def _qa_f1(prediction: str, answer: str) -> float:
    return _token_f1(*(ARTICLES.sub(" ", _plain(text)).split() for text in (prediction, answer)))


def _plain(text: str) -> str:
    return text.lower().translate(DROP_ASCII)


def _qa_f1_zh(prediction: str, answer: str) -> float:
    words = chinese_segmenter()
    cleaned = (
        ["".join(word.lower().translate(DROP_ALL).split()) for word in words(text)]
        for text in (prediction, answer)
    )
    return _token_f1(*([word for word in text if word] for text in cleaned))


def _token_f1(predicted: Sequence[str], wanted: Sequence[str]) -> float:
    num_same = sum((Counter(predicted) & Counter(wanted)).values())
    if num_same == 0:
        return 0.0
    precision, recall = num_same / len(predicted), num_same / len(wanted)
    return 2 * precision * recall / (precision + recall)


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
