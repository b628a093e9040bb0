"""Locret: small trained heads predict how much later answers will look at a token.

In each layer a retaining head, an MLP without biases, turns a token's own query, key and value
before rotary positions into one score per KV head: SiLU([Q, K, V] W1) W2. The score is written
once, when the token arrives, and travels with it; the newest tokens, the stabilizers, always stay.
Paper: "Locret: Enhancing Eviction in Long-Context LLM Inference with Trained Retaining Heads on
Consumer-Grade Devices", https://arxiv.org/abs/2410.01805, sections 3.3 and 3.4. Its Locret-Q, which
knows the question, is ``question=first`` with heads trained by ``train_locret --question-first``.

Differs from the paper: keys stay at their original positions, where the paper gives the kept tokens
new contiguous ones before each pass; heads keep different tokens, so every stored key of every head
would have to be rotated again in each pass. Eviction goes on while decoding. The stabilizers are a
share of the budget (the paper: 2500 tokens of 6000 or 16 384), and they protect the end of the
prompt as well, where the paper has 100 local tokens that it never evicts. Heads made by ``make
train-locret`` are narrower (d_R 64, the released ones 1024), see harness/training/locret.py.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from kvarena.policies.base import LayerView, Needs, NewTokens, OptionError, Policy, at_least_float32

_HEADS = "results/locret/smollm2-135m.safetensors"
_IF_MISSING = "run `make train-locret`, or name the trained heads of your model"


def token_features(new: NewTokens) -> Tensor:
    """[S, Q, (H + 2K) * D]: each token's queries, keys and values side by side, head by head."""
    parts = (new.queries, new.keys, new.values)
    return at_least_float32(torch.cat([part.transpose(1, 2).flatten(2) for part in parts], dim=-1))


def retaining_scores(features: Tensor, w1: Tensor, w2: Tensor) -> Tensor:
    """[..., Q, K] of features [..., Q, F] with W1 [..., F, d_R] and W2 [..., d_R, K]."""
    return F.silu(features @ w1) @ w2


@dataclass(kw_only=True)
class Locret(Policy):
    """heads: safetensors file of trained heads, ``layers.<number>.w1`` and ``.w2``.

    stabilizer_ratio: share of the budget for the newest tokens. The file is read at the first
    score: OptionError if it cannot be, or if its heads are those of a model with other shapes.
    """

    columns: ClassVar[tuple[str, ...]] = ("retaining_score",)
    file_options: ClassVar[tuple[str, ...]] = ("heads",)

    heads: str = field(default=_HEADS, metadata={"if_missing": _IF_MISSING})
    stabilizer_ratio: float = 0.16

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.stabilizer_ratio < 1:
            raise ValueError(
                f"stabilizer_ratio must be at least 0 and under 1, got {self.stabilizer_ratio}"
            )

    @property
    def needs(self) -> Needs:
        return Needs(new_tokens=True)

    def num_recent(self, budget_tokens: int) -> int:
        return max(self.recent, round(self.stabilizer_ratio * budget_tokens))

    def score(self, view: LayerView) -> Tensor:
        assert view.new is not None, "the engine hands over what needs asks for"
        features = token_features(view.new)
        num_kv_heads, num_new = view.new.keys.shape[1:3]
        w1, w2 = self._head(view.layer, features, num_kv_heads)
        scores = view.columns["retaining_score"]
        of_all_heads = retaining_scores(features, w1, w2).transpose(-1, -2)
        scores[..., -num_new:] = of_all_heads[:, view.kv_heads]
        return scores

    @cached_property
    def _weights(self) -> dict[str, Tensor]:
        """All heads by name; those that were used stay where the model is."""
        try:
            return load_file(self.heads)
        except (OSError, SafetensorError) as error:
            text = f"heads: cannot read {self.heads!r} ({error}); {_IF_MISSING}"
            raise OptionError(text) from error

    def _head(self, layer: int, features: Tensor, num_kv_heads: int) -> list[Tensor]:
        """W1 and W2 of a layer in the dtype and on the device of the features, kept there."""
        names = [f"layers.{layer}.{name}" for name in ("w1", "w2")]
        found = [tuple(self._weights[name].shape) for name in names if name in self._weights]
        wanted = features.shape[-1], num_kv_heads
        if len(found) < 2 or (found[0][0], found[1][1]) != wanted:
            raise OptionError(
                f"heads: {self.heads!r} is of another model: in layer {layer} W1 and W2 are "
                f"{found}, this model needs ({wanted[0]}, d_R) and (d_R, {wanted[1]})"
            )
        self._weights.update({name: self._weights[name].to(features) for name in names})
        return [self._weights[name] for name in names]
