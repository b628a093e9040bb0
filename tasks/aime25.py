r"""AIME 2025: 30 problems whose answers are whole numbers from 0 to 999, checked as MATH-500's are.

Both papers of the American Invitational Mathematics Examination of 2025 (I and II, 15 problems
each, https://artofproblemsolving.com/wiki/index.php/2025_AIME_I), asked as in math500.py; with so
few problems the protocol takes many answers to each (``num_samples``), sampled. The pinned file is
that of https://huggingface.co/datasets/math-ai/aime25, by the checksum that other projects publish
for this commit; kvarena has not been able to download it yet.

Differs from the examination: a score is pass@1, the mean over answers, not the number of points.
"""

import re
from dataclasses import dataclass
from typing import Any, ClassVar

from kvarena.harness.column import Column
from kvarena.tasks.benchmark.downloads import HubFile
from kvarena.tasks.benchmark.rows import Row, is_count, is_text
from kvarena.tasks.math.answers import normalised
from kvarena.tasks.math.problems import TEXT, ProblemSet
from kvarena.tasks.math.task import BOXED_EM, OF_ANSWERS, UNIQUE_ID, MathTask

TEST_FILE = HubFile(
    repo="math-ai/aime25",
    revision="563bb8404243c5f09de6ec262f2db674fe5bce9b",
    name="test.jsonl",
    sha256="b4e273c02d3e7fe1b74b59eae768fc8230bfb0f79539890cb56f4361caac0331",
)


def is_answer(value: Any) -> bool:  # Any: JSON
    """A whole number from 0 to 999, as a number or as text, with or without a degree sign."""
    text = str(value) if is_count(value) else value
    return is_text(text) and re.fullmatch(r"\d{1,3}", normalised(text)) is not None


@dataclass(kw_only=True)
class Aime25(MathTask):
    """data: hub, sample, or test.jsonl (.gz), or a folder or zip with it. Raises as MathTask."""

    name: ClassVar[str] = "aime25"
    version: ClassVar[str] = "1"
    row_columns: ClassVar[tuple[Column, ...]] = (BOXED_EM, UNIQUE_ID, *OF_ANSWERS)
    problems: ClassVar[ProblemSet] = ProblemSet(
        title="AIME 2025",
        folder="aime25",
        hub=TEST_FILE,
        fields={
            "problem": TEXT,
            "answer": ("a whole number from 0 to 999", is_answer),
            "id": ("a text or a whole number", lambda value: is_text(value) or is_count(value)),
        },
        unique=("problem",),
    )

    def about(self, row: Row) -> dict[str, Any]:
        return {"unique_id": str(row["id"])}
