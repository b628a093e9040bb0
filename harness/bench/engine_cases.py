"""Prefill and decode of the engine, a timed case per point: what both benches put together."""

from kvarena.harness.bench.measure import Case, TimedCase
from kvarena.harness.bench.memory import peak_bytes
from kvarena.harness.bench.subjects import Subject
from kvarena.harness.bench.timed_passes import warm_pass_sec
from kvarena.harness.engine import Engine
from kvarena.harness.registry import build, load_choice

_STEPS = 32  # decoding steps after a prompt, where they are timed


def prefill(
    subject: Subject,
    policy: str,
    *,
    section: str,
    prompt_tokens: int,
    budget_tokens: int,
    chunk_tokens: int,
    attention: str = "sdpa",
    whole: bool = False,
) -> TimedCase:
    """A prompt alone in the engine, up to its first new token: ``ttft_sec`` and tokens per second.

    The warm-up reads a shorter prompt in passes of all the same shapes and notes the peak memory,
    which no longer prompt exceeds (growth.py shows it). whole: it reads the whole prompt, and some
    more tokens are written: ``pass_sec`` is a decoding step after a prompt of that length.
    """
    evicts = build(load_choice("policy", policy)).evicts

    def read(num_tokens: int) -> dict[str, float]:
        engine = Engine(
            subject.model,
            build(load_choice("policy", policy)),
            budget_tokens=budget_tokens,
            chunk_tokens=chunk_tokens,
            slots=1,
            attention=attention,
        )
        new_tokens = _STEPS + 1 if whole else 1
        (generation,) = engine.generate([subject.text[:num_tokens]], max_new_tokens=new_tokens)
        metrics = {
            "ttft_sec": generation.ttft_sec,
            "prefill_tokens_per_sec": num_tokens / generation.ttft_sec,
            "kv_peak_bytes": generation.kv_bytes_peak,
        }
        if whole:
            assert generation.decode_tokens_per_sec is not None, "more than one token was written"
            metrics["pass_sec"] = 1 / generation.decode_tokens_per_sec
        return metrics

    # The first chunk is the short one, so passes depend on the remainder and then repeat.
    covered = -(-budget_tokens // chunk_tokens) + 2
    shorter = min(prompt_tokens, prompt_tokens % chunk_tokens + covered * chunk_tokens)
    warm_tokens = shorter if evicts and not whole else prompt_tokens
    return TimedCase(
        case=Case(
            section=section,
            what="prefill",
            policy=policy,
            attention=attention,
            prompt_tokens=prompt_tokens,
            budget_tokens=budget_tokens if evicts else None,
            chunk_tokens=chunk_tokens,
            slots=1,
        ),
        run=lambda: read(prompt_tokens),
        warm=lambda: peak_bytes(lambda: read(warm_tokens), subject.device),
    )


def decode(
    subject: Subject,
    policy: str,
    *,
    section: str,
    slots: int,
    cache_tokens: int,
    passes: int,
    attention: str = "sdpa",
    evict_every: int = 1,
) -> TimedCase:
    """Passes that write one token in every slot: ``pass_sec``, tokens per second.

    Every ``evict_every``-th of them evicts as many. The slots are filled anew at each visit, whose
    first pass is not timed.
    """

    evicts = build(load_choice("policy", policy)).evicts

    def write() -> dict[str, float]:
        pass_sec = warm_pass_sec(
            subject,
            policy,
            slots=slots,
            cache_tokens=cache_tokens,
            passes=passes,
            attention=attention,
            evict_every=evict_every,
        )
        return {"pass_sec": pass_sec, "decode_tokens_per_sec": slots / pass_sec}

    return TimedCase(
        case=Case(
            section=section,
            what="decode",
            policy=policy,
            attention=attention,
            slots=slots,
            cache_tokens=cache_tokens,
            evict_every=evict_every if evicts else None,
        ),
        run=write,
    )
