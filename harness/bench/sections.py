"""What both benches share: sections one after the other, their files, and how they end."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from transformers.utils import logging as transformers_logging

from kvarena.harness.bench.measure import TimedCase, measure, summarise
from kvarena.harness.bench.roofline import with_fractions
from kvarena.harness.bench.subjects import Subject
from kvarena.harness.bench.table import machine_columns, write_tables
from kvarena.harness.entry import one_line_errors


@dataclass(frozen=True, kw_only=True)
class Section:
    """Cases that are measured side by side; made when their turn comes."""

    cases: Callable[[], list[TimedCase]]
    rounds: int


def run_sections(
    subject: Subject,
    sections: Mapping[str, Section],
    judge: Callable[[pd.DataFrame], pd.DataFrame],
    stem: Path,
) -> str:
    """Measure, and write the files anew after each section. Returns the Markdown.

    judge: the targets of what was measured; stem: of the files' names (``write_tables``).
    """
    text, parts = "", []
    columns = machine_columns(subject)
    for section in sections.values():
        parts.append(with_fractions(measure(section.cases(), section.rounds)))
        measured = pd.concat(parts, ignore_index=True)
        text = write_tables(summarise(measured), judge(measured), columns, stem)
    return text


def chosen(sections: Mapping[str, Section], only: str | None) -> dict[str, Section]:
    """One of the sections, or all of them."""
    return {name: section for name, section in sections.items() if only in (None, name)}


@contextmanager
def quiet_command() -> Iterator[None]:
    """Errors in one line, and transformers' remarks left out."""
    transformers_logging.set_verbosity_error()
    with one_line_errors():
        yield
