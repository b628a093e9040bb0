"""The engine: many requests side by side, each under its own hard token budget.

Every request owns a slot of N + B places per layer and head (N budget, B chunk). A pass takes a
chunk from each slot that still reads its prompt and one token from each slot that writes, as one
packed row; each layer evicts right after its attention. Slots refill as requests end. What a
request keeps and answers does not depend on what runs beside it (float rounding aside).

The engine knows token ids only: no text, no tasks, no policy by name.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal

import torch
from transformers import PreTrainedModel

from kvarena.codecs.base import Codec
from kvarena.codecs.none import NoCodec
from kvarena.harness.engine.batch import Batch, Recording
from kvarena.harness.engine.cuda_graphs import GraphedBatch
from kvarena.harness.engine.eviction import Eviction
from kvarena.harness.engine.free_memory import keep_free_memory
from kvarena.harness.engine.generation import Generation, in_order
from kvarena.harness.engine.limits import check_architecture, check_attention, check_graphs
from kvarena.harness.engine.request import Request, settled
from kvarena.harness.engine.rotary import KeyRotator
from kvarena.harness.errors import UsageError
from kvarena.harness.protection import Protection
from kvarena.harness.sampling import Sampling
from kvarena.policies.base import Policy
from kvarena.shapes.base import Shape
from kvarena.shapes.uniform import Uniform

# Raised whenever a kept position, a token or a counted byte could change: it is part of a cell's
# identity, so rows of another engine are never continued.
ENGINE_VERSION = 3


class Engine:
    """Generates under a token budget. Raises UsageError for what cannot be honoured.

    model: a decoder of transformers; it is not changed.
    shape: how layers and heads share the budget; None: all alike.
    protection: which tokens stay whatever their score; None: as the policy has it.
    evict_every: answer tokens k between two evictions of a request; a head then holds N + k.
    codec: how tokens older than its exact window are stored; None: as they are.
    kv_dtype: data type of tokens that are not coded; None: the model's own.
    budget_tokens: most tokens a KV head of any layer holds after a chunk, N (on average over all
    heads, where the shape lets them differ); None: no bound.
    chunk_tokens: prompt tokens per pass and request, B.
    slots: requests side by side. attention: sdpa | flash | reference.
    graphs: replay steady decoding steps as CUDA graphs; on CUDA and without a codec only.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        policy: Policy,
        *,
        shape: Shape | None = None,
        protection: Protection | None = None,
        evict_every: int = 1,
        codec: Codec | None = None,
        kv_dtype: torch.dtype | None = None,
        budget_tokens: int | None = None,
        chunk_tokens: int = 128,
        slots: int = 8,
        attention: str = "sdpa",
        graphs: bool = False,
    ) -> None:
        for name, value in (("chunk_tokens", chunk_tokens), ("slots", slots)):
            if value < 1:
                raise UsageError(f"{name} must be >= 1, got {value}")
        check_attention(attention, str(model.device), model.dtype)
        check_architecture(model)
        self.eviction = Eviction(
            policy=policy,
            num_layers=model.config.get_text_config().num_hidden_layers,
            shape=shape or Uniform(),
            protection=protection or Protection(),
            every=evict_every,
        )
        self.eviction.check(budget_tokens)
        if graphs:
            codes = codec is not None and codec.codes
            check_graphs(model.device.type, self.eviction, codes=codes)
        keep_free_memory()
        self.model = model
        self.policy = policy
        self.codec = codec or NoCodec()
        self.kv_dtype = kv_dtype
        self.budget_tokens = budget_tokens
        self.chunk_tokens = chunk_tokens
        self.slots = slots
        self.attention = attention
        self.graphs = graphs
        needs = policy.needs
        needs_rotator = needs.rank_positions or needs.new_tokens or needs.future_queries
        self._rotator = KeyRotator(model) if needs_rotator else None

    def generate(
        self,
        requests: Sequence[Request] | Sequence[Sequence[int]],
        *,
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
        as_completed: bool = False,
        on_pass: Callable[[int], None] | None = None,
        record_kept: bool = False,
        record_history: bool = False,
        record_logits: Literal["all", "answer"] | None = None,
    ) -> Iterator[Generation]:
        """Yield one Generation per request, in their order (or as they end).

        on_pass: told the number of tokens of each pass; all else: see ``batch``.
        """
        batch = self.batch(
            requests,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            record_kept=record_kept,
            record_history=record_history,
            record_logits=record_logits,
        )
        finished = _driven(batch, on_pass)
        return finished if as_completed else in_order(finished)

    def batch(
        self,
        requests: Sequence[Request] | Sequence[Sequence[int]],
        *,
        max_new_tokens: int | None = None,
        sampling: Sampling | None = None,
        record_kept: bool = False,
        record_history: bool = False,
        record_logits: Literal["all", "answer"] | None = None,
    ) -> Batch:
        """The requests with slots of their own, to be moved on by ``step`` while it ``has_work``.

        requests: token ids alone stand for requests with max_new_tokens.
        sampling: greedy if None.
        record_kept: positions held at the end; record_history: after every pass;
        record_logits: of all tokens fed, or those that choose each token of the answer.
        Raises UsageError before any work is done.
        """
        asked = [_request(one, max_new_tokens) for one in requests]
        return (GraphedBatch if self.graphs else Batch)(
            self.model,
            self.eviction,
            self.codec,
            settled(asked, self.model, self.eviction, self.budget_tokens),
            kv_dtype=self.kv_dtype,
            chunk_tokens=self.chunk_tokens,
            num_slots=self.slots,
            attention=self.attention,
            rotator=self._rotator,
            sampling=sampling or Sampling(),
            recording=Recording(kept=record_kept, history=record_history, logits=record_logits),
        )


def _request(one: Request | Sequence[int], max_new_tokens: int | None) -> Request:
    if not isinstance(one, Request):
        return Request(prompt=one, max_new_tokens=max_new_tokens)
    if max_new_tokens is not None:
        raise UsageError("a Request says itself how long its answer may be; leave max_new_tokens")
    return one


def _driven(batch: Batch, on_pass: Callable[[int], None] | None) -> Iterator[Generation]:
    while batch.has_work:
        finished = batch.step()
        if on_pass is not None:
            on_pass(batch.num_tokens)
        yield from finished
