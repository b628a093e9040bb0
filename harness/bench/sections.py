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
    """Measure, and after each section put its lines into the files. Returns the Markdown.

    judge: the targets of what was measured; stem: of the files' names (``write_tables``).
    """
    text = ""
    for name, section in sections.items():
        columns = machine_columns(subject)
        measured = with_fractions(measure(section.cases(), section.rounds))
        held = judge(measured).assign(section=name)
        text = write_tables(summarise(measured), held, columns, stem)
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
