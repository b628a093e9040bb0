r"""MATH-500: competition problems; the last ``\boxed{...}`` of an answer is checked by algebra.

The 500 problems that "Let's Verify Step by Step", https://arxiv.org/abs/2305.20050, held out of
"Measuring Mathematical Problem Solving With the MATH Dataset", https://arxiv.org/abs/2103.03874,
asked as reasoning models are: one user turn, the instruction after the problem, sampling, and
pass@1 as the mean over ``num_samples`` answers to each problem.

Differs from the paper: math-verify compares the answers, not the graders of either paper.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

from kvarena.harness.column import Column
from kvarena.tasks.benchmark.downloads import HubFile
from kvarena.tasks.benchmark.rows import Row, is_count
from kvarena.tasks.math.problems import TEXT, ProblemSet
from kvarena.tasks.math.task import BOXED_EM, OF_ANSWERS, UNIQUE_ID, MathTask

# The checksum is also that of the original, prm800k/math_splits/test.jsonl of
# https://github.com/openai/prm800k.
TEST_FILE = HubFile(
    repo="HuggingFaceH4/MATH-500",
    revision="6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be",
    name="test.jsonl",
    sha256="35dc41080a3680858b27fa7e0533d2d547825316fc5dafe5d316f4ccc5a06132",
)


@dataclass(kw_only=True)
class Math500(MathTask):
    """data: hub, sample, or test.jsonl (.gz), or a folder or zip with it. Raises as MathTask."""

    name: ClassVar[str] = "math500"
    version: ClassVar[str] = "1"
    row_columns: ClassVar[tuple[Column, ...]] = (
        BOXED_EM,
        Column("meta_subject", str, "", "field of mathematics, as the benchmark has it"),
        Column("meta_level", int, "", "how hard the problem is, as the benchmark has it", low=0),
        UNIQUE_ID,
        *OF_ANSWERS,
    )
    problems: ClassVar[ProblemSet] = ProblemSet(
        title="MATH-500",
        folder="math500",
        hub=TEST_FILE,
        fields={
            "problem": TEXT,
            "solution": TEXT,
            "answer": TEXT,
            "subject": TEXT,
            "level": ("a whole number", is_count),
            "unique_id": TEXT,
        },
        unique=("unique_id",),
    )

    def about(self, row: Row) -> dict[str, Any]:
        return {name: row[name] for name in ("subject", "level", "unique_id")}
