"""Single passes of an engine whose slots are full: the steady state, without reading up to it.

Keys and values are those of a real text under full attention, the same in every slot. Every policy
and peer starts from them, so that all do their work on equal terms.
"""

import torch

from kvarena.harness.bench.measure import now_sec
from kvarena.harness.bench.subjects import Subject
from kvarena.harness.engine import Engine
from kvarena.harness.engine.engine import _Recording
from kvarena.harness.engine.layer_stores import new_layers
from kvarena.harness.engine.request import plan_sequences
from kvarena.harness.engine.sampling import Sampling
from kvarena.harness.registry import build, load_choice

_NOTHING = _Recording(kept=False, history=False, logits=None)


class FullSlots:
    """slots sequences of cache_tokens each, which the next pass must evict from.

    chunk_tokens: None: every pass writes one token per slot; else it reads so many. A policy that
    keeps everything grows by what each pass adds.
    """

    def __init__(
        self,
        subject: Subject,
        policy: str,
        *,
        slots: int,
        cache_tokens: int,
        passes: int,
        chunk_tokens: int | None = None,
        attention: str = "sdpa",
    ) -> None:
        self.engine = Engine(
            subject.model,
            build(load_choice("policy", policy)),
            budget_tokens=cache_tokens,
            chunk_tokens=chunk_tokens or 128,
            slots=slots,
            attention=attention,
        )
        # While reading, the prompt goes on after the last pass, so that no pass chooses a token.
        num_read = (passes + 1) * (chunk_tokens or 0)
        self.sequences = plan_sequences(
            subject.model,
            self.engine.policy,
            [subject.text[: cache_tokens + num_read]] * slots,
            # As many places as in a long answer, whatever the number of passes.
            max_new_tokens=passes + self.engine.chunk_tokens,
            budgets=cache_tokens,
            seeds=0,
            stop_token_ids=(),
        )
        for sequence in self.sequences:
            sequence.num_seen = sequence.num_live = cache_tokens
            if chunk_tokens is None:
                sequence.token_ids = [subject.text[cache_tokens]]
        self.engine.layers = new_layers(
            subject.model,
            self.engine.policy,
            self.engine.codec,
            self.sequences,
            kv_dtype=self.engine.kv_dtype,
            num_slots=slots,
            chunk_tokens=self.engine.chunk_tokens,
        )
        positions = torch.arange(cache_tokens, device=subject.device).expand(slots, -1)
        pairs = subject.keys_and_values(cache_tokens)
        for layer, (keys, values) in zip(self.engine.layers, pairs, strict=True):
            shape = (slots, *keys.shape[1:])
            layer.append(slice(0, slots), 0, keys.expand(shape), values.expand(shape), positions)

    def run(self, passes: int) -> float:
        """Mean seconds of so many further passes."""
        device = self.engine.model.device
        started = now_sec(device)
        for _ in range(passes):
            self.engine._step(self.sequences, Sampling(), _NOTHING)
        return (now_sec(device) - started) / passes


def warm_pass_sec(
    subject: Subject,
    policy: str,
    *,
    slots: int,
    cache_tokens: int,
    passes: int,
    chunk_tokens: int | None = None,
    attention: str = "sdpa",
) -> float:
    """Mean seconds of ``passes`` in slots filled anew, after a first pass that is not timed."""
    full = FullSlots(
        subject,
        policy,
        slots=slots,
        cache_tokens=cache_tokens,
        passes=passes + 1,
        chunk_tokens=chunk_tokens,
        attention=attention,
    )
    full.run(1)
    return full.run(passes)
