"""LongBench's rows, templates and generation lengths, read from one place and checked.

The benchmark's own release is ``data.zip`` on the Hugging Face hub; templates and lengths are in
its repository on GitHub. Both are pinned to a commit and checked against a SHA-256.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from string import Formatter

from kvarena.tasks.benchmark.downloads import HubFile, WebFile
from kvarena.tasks.benchmark.rows import DataFile, Field, Row, is_count, is_text, is_texts
from kvarena.tasks.benchmark.source import Source, open_source
from kvarena.tasks.longbench.metrics import has_gold_number
from kvarena.tasks.longbench.names import METRIC_OF, base_task

DATA_ZIP = HubFile(
    repo="zai-org/LongBench",
    revision="5e628be450b7e67fb7ae6e201bd6d8f7056f7672",
    name="data.zip",
    sha256="cb45b11a4133c6bc1d6a44b0f8e701335ff1e543195db1103472e575857f7f64",
)
REPOSITORY = "THUDM/LongBench/2e00731f8d0bff23dc4325161044d0ed8af94c1e/LongBench/config"
PROMPTS, LENGTHS = "dataset2prompt.json", "dataset2maxlen.json"
SETTINGS = (
    WebFile(
        url=f"https://raw.githubusercontent.com/{REPOSITORY}/{PROMPTS}",
        sha256="56d22ad4f382169c2b8a11ff4c982a4a1bea096c8152b0f0b85b64686b157c30",
    ),
    WebFile(
        url=f"https://raw.githubusercontent.com/{REPOSITORY}/{LENGTHS}",
        sha256="72966b3c0933e214591637fb085798c5e687ebff4ddaab5d99bbc31120532022",
    ),
)
WAYS = (
    "Ways to get LongBench (with make: DATA=...): task.data=hub, with a network, downloads "
    f"{DATA_ZIP.repo} (114 MB); task.data=<folder> has <task>.jsonl or .jsonl.gz files; "
    f"task.data=<zip> is its data.zip; folder and zip need {PROMPTS} and {LENGTHS} from "
    "https://github.com/THUDM/LongBench/tree/main/LongBench/config inside or one level up; "
    "task.data=sample has 2 rows per task of kvarena's own, which are not the benchmark"
)
FIELDS: dict[str, Field] = {
    "input": ("a text", is_text),
    "context": ("a text", is_text),
    "answers": ("a list of texts", is_texts),
    "length": ("a whole number", is_count),
    "dataset": ("a text", is_text),
    "language": ("a text", is_text),
    "all_classes": ("null or a list of texts", lambda value: value is None or is_texts(value)),
    "_id": ("a text", is_text),
}


@dataclass(frozen=True)
class TaskData:
    """One task. rows: as in the file; template: with {context} and other fields of a row.

    source: a label for result rows; sha256: of the rows file; settings_sha256: of the template
    and length files together.
    """

    task: str
    rows: list[Row]
    template: str
    max_new_tokens: int
    source: str
    sha256: str
    settings_sha256: str

    def render(self, row: Row) -> tuple[str, int]:
        """The prompt, and the index of the first character after the context in it."""
        _, after = self.template.split("{context}")
        prompt = self.template.format(**row)
        return prompt, len(prompt) - len(after.format(**row))


def load_tasks(data: str, tasks: Sequence[str]) -> list[TaskData]:
    """All rows of all tasks. ValueError for missing data; for a bad row: file, line and field."""
    source = open_source(data, "longbench", open_hub, WAYS)
    prompts, lengths = (_settings(source, name) for name in (PROMPTS, LENGTHS))
    settings_sha256 = hashlib.sha256(prompts.content + lengths.content).hexdigest()
    templates, maxlens = prompts.mapping(), lengths.mapping()
    loaded = []
    for task in tasks:
        file = source.rows_file(task)
        loaded.append(
            TaskData(
                task=task,
                rows=file.rows(_fields(task)),
                template=_template(prompts.name, base_task(task), templates),
                max_new_tokens=_length(lengths.name, base_task(task), maxlens),
                source=source.label,
                sha256=file.sha256,
                settings_sha256=settings_sha256,
            )
        )
    return loaded


def open_hub() -> Source:
    """The official release in the hub's cache, downloaded on first use. Raises as its files do."""
    from huggingface_hub import cached_assets_path

    folder = cached_assets_path("kvarena", namespace="longbench", subfolder="config-2e00731")
    for file in SETTINGS:
        file.fetch(folder)
    label = f"hub:{DATA_ZIP.repo}@{DATA_ZIP.revision[:7]}"
    return Source(label, DATA_ZIP.fetch(), settings_path=folder)


def _settings(source: Source, name: str) -> DataFile:
    try:
        return source.settings_file(name)
    except ValueError as error:
        raise ValueError(
            f"{error}: LongBench's own {PROMPTS} and {LENGTHS} are needed. {WAYS}"
        ) from error


def _fields(task: str) -> dict[str, Field]:
    base = base_task(task)
    fields = dict(FIELDS)
    fields["dataset"] = (f'"{base}"', lambda value: value in (base, task))
    if METRIC_OF[base] == "classification":
        fields["all_classes"] = ("a list of texts", is_texts)
    if METRIC_OF[base] == "retrieval":
        meaning = "a list of texts that name a paragraph by its number"
        fields["answers"] = (
            meaning,
            lambda value: is_texts(value) and all(has_gold_number(base, text) for text in value),
        )
    return fields


def _template(name: str, task: str, templates: Row) -> str:
    template = templates.get(task)
    if not is_text(template):
        raise ValueError(f"{name}: {task!r} must be a text, got {template!r}")
    used = [field for _, field, _, _ in Formatter().parse(template) if field is not None]
    if used.count("context") != 1 or not set(used) <= set(FIELDS):
        raise ValueError(
            f"{name}: {task!r} must have {{context}} once and no other fields than a row's, "
            f"got {', '.join(used) or 'none'}"
        )
    return template


def _length(name: str, task: str, lengths: Row) -> int:
    length = lengths.get(task)
    if type(length) is not int or length < 1:
        raise ValueError(f"{name}: {task!r} must be a whole number from 1 on, got {length!r}")
    return length
