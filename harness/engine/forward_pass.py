"""One packed forward pass: what happens to keys and values inside each layer's attention.

In every layer, cohort by cohort: append the new tokens, attend, let the policy score, evict down to
the budget.

Shape letters: S slots of a cohort, H query heads, K KV heads, Q new tokens per slot, T = kept and
new tokens, D head dim.
"""

import inspect
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from kvarena.harness.engine import attention
from kvarena.harness.engine.attention import KERNELS, AttentionSpec
from kvarena.harness.engine.eviction import Eviction
from kvarena.harness.engine.layer_cache import LayerCache, Part, head_slice
from kvarena.harness.engine.output_norms import OUTPUT_NORMS, output_norms
from kvarena.harness.engine.packing import Cohort
from kvarena.harness.engine.ragged_cache import RaggedCache
from kvarena.harness.engine.rotary import KeyRotator
from kvarena.harness.errors import PolicyError, UsageError
from kvarena.policies.base import (
    TOKEN_SCORE,
    FutureQueries,
    LayerView,
    NewTokens,
    OptionError,
    Policy,
)

ATTENTION_NAME = "kvarena"

# Keyword arguments of transformers' attention call that change nothing here. Any other one raises:
# a silently ignored argument once made a model wrong by 0.4 in its logits.
_HARMLESS = {"position_ids", "use_cache", "output_router_logits", "is_causal"}


