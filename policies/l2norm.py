"""L2 norm: keep the keys with the lowest L2 norm, which tend to get the most attention.

Paper: "A Simple and Effective L2 Norm-Based Strategy for KV Cache Compression",
https://arxiv.org/abs/2406.11430.

Differs from the paper: the paper leaves the layers in ``skip_layers`` uncompressed. Here the memory
bound holds for every layer, so those layers keep their newest tokens instead (``skip_layers=[]``
applies the norm everywhere). On models that normalise their keys (Qwen3, Gemma3) all norms are
nearly equal: expect noise.
"""

from dataclasses import dataclass

from torch import Tensor

from kvarena.policies.base import LayerView, Policy


@dataclass(kw_only=True)
class L2Norm(Policy):
    """skip_layers: indices of the layers that the norm does not rank."""

    skip_layers: tuple[int, ...] = (0, 1)

    def __post_init__(self) -> None:
        self.skip_layers = tuple(self.skip_layers)
        super().__post_init__()

    def score(self, view: LayerView) -> Tensor:
        if view.layer in self.skip_layers:
            return view.positions.float()
        return -view.keys.norm(dim=-1)
