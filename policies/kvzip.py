"""KVzip: keep what the model looks at when it reads its prompt again. A reference, not a method.

A token's score is the most attention that any query of the repeated prompt gives it, over the query
heads that share its KV head. It needs no question, but the whole cache first, in memory that
nothing bounds.
Paper: "KVzip: Query-Agnostic KV Cache Compression with Context Reconstruction",
https://arxiv.org/abs/2505.23416, section 3. Four first tokens stay, as in kvpress.

Differs from the paper: the prompt is repeated whole and as it is, where the paper asks for it in
words and repeats it in chunks of 2048; the text may then be twice as long as the model's context
allows, which is refused. Eviction goes on while answering, where new tokens count as much as the
best of the prompt.
"""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from kvarena.policies.base import TOKEN_SCORE, LayerView, Needs, Policy


@dataclass(kw_only=True)
class KVzip(Policy):
    """No options of its own."""

    columns: ClassVar[tuple[str, ...]] = (TOKEN_SCORE,)
    bounded: ClassVar[bool] = False

    sinks: int = 4

    @property
    def needs(self) -> Needs:
        return Needs(token_scores="repeat")

    def score(self, view: LayerView) -> Tensor:
        return view.columns[TOKEN_SCORE].clone()
