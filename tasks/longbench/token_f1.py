"""Token F1 of an answer in English or Chinese, as LongBench computes it.

"LongBench: A Bilingual, Multitask Benchmark for Long Context Understanding",
https://arxiv.org/abs/2308.14508; the code is ``LongBench/metrics.py`` of
https://github.com/THUDM/LongBench at 2e00731. Differs from that code: nothing.
"""

import logging
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache

from kvarena.tasks.longbench.names import NEEDS_JIEBA

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


def token_f1(prediction: str, answer: str) -> float:
    """F1 of the words of both, without case, ASCII punctuation and articles; 0 to 1."""
    return _f1(*(ARTICLES.sub(" ", _plain(text)).split() for text in (prediction, answer)))


def token_f1_zh(prediction: str, answer: str) -> float:
    """F1 of jieba's words of both, without case, punctuation and spaces. Needs jieba."""
    words = chinese_segmenter()
    cleaned = (
        ["".join(word.lower().translate(DROP_ALL).split()) for word in words(text)]
        for text in (prediction, answer)
    )
    return _f1(*([word for word in text if word] for text in cleaned))


def character_f1(prediction: str, answer: str) -> float:
    """F1 of the characters of both, without case, punctuation and spaces: SCBench's."""
    cleaned = ("".join(text.lower().translate(DROP_ALL).split()) for text in (prediction, answer))
    return _f1(*cleaned)


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


def _plain(text: str) -> str:
    return text.lower().translate(DROP_ASCII)


def _f1(predicted: Sequence[str], wanted: Sequence[str]) -> float:
    num_same = sum((Counter(predicted) & Counter(wanted)).values())
    if num_same == 0:
        return 0.0
    precision, recall = num_same / len(predicted), num_same / len(wanted)
    return 2 * precision * recall / (precision + recall)
