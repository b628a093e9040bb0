"""Single passes of an engine whose slots are full: the steady state, without reading up to it.

Keys and values are those of a real text under full attention, the same in every slot. Every policy
and peer starts from them, so that all do their work on equal terms.
"""

from kvarena.harness.bench.measure import now_sec
from kvarena.harness.bench.subjects import Subject
from kvarena.harness.engine import Batch, Engine, Request
from kvarena.harness.registry import build, load_choice


def full_slots(
    subject: Subject,
    policy: str,
    *,
    slots: int,
    cache_tokens: int,
    passes: int,
    chunk_tokens: int | None = None,
    attention: str = "sdpa",
    evict_every: int = 1,
) -> Batch:
    """A batch of ``slots`` requests with cache_tokens each, which a pass must soon evict from.

    chunk_tokens: None: every pass writes one token per slot; else it reads so many. A policy that
    keeps everything grows by what each pass adds.
    """
    engine = Engine(
        subject.model,
        build(load_choice("policy", policy)),
        budget_tokens=cache_tokens,
        chunk_tokens=chunk_tokens or 128,
        slots=slots,
        attention=attention,
        evict_every=evict_every,
    )
    # While reading, the prompt goes on after the last pass, so that no pass chooses a token.
    num_read = (passes + 1) * (chunk_tokens or 0)
    prompt = subject.text[: cache_tokens + num_read]
    # As many places as in a long answer, whatever the number of passes.
    num_written = passes + engine.chunk_tokens
    answer = subject.text[cache_tokens : cache_tokens + num_written]
    batch = engine.batch([Request(prompt=prompt, forced=answer)] * slots)
    batch.start_from(cache_tokens, subject.keys_and_values(cache_tokens))
    return batch


def run_passes(batch: Batch, passes: int) -> float:
    """Mean seconds of so many further passes."""
    started = now_sec(batch.device)
    for _ in range(passes):
        batch.step()
    return (now_sec(batch.device) - started) / passes


def warm_pass_sec(
    subject: Subject,
    policy: str,
    *,
    slots: int,
    cache_tokens: int,
    passes: int,
    chunk_tokens: int | None = None,
    attention: str = "sdpa",
    evict_every: int = 1,
) -> float:
    """Mean seconds of ``passes`` in slots filled anew, after a first pass that is not timed.

    passes: a multiple of evict_every, so that as many of them evict as in a long answer.
    """
    batch = full_slots(
        subject,
        policy,
        slots=slots,
        cache_tokens=cache_tokens,
        passes=passes + 1,
        chunk_tokens=chunk_tokens,
        attention=attention,
        evict_every=evict_every,
    )
    run_passes(batch, 1)
    return run_passes(batch, passes)
