"""A process that does one job per line: what must run under another interpreter or environment."""

import json
import subprocess
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from kvarena.harness.errors import UsageError


class LineWorker:
    """Each line of its standard input is a job as JSON, each line of its output the answer.

    Use as a context manager. ``gone``: what to say when it stops. OSError if it cannot be started.
    """

    def __init__(
        self, command: Sequence[str], gone: str, env: Mapping[str, str] | None = None
    ) -> None:
        self._gone = gone
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.communicate()  # the end of its input ends it

    def ask(self, job: object) -> None:
        """Hand over a job, without waiting for the answer."""
        assert self._process.stdin is not None, "asked for above"
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()

    def answer(self) -> dict[str, Any]:  # Any: JSON values
        """The next line that it writes. Raises UsageError if it has stopped."""
        assert self._process.stdout is not None, "asked for above"
        line = self._process.stdout.readline()
        if not line:
            raise UsageError(self._gone)
        return json.loads(line)
