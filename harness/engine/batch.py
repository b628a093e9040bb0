"""Requests side by side in slots: admitted, moved on pass by pass, handed back when they end."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from time import perf_counter
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvarena.codecs.base import Codec
from kvarena.codecs.none import NoCodec
from kvarena.harness.engine.active_request import ActiveRequest
from kvarena.harness.engine.coded_cache import CodedCache, Workspace
from kvarena.harness.engine.context_read import ContextRead
from kvarena.harness.engine.eviction import Eviction, Limit
from kvarena.harness.engine.foresight import token_scores
from kvarena.harness.engine.forward_pass import ATTENTION_NAME, ForwardPass
from kvarena.harness.engine.free_memory import give_back_free_memory
from kvarena.harness.engine.generation import Generation, KeptTokens
from kvarena.harness.engine.layer_cache import LayerCache
from kvarena.harness.engine.output_norms import OUTPUT_NORMS
from kvarena.harness.engine.packing import Cohort, Portion, pack_cohorts
from kvarena.harness.engine.query_statistics import QueryStatistics
from kvarena.harness.engine.ragged_cache import RaggedCache, make_room
from kvarena.harness.engine.request import Request
from kvarena.harness.engine.rotary import KeyRotator
from kvarena.harness.engine.sampling import choose
from kvarena.harness.errors import UsageError
from kvarena.harness.sampling import Sampling
from kvarena.policies.base import Policy


@dataclass(frozen=True, kw_only=True)
class Recording:
    """What to keep of each request; see Generation."""

    kept: bool = False
    history: bool = False
    logits: Literal["all", "answer"] | None = None


class Batch:
    """Settled requests on their way through slots of their own; see ``Engine`` for the options.

    model, eviction: as given; slots: who works there, or None; layers: the KV stores, wide enough
    for the longest request for as long as the batch lives, so memory is constant; num_tokens: fed
    in the last pass.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        eviction: Eviction,
        codec: Codec,
        requests: Sequence[Request],
        *,
        kv_dtype: torch.dtype | None,
        chunk_tokens: int,
        num_slots: int,
        attention: str,
        rotator: KeyRotator | None,
        sampling: Sampling,
        recording: Recording,
    ) -> None:
        self.num_tokens = 0
        self._waiting: deque[ActiveRequest] = deque()
        self._next_turns: dict[int, ActiveRequest] = {}  # by the index of the request before
        self._line_up(requests)
        self.slots: list[ActiveRequest | None] = [None] * self._num_slots(num_slots)
        self.model, self.eviction, self._codec = model, eviction, codec
        self._chunk_tokens, self._kv_dtype = chunk_tokens, kv_dtype
        self._requests, self._workspace = requests, Workspace()
        self.layers = [self._new_layer(index) for index in range(eviction.num_layers)]
        self._attention = attention
        self._sampling, self._recording = sampling, recording
        self._rotator = rotator

    def _line_up(self, requests: Sequence[Request]) -> None:
        """Have them wait in their order, those of one context together, later turns apart."""
        contexts: dict[str, ContextRead] = {}
        for index, request in enumerate(requests):
            generator = torch.Generator().manual_seed(request.seed)
            active = ActiveRequest(index=index, request=request, generator=generator)
            if request.continues is not None:
                self._next_turns[request.continues] = active
            elif request.context is None:
                self._waiting.append(active)
            else:
                if request.context not in contexts:
                    contexts[request.context] = ContextRead.of(active)
                    self._waiting.append(contexts[request.context])
                contexts[request.context].questions.append(active)

    def _num_slots(self, most: int) -> int:
        """As many as can be at work at once; a context with several questions needs a second one,
        as it has to stay as it is until the last of them begins.
        """
        questions = [len(one.questions) for one in self._waiting if isinstance(one, ContextRead)]
        num_plain = len(self._waiting) - len(questions)
        least = 2 if max(questions, default=0) > 1 else 1
        return min(max(most, least), num_plain + sum(questions))

    @property
    def has_work(self) -> bool:
        return self.num_waiting > 0 or self.num_busy > 0

    @property
    def num_waiting(self) -> int:
        """Requests without a slot so far, a context and its questions as one."""
        return len(self._waiting)

    @property
    def num_busy(self) -> int:
        """Slots at work."""
        return sum(occupant is not None for occupant in self.slots)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def kv_bytes_allocated(self) -> int:
        """Bytes of all cache buffers of all slots."""
        return sum(layer.allocated_bytes for layer in self.layers)

    def step(self) -> list[Generation]:
        """Fill free slots, run one pass, and hand back what has ended with it.

        Raises UsageError for a model that the pass shows to be one that no budget bounds.
        """
        self._admit()
        self._run_pass()
        self._check_layers()
        if self._codec.codes:
            give_back_free_memory()
        finished = []
        for slot, occupant in enumerate(self.slots):
            if occupant is not None and occupant.finish_reason:
                finished += self._leave(slot, occupant)
        return finished

    def start_from(self, num_tokens: int, keys_and_values: Sequence[tuple[Tensor, Tensor]]) -> None:
        """Admit requests as if each had read its first ``num_tokens`` tokens already.

        keys_and_values: of each layer, [1 or S, K, num_tokens, D], the same for all slots or one
        for each. A request whose prompt ends there has chosen its first forced token.
        """
        self._admit()
        slots = slice(0, len(self.slots))
        positions = torch.arange(num_tokens, device=self.model.device).expand(slots.stop, -1)
        for layer, (keys, values) in zip(self.layers, keys_and_values, strict=True):
            shape = (slots.stop, *keys.shape[1:])
            layer.append(slots, keys.expand(shape), values.expand(shape), positions)
        for active in self.slots:
            assert active is not None, "there are as many requests as slots"
            active.num_seen = num_tokens
            if active.chooses_after(0):
                assert active.request.forced is not None, "nothing was run to choose by"
                active.add_token(active.request.forced[0], perf_counter())

    def _leave(self, slot: int, active: ActiveRequest) -> list[Generation]:
        """What ends with ``active``; its slot goes to the next turn of its dialogue, or is free."""
        self.slots[slot] = None
        if isinstance(active, ContextRead):  # none of its questions can begin
            lost = list(active.questions)
            for question in lost:
                question.go_on_from(active)
        else:
            lost = [active]
        finished = []
        for one in lost:
            if active.error is not None:
                one.end_invalid(perf_counter(), active.error)
            finished.append(self._generation(one, slot))
            turn = self._next_turns.pop(one.index, None)
            if turn is None:
                continue
            turn.begin_after(one, perf_counter())
            if one.error is None:
                self.slots[slot] = turn
            else:
                turn.end_invalid(perf_counter(), f"an earlier turn ended: {one.error}")
                finished += self._leave(slot, turn)
        return finished

    @torch.inference_mode()  # as passes are, which allocate
    def _begin_questions(self) -> None:
        """Give free slots to the questions of contexts that are read: the oldest contexts first."""
        for source, context in enumerate(self.slots):
            if not isinstance(context, ContextRead) or not context.waits:
                continue
            while len(context.questions) > 1 and None in self.slots:
                target = self.slots.index(None)
                for layer in self.layers:
                    layer.copy_slot(source, target)
                self.slots[target] = context.next_question(perf_counter())
            if len(context.questions) == 1:
                self.slots[source] = context.next_question(perf_counter())

    def _may_enter(self, active: ActiveRequest) -> bool:
        """A context only if a slot is left for answers, or all could wait for one another."""
        others = [one for one in self.slots if isinstance(one, ContextRead)]
        alone = not isinstance(active, ContextRead) or len(active.questions) == 1
        return alone or len(others) + 1 < len(self.slots)

    def _admit(self) -> None:
        self._begin_questions()
        for slot, occupant in enumerate(self.slots):
            if occupant is None and self._waiting and self._may_enter(self._waiting[0]):
                active = self._waiting.popleft()
                self._look_ahead(active)
                active.admitted_at = perf_counter()
                self.slots[slot] = active
                for layer in self.layers:
                    layer.clear(slot)

    def _look_ahead(self, active: ActiveRequest) -> None:
        """Give a policy that needs them the scores of tokens that only a full cache can know."""
        kind = self.eviction.policy.needs.token_scores
        if kind and active.request.token_scores is None:
            scores = token_scores(active.request, kind, self._chunk_tokens, self._read_whole)
            active.request = replace(active.request, token_scores=scores)

    def _read_whole(self, policy: Policy, request: Request) -> None:
        """Run a request by itself under a policy that keeps everything."""
        batch = Batch(
            self.model,
            Eviction(policy=policy, num_layers=self.eviction.num_layers),
            NoCodec(),
            [replace(request, context=None, continues=None)],
            kv_dtype=None,
            chunk_tokens=self._chunk_tokens,
            num_slots=1,
            attention=self._attention,
            rotator=None,
            sampling=self._sampling,
            recording=Recording(),
        )
        while batch.has_work:
            batch.step()

    @torch.inference_mode()
    def _run_pass(self) -> None:
        """One packed forward pass; every request past its prompt gets a new token."""
        portions = [
            Portion(slot, active, active.next_tokens(self._chunk_tokens))
            for slot, active in enumerate(self.slots)
            if active is not None and not active.waits
        ]
        self._make_room(portions)
        row = [token for portion in portions for token in portion.token_ids]
        deciding, last_rows, end = [], [], 0
        for _, active, token_ids in portions:
            end += len(token_ids)
            if active.chooses_after(len(token_ids)):
                deciding.append(active)
                last_rows.append(end - 1)
        record = self._recording.logits
        logits, cohorts = self._logits(
            row, portions, list(range(len(row))) if record == "all" else last_rows
        )
        self._observe(cohorts)
        for slot, active, token_ids in portions:
            if active.num_seen < len(active.request.prompt):
                active.prefill_tokens += len(token_ids)
            active.num_seen += len(token_ids)
            self._count(slot, active)
            if self._recording.history:
                active.history.append(self._kept(slot, active))
        if record == "all":
            pieces = logits.cpu().split([len(portion.token_ids) for portion in portions])
            for portion, piece in zip(portions, pieces, strict=True):
                portion.active.logits.append(piece)
            logits = logits[last_rows]
        if record == "answer":
            for active, piece in zip(deciding, logits.cpu(), strict=True):
                active.logits.append(piece[None])
        if deciding:
            self._choose(deciding, logits)
        self.num_tokens = len(row)

    def _choose(self, deciding: Sequence[ActiveRequest], logits: Tensor) -> None:
        """Give each request its next token by its row of logits [S, V], or end it as invalid."""
        # Minus infinity is a token ruled out; NaN, plus infinity, or nothing but minus infinity is
        # a model gone wrong, and so is their largest value.
        broken = ~logits.amax(dim=-1).isfinite()
        logits = logits.masked_fill(broken[:, None], 0.0)
        for row, active in zip(logits, deciding, strict=True):
            if len(active.token_ids) < active.request.min_new_tokens:
                assert active.request.stop_token_ids is not None, "settled"
                row[list(active.request.stop_token_ids)] = float("-inf")
        chosen = choose(self._sampling, logits, [active.generator for active in deciding])
        now_sec = perf_counter()
        for active, token_id, is_broken in zip(deciding, chosen, broken.tolist(), strict=True):
            if is_broken:
                after = f"after {len(active.token_ids)} new tokens"
                active.end_invalid(now_sec, f"logits were not finite {after}")
            elif not active.error:
                active.add_token(token_id, now_sec)

    def _logits(
        self, row: list[int], portions: Sequence[Portion], rows_wanted: list[int]
    ) -> tuple[Tensor, Sequence[Cohort]]:
        """Logits [len(rows_wanted), V] of the packed row; caches are written and evicted."""
        positions = [a.num_seen + i for _, a, tokens in portions for i in range(len(tokens))]
        device = self.model.device
        # Each transfer makes the host wait for the device, so tokens and positions share one.
        inputs = torch.tensor([row, positions], device=device)  # [2, total]
        wanted = torch.tensor(rows_wanted, device=device).long()
        return self._forward(inputs, portions, wanted)

    def _forward(
        self, inputs: Tensor, portions: Sequence[Portion], rows_wanted: Tensor
    ) -> tuple[Tensor, Sequence[Cohort]]:
        """``_logits`` from where its numbers are on the device; nothing in here waits for it."""
        tokens, position_ids = inputs.split(1)
        cohorts = pack_cohorts(portions, self.layers, position_ids[0], self.eviction.every)
        forward_pass = ForwardPass(
            cohorts=cohorts,
            layers=self.layers,
            eviction=self.eviction,
            attention=self._attention,
            rotator=self._rotator,
        )
        config = self.model.config.get_text_config()
        before = config._attn_implementation
        config._attn_implementation = ATTENTION_NAME
        try:
            output = self.model(
                input_ids=tokens,
                position_ids=position_ids,
                use_cache=False,
                logits_to_keep=rows_wanted,
                forward_pass=forward_pass,
            )
        finally:
            config._attn_implementation = before  # the model stays as the caller knows it
        forward_pass.settle()
        return output.logits[0], cohorts

    def _observe(self, cohorts: Sequence[Cohort]) -> None:
        """Note for each request what attended; end those whose scores were not finite."""
        for cohort in cohorts:
            broken = cohort.observed.first_layers_not_finite(cohort.num_slots)
            for active, layer in zip(self.slots[cohort.slots], broken, strict=True):
                assert active is not None, "cohorts are of slots at work"
                active.kernels |= cohort.observed.kernels
                active.has_evicted |= cohort.observed.has_evicted
                if layer is not None:
                    name = type(self.eviction.policy).__name__
                    first, last = active.num_seen, active.num_seen + cohort.num_new - 1
                    active.end_invalid(
                        perf_counter(),
                        f"policy {name} gave scores that are not finite in "
                        f"layer {layer}, in the pass of tokens {first} to {last}",
                    )

    def _count(self, slot: int, active: ActiveRequest) -> None:
        """Note what the slot holds after a pass, and what it held in it."""
        kept = sum(layer.held_bytes(slot) for layer in self.layers)
        in_pass = sum(layer.bytes_in_pass(slot) for layer in self.layers)
        workspace = max(layer.workspace_bytes(slot) for layer in self.layers)
        counts = [count for layer in self.layers for count in layer.held_tokens(slot)]
        held = -(-sum(counts) // len(counts))
        active.kept_tokens = max(active.kept_tokens, held)
        active.kv_bytes_kept = max(active.kv_bytes_kept, kept)
        active.kv_bytes_peak = max(active.kv_bytes_peak, in_pass + workspace)

    def _kept(self, slot: int, active: ActiveRequest) -> KeptTokens:
        positions = [layer.held_positions(slot) for layer in self.layers]
        return KeptTokens(seen_tokens=active.num_seen, positions=positions)

    def _generation(self, active: ActiveRequest, slot: int) -> Generation:
        reason = active.finish_reason
        assert reason is not None, "only finished requests leave their slot"
        recording = self._recording
        return Generation(
            index=active.index,
            token_ids=active.token_ids,
            finish_reason=reason,
            error=active.error,
            kernels=tuple(sorted(active.kernels)),
            prompt_tokens=len(active.request.prompt),
            prefill_tokens=active.prefill_tokens,
            budget_tokens=active.request.budget_tokens,
            has_evicted=active.has_evicted,
            kept_tokens=active.kept_tokens,
            kv_bytes_kept=active.kv_bytes_kept,
            kv_bytes_peak=active.kv_bytes_peak,
            ttft_sec=active.first_token_at - active.admitted_at,
            decode_tokens_per_sec=active.decode_tokens_per_sec,
            kept_positions=self._kept(slot, active).positions if recording.kept else None,
            kept_history=active.history if recording.history else None,
            logits=torch.cat(active.logits) if recording.logits else None,
        )

    def _new_layer(self, index: int) -> LayerCache | RaggedCache:
        places = max((self._places(request, index) for request in self._requests), default=0)
        if self.eviction.shape.scope == "head":
            return self._new_cache(len(self.slots), places)
        return RaggedCache(len(self.slots), lambda: self._new_cache(1, places))

    def _new_cache(self, num_slots: int, places: int) -> LayerCache:
        policy, kv_dtype = self.eviction.policy, self._kv_dtype
        num_saved_sinks = self.eviction.sinks if policy.needs.rank_positions else 0
        num_queries = policy.needs.attention_rows if policy.needs.rows_over_steps else 0
        own_columns = (OUTPUT_NORMS,) if policy.needs.output_norms else ()
        statistics = None
        if policy.needs.future_queries:
            statistics = QueryStatistics(
                num_slots,
                policy.needs.skipped_queries,
                with_covariance=policy.needs.future_covariance,
            )
        side_state = ((*policy.columns, *own_columns), num_saved_sinks, num_queries, statistics)
        if not self._codec.codes and kv_dtype in (None, self.model.dtype):
            return LayerCache(num_slots, places, *side_state)
        return CodedCache(
            num_slots,
            places,
            self._codec,
            self._chunk_tokens,
            kv_dtype,
            self._workspace,
            *side_state,
        )

    def _places(self, request: Request, layer: int) -> int:
        """Places that a head of the layer can ever fill, on average where heads share a budget."""
        total = request.total_tokens
        if request.budget_tokens is None:
            return total
        room = request.held_back_tokens
        limit = Limit(shared_tokens=request.budget_tokens - room, extra_tokens=room)
        most_new = max(self._chunk_tokens, self.eviction.every)
        if request.continues is not None:  # a chunk may come on top of what waits for an eviction
            most_new = self._chunk_tokens + self.eviction.every - 1
        return min(total, self.eviction.layer_tokens(limit, layer) + most_new)

    def _make_room(self, portions: Sequence[Portion]) -> None:
        """See to it that every head has places for what its slot brings to the pass."""
        ragged = [layer for layer in self.layers if isinstance(layer, RaggedCache)]
        for slot, _, token_ids in portions:
            by_layer = [layer.heads(slot) for layer in ragged if layer.heads(slot)]
            if self.eviction.shape.scope == "model" and by_layer:
                by_layer = [[head for heads in by_layer for head in heads]]
            for heads in by_layer:
                make_room(heads, len(token_ids), self._mean_places)

    @cached_property
    def _mean_places(self) -> int:
        """Places of a head on average, where heads share a budget: the same in all layers."""
        return max(self._places(request, 0) for request in self._requests)

    def _check_layers(self) -> None:
        """Raise UsageError for a model with layers that keep their past somewhere else.

        A Mamba or linear-attention layer would carry state from one request of a packed row into
        the next, and no budget would bound it.
        """
        untouched = [n for n, layer in enumerate(self.layers) if not layer.is_allocated]
        if untouched:
            raise UsageError(
                f"model type {self.model.config.model_type} is not supported: its layers "
                f"{untouched} do not attend through transformers' attention interface"
            )