@dataclass(frozen=True, kw_only=True)
class ForwardPass:
    """Everything the attention function needs; travels to it as a keyword argument of the model.

    attention: name of the kernel in ``KERNELS`` for every layer that needs no weights.
    """

    cohorts: Sequence[Cohort]
    layers: Sequence[LayerCache | RaggedCache]
    eviction: Eviction
    attention: str
    rotator: KeyRotator | None = None

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec
    ) -> Tensor:
        """Attention output [1, total, H, D] of one layer; its cache is updated and evicted."""
        outputs = []
        for cohort in self.cohorts:
            output = self._attend_cohort(
                cohort,
                module,
                cohort.unpack(query),
                cohort.unpack(key),
                cohort.unpack(value),
                spec,
            )
            outputs.append(output.transpose(1, 2).flatten(0, 1))  # [S * Q, H, D]
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs))[None]

    def settle(self) -> None:
        """Evict what only the scores of all layers could decide, once the pass is through them."""
        for cohort in self.cohorts:
            if cohort.observed.waiting:
                assert cohort.limit is not None, "nothing is evicted without a bound"
                self._evict(cohort.observed.waiting, cohort.limit.tokens)

    def _attend_cohort(
        self,
        cohort: Cohort,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        spec: AttentionSpec,
    ) -> Tensor:
        """[S, H, Q, D]; query [S, H, Q, D], key and value [S, K, Q, D]."""
        index = module.layer_idx
        assert isinstance(index, int)
        cache = self.layers[index]
        columns = {}
        if cohort.token_scores is not None:
            columns[TOKEN_SCORE] = cohort.token_scores[:, index]
        if self.eviction.policy.needs.output_norms:
            columns[OUTPUT_NORMS] = output_norms(module, value, query.shape[1])
        projected = None
        if self.eviction.policy.needs.future_queries:
            assert self.rotator is not None
            projected = self.rotator.unrotate(module, query, cohort.positions)
        cache.append(cohort.slots, key, value, cohort.positions, query, columns, projected)
        budget_tokens = self._budget_if_over(cohort, index)
        new = None
        if self.eviction.policy.needs.new_tokens and self._is_scored(budget_tokens):
            new = self.new_tokens(cohort, module, query, key, value)
        outputs, scored = [], []
        group = query.shape[1] // key.shape[1]
        for part in cache.parts(cohort.slots):
            heads = head_slice(part.heads, group)
            output, scores = self._attend_part(
                cohort, part, module, query[:, heads], new, spec.of_heads(heads), budget_tokens
            )
            outputs.append(output)
            scored += [] if scores is None else [(part, scores)]
        if budget_tokens is not None:
            cohort.observed.has_evicted = True
            if self.eviction.shape.scope == "model":
                cohort.observed.waiting.extend(scored)
            else:
                self._evict(scored, budget_tokens)
        cache.settle(cohort.slots, query, cohort.positions, spec)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def _budget_if_over(self, cohort: Cohort, index: int) -> int | None:
        """What a head of this layer keeps, on average, if it holds too many with the new tokens."""
        limit = cohort.limit
        if limit is None:
            return None
        if self.eviction.shape.scope == "model":
            budget_tokens, held_tokens = limit.tokens, cohort.mean_tokens
        else:
            budget_tokens = self.eviction.layer_tokens(limit, index)
            counts = self.layers[index].held_tokens(cohort.slots.start)
            held_tokens = sum(counts) // len(counts)
        return budget_tokens if held_tokens > budget_tokens + limit.spare_tokens else None

    def _is_scored(self, budget_tokens: int | None) -> bool:
        """Whether the policy sees this pass: something goes, or it keeps columns of its own."""
        return budget_tokens is not None or bool(self.eviction.policy.columns)

    def _may_stay_coded(self, cohort: Cohort, spec: AttentionSpec) -> bool:
        """Whether a step's attention asks nothing that needs keys: no mask, no mass, no moved ones.

        The reference kernel is the yardstick and reads every token out.
        """
        needs = self.eviction.policy.needs
        return (
            self.attention != "reference"
            and cohort.num_new == 1
            and spec.is_causal_only
            and not needs.attention_mass
            and not needs.rank_positions
        )

    def _attend_part(
        self,
        cohort: Cohort,
        part: Part,
        module: nn.Module,
        query: Tensor,
        new: NewTokens | None,
        spec: AttentionSpec,
        budget_tokens: int | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Output [S, H, Q, D] of some heads, and [S, K, T] scores if something of theirs goes.

        query: [S, H, Q, D] of these heads; new: of the whole layer.
        """
        cache, needs = part.cache, self.eviction.policy.needs
        is_scored = self._is_scored(budget_tokens)
        if self._may_stay_coded(cohort, spec) and not is_scored:
            fused = cache.attend(part.slots, query, spec)
            if fused is not None:
                cohort.observed.kernels.add("triton")
                return fused, None
        num_tokens = cache.num_tokens(part.slots)
        keys, values = cache.tokens(part.slots, num_tokens)
        if needs.rank_positions:
            self.move_sinks(cohort, part, module, keys)
        positions = cache.positions[part.slots, :, :num_tokens]
        mask = self._mask(cohort, positions, spec)

        mass = rows = None
        ran = self.attention
        if needs.attention_mass:
            output, mass, ran = attention.attend_with_mass(
                query, keys, values, mask, spec, may_fuse=self.attention != "reference"
            )
        elif is_scored and needs.attention_rows >= cohort.num_new and not needs.rows_over_steps:
            output, rows = attention.attend_with_weights(query, keys, values, mask, spec)
            ran = "reference"
        else:
            output = KERNELS[self.attention](query, keys, values, mask, spec)
        cohort.observed.kernels.add(ran)
        if not is_scored:
            return output, None

        if needs.rows_over_steps:
            assert cache.queries is not None, "asked for when the cache was made"
            rows = cache.queries.rows(part.slots, keys, positions, spec)
        elif needs.attention_rows and rows is None:
            rows = attention.last_query_weights(query, keys, mask, spec, needs.attention_rows)
        index = module.layer_idx
        assert isinstance(index, int)
        columns = cache.columns(part.slots, num_tokens)
        num_kv_heads = len(self.layers[index].held_tokens(cohort.slots.start))
        group = query.shape[1] // keys.shape[1]
        view = LayerView(
            layer=index,
            kv_heads=part.heads,
            layer_heads=(num_kv_heads * group, num_kv_heads),
            stored_keys=keys,
            stored_values=values,
            positions=positions.long(),
            attention=rows,
            attention_mass=mass,
            new=new,
            output_norms=columns.pop(OUTPUT_NORMS, None),
            future_queries=self.future_queries(cohort, part, module, spec),
            columns=columns,
            text_tokens=cohort.text_tokens,
            num_recent=0 if budget_tokens is None else self.eviction.num_recent(budget_tokens),
            num_kept=budget_tokens or 0,
        )
        scores = self._scores(view)
        sums, so_far = scores.sum(dim=(1, 2)), cohort.observed.score_sums.get(index)
        cohort.observed.score_sums[index] = sums if so_far is None else so_far + sums
        if budget_tokens is None:
            return output, None
        return output, self.protect(cohort, view, scores, spec)

    def _evict(self, scored: Sequence[tuple[Part, Tensor]], budget_tokens: int) -> None:
        """Down to the budget, which heads share among each other where the shape lets them.

        scored: of all heads that share one, with protected tokens at +inf.
        """
        if self.eviction.shape.scope == "head":
            kept = [budget_tokens] * len(scored)
        else:
            kept = self.eviction.head_tokens([own[0, 0] for _, own in scored], budget_tokens)
        for (part, scores), num_kept in zip(scored, kept, strict=True):
            if num_kept < scores.shape[-1]:
                part.cache.evict(part.slots, scores, num_kept)

    def _scores(self, view: LayerView) -> Tensor:
        """The policy's scores [S, K, T] in float32. Raises PolicyError for what is none."""
        policy, wanted = type(self.eviction.policy), view.positions.shape
        try:
            scores = self.eviction.policy.score(view)
        except OptionError as error:
            raise UsageError(f"{policy.__name__}: {error}") from error
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            where = _line_in(policy, error)
            raise PolicyError(f"policy {policy.__name__} ({where}): {what}") from error
        if not isinstance(scores, Tensor) or scores.shape != wanted:
            got = tuple(scores.shape) if isinstance(scores, Tensor) else type(scores).__name__
            raise PolicyError(
                f"policy {policy.__name__} ({_line_in(policy)}): score returned {got} in layer "
                f"{view.layer}, not a tensor [S, K, T] of {tuple(wanted)}"
            )
        return scores.float()

    def protect(
        self, cohort: Cohort, view: LayerView, scores: Tensor, spec: AttentionSpec
    ) -> Tensor:
        """Scores [S, K, T] with the protected tokens at +inf.

        Tokens that the layer's own sliding window hides from every later query go first, protected
        or not: nothing can ever attend to them.
        """
        positions = view.positions
        # Only protection is infinite. A sequence with other scores that are not finite ends as
        # invalid after the pass; until then its slot must hold as many tokens as it should.
        largest = torch.finfo(torch.float32).max
        scores = scores.nan_to_num(nan=-largest, posinf=largest, neginf=-largest)
        next_position = cohort.next_position
        if self.eviction.sinks:
            scores = scores.masked_fill(positions < self.eviction.sinks, float("inf"))
        if view.num_recent:
            scores = scores.masked_fill(positions >= next_position - view.num_recent, float("inf"))
        if spec.sliding_window is not None and not self.eviction.policy.needs.rank_positions:
            hidden = positions <= next_position - spec.sliding_window
            scores = scores.masked_fill(hidden, float("-inf"))
        return scores

    def new_tokens(
        self, cohort: Cohort, module: nn.Module, query: Tensor, key: Tensor, value: Tensor
    ) -> NewTokens:
        """This pass's tokens as the layer projected them, before rotary positions."""
        assert self.rotator is not None
        return NewTokens(
            queries=self.rotator.unrotate(module, query, cohort.positions),
            keys=self.rotator.unrotate(module, key, cohort.positions),
            values=value,
        )

    def future_queries(
        self, cohort: Cohort, part: Part, module: nn.Module, spec: AttentionSpec
    ) -> FutureQueries | None:
        """What these heads are to expect at the next positions, if the policy asks for it."""
        num_next = self.eviction.policy.needs.future_queries
        if not num_next:
            return None
        assert self.rotator is not None
        assert part.cache.statistics is not None, "asked for when the cache was made"
        mean, covariance = part.cache.statistics.of(part.slots)
        turn = partial(
            self.rotator.turn_to_next, module, positions=cohort.positions, num_next=num_next
        )
        if covariance is not None:  # R C R', as C is symmetric: turn its rows, then its columns
            covariance = turn(turn(covariance).transpose(-1, -2)) * spec.scaling**2
        return FutureQueries(mean=turn(mean).squeeze(2) * spec.scaling, covariance=covariance)

    def move_sinks(self, cohort: Cohort, part: Part, module: nn.Module, keys: Tensor) -> None:
        """Rotate the sink keys to sit right before the other kept tokens.

        With ranks as positions all distances between kept tokens are those of their ranks. The
        newest tokens are an unbroken run, so their distances are right as they are; only the sinks
        are nearer than in the text, by the number of tokens evicted between. They are always
        rotated from the keys as first written, so no rounding builds up.
        """
        num_tokens = keys.shape[2]
        num_sinks = min(part.cache.num_saved_sinks, num_tokens)
        if num_sinks:
            saved = part.cache.sink_keys[part.slots, :, :num_sinks]
            nearer = cohort.num_evicted_before(num_tokens)
            assert self.rotator is not None
            keys[:, :, :num_sinks] = self.rotator.rotate(module, saved, nearer)

    def _mask(self, cohort: Cohort, positions: Tensor, spec: AttentionSpec) -> Tensor | None:
        """What each query sees, broadcastable to [S, K, Q, T], or None; positions: [S, K, T]."""
        num_tokens = positions.shape[-1]
        if spec.sliding_window is None:
            return cohort.causal_mask(num_tokens)
        if (
            self.eviction.policy.needs.rank_positions
        ):  # attention sees the sinks where they were moved to
            moved = positions + cohort.num_evicted_before(num_tokens)[:, None, None]
            positions = torch.where(positions < self.eviction.sinks, moved, positions)
        return attention.visible_tokens(
            cohort.positions, positions, cohort.num_new, spec.sliding_window
        )


def _line_in(policy: type[Policy], error: Exception | None = None) -> str:
    """Where an error arose in a policy's file, or its ``score`` begins: policies/mine.py line 9."""
    path = Path(inspect.getfile(policy))
    line = inspect.getsourcelines(policy.score)[1]
    for frame in traceback.extract_tb(error.__traceback__ if error else None):
        if Path(frame.filename) == path and frame.lineno:
            line = frame.lineno
    return f"{path.parent.name}/{path.name} line {line}"


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    forward_pass: ForwardPass | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: Any,  # Any: whatever a model of a later release may pass
) -> tuple[Tensor, None]:
    """The attention function that transformers calls in every layer.

    query: [1, H, total, D]; key, value: [1, K, total, D]. Returns [1, total, H, D].
    """
    assert attention_mask is None, "no mask function is registered, so none can have been built"
    unknown = {name for name, value in others.items() if value is not None} - _HARMLESS
    if unknown or dropout:
        raise NotImplementedError(
            f"{type(module).__name__} passes {sorted(unknown) or 'dropout'} to its attention, "
            "which the engine does not know; running on would give wrong results"
        )
    if forward_pass is None:
        raise UsageError(
            f"{type(module).__name__} does not hand its keyword arguments on to its attention, so "
            "its model is not supported; use another one"
        )
    spec = AttentionSpec(
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=softcap,
        sink_logits=s_aux,
        sliding_window=sliding_window,
    )
    return forward_pass.attend(module, query, key, value, spec), None


AttentionInterface.register(ATTENTION_NAME, packed_attention)
