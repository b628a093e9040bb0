"""How far a cell is, counted in tokens, since prompts differ in length.

A moving bar on a terminal, a plain line now and then anywhere else.
"""

import sys
from time import monotonic
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

_PLAIN_LINE_EVERY_SEC = 15


class TokenProgress:
    """Use as a context manager and call ``advance`` with the tokens of each pass."""

    def __init__(self, label: str, total_tokens: int) -> None:
        self._label = label
        self._total_tokens = max(1, total_tokens)
        self._done_tokens = 0
        self._started = self._last_line = monotonic()
        self._bar: Progress | None = None
        if sys.stderr.isatty():
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TimeRemainingColumn(elapsed_when_finished=True),
                console=Console(stderr=True),
            )
            self._bar_task = self._bar.add_task(label, total=self._total_tokens)

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def advance(self, num_tokens: int) -> None:
        self._done_tokens += num_tokens
        if self._bar:
            self._bar.update(self._bar_task, advance=num_tokens)
        elif monotonic() - self._last_line > _PLAIN_LINE_EVERY_SEC:
            self._last_line = monotonic()
            share = min(1.0, self._done_tokens / self._total_tokens)
            left_sec = (self._last_line - self._started) * (1 - share) / share
            self._print(f"{share:.0%}, about {left_sec:.0f} s left")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._bar:
            if error is None:  # answers that stopped early leave planned tokens undone
                self._bar.update(self._bar_task, completed=self._total_tokens)
            self._bar.stop()
        elif error is None:
            self._print(f"done in {monotonic() - self._started:.0f} s")

    def _print(self, text: str) -> None:
        print(f"{self._label}: {text}", file=sys.stderr, flush=True)
