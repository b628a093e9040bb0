r"""MATH-500: competition problems; the last ``\boxed{...}`` of an answer is checked by algebra.

The 500 problems that "Let's Verify Step by Step", https://arxiv.org/abs/2305.20050, held out of
"Measuring Mathematical Problem Solving With the MATH Dataset", https://arxiv.org/abs/2103.03874,
asked as reasoning models are: one user turn, the instruction after the problem, sampling, and
pass@1 as the mean over ``num_samples`` answers to each problem.

Differs from the paper: math-verify compares the answers, not the graders of either paper.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import pandas as pd

from kvarena.tasks.base import Sample, Task, Tokenizer, content_id, render_prompt, rows_fingerprint
from kvarena.tasks.math500_data import load_problems
from kvarena.tasks.math_answers import graded, is_correct, last_box, normalised
from kvarena.tasks.math_grader import check_installed

__all__ = ["Math500", "is_correct", "math500_summary"]

MOST_NEW_TOKENS = 32768  # of the protocol of reasoning models
INSTRUCTION = r"Please reason step by step, and put your final answer within \boxed{}."


@dataclass(kw_only=True)
class Math500(Task):
    """Each problem ``num_samples`` times. ValueError on a bad option or a bad row of data."""

    name: ClassVar[str] = "math500"
    version: ClassVar[str] = "1"

    data: str = "hub"  # hub | sample | test.jsonl (.gz), or a folder or zip with it
    num_samples: int = 1
    # auto: what the model's context leaves after each prompt, at most the protocol's 32768
    max_new_tokens: int | str = "auto"

    def __post_init__(self) -> None:
        for name in ("num_samples", "max_new_tokens"):
            value = getattr(self, name)
            is_auto = name == "max_new_tokens" and value == "auto"
            if not is_auto and (type(value) is not int or value < 1):
                allowed = "auto or " if name == "max_new_tokens" else ""
                raise ValueError(f"math500 {name} must be {allowed}an int from 1 on, got {value!r}")
        self._context_tokens: int | None = None  # what answers are fitted to
        check_installed()

    def settle(self, context_tokens: int | None) -> dict[str, Any]:
        """``max_new_tokens``, of which each prompt takes its share where the context is that short.

        A number that is typed holds for every answer; a cell of the same number has the same rows.
        """
        if self.max_new_tokens != "auto":
            return {}
        self._context_tokens = context_tokens
        self.max_new_tokens = min(MOST_NEW_TOKENS, context_tokens or MOST_NEW_TOKENS)
        return {"max_new_tokens": self.max_new_tokens}

    def advice(self, longest: Sample, context_tokens: int) -> str:
        most = context_tokens - len(longest.prompt_token_ids)
        if most < 1:
            return "the prompt alone fills it: use a model with a longer context"
        return (
            f"use MAX_TOKENS={most} or less (task.max_new_tokens={most}), or leave it out: auto is "
            "what each prompt leaves"
        )

    def _most_new_tokens(self, prompt_tokens: int) -> int:
        most = self.max_new_tokens if isinstance(self.max_new_tokens, int) else MOST_NEW_TOKENS
        if self._context_tokens is None:
            return most
        return max(1, min(most, self._context_tokens - prompt_tokens))

    def samples(self, tokenizer: Tokenizer, seed: int, limit: int | None = None) -> list[Sample]:
        """All problems once, then all again; ``seed`` changes nothing, there is no chance in them.

        Every repeat is a sample with an id of its own and so draws other random numbers.
        """
        rows = load_problems(str(self.data))
        prompts = [tuple(render_prompt(tokenizer, _prompt(row["problem"]))) for row in rows]
        return [
            Sample(
                id=content_id(self.name, self.version, row["problem"], row["answer"], repeat),
                prompt_token_ids=prompt,
                references=(row["answer"],),
                max_new_tokens=self._most_new_tokens(len(prompt)),
                document=content_id(row["problem"]),
                meta={name: row[name] for name in ("subject", "level", "unique_id")}
                | {"repeat": repeat, "is_sample": self.data == "sample"}
                | {"max_new_tokens": self._most_new_tokens(len(prompt))},
            )
            for repeat in range(self.num_samples)
            for row, prompt in zip(rows, prompts, strict=True)
        ][:limit]

    def data_fingerprint(self) -> str:
        return rows_fingerprint(load_problems(str(self.data)))

    @classmethod
    def summaries(cls, rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
        return {"pass": math500_summary(rows)}

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
