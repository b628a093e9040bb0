r"""What benchmarks of problems with one right answer share: samples, limits, grading and pass@1.

Problems are asked as reasoning models are: one user turn, the instruction after the problem, and
the last ``\boxed{...}`` of the answer is checked by algebra. A task with another protocol has its
own ``ask`` and ``score``.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import pandas as pd

from kvarena.harness.column import Column
from kvarena.tasks.base import (
    IS_SAMPLE,
    Sample,
    Task,
    Tokenizer,
    content_id,
    render_prompt,
    rows_fingerprint,
)
from kvarena.tasks.benchmark.rows import Row
from kvarena.tasks.math.answers import graded, last_box, normalised
from kvarena.tasks.math.grader import check_installed
from kvarena.tasks.math.problems import ProblemSet

INSTRUCTION = r"Please reason step by step, and put your final answer within \boxed{}."

OF_ANSWERS = (
    Column("meta_repeat", int, "", "which of the answers to the problem", low=0),
    Column(
        "meta_max_new_tokens",
        int,
        "tokens",
        "most of an answer: by default what the model's context leaves after the prompt, at most "
        "what the protocol allows",
        low=1,
    ),
    IS_SAMPLE,
)
BOXED_EM = Column(
    "boxed_em", float, "", "1 if the last box equals the gold answer as text, else 0", low=0, high=1
)
UNIQUE_ID = Column("meta_unique_id", str, "name", "the benchmark's own name of the problem")


@dataclass(kw_only=True)
class MathTask(Task):
    """Each problem ``num_samples`` times. ValueError on a bad option or a bad row of data."""

    problems: ClassVar[ProblemSet]
    most_new_tokens: ClassVar[int] = 32768  # of the protocol of reasoning models

    data: str = "hub"
    num_samples: int = 1
    # auto: what the model's context leaves after each prompt, at most the protocol's
    max_new_tokens: int | str = "auto"

    def __post_init__(self) -> None:
        for name in ("num_samples", "max_new_tokens"):
            value = getattr(self, name)
            is_auto = name == "max_new_tokens" and value == "auto"
            if not is_auto and (type(value) is not int or value < 1):
                allowed = "auto or " if name == "max_new_tokens" else ""
                raise ValueError(
                    f"{self.name} {name} must be {allowed}an int from 1 on, got {value!r}"
                )
        self._context_tokens: int | None = None  # what answers are fitted to
        check_installed()

    @abstractmethod
    def about(self, row: Row) -> dict[str, Any]:
        """What a result row tells of a problem; JSON values."""

    def ask(self, tokenizer: Tokenizer, row: Row) -> tuple[list[int], int]:
        """Token ids of the prompt, and how many of them follow its context, if it has any."""
        return render_prompt(tokenizer, f"{row[self.problems.question]}\n{INSTRUCTION}"), 0

    def gold(self, row: Row) -> str:
        """The right answer."""
        return str(row["answer"])

    def settle(self, context_tokens: int | None) -> dict[str, Any]:
        """``max_new_tokens``, of which a prompt takes its share where the context is that short.

        A number that is typed holds for every answer; a cell of the same number has the same rows.
        """
        if self.max_new_tokens != "auto":
            return {}
        self._context_tokens = context_tokens
        self.max_new_tokens = min(self.most_new_tokens, context_tokens or self.most_new_tokens)
        return {"max_new_tokens": self.max_new_tokens}

    def advice(self, longest: Sample, context_tokens: int) -> str:
        most = context_tokens - len(longest.prompt_token_ids)
        if most < 1:
            return "the prompt alone fills it: use a model with a longer context"
        return (
            f"use MAX_TOKENS={most} or less (task.max_new_tokens={most}), or leave it out: auto is "
            "what each prompt leaves"
        )

    def samples(self, tokenizer: Tokenizer, seed: int, limit: int | None = None) -> list[Sample]:
        """All problems once, then all again; ``seed`` changes nothing, there is no chance in them.

        Every repeat is a sample with an id of its own and so draws other random numbers.
        """
        rows = self.problems.load(str(self.data))[:limit]
        asked = [(row, *self.ask(tokenizer, row)) for row in rows]
        repeats = range(self.num_samples)
        samples = [self._sample(*problem, repeat) for repeat in repeats for problem in asked]
        return samples[:limit]

    def data_fingerprint(self) -> str:
        return rows_fingerprint(self.problems.load(str(self.data)))

    @classmethod
    def summaries(cls, rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
        return {"pass": pass_at_1(rows[rows["task"] == cls.name])}

    def score(self, sample: Sample, text: str, *, finished: bool = True) -> dict[str, float]:
        """``score``: right by algebra; ``boxed_em``: the same string up to spacing and style.

        finished: False for an answer cut off by ``max_new_tokens``, which counts as wrong even with
        a box in it: that box was not the last word. Raises UndecidedError when math-verify comes to
        no end: such an answer has no score.
        """
        box, gold = last_box(text), sample.references[0]
        same_text = finished and box is not None and normalised(box) == normalised(gold)
        right = same_text or (finished and graded(text, gold))
        return {"score": float(right), "boxed_em": float(same_text)}

    def _sample(self, row: Row, token_ids: list[int], question_tokens: int, repeat: int) -> Sample:
        max_new_tokens = self._most_new_tokens(len(token_ids))
        problem = row[self.problems.question]
        return Sample(
            id=content_id(self.name, self.version, problem, str(row["answer"]), repeat),
            prompt_token_ids=tuple(token_ids),
            references=(self.gold(row),),
            max_new_tokens=max_new_tokens,
            question_tokens=question_tokens,
            document=content_id(problem),
            meta=self.about(row)
            | {"repeat": repeat, "is_sample": self.data == "sample"}
            | {"max_new_tokens": max_new_tokens},
        )

    def _most_new_tokens(self, prompt_tokens: int) -> int:
        most = self.max_new_tokens
        most = most if isinstance(most, int) else self.most_new_tokens
        if self._context_tokens is None:
            return most
        return max(1, min(most, self._context_tokens - prompt_tokens))


def pass_at_1(rows: pd.DataFrame) -> pd.DataFrame:
    """One line for each model, policy and budget of one benchmark's ``rows``, as stored in results.

    pass_at_1: mean over the answers to a problem, then over problems; pass_at_1_se: its standard
    error over problems (NaN for one). truncation_rate: share of answers that the token limit cut
    off before they were given, which are wrong whatever their score. Rows with a status other than
    "ok" are left out.
    """
    rows = rows[rows["status"] == "ok"]
    cut = rows["finish_reason"] == "length"
    if "answered" in rows.columns:  # what a benchmark with another protocol says about it
        cut &= rows["answered"] != 1
    rows = rows.assign(cut=cut, score=rows["score"].astype(float).mask(cut, 0.0))
    cell = ["model", "policy", "budget"]
    problems = rows.groupby([*cell, "document"], sort=False)["score"].mean().groupby(cell)
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
