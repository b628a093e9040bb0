"""What a codec costs: the same sample with each of them, alone and as eight questions at once.

Several slots take a context that is read once, so that the time is that of writing side by side.
"""

from collections.abc import Callable
from time import process_time

from kvarena.harness.bench.measure import Case, TimedCase, now_sec
from kvarena.harness.bench.sizes import Sizes
from kvarena.harness.bench.subjects import Subject
from kvarena.harness.engine import Engine, Request
from kvarena.harness.registry import build, load_choice

PLAIN = "none"
CODECS = (PLAIN, "kivi", "kvcomp", "zipcache")
POLICIES = ("keydiff", "full")
_QUESTION_TOKENS = 1  # the shortest there is, for questions cost the same under every codec


def codecs(subject: Subject, sizes: Sizes) -> list[TimedCase]:
    """Each codec with a policy that evicts and with the full cache, in one slot and in several."""
    return [
        _sample(subject, sizes, policy, codec, slots)
        for slots in (1, sizes.job_slots)
        for policy in POLICIES
        for codec in CODECS
    ]


def _sample(subject: Subject, sizes: Sizes, policy: str, codec: str, slots: int) -> TimedCase:
    evicts = build(load_choice("policy", policy)).evicts
    case = Case(
        section="codecs",
        what="sample",
        policy=policy,
        codec=codec,
        attention="sdpa",
        prompt_tokens=sizes.codec_prompt_tokens,
        new_tokens=sizes.codec_new_tokens,
        budget_tokens=sizes.budget_tokens if evicts else None,
        chunk_tokens=sizes.chunk_tokens,
        slots=slots,
    )
    request = Request(
        prompt=subject.text[: sizes.codec_prompt_tokens],
        max_new_tokens=sizes.codec_new_tokens,
        stop_token_ids=(),
        question_tokens=_QUESTION_TOKENS if slots > 1 else 0,
        context="one" if slots > 1 else None,
    )

    def work() -> dict[str, float]:
        engine = Engine(
            subject.model,
            build(load_choice("policy", policy)),
            codec=build(load_choice("codec", codec)),
            budget_tokens=sizes.budget_tokens,
            chunk_tokens=sizes.chunk_tokens,
            slots=slots,
        )
        started, started_cpu = now_sec(subject.device), process_time()
        finished = list(engine.generate([request] * slots))
        sample_sec = now_sec(subject.device) - started
        assert len(finished) == slots, "every slot has an answer"
        return {
            "sample_sec": sample_sec,
            "sample_cpu_sec": process_time() - started_cpu,
            "kv_kept_bytes": float(finished[0].kv_bytes_kept),
        }

    return TimedCase(case=case, run=work, warm=_warmed(work))


def _warmed(work: Callable[[], dict[str, float]]) -> Callable[[], dict[str, float]]:
    def warm() -> dict[str, float]:
        work()
        return {}

    return warm
