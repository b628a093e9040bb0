"""The engine: many sequences side by side, each under its own hard token budget.

Every sequence owns a slot of N + B places per layer and head (N budget, B chunk). A pass takes a
chunk from each slot that still reads its prompt and one token from each slot that writes, as one
packed row; each layer evicts right after its attention. Slots refill as sequences end. What a
sequence keeps and answers does not depend on what runs beside it (float rounding aside).

The engine knows token ids only: no text, no tasks, no policy by name.
"""

from collections import deque
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from time import perf_counter
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvarena.codecs.base import Codec
from kvarena.codecs.none import NoCodec
from kvarena.harness.engine.forward_pass import ARENA, ForwardPass, Run, pack_runs
from kvarena.harness.engine.free_memory import give_back_free_memory
from kvarena.harness.engine.layer_cache import LayerCache
from kvarena.harness.engine.layer_stores import check_layers, count_bytes, new_layers
from kvarena.harness.engine.limits import check_architecture, check_attention, check_budget
from kvarena.harness.engine.request import StopTokens, plan_sequences
from kvarena.harness.engine.rotary import KeyRotator
from kvarena.harness.engine.sampling import Sampling
from kvarena.harness.engine.sequence import Generation, KeptTokens, Sequence, in_order
from kvarena.harness.errors import UsageError
from kvarena.policies.base import Policy

# Raised whenever a kept position, a token or a counted byte could change: it is part of a cell's
# identity, so rows of another engine are never continued.
ENGINE_VERSION = 3


@dataclass(frozen=True, kw_only=True)
class _Recording:
    kept: bool
    history: bool
    logits: Literal["all", "answer"] | None


