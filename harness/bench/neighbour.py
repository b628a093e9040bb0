"""What another busy process costs: passes beside nothing, a busy loop and a second worker.

How OpenMP's threads wait for each other decides it (openmp.py), and is read when torch is imported.
So each way of waiting has processes of its own, which this module is too: ``python -m
kvarena.harness.bench.neighbour <model> <dtype>``.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch

from kvarena.harness.bench.line_worker import LineWorker
from kvarena.harness.bench.measure import Case, TimedCase
from kvarena.harness.bench.sizes import Sizes
from kvarena.harness.bench.subjects import Subject, of_name
from kvarena.harness.bench.timed_passes import full_slots, run_passes
from kvarena.harness.openmp import SPIN_COUNT

# What GNU OpenMP takes when nothing is set, what the harness sets, and sleeping at once.
OWN, BRIEF, NONE = (
    "GOMP_SPINCOUNT=300000",
    f"GOMP_SPINCOUNT={SPIN_COUNT}",
    "OMP_WAIT_POLICY=PASSIVE",
)
NOTHING, BUSY, WORKER = "nothing", "busy loop", "second worker"
_POLICY = "keydiff"
# Ends with its parent, however that ends.
_BUSY = "import os\nparent = os.getppid()\nwhile os.getppid() == parent: pass"


def neighbour(subject: Subject, sizes: Sizes, stack: ExitStack) -> list[TimedCase]:
    """Each way of waiting beside each neighbour; processes live as long as ``stack``.

    Workers side by side share the threads that one alone has, as ``launcher=joblib`` gives them.
    """
    found = []
    for waiting in (OWN, BRIEF, NONE):
        workers = [stack.enter_context(_worker(subject, waiting)) for _ in range(2)]
        found += [_case(workers, sizes, waiting, beside) for beside in (NOTHING, BUSY, WORKER)]
    return found


def _worker(subject: Subject, waiting: str) -> LineWorker:
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    env = {name: value for name, value in os.environ.items() if name not in names}
    name, _, value = waiting.partition("=")
    return LineWorker(
        [sys.executable, "-m", __name__, subject.name, subject.dtype],
        "a process of section neighbour stopped (its own message is above)",
        env | {name: value},
    )


def _case(workers: list[LineWorker], sizes: Sizes, waiting: str, beside: str) -> TimedCase:
    asked = workers if beside == WORKER else workers[:1]
    threads = max(1, torch.get_num_threads() // len(asked))

    def run() -> dict[str, float]:
        job = {
            "threads": threads,
            "slots": sizes.job_slots,
            "cache_tokens": sizes.budget_tokens,
            "chunk_tokens": sizes.chunk_tokens,
            "passes": sizes.passes,
        }
        with busy_loop() if beside == BUSY else contextlib.nullcontext():
            for worker in asked:
                worker.ask(job)
            answers = [worker.answer() for worker in asked]
        # Of all workers together.
        return {metric: sum(answer[metric] for answer in answers) for metric in answers[0]}

    return TimedCase(
        case=Case(
            section="neighbour",
            what="passes",
            policy=_POLICY,
            attention="sdpa",
            chunk_tokens=sizes.chunk_tokens,
            slots=sizes.job_slots,
            cache_tokens=sizes.budget_tokens,
            beside=beside,
            waiting=waiting,
        ),
        run=run,
        warm=lambda: (run(), {})[1],
    )


@contextmanager
def busy_loop() -> Iterator[None]:
    """A process that keeps one core busy."""
    process = subprocess.Popen([sys.executable, "-c", _BUSY])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def timed(subject: Subject, job: Mapping[str, int]) -> dict[str, float]:
    """Tokens per second of passes that write a token in every slot, and read a chunk in one."""
    torch.set_num_threads(job["threads"])
    rates = {}
    for metric, slots, chunk_tokens in (
        ("decode_tokens_per_sec", job["slots"], None),
        ("prefill_tokens_per_sec", 1, job["chunk_tokens"]),
    ):
        batch = full_slots(
            subject,
            _POLICY,
            slots=slots,
            cache_tokens=job["cache_tokens"],
            passes=job["passes"] + 1,
            chunk_tokens=chunk_tokens,
        )
        run_passes(batch, 1)
        rates[metric] = slots * (chunk_tokens or 1) / run_passes(batch, job["passes"])
    return rates


def main() -> None:
    """Answer jobs until standard input ends."""
    subject = of_name(sys.argv[1], sys.argv[2])
    for line in sys.stdin:
        print(json.dumps(timed(subject, json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
