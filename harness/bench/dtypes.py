"""The engine with the same model in float32 and in bfloat16, in the same rounds."""

from dataclasses import replace

from kvarena.harness.bench.engine_cases import decode
from kvarena.harness.bench.jobs import answer_job, engine_job
from kvarena.harness.bench.measure import TimedCase
from kvarena.harness.bench.roofline import POLICY, rated_pass
from kvarena.harness.bench.sizes import Sizes
from kvarena.harness.bench.subjects import Subject, of_name

SYSTEMS = {"float32": "kvarena", "bfloat16": "kvarena_bfloat16"}


def dtypes(subject: Subject, sizes: Sizes) -> list[TimedCase]:
    """Passes that read and write, and the job of long answers; weights are loaded twice."""
    found = []
    for dtype, system in SYSTEMS.items():
        own = subject if subject.dtype == dtype else of_name(subject.name, dtype)
        prompts = [(prompt, 0) for prompt in own.short_prompts(sizes.answer_prompts)]
        passes = [
            rated_pass(
                own,
                slots=slots,
                cache_tokens=sizes.budget_tokens,
                passes=sizes.passes,
                chunk_tokens=sizes.chunk_tokens,
            )
            for slots in (1, sizes.job_slots)
        ]
        passes += [
            decode(
                own,
                POLICY,
                section="dtypes",
                slots=slots,
                cache_tokens=cache_tokens,
                passes=sizes.passes,
            )
            for slots, cache_tokens in sizes.policy_shapes
        ]
        for timed in (*passes, engine_job(own, answer_job(sizes), prompts)):
            found.append(replace(timed, case=replace(timed.case, section="dtypes", system=system)))
    return found