class Engine:
    """Generates under a token budget. Raises UsageError for what cannot be honoured.

    model: a decoder of transformers; it is not changed.
    codec: how tokens older than its exact window are stored; None: as they are.
    kv_dtype: data type of tokens that are not coded; None: the model's own.
    budget_tokens: most tokens a KV head of any layer holds after a chunk, N; None: no bound.
    chunk_tokens: prompt tokens per pass and sequence, B.
    slots: sequences side by side. attention: sdpa | flash | reference.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        policy: Policy,
        *,
        codec: Codec | None = None,
        kv_dtype: torch.dtype | None = None,
        budget_tokens: int | None = None,
        chunk_tokens: int = 128,
        slots: int = 8,
        attention: str = "sdpa",
    ) -> None:
        for name, value in (("chunk_tokens", chunk_tokens), ("slots", slots)):
            if value < 1:
                raise UsageError(f"{name} must be >= 1, got {value}")
        check_attention(attention, str(model.device), model.dtype)
        check_budget(policy, budget_tokens)
        check_architecture(model)
        self.model = model
        self.policy = policy
        self.codec = codec or NoCodec()
        self.kv_dtype = kv_dtype
        self.budget_tokens = budget_tokens
        self.chunk_tokens = chunk_tokens
        self.slots = slots
        self.layers: list[LayerCache] = []
        self._attention = attention
        needs_rotator = policy.needs.rank_positions or policy.needs.new_tokens
        self._rotator = KeyRotator(model) if needs_rotator else None

    @property
    def kv_bytes_allocated(self) -> int:
        """Bytes of all cache buffers of all slots, as allocated by the last ``generate``."""
        return sum(layer.allocated_bytes for layer in self.layers)

    def generate(
        self,
        prompts: Seq[Seq[int]],
        *,
        max_new_tokens: int | Seq[int] | None = None,
        forced: Seq[Seq[int]] | None = None,
        budgets: Seq[int | None] | None = None,
        sampling: Sampling | None = None,
        seeds: int | Seq[int] = 0,
        stop_token_ids: StopTokens = None,
        min_new_tokens: int | Seq[int] = 0,
        question_tokens: int | Seq[int] = 0,
        as_completed: bool = False,
        on_pass: Callable[[int], None] | None = None,
        record_kept: bool = False,
        record_history: bool = False,
        record_logits: Literal["all", "answer"] | None = None,
    ) -> Iterator[Generation]:
        """Yield one Generation per prompt, in the order of the prompts (or as they end).

        prompts: token ids; an empty one starts from the model's BOS token.
        forced: one answer per prompt that is fed in place of the model's own (teacher forcing); it
        stands for max_new_tokens and is never stopped.
        budgets: one per prompt, in place of budget_tokens.
        sampling: greedy if None; each sequence draws from a generator of its own, seeded by seeds:
        equal prompts under one seed for all draw the same answer, so give one seed per prompt.
        stop_token_ids: for all, or one collection per prompt; None: the model's own.
        min_new_tokens: no stop token before so many.
        question_tokens: last tokens of the prompt that the context is compressed without; context
        and question together stay in the budget.
        on_pass: told the number of tokens of each pass.
        record_kept: positions held at the end; record_history: after every pass;
        record_logits: of all tokens fed, or those that choose each token of the answer.
        """
        if (max_new_tokens is None) == (forced is None):
            raise UsageError("give either max_new_tokens or forced")
        lengths = max_new_tokens if forced is None else [len(answer) for answer in forced]
        assert lengths is not None, "one of the two is given"
        sequences = plan_sequences(
            self.model,
            self.policy,
            prompts,
            max_new_tokens=lengths,
            forced=forced,
            budgets=self.budget_tokens if budgets is None else budgets,
            seeds=seeds,
            stop_token_ids=stop_token_ids,
            min_new_tokens=min_new_tokens,
            question_tokens=question_tokens,
        )
        recording = _Recording(kept=record_kept, history=record_history, logits=record_logits)
        finished = self._run(sequences, sampling or Sampling(), recording, on_pass)
        return finished if as_completed else in_order(finished)

    def _run(
        self,
        sequences: list[Sequence],
        sampling: Sampling,
        recording: _Recording,
        on_pass: Callable[[int], None] | None,
    ) -> Iterator[Generation]:
        waiting = deque(sequences)
        slots: list[Sequence | None] = [None] * min(self.slots, len(sequences))
        layers = new_layers(
            self.model,
            self.policy,
            self.codec,
            sequences,
            kv_dtype=self.kv_dtype,
            num_slots=len(slots),
            chunk_tokens=self.chunk_tokens,
        )
        while waiting or any(slots):
            for slot, occupant in enumerate(slots):
                if occupant is None and waiting:
                    sequence = waiting.popleft()
                    sequence.admitted_at = perf_counter()
                    slots[slot] = sequence
            self.layers = layers  # another iterator of this engine may have run in between
            num_tokens = self._step(slots, sampling, recording)
            check_layers(self.model, layers)
            if self.codec.codes:
                give_back_free_memory()
            if on_pass is not None:
                on_pass(num_tokens)
            finished = []
            for slot, occupant in enumerate(slots):
                if occupant is not None and occupant.finish_reason:
                    slots[slot] = None
                    finished.append(self._generation(occupant, slot, recording))
            yield from finished

    @torch.inference_mode()
    def _step(self, slots: Seq[Sequence | None], sampling: Sampling, recording: _Recording) -> int:
        """One packed forward pass; every sequence past its prompt gets a new token.

        Returns how many tokens were fed.
        """
        work = [
            (slot, sequence, sequence.next_tokens(self.chunk_tokens))
            for slot, sequence in enumerate(slots)
            if sequence is not None
        ]
        row = [token for _, _, tokens in work for token in tokens]
        deciding, last_rows, end = [], [], 0
        for _, sequence, tokens in work:
            end += len(tokens)
            if sequence.num_seen + len(tokens) >= len(sequence.prompt):
                deciding.append(sequence)
                last_rows.append(end - 1)
        rows_wanted = list(range(len(row))) if recording.logits == "all" else last_rows
        logits, runs = self._forward(row, work, rows_wanted)
        self._observe(runs, {slot: sequence for slot, sequence, _ in work})

        for slot, sequence, tokens in work:
            num_touched = sequence.num_live + len(tokens)
            sequence.advance(len(tokens))
            count_bytes(self.layers, slot, sequence, num_touched)
            if recording.history:
                sequence.history.append(self._kept(slot, sequence))
        if recording.logits == "all":
            pieces = logits.cpu().split([len(tokens) for _, _, tokens in work])
            for (_, sequence, _), piece in zip(work, pieces, strict=True):
                sequence.logits.append(piece)
            logits = logits[last_rows]
        if recording.logits == "answer":
            for sequence, piece in zip(deciding, logits.cpu(), strict=True):
                sequence.logits.append(piece[None])
        if deciding:
            # Minus infinity is a token ruled out; NaN, plus infinity, or nothing but minus infinity
            # is a model gone wrong, and so is their largest value.
            broken = ~logits.amax(dim=-1).isfinite()
            logits = logits.masked_fill(broken[:, None], 0.0)
            for row_index, sequence in enumerate(deciding):
                if len(sequence.token_ids) < sequence.min_new_tokens:
                    logits[row_index, list(sequence.stop_token_ids)] = float("-inf")
            chosen = sampling.choose(logits, [sequence.generator for sequence in deciding])
            now_sec = perf_counter()
            for sequence, token_id, is_broken in zip(
                deciding, chosen, broken.tolist(), strict=True
            ):
                if is_broken:
                    after = f"after {len(sequence.token_ids)} new tokens"
                    sequence.end_invalid(now_sec, f"logits were not finite {after}")
                elif not sequence.error:
                    sequence.add_token(token_id, now_sec)
        return len(row)

    def _forward(
        self, row: list[int], work: list[tuple[int, Sequence, list[int]]], rows_wanted: list[int]
    ) -> tuple[Tensor, Seq[Run]]:
        """Logits [len(rows_wanted), V] of the packed row; caches are written and evicted."""
        positions = [s.num_seen + i for _, s, tokens in work for i in range(len(tokens))]
        device = self.model.device
        # Each transfer makes the host wait for the device, so tokens and positions share one.
        inputs = torch.tensor([row, positions], device=device)  # [2, total]
        return self._logits(inputs, work, torch.tensor(rows_wanted, device=device).long())

    def _observe(self, runs: Seq[Run], by_slot: dict[int, Sequence]) -> None:
        """Note for each sequence what attended; end those whose scores were not finite."""
        for run in runs:
            broken = run.observed.first_layers_not_finite(run.num_sequences)
            for slot, layer in zip(range(run.slots.start, run.slots.stop), broken, strict=True):
                sequence = by_slot[slot]
                sequence.kernels |= run.observed.kernels
                if layer is not None:
                    first, last = sequence.num_seen, sequence.num_seen + run.num_new - 1
                    sequence.end_invalid(
                        perf_counter(),
                        f"policy {type(self.policy).__name__} gave scores that are not finite in "
                        f"layer {layer}, in the pass of tokens {first} to {last}",
                    )

    def _logits(
        self, inputs: Tensor, work: list[tuple[int, Sequence, list[int]]], rows_wanted: Tensor
    ) -> tuple[Tensor, Seq[Run]]:
        """``_forward`` from where its numbers are on the device; nothing in here waits for it."""
        tokens, position_ids = inputs.split(1)
        arena = ForwardPass(
            runs=pack_runs(work, position_ids[0]),
            layers=self.layers,
            policy=self.policy,
            attention=self._attention,
            rotator=self._rotator,
        )
        config = self.model.config.get_text_config()
        before = config._attn_implementation
        config._attn_implementation = ARENA
        try:
            output = self.model(
                input_ids=tokens,
                position_ids=position_ids,
                use_cache=False,
                logits_to_keep=rows_wanted,
                arena=arena,
            )
        finally:
            config._attn_implementation = before  # the model stays as the caller knows it
        return output.logits[0], arena.runs

    def _kept(self, slot: int, sequence: Sequence) -> KeptTokens:
        positions = [
            layer.positions[slot, :, : sequence.num_live].long().sort(dim=-1).values.cpu()
            for layer in self.layers
        ]
        return KeptTokens(seen_tokens=sequence.num_seen, positions=positions)

    def _generation(self, sequence: Sequence, slot: int, recording: _Recording) -> Generation:
        reason = sequence.finish_reason
        assert reason is not None, "only finished sequences leave their slot"
        return Generation(
            index=sequence.index,
            token_ids=sequence.token_ids,
            finish_reason=reason,
            error=sequence.error,
            kernels=tuple(sorted(sequence.kernels)),
            prompt_tokens=len(sequence.prompt),
            budget_tokens=sequence.budget_tokens,
            kept_tokens=sequence.most_kept,
            kv_bytes_kept=sequence.kv_bytes_kept,
            kv_bytes_peak=sequence.kv_bytes_peak,
            ttft_sec=sequence.first_token_at - sequence.admitted_at,
            decode_tokens_per_sec=sequence.decode_tokens_per_sec,
            kept_positions=self._kept(slot, sequence).positions if recording.kept else None,
            kept_history=sequence.history if recording.history else None,
            logits=torch.cat(sequence.logits) if recording.logits else None,
        )
