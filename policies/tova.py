"""TOVA: drop the tokens that the last query attends to least.

The attention of the newest query, averaged over all heads of a layer, ranks the tokens; all heads
of a layer keep the same tokens.
Paper: "Transformers are Multi-State RNNs", https://arxiv.org/abs/2401.06104.

Differs from the paper: a prompt is processed in chunks, so the last query of each chunk decides
(the paper decides once per token). Under a shape that lets heads differ, each KV head goes by its
own query heads.
"""

from dataclasses import dataclass

from torch import Tensor

from kvarena.policies.base import LayerView, Needs, Policy


@dataclass(kw_only=True)
class TOVA(Policy):
    """No options of its own."""

    @property
    def needs(self) -> Needs:
        return Needs(attention_rows=1)

    def score(self, view: LayerView) -> Tensor:
        assert view.attention is not None, "the engine hands over what needs asks for"
        last_query = view.attention[:, :, -1].mean(dim=1, keepdim=True)  # [S, 1, T]
        return last_query.expand(view.positions.shape)
