"""GSM8K: word problems of grade school, after eight worked examples of step by step reasoning.

"Training Verifiers to Solve Math Word Problems", https://arxiv.org/abs/2110.14168, asked with the
examples of "Chain-of-Thought Prompting Elicits Reasoning in Large Language Models",
https://arxiv.org/abs/2201.11903, by the protocol of the task ``gsm8k_cot`` (version 3) of
lm-evaluation-harness 0.4.13: plain text without a chat template, greedy, at most 256 new tokens, an
answer ends where the model begins the next question; ``strict_em`` and ``flexible_em`` are that
task's two scores, to the letter. The pinned file has the checksum that the hub publishes for it;
kvarena has not been able to download it yet.

Differs from that protocol: ``score`` compares the number after "The answer is" by algebra, as
MATH-500's boxes are, so 18.00 is 18 and the end of the text does not cost a digit; the answer is
cut at the next question when it is scored, and the model writes on to its stop token or limit.
"""

import json
import re
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

from kvarena.harness.column import Column
from kvarena.tasks.base import Sample, Tokenizer, count_question_tokens, render_prompt
from kvarena.tasks.benchmark.downloads import HubFile
from kvarena.tasks.benchmark.rows import Row, is_text
from kvarena.tasks.math.answers import same_answer
from kvarena.tasks.math.problems import TEXT, ProblemSet
from kvarena.tasks.math.task import OF_ANSWERS, MathTask

TEST_FILE = HubFile(
    repo="openai/gsm8k",
    revision="740312add88f781978c0658806c59bc2815b9866",
    name="main/test-00000-of-00001.parquet",
    sha256="ee7b8da9e381df27b9e3f7758a159ab2bdaa4dbaa910546cbbc47e0cb44e4f59",
)
EXAMPLES = Path(__file__).parent / "protocol_data" / "gsm8k_cot.jsonl"
NEXT_QUESTION = "Q:"
NUMBER = r"-?\d+(?:,\d{3})*(?:\.\d+)?"
GOLD = re.compile(r"####\s*(-?[\d.,]*\d)\s*$")
GIVEN = re.compile(rf"[Tt]he answer is:?\s*\$?\s*({NUMBER})")
# lm-evaluation-harness, tasks/gsm8k/gsm8k-cot.yaml; the last character of the first is any one.
STRICT = re.compile(r"The answer is (\-?[0-9\.\,]+).")
FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
IGNORED = (",", r"\$", r"(?s).*#### ", r"\.$")


@dataclass(kw_only=True)
class Gsm8k(MathTask):
    """data: hub, sample, test.jsonl of the authors or the hub's parquet; ValueError as MathTask."""

    name: ClassVar[str] = "gsm8k"
    version: ClassVar[str] = "1"
    row_columns: ClassVar[tuple[Column, ...]] = (
        Column(
            "answered",
            float,
            "",
            'whether a number followed "The answer is"; `score` is about that number, by algebra',
            low=0,
            high=1,
        ),
        Column(
            "strict_em",
            float,
            "",
            "lm-evaluation-harness's strict-match of `gsm8k_cot`",
            low=0,
            high=1,
        ),
        Column("flexible_em", float, "", "lm-evaluation-harness's flexible-extract", low=0, high=1),
        *OF_ANSWERS,
    )
    most_new_tokens: ClassVar[int] = 256
    problems: ClassVar[ProblemSet] = ProblemSet(
        title="GSM8K",
        folder="gsm8k",
        hub=TEST_FILE,
        fields={
            "question": TEXT,
            "answer": (
                "a text that ends in #### and a number",
                lambda value: is_text(value) and GOLD.search(value) is not None,
            ),
        },
        unique=("question", "answer"),
        question="question",
        elsewhere=" or a test.jsonl from https://github.com/openai/grade-school-math",
    )

    def about(self, row: Row) -> dict[str, Any]:
        return {}

    def ask(self, tokenizer: Tokenizer, row: Row) -> tuple[list[int], int]:
        """The worked examples are the context; the question and "A:" follow it."""
        examples = worked_examples()
        text = f"{examples}Q: {row['question']}\nA:"
        token_ids = render_prompt(tokenizer, text, chat=False)
        return token_ids, count_question_tokens(tokenizer, text, len(examples), chat=False)

    def gold(self, row: Row) -> str:
        found = GOLD.search(row["answer"])
        assert found is not None, "rows are checked when they are loaded"
        return found[1]

    def score(self, sample: Sample, text: str, *, finished: bool = True) -> dict[str, float]:
        """``score``: the number first given as the answer is right; ``answered``: one was given.

        ``strict_em``, ``flexible_em``: see the module. finished: False for an answer cut off by
        ``max_new_tokens``, whose last number may have lost digits. Raises UndecidedError as the
        base does.
        """
        text, next_question, _ = text.partition(NEXT_QUESTION)
        gold, given = sample.references[0], GIVEN.search(text)
        if given and given.end() == len(text) and not finished and not next_question:
            given = None
        strict, flexible = STRICT.search(text), list(FLEXIBLE.finditer(text))
        return {
            "score": float(given is not None and same_answer(given[1], gold)),
            "answered": float(given is not None),
            "strict_em": float(strict is not None and _plain(strict[1]) == _plain(gold)),
            "flexible_em": float(bool(flexible) and _plain(flexible[-1][0]) == _plain(gold)),
        }


@cache
def worked_examples() -> str:
    """The eight examples, each followed by an empty line."""
    rows = [json.loads(line) for line in EXAMPLES.read_text(encoding="utf-8").splitlines()]
    return "".join(f"Q: {row['question']}\nA: {row['answer']}\n\n" for row in rows)


def _plain(number: str) -> str:
    for pattern in IGNORED:
        number = re.sub(pattern, "", number)
    return number
