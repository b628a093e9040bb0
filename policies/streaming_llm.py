"""StreamingLLM: keep a few first tokens (attention sinks) and the most recent ones.

Positions are ranks inside the cache, so the kept tokens look like one unbroken text to the model.
Paper: "Efficient Streaming Language Models with Attention Sinks",
https://arxiv.org/abs/2309.17453.

Differs from the paper: a prompt comes in chunks and not token by token, so a query also sees the
tokens of its chunk before it: up to budget and chunk in all. ``reindex=false`` keeps the original
positions, as many re-implementations do.
"""

from dataclasses import dataclass

from torch import Tensor

from kvarena.policies.base import LayerView, Needs, Policy


@dataclass(kw_only=True)
class StreamingLLM(Policy):
    """reindex: positions are ranks inside the cache (paper) or those of the original text."""

    sinks: int = 4
    reindex: bool = True

    @property
    def needs(self) -> Needs:
        return Needs(rank_positions=self.reindex)

    def score(self, view: LayerView) -> Tensor:
        return view.positions.float()
