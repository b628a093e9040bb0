"""Whole jobs: many prompts through the slots, against one at a time elsewhere.

The answers have a fixed length, so that every system writes equally much. Beside the time a job
tells whether a slot was ever idle while samples waited, and whether memory grew.
"""

from dataclasses import dataclass, field, replace

from kvarena.harness.bench.measure import Case, TimedCase, now_sec
from kvarena.harness.bench.memory import resident_bytes
from kvarena.harness.bench.peers import KvpressServer, Prompts, generate_job, kvpress_job
from kvarena.harness.bench.sizes import Sizes
from kvarena.harness.bench.subjects import Subject
from kvarena.harness.engine import Batch, Engine, Generation, Request
from kvarena.harness.registry import build, load_choice

_POLICY = "keydiff"  # kvpress has it as well


@dataclass(kw_only=True)
class JobWatch:
    """What a batch looked like in each pass."""

    idle_passes: int = 0  # passes with an empty slot while a request waited
    busy: list[int] = field(default_factory=list)  # slots at work
    allocated: list[int] = field(default_factory=list)  # bytes of all cache buffers
    resident: list[int] = field(default_factory=list)  # bytes of the process

    def drive(self, batch: Batch) -> list[Generation]:
        """Move the batch on to its end."""
        finished = []
        while batch.has_work:
            # The pass fills free slots first, as long as there are requests to fill them with.
            ready = batch.num_busy + batch.num_waiting
            finished += batch.step()
            self.note(batch, min(ready, len(batch.slots)))
        return finished

    def note(self, batch: Batch, num_busy: int) -> None:
        """After a pass in which so many slots worked."""
        self.busy.append(num_busy)
        self.idle_passes += num_busy < len(batch.slots) and batch.num_waiting > 0
        self.allocated.append(batch.kv_bytes_allocated)
        self.resident.append(resident_bytes())

    @property
    def metrics(self) -> dict[str, float]:
        half = len(self.resident) // 2
        metrics = {
            "idle_while_waiting_passes": float(self.idle_passes),
            "busy_slots_mean": sum(self.busy) / len(self.busy),
            "kv_allocated_bytes": float(self.allocated[-1]),
            "kv_allocated_growth_ratio": max(self.allocated) / min(self.allocated),
        }
        if half and self.resident[0]:
            peaks = max(self.resident[:half]), max(self.resident[half:])
            metrics["resident_growth_ratio"] = peaks[1] / peaks[0]
        return metrics


def jobs(subject: Subject, sizes: Sizes, kvpress: KvpressServer | None) -> list[TimedCase]:
    """The needle job and the job of long answers, through each system."""
    needle = subject.needle_prompts(sizes.job_lengths, sizes.job_prompts)
    answers = [(prompt, 0) for prompt in subject.short_prompts(sizes.answer_prompts)]
    needle_case, answer_case = needle_job(sizes), answer_job(sizes)
    found = []
    for case, prompts in ((needle_case, needle), (answer_case, answers)):
        assert case.new_tokens is not None, "set above"
        alone = replace(
            case, system="generate", policy="full", budget_tokens=None, chunk_tokens=None, slots=1
        )
        found.append(engine_job(subject, case, prompts))
        found.append(generate_job(subject, alone, prompts, case.new_tokens))
    if kvpress is not None:  # its BlockPress compresses prompts only, so it has no part in answers
        case = replace(needle_case, system="kvpress", slots=1)
        found.append(kvpress_job(kvpress, case, needle, sizes.job_new_tokens))
    return found


def needle_job(sizes: Sizes) -> Case:
    """Long prompts with short answers."""
    return Case(
        section="job",
        what="needle_job",
        policy=_POLICY,
        attention="sdpa",
        new_tokens=sizes.job_new_tokens,
        budget_tokens=sizes.budget_tokens,
        chunk_tokens=sizes.chunk_tokens,
        slots=sizes.job_slots,
    )


def answer_job(sizes: Sizes) -> Case:
    """Short prompts with long answers, under a budget that binds while they are written."""
    return replace(
        needle_job(sizes),
        what="answer_job",
        new_tokens=sizes.answer_new_tokens,
        budget_tokens=sizes.answer_budget_tokens,
    )


def engine_job(subject: Subject, case: Case, prompts: Prompts) -> TimedCase:
    """All prompts through the slots of one engine."""
    chunk_tokens, slots = case.chunk_tokens or 1, case.slots or 1

    def work(some: Prompts) -> dict[str, float]:
        engine = Engine(
            subject.model,
            build(load_choice("policy", _POLICY)),
            budget_tokens=case.budget_tokens,
            chunk_tokens=chunk_tokens,
            slots=slots,
        )
        watch = JobWatch()
        started = now_sec(subject.device)
        finished = watch.drive(
            engine.batch(
                [
                    Request(prompt=prompt, max_new_tokens=case.new_tokens, stop_token_ids=())
                    for prompt, _ in some
                ]
            )
        )
        job_sec = now_sec(subject.device) - started
        assert len(finished) == len(some), "every prompt has an answer"
        return {
            "job_sec": job_sec,
            "samples_per_min": 60 * len(some) / job_sec,
            **watch.metrics,
        }

    def warm() -> dict[str, float]:
        work(prompts[:1])
        return {}

    return TimedCase(case=case, run=lambda: work(prompts), warm=warm)
