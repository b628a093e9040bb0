"""Rows of a set of problems, read from one place and checked."""

from collections.abc import Mapping
from dataclasses import dataclass

from kvarena.tasks.benchmark.downloads import HubFile
from kvarena.tasks.benchmark.rows import Field, Row, is_text
from kvarena.tasks.benchmark.source import Source, open_source

TEXT: Field = ("a text that is not empty", lambda value: is_text(value) and value != "")


@dataclass(frozen=True, kw_only=True)
class ProblemSet:
    """Where the problems of a benchmark lie and what a row of them must be.

    folder: of kvarena's own sample; fields: those of a row and what they must be; unique: fields
    that no two rows share; question: the field that is asked; elsewhere: other places to get it.
    """

    title: str
    folder: str
    hub: HubFile
    fields: Mapping[str, Field]
    unique: tuple[str, ...]
    question: str = "problem"
    elsewhere: str = ""

    @property
    def ways(self) -> str:
        """Every way to get the data."""
        file = self.hub.name.rpartition("/")[2]
        return (
            f"Ways to get {self.title} (with make: DATA=...): task.data=hub, with a network, "
            f"downloads it; task.data=<path> of a {file} from "
            f"https://huggingface.co/datasets/{self.hub.repo}{self.elsewhere}, or of a folder or "
            "zip with it; task.data=sample for a few problems of this project, which are not the "
            "benchmark"
        )

    def load(self, data: str) -> list[Row]:
        """All rows. ValueError for missing data; for a bad row: file, line and field."""
        source = open_source(data, self.folder, self._open_hub, self.ways)
        try:
            file = source.rows_file("test", self.hub.name)
        except ValueError as error:
            raise ValueError(f"{error}. {self.ways}") from error
        rows = file.rows(self.fields)
        seen = set()
        for row in rows:
            name = tuple(row[field] for field in self.unique)
            if name in seen:
                same = ", ".join(f"{field} {row[field]!r}" for field in self.unique)
                raise ValueError(f"{file.name} has several rows with the {same:.200}")
            seen.add(name)
        return rows

    def _open_hub(self) -> Source:
        path = self.hub.fetch()
        for _ in self.hub.name.split("/"):
            path = path.parent
        return Source(f"hub:{self.hub.repo}@{self.hub.revision[:7]}", path)
