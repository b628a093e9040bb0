"""MATH-500's rows, read from one place and checked.

The file on the Hugging Face hub is pinned to a commit; its SHA-256 is also that of the original,
``prm800k/math_splits/test.jsonl`` of https://github.com/openai/prm800k.
"""

from kvarena.tasks.benchmark_data import Source, open_source
from kvarena.tasks.benchmark_downloads import HubFile
from kvarena.tasks.benchmark_rows import Field, Row, is_count, is_text

TEST_FILE = HubFile(
    repo="HuggingFaceH4/MATH-500",
    revision="6e4ed1a2a79af7d8630a6b768ec859cb5af4d3be",
    name="test.jsonl",
    sha256="35dc41080a3680858b27fa7e0533d2d547825316fc5dafe5d316f4ccc5a06132",
)
WAYS = (
    "Ways to get MATH-500: data=hub, with a network, downloads it; data=<path> of a test.jsonl (or "
    f".gz) from https://huggingface.co/datasets/{TEST_FILE.repo} or of a folder or zip with it; "
    "data=sample for 20 problems of this project, which are not the benchmark"
)
TEXT: Field = ("a text that is not empty", lambda value: is_text(value) and value != "")
FIELDS: dict[str, Field] = {
    "problem": TEXT,
    "solution": TEXT,
    "answer": TEXT,
    "subject": TEXT,
    "level": ("a whole number", is_count),
    "unique_id": TEXT,
}


def load_problems(data: str) -> list[Row]:
    """All rows. ValueError for missing data; for a bad row: file, line and field."""
    source = open_source(data, "math500", open_hub, WAYS)
    try:
        file = source.rows_file("test")
    except ValueError as error:
        raise ValueError(f"{error}. {WAYS}") from error
    rows = file.rows(FIELDS)
    ids = [row["unique_id"] for row in rows]
    repeated = next((name for name in ids if ids.count(name) > 1), None)
    if repeated is not None:
        raise ValueError(f"{file.name} has several rows with the unique_id {repeated!r}")
    return rows


def open_hub() -> Source:
    """The folder of the hub's cache with the file, downloaded on first use. Raises as it does."""
    label = f"hub:{TEST_FILE.repo}@{TEST_FILE.revision[:7]}"
    return Source(label, TEST_FILE.fetch().parent)
