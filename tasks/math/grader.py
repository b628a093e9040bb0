"""Whether two LaTeX answers are equal: math-verify in a child process, killed when it hangs.

math-verify (https://github.com/huggingface/Math-Verify) decides with sympy, which can compute for
ever, for example on ``5^{5^{5^5}}``; its own time limit needs signals and thus the main thread. The
child answers JSON lines, lives as long as its parent, and is replaced after a kill.

This file imports nothing of kvarena: the child runs it as a script.
"""

import atexit
import importlib.util
import json
import logging
import os
import resource
import select
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from functools import cache

CPU_LIMIT_SEC = 5.0  # of one comparison; CPU time, so that a busy machine changes no score
WALL_LIMIT_SEC = 60.0  # the same, should the child stop for another reason
START_LIMIT_SEC = 120.0  # importing sympy takes seconds from a cold disk
MEMORY_LIMIT_BYTES = 4 << 30


class UndecidedError(RuntimeError):
    """math-verify came to no end within the time or the memory it may take."""


def are_equal(gold: str, prediction: str) -> bool:
    """Whether math-verify finds the LaTeX ``prediction`` equal to ``gold``.

    Both come without dollar signs. Works in any thread or forked process. Raises UndecidedError for
    a comparison over the time or memory limit, ValueError without math-verify.
    """
    equal = _grader(os.getpid()).compare(gold, prediction)
    if equal is None:
        raise UndecidedError(f"math-verify gave up comparing {prediction[:80]!r} with {gold!r}")
    return equal


def check_installed() -> None:
    """Raises ValueError if math-verify is missing."""
    if importlib.util.find_spec("math_verify") is None:
        raise ValueError("math-verify, which compares answers, is missing: pip install math-verify")


class Grader:
    """A child process that compares answers, started when first needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        atexit.register(self.close)

    def compare(self, gold: str, prediction: str) -> bool | None:
        """None if the child had to be killed or died."""
        with self._lock:
            if self._process is None or self._process.poll() is not None:
                self.close()
                self._process = self._start()
            stdin = self._process.stdin
            assert stdin is not None, "the child was started without a pipe"
            with suppress(BrokenPipeError):  # a dead child shows as an empty answer below
                stdin.write(json.dumps([gold, prediction]).encode() + b"\n")
                stdin.flush()
            answer = _read_line(self._process, WALL_LIMIT_SEC)
            if answer is None:
                self.close()
                return None
            return bool(json.loads(answer))

    def close(self) -> None:
        """Kill the child, if there is one, and take its exit status so that no zombie stays."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None, "the child was started without a pipe"
            with suppress(BrokenPipeError):  # closing flushes
                pipe.close()

    def _start(self) -> "subprocess.Popen[bytes]":
        check_installed()
        process = subprocess.Popen(
            [sys.executable, "-P", __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the parent, which closes the child
        )
        if _read_line(process, START_LIMIT_SEC) is None:
            process.kill()
            raise RuntimeError(
                f"the math grader did not start (exit code {process.wait()}); to see why, run: "
                f"{sys.executable} {__file__}"
            )
        return process


@cache
def _grader(process_id: int) -> Grader:
    # One for each process: after a fork, two processes would mix up the answers of one child.
    return Grader()


def _read_line(process: "subprocess.Popen[bytes]", limit_sec: float) -> bytes | None:
    """None if the child ended, or wrote no whole line within the time."""
    assert process.stdout is not None, "the child was started without a pipe"
    pipe, deadline = process.stdout.fileno(), time.monotonic() + limit_sec
    poll = select.poll()
    poll.register(pipe, select.POLLIN)
    received = b""
    while not received.endswith(b"\n"):
        left_sec = deadline - time.monotonic()
        if left_sec <= 0 or not poll.poll(1000 * left_sec):
            return None
        chunk = os.read(pipe, 4096)
        if not chunk:
            return None
        received += chunk
    return received


def serve() -> None:
    """The child: answer each ``[gold, prediction]`` line of stdin with ``true`` or ``false``."""
    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)  # math-verify logs each expression it cannot read
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    room = MEMORY_LIMIT_BYTES if most == resource.RLIM_INFINITY else min(MEMORY_LIMIT_BYTES, most)
    resource.setrlimit(resource.RLIMIT_AS, (room, most))
    # By default this signal ends the process, also in the middle of one long multiplication.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    # The parser prints notes to stdout, so the answers get a pipe of their own.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    verify(parse("$1$", parsing_timeout=None), 2, timeout_seconds=None)  # the first one is slow
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        gold, prediction = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, CPU_LIMIT_SEC)
        parsed = [parse(f"${text}$", parsing_timeout=None) for text in (gold, prediction)]
        equal = verify(*parsed, timeout_seconds=None)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(bool(equal)), file=answers, flush=True)


if __name__ == "__main__":
    serve()
