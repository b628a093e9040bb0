r"""MATH-500: competition problems; the last ``\boxed{...}`` of an answer is checked by algebra.

The 500 problems that "Let's Verify Step by Step", https://arxiv.org/abs/2305.20050, held out of
"Measuring Mathematical Problem Solving With the MATH Dataset", https://arxiv.org/abs/2103.03874,
asked as reasoning models are: one user turn, the instruction after the problem, sampling, and
pass@1 as the mean over ``num_samples`` answers to each problem.

Differs from the paper: math-verify compares the answers, not the graders of either paper.
"""

import gzip
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd

from kvarena.tasks.base import Sample, Task, Tokenizer, content_id, render_prompt
from kvarena.tasks.math_grader import are_equal, check_installed

INSTRUCTION = r"Please reason step by step, and put your final answer within \boxed{}."
HUB_NAME = "HuggingFaceH4/MATH-500"
SAMPLE_FILE = Path(__file__).parent / "sample_data" / "math500" / "test.jsonl"
FIELDS = ("problem", "solution", "answer", "subject", "level", "unique_id")

WAYS = (
    "Ways to get MATH-500: data=hub with a network and `pip install datasets`; data=<path> of a "
    f"test.jsonl (or .gz) from https://huggingface.co/datasets/{HUB_NAME} or of a folder with it; "
    "data=sample for 20 problems of this project, which are not the benchmark"
)

SPACING = re.compile(r"(?<!\\)\\[,;:! ]|\s+|\\q?quad\b|~|(?<!\\)\$")
STYLE = re.compile(r"\\(?:left|right|displaystyle|degree)(?![a-zA-Z])|\^\{?\\circ\}?|\\[%$]|%")
TEXT = re.compile(r"\\(?:text(?:bf|it|rm|up)?|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")
BASE = re.compile(r"\d_\{?(\d+)\}?$")  # 2516_8: a number written in base 8
REPEATING = re.compile(r"(?<![\d.])(\d*)\.(\d*)\\overline\{(\d+)\}")


