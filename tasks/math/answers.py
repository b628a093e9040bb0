r"""Whether an answer to a competition problem is right: its last ``\boxed{...}`` against the gold.

Equal text up to spacing and style is equal; what differs is compared by algebra (grader.py).
"""

import re
import warnings

from kvarena.tasks.math.grader import UndecidedError, are_equal

SPACING = re.compile(r"(?<!\\)\\[,;:! ]|\s+|\\q?quad\b|~|(?<!\\)\$")
STYLE = re.compile(r"\\(?:left|right|displaystyle|degree)(?![a-zA-Z])|\^\{?\\circ\}?|\\[%$]|%")
TEXT = re.compile(r"\\(?:text(?:bf|it|rm|up)?|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
BASE = re.compile(r"\d_\{?(\d+)\}?$")  # 2516_8: a number written in base 8
REPEATING = re.compile(r"(?<![\d.])(\d*)\.(\d*)\\overline\{(\d+)\}")


def is_correct(prediction: str, answer: str) -> bool:
    """``graded``, and False with a warning where that is UndecidedError."""
    try:
        return graded(prediction, answer)
    except UndecidedError as error:
        warnings.warn(f"{error}: counted as wrong", stacklevel=2)
        return False


def graded(prediction: str, answer: str) -> bool:
    """Whether the last box of ``prediction``, after its thinking block, equals ``answer``.

    Equal text is equal; math-verify decides the rest. False without a box or with an empty one.
    Raises UndecidedError when math-verify does not come to an end within seconds.
    """
    box = last_box(prediction)
    return box is not None and bool(box.strip()) and same_answer(box, answer)


def same_answer(given: str, answer: str) -> bool:
    """Whether an answer that is given on its own equals the right one. Raises as ``graded``."""
    ours, gold = normalised(given), normalised(answer)
    if ours == gold or (gold.isalpha() and len(gold) > 1 and ours.casefold() == gold.casefold()):
        return True
    bases = [BASE.search(text) for text in (ours, gold)]
    # math-verify leaves the base out, so 25_7 would equal 25_8.
    if bases[0] and bases[1] and bases[0][1] != bases[1][1]:
        return False
    return are_equal(_for_math_verify(answer), _for_math_verify(given))


def last_box(text: str) -> str | None:
    r"""Content of the last ``\boxed{...}`` with balanced braces after the thinking block.

    None if there is none, or if the text ends inside its thinking block.
    """
    _, _, text = text.rpartition("</think>")
    if "<think>" in text:
        return None
    # All braces are paired in one pass: an answer that repeats an open box thousands of times
    # would else be read to its end from each of them.
    opened: list[int] = []
    closed: dict[int, int] = {}  # where an opening brace ends -> where its closing one starts
    # A brace after a backslash is a printed one; two backslashes are a line break.
    for mark in re.finditer(r"\\.|[{}]", text, re.DOTALL):
        if mark[0] == "{":
            opened.append(mark.end())
        elif mark[0] == "}" and opened:
            closed[opened.pop()] = mark.start()
    boxes = [found.end() for found in re.finditer(r"\\boxed\s*\{", text) if found.end() in closed]
    return text[boxes[-1] : closed[boxes[-1]]] if boxes else None


def normalised(answer: str) -> str:
    r"""``answer`` without spacing, dollar, percent and degree signs, ``\text{}`` and style."""
    text, before = answer.replace("{,}", ","), ""
    while text != before:
        before, text = text, TEXT.sub(r"\1", text)
    text = STYLE.sub("", SPACING.sub("", text)).rstrip(".")
    text = re.sub(r"\\[dt]frac(?![a-zA-Z])", r"\\frac", text)
    return text[1:-1] if re.fullmatch(r"\([A-Z]\)", text) else text  # a choice: (C) is C


def _for_math_verify(answer: str) -> str:
    # math-verify reads 0.\overline{3} as 0.
    answer = REPEATING.sub(_as_fraction, answer)
    return re.sub(r"(?<!\\)\$", "", answer).strip().rstrip(".")


def _as_fraction(found: re.Match[str]) -> str:
    whole, fixed, repeated = found.groups()
    numerator = int(whole + fixed + repeated) - int(whole + fixed or 0)
    return rf"\frac{{{numerator}}}{{{(10 ** len(repeated) - 1) * 10 ** len(fixed)}}}"
