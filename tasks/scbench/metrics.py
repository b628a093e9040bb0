"""SCBench's scores, to the letter of ``scbench/compute_scores.py`` of microsoft/MInference.

https://github.com/microsoft/MInference at 9987de6.
"""

import re
from collections.abc import Sequence

from kvarena.tasks.scbench.families import MATH_FIND, RETR_MULTIHOP

NUMBER = re.compile(r"\d+\.\d+|\d+")  # a sign is no part of it


def score_answer(family: str, text: str, references: Sequence[str]) -> float:
    """0 to 1. Strings: the reference is in the answer, case and all.

    Variables: the share of them in the answer, case aside, rounded to two places. Numbers: the
    first one in the answer, without its decimals, is the reference.
    """
    if family == RETR_MULTIHOP:
        found = [reference.lower() in text.lower() for reference in references]
        return round(sum(found) / len(found), 2)
    (reference,) = references
    if family == MATH_FIND:
        number = NUMBER.search(text)
        return float(number is not None and int(float(number[0])) == int(reference))
    return float(reference in text)
