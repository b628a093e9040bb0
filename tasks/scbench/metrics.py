"""SCBench's scores, by ``scbench/compute_scores.py`` of microsoft/MInference.

https://github.com/microsoft/MInference at 9987de6, and at 0ff346d ``scbench/eval_utils.py`` for the
labels that it scores against.

Differs from that code: summaries get LongBench's ROUGE-L where it takes rougeLsum of the
rouge_score package, so their scores are not comparable with published ones. Answers of ICL.ManyShot
and Zh.QA count whole, where it compares with each character of the answer, as its loop expects
a list and is given a text: one character of the answer, a bracket for one, is all that
ICL.ManyShot takes there.
"""

import re
from collections.abc import Sequence

from kvarena.tasks.longbench.rouge_l import rouge_l
from kvarena.tasks.longbench.token_f1 import character_f1
from kvarena.tasks.scbench.families import (
    EN_MULTICHOICE,
    EN_QA,
    EN_SUM,
    ICL_MANYSHOT,
    MATH_FIND,
    NEEDLE,
    RETR_MULTIHOP,
    ZH_QA,
)

LETTERS = "ABCD"
NUMBER = re.compile(r"\d+\.\d+|\d+")  # a sign is no part of it
DIGITS = re.compile("[0-9]+")
BETWEEN_WORDS = re.compile("""[\\n"'.,?!{}]""")
BEFORE_CHOICE = ("answer is:", "answer:", "answer is", "option is")


def score_answer(family: str, text: str, references: Sequence[str]) -> float:
    """0 to 1. Strings: the reference is in the answer, case and all.

    Variables: the share of them in the answer, case aside, rounded to two places. Numbers: the
    first one in the answer, without its decimals, is the reference. Needles: its first digits are.
    English questions, many examples: the reference is in the answer, case aside. Chinese questions:
    F1 of characters. Summaries: ROUGE-L. Choices: of what was chosen and its letter.
    """
    if family == RETR_MULTIHOP:
        found = [reference.lower() in text.lower() for reference in references]
        return round(sum(found) / len(found), 2)
    if family == EN_MULTICHOICE:
        return float(_is_chosen(text.strip(), references))
    (reference,) = references
    if family == MATH_FIND:
        number = NUMBER.search(text)
        return float(number is not None and int(float(number[0])) == int(reference))
    if family == NEEDLE:
        digits = DIGITS.search(text)
        return float(digits is not None and digits[0] == reference)
    if family in (EN_QA, ICL_MANYSHOT):
        return float(reference.upper() in text.strip().upper())
    if family == ZH_QA:
        return character_f1(text, reference)
    if family == EN_SUM:
        return rouge_l(text, reference).f
    return float(reference in text)


def _is_chosen(text: str, right: Sequence[str]) -> bool:
    """Whether a stripped answer names the right choice; right: its text and its letter.

    A letter at the very start decides, even that of a word. Then what follows the first kind of
    announcement that there is, after one character; then the first word of letters A to D in a row.
    """
    if not text:
        return False
    if text[0] in LETTERS:
        return text[0] in right
    if text in right:
        return True
    text = re.sub(" +", " ", BETWEEN_WORDS.sub(" ", text))
    for announcement in BEFORE_CHOICE:
        _, found, rest = text.partition(announcement)
        if found:
            return any(rest[1:].startswith(choice) for choice in right) if rest else False
    letters = next((word for word in text.split() if word in LETTERS), None)
    return letters in right