@dataclass(kw_only=True)
class Math500(Task):
    """Each problem ``num_samples`` times. ValueError on a bad option or a bad row of data."""

    name: ClassVar[str] = "math500"
    version: ClassVar[str] = "1"

    data: str = "hub"  # hub | sample | test.jsonl (.gz) or a folder with it
    num_samples: int = 1
    max_new_tokens: int = 32768

    def __post_init__(self) -> None:
        for name in ("num_samples", "max_new_tokens"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"math500 {name} must be an int from 1 on, got {value!r}")
        check_installed()

    def samples(self, tokenizer: Tokenizer, seed: int, limit: int | None = None) -> list[Sample]:
        """All problems once, then all again; ``seed`` changes nothing, there is no chance in them.

        Every repeat is a sample with an id of its own and so draws other random numbers.
        """
        rows = _load_rows(str(self.data))
        prompts = [tuple(render_prompt(tokenizer, _prompt(row["problem"]))) for row in rows]
        return [
            Sample(
                id=content_id(self.name, self.version, row["problem"], row["answer"], repeat),
                prompt_token_ids=prompt,
                references=(row["answer"],),
                max_new_tokens=self.max_new_tokens,
                meta={name: row[name] for name in ("subject", "level", "unique_id")}
                | {"repeat": repeat, "is_sample": self.data == "sample"},
            )
            for repeat in range(self.num_samples)
            for row, prompt in zip(rows, prompts, strict=True)
        ][:limit]

    @classmethod
    def summaries(cls, rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
        return {"pass": math500_summary(rows)}

    def score(self, sample: Sample, text: str, *, finished: bool = True) -> dict[str, float]:
        """``score``: right by algebra; ``boxed_em``: the same string up to spacing and style.

        finished: False for an answer cut off by ``max_new_tokens``, which counts as wrong even with
        a box in it: that box was not the last word.
        """
        box, gold = last_box(text), sample.references[0]
        same_text = finished and box is not None and normalised(box) == normalised(gold)
        right = same_text or (finished and is_correct(text, gold))
        return {"score": float(right), "boxed_em": float(same_text)}


def is_correct(prediction: str, answer: str) -> bool:
    """Whether the last box of ``prediction``, after its thinking block, equals ``answer``.

    Equal text is equal; math-verify decides the rest. False without a box, with an empty one, or
    when math-verify does not come to an end within seconds.
    """
    box = last_box(prediction)
    if box is None or not box.strip():
        return False
    ours, gold = normalised(box), normalised(answer)
    if ours == gold or (gold.isalpha() and len(gold) > 1 and ours.casefold() == gold.casefold()):
        return True
    bases = [BASE.search(text) for text in (ours, gold)]
    # math-verify leaves the base out, so 25_7 would equal 25_8.
    if bases[0] and bases[1] and bases[0][1] != bases[1][1]:
        return False
    return are_equal(_for_math_verify(answer), _for_math_verify(box))


def last_box(text: str) -> str | None:
    r"""Content of the last ``\boxed{...}`` with balanced braces after the thinking block.

    None if there is none, or if the text ends inside its thinking block.
    """
    _, _, text = text.rpartition("</think>")
    if "<think>" in text:
        return None
    for found in reversed(list(re.finditer(r"\\boxed\s*\{", text))):
        depth = 1
        # A brace after a backslash is a printed one; two backslashes are a line break.
        for mark in re.finditer(r"\\.|[{}]", text[found.end() :], re.DOTALL):
            depth += {"{": 1, "}": -1}.get(mark[0], 0)
            if depth == 0:
                return text[found.end() : found.end() + mark.start()]
    return None


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


def math500_summary(rows: pd.DataFrame) -> pd.DataFrame:
    """One line for each model, policy and budget of MATH-500 ``rows``, as stored in results.

    pass_at_1: mean over the answers to a problem, then over problems; pass_at_1_se: its standard
    error over problems (NaN for one). truncation_rate: share of answers cut off by the token limit,
    which are wrong whatever their score. Rows with a status other than "ok" are left out.
    """
    rows = rows[(rows["task"] == Math500.name) & (rows["status"] == "ok")]
    cut = rows["finish_reason"] == "length"
    rows = rows.assign(cut=cut, score=rows["score"].astype(float).mask(cut, 0.0))
    cell = ["model", "policy", "budget"]
    problems = rows.groupby([*cell, "meta_unique_id"], sort=False)["score"].mean().groupby(cell)
    answers = rows.groupby(cell)
    return pd.DataFrame(
        {
            "num_problems": problems.size(),
            "num_answers": answers.size(),
            "pass_at_1": problems.mean(),
            "pass_at_1_se": problems.sem(),
            "truncation_rate": answers["cut"].mean(),
            "mean_generated_tokens": answers["generated_tokens"].mean(),
            "is_sample": answers["meta_is_sample"].any(),
        }
    ).reset_index()


def _prompt(problem: str) -> str:
    return f"{problem}\n{INSTRUCTION}"


def _load_rows(data: str) -> list[dict[str, Any]]:
    """Rows with ``FIELDS``. Raises ValueError that names file, line and field of a bad one."""
    if data == "hub":
        return _checked(HUB_NAME, _hub_rows())
    path = SAMPLE_FILE if data == "sample" else Path(data)
    if path.is_dir():
        found = [path / name for name in ("test.jsonl", "test.jsonl.gz") if (path / name).is_file()]
        path = found[0] if found else path / "test.jsonl"
    if not path.is_file():
        raise ValueError(f"data {str(path)!r} is not a file. {WAYS}")
    open_text = gzip.open if path.suffix == ".gz" else open
    with open_text(path, "rt", encoding="utf-8") as lines:
        return _checked(str(path), (_parsed(path, i, line) for i, line in enumerate(lines, 1)))


def _hub_rows() -> list[dict[str, Any]]:
    try:
        import datasets

        return list(datasets.load_dataset(HUB_NAME, split="test"))
    except (ImportError, OSError, ValueError) as error:
        raise ValueError(f"{HUB_NAME} cannot be loaded ({error}). {WAYS}") from error


def _parsed(path: Path, number: int, line: str) -> dict[str, Any]:
    try:
        return json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path} line {number} is not JSON: {error}") from error


def _checked(source: str, rows: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    rows = list(rows)
    for number, row in enumerate(rows, 1):
        for name in FIELDS:
            value = row.get(name) if isinstance(row, dict) else None
            if not isinstance(value, int if name == "level" else str) or value == "":
                raise ValueError(f"{source} line {number}: field {name!r} is {value!r}")
    if len({row["unique_id"] for row in rows}) < len(rows) or not rows:
        raise ValueError(f"{source} has no rows, or rows with the same unique_id")
    return rows
