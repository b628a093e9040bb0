"""One packed forward pass: what happens to keys and values inside each layer's attention.

In every layer, run by run: append the new tokens, attend, let the policy score, evict down to the
budget.

Shape letters: S slots of a run, H query heads, K KV heads, Q new tokens per slot, T = kept and new
tokens, D head dim.
"""

import inspect
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from kvarena.harness.engine import attention
from kvarena.harness.engine.attention import KERNELS, AttentionSpec
from kvarena.harness.engine.layer_cache import LayerCache
from kvarena.harness.engine.packing import Run
from kvarena.harness.engine.rotary import KeyRotator
from kvarena.harness.errors import PolicyError, UsageError
from kvarena.policies.base import LayerView, NewTokens, OptionError, Policy

ATTENTION_NAME = "kvarena"

# Keyword arguments of transformers' attention call that change nothing here. Any other one raises:
# a silently ignored argument once made a model wrong by 0.4 in its logits.
_HARMLESS = {"position_ids", "use_cache", "output_router_logits", "is_causal"}


@dataclass(frozen=True, kw_only=True)
class ForwardPass:
    """Everything the attention function needs; travels to it as a keyword argument of the model.

    attention: name of the kernel in ``KERNELS`` for every layer that needs no weights.
    """

    runs: Sequence[Run]
    layers: Sequence[LayerCache]
    policy: Policy
    attention: str
    rotator: KeyRotator | None = None

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec
    ) -> Tensor:
        """Attention output [1, total, H, D] of one layer; its cache is updated and evicted."""
        outputs = []
        for run in self.runs:
            output = self._attend_run(
                run, module, run.unpack(query), run.unpack(key), run.unpack(value), spec
            )
            outputs.append(output.transpose(1, 2).flatten(0, 1))  # [S * Q, H, D]
        return (outputs[0] if len(outputs) == 1 else torch.cat(outputs))[None]

    def _attend_run(
        self,
        run: Run,
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
        num_tokens = cache.append(run.slots, key, value, run.positions)
        num_kept = run.num_kept(num_tokens)
        keys, values = cache.tokens(run.slots, num_tokens)
        if self.policy.needs.rank_positions:
            self.move_sinks(run, cache, module, keys)
        positions = cache.positions[run.slots, :, :num_tokens]
        mask = self._mask(run, positions, spec)

        needs = self.policy.needs
        evicts = num_kept < num_tokens
        is_scored = evicts or bool(self.policy.columns)
        mass = rows = None
        ran = self.attention
        if needs.attention_mass:
            output, mass, ran = attention.attend_with_mass(
                query, keys, values, mask, spec, may_fuse=self.attention != "reference"
            )
        elif is_scored and needs.attention_rows >= run.num_new:
            output, rows = attention.attend_with_weights(query, keys, values, mask, spec)
            ran = "reference"
        else:
            output = KERNELS[self.attention](query, keys, values, mask, spec)
        run.observed.kernels.add(ran)

        if is_scored:
            if needs.attention_rows and rows is None:
                rows = attention.last_query_weights(query, keys, mask, spec, needs.attention_rows)
            view = LayerView(
                layer=index,
                stored_keys=keys,
                stored_values=values,
                positions=positions.long(),
                attention=rows,
                attention_mass=mass,
                new=self.new_tokens(run, module, query, key, value) if needs.new_tokens else None,
                columns=cache.columns(run.slots, num_tokens),
                text_tokens=run.text_tokens,
            )
            scores = self._scores(view)
            run.observed.score_sums[index] = scores.sum(dim=(1, 2))
            if evicts:
                cache.evict(run.slots, self.protect(run, view, scores, spec), num_kept)
        cache.settle(run.slots, query, run.positions, spec)
        return output

    def _scores(self, view: LayerView) -> Tensor:
        """The policy's scores [S, K, T] in float32. Raises PolicyError for what is none."""
        policy, wanted = type(self.policy), view.positions.shape
        try:
            scores = self.policy.score(view)
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

    def protect(self, run: Run, view: LayerView, scores: Tensor, spec: AttentionSpec) -> Tensor:
        """Scores [S, K, T] with the policy's protected tokens at +inf.

        Tokens that the layer's own sliding window hides from every later query go first, protected
        or not: nothing can ever attend to them.
        """
        positions = view.positions
        # Only protection is infinite. A sequence with other scores that are not finite ends as
        # invalid after the pass; until then its slot must hold as many tokens as it should.
        largest = torch.finfo(torch.float32).max
        scores = scores.nan_to_num(nan=-largest, posinf=largest, neginf=-largest)
        next_position = run.next_position
        assert run.limit_tokens is not None, "nothing is evicted without a bound"
        num_recent = self.policy.num_recent(run.limit_tokens)
        if self.policy.sinks:
            scores = scores.masked_fill(positions < self.policy.sinks, float("inf"))
        if num_recent:
            scores = scores.masked_fill(positions >= next_position - num_recent, float("inf"))
        if spec.sliding_window is not None and not self.policy.needs.rank_positions:
            hidden = positions <= next_position - spec.sliding_window
            scores = scores.masked_fill(hidden, float("-inf"))
        return scores

    def new_tokens(
        self, run: Run, module: nn.Module, query: Tensor, key: Tensor, value: Tensor
    ) -> NewTokens:
        """This pass's tokens as the layer projected them, before rotary positions."""
        assert self.rotator is not None
        return NewTokens(
            queries=self.rotator.unrotate(module, query, run.positions),
            keys=self.rotator.unrotate(module, key, run.positions),
            values=value,
        )

    def move_sinks(self, run: Run, cache: LayerCache, module: nn.Module, keys: Tensor) -> None:
        """Rotate the sink keys to sit right before the other kept tokens.

        With ranks as positions all distances between kept tokens are those of their ranks. The
        newest tokens are an unbroken run, so their distances are right as they are; only the sinks
        are nearer than in the text, by the number of tokens evicted between. They are always
        rotated from the keys as first written, so no rounding builds up.
        """
        num_tokens = keys.shape[2]
        num_sinks = min(cache.num_saved_sinks, num_tokens)
        if num_sinks:
            saved = cache.sink_keys[run.slots, :, :num_sinks]
            nearer = run.num_evicted_before(num_tokens)
            assert self.rotator is not None
            keys[:, :, :num_sinks] = self.rotator.rotate(module, saved, nearer)

    def _mask(self, run: Run, positions: Tensor, spec: AttentionSpec) -> Tensor | None:
        """What each query sees, broadcastable to [S, K, Q, T], or None; positions: [S, K, T]."""
        num_tokens = positions.shape[-1]
        if spec.sliding_window is None:
            return run.causal_mask(num_tokens)
        if self.policy.needs.rank_positions:  # attention sees the sinks where they were moved to
            moved = positions + run.num_evicted_before(num_tokens)[:, None, None]
            positions = torch.where(positions < self.policy.sinks, moved, positions)
        return attention.visible_tokens(run.positions, positions, run.num_new, spec.sliding_window)


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
