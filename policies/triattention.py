"""TriAttention: expected attention of a model's average queries to a key, over distances to come.

Before rotary positions, the queries of a head lie around a mean that hardly depends on the text.
A key scores what that mean query would give it from 1, 2, 4, ... 65536 positions after the newest
token, on average; to that comes, per frequency f of the rotary embedding, the norm of the key times
what the mean leaves out of the norm of queries, E|q_f| - |E q_f|. A dimension and the one D / 2
above it are real and imaginary part of f. ``make calibrate-triattention`` measures the queries.
Paper: "TriAttention: Efficient Long Reasoning with Trigonometric KV Compression",
https://arxiv.org/abs/2604.04921; details as in the released code, ``WeianMao/triattention``.

The query heads of a KV head are brought together as in that code: each head's scores less their
mean over the cached tokens, divided by their standard deviation; then the maximum over the group.
It evicts once in 128 tokens of an answer: run it with evict_every=128 to have it as published.

Differs from the paper: the prompt is compressed too, chunk by chunk, where it is kept and only the
answer's tokens are scored and standardised. Each layer chooses for itself, an option of the code;
its experiments average each KV head over all layers. Distances count from the newest token, in the
code from the one after it. A scale of the embedding itself (YaRN) is left out, for it cancels when
scores are standardised. The queries are those of text made here, see
harness/training/triattention.py.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from kvarena.policies.base import LayerView, OptionError, Policy

_STATISTICS = "results/triattention/smollm2-135m.safetensors"
_IF_MISSING = "run `make calibrate-triattention`, or name the statistics of your model"
_DISTANCES = 2.0 ** torch.arange(17, dtype=torch.float64)
_NAMES = ("mean_queries", "mean_norms", "frequencies")


@dataclass(kw_only=True)
class TriAttention(Policy):
    """statistics: safetensors file of what a model's queries are on average before rotary positions

    In it, ``layers.<number>.mean_queries`` [K, G, D], ``.mean_norms`` [K, G, D / 2] (norms of each
    frequency's two dimensions) and ``.frequencies`` [D / 2] (radians per position). The file is
    read at the first score: OptionError if it cannot be, or is that of a model with other shapes.
    """

    file_options: ClassVar[tuple[str, ...]] = ("statistics",)

    statistics: str = field(default=_STATISTICS, metadata={"if_missing": _IF_MISSING})

    def score(self, view: LayerView) -> Tensor:
        keys = view.keys
        means, norms, frequencies = self._of_layer(view)
        newest = view.positions.amax(dim=-1, keepdim=True)  # [S, K, 1]
        # A stored key is turned to its position already, so the mean is turned to where queries
        # will stand: a sum over f of |q||k| cos(...) is then the product of key and turned mean.
        ahead = _turns(_DISTANCES.to(keys.device)[:, None], frequencies).mean(dim=0)
        turned = means * (ahead * _turns(newest, frequencies))[:, :, None]  # [S, K, G, D / 2]
        expected = torch.cat([turned.real, turned.imag], dim=-1).to(keys)
        rest = (norms - means.abs()).to(keys)
        key_norms = keys.unflatten(-1, (2, -1)).norm(dim=-2)  # [S, K, T, D / 2]
        scores = expected @ keys.transpose(-1, -2) + rest @ key_norms.transpose(-1, -2)
        scores -= scores.mean(dim=-1, keepdim=True)
        spread = scores.std(dim=-1, unbiased=False, keepdim=True).clamp_min(1e-6)
        return (scores / spread).amax(dim=2)

    @cached_property
    def _tensors(self) -> dict[str, Tensor]:
        """All statistics by name; those that were used stay where the model is."""
        try:
            return load_file(self.statistics)
        except (OSError, SafetensorError) as error:
            text = f"statistics: cannot read {self.statistics!r} ({error}); {_IF_MISSING}"
            raise OptionError(text) from error

    def _of_layer(self, view: LayerView) -> tuple[Tensor, Tensor, Tensor]:
        """Mean queries, complex, and norms, both [K, G, D / 2], and frequencies [D / 2]."""
        assert view.layer_heads is not None, "the engine hands over how many the layer has"
        H, K = view.layer_heads
        D, device = view.stored_keys.shape[-1], view.stored_keys.device
        names = [f"layers.{view.layer}.{name}" for name in _NAMES]
        found = [tuple(self._tensors[name].shape) for name in names if name in self._tensors]
        wanted = [(K, H // K, D), (K, H // K, D // 2), (D // 2,)]
        if found != wanted:
            raise OptionError(
                f"statistics: {self.statistics!r} is of another model: in layer {view.layer} "
                f"{', '.join(_NAMES)} are {found}, this model needs {wanted}"
            )
        self._tensors.update({name: self._tensors[name].to(device).double() for name in names})
        queries, norms, frequencies = (self._tensors[name] for name in names)
        real, imaginary = queries[view.kv_heads].chunk(2, dim=-1)
        return torch.complex(real, imaginary), norms[view.kv_heads], frequencies


def _turns(positions: Tensor, frequencies: Tensor) -> Tensor:
    """Complex numbers of length 1, [..., D / 2], by which ``positions`` [..., 1] turn a pair."""
    angles = positions * frequencies
    return torch.polar(torch.ones_like(angles), angles)
