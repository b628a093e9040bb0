"""Whether keys that point away from their head's mean key receive the attention.

KeyDiff rests on that premise ("KeyDiff: Key Similarity-Based KV Cache Eviction for Long-Context LLM
Inference in Resource-Constrained Environments", https://arxiv.org/abs/2504.15364). ``KeyProbe``
keeps the whole cache and notes, for every key of a prompt, its cosine to the mean key and the
attention it receives; ``agreement`` says head by head how the two go together.

Shape letters: L layers, H query heads, K KV heads, G = H/K, W query tokens, T prompt tokens.
"""

from typing import ClassVar

import numpy as np
import pandas as pd
import torch.nn.functional as F
from torch import Tensor

from kvarena.policies.base import LayerView, Needs, Policy

HEAD = ["sample_id", "layer", "head"]


class KeyProbe(Policy):
    """Keeps everything and looks at one prompt, which must arrive in a single pass.

    prompt_tokens: T; window: last queries of the prompt whose attention is noted. The queries of
    the answer are those that choose its tokens: the prompt's last and each token's but the last.
    """

    evicts: ClassVar[bool] = False
    # Nothing is evicted, so only a column makes the engine call ``score``.
    columns: ClassVar[tuple[str, ...]] = ("unused",)

    def __init__(self, prompt_tokens: int, window: int) -> None:
        super().__init__()
        self.prompt_tokens = prompt_tokens
        self.window = window
        # By layer, in the order of the text; attention is summed over the queries and the group.
        self._cosine: dict[int, Tensor] = {}  # [K, T]
        self._from_prompt: dict[int, Tensor] = {}  # [K, T]
        self._from_answer: dict[int, list[Tensor]] = {}  # [K, T] for each query

    @property
    def needs(self) -> Needs:
        return Needs(attention_rows=self.window)

    def score(self, view: LayerView) -> Tensor:
        assert view.attention is not None, "asked for"
        num_heads = view.positions.shape[1]
        order = view.positions[0].argsort(dim=-1)[:, : self.prompt_tokens]  # [K, T]
        rows = view.attention[0].unflatten(0, (num_heads, -1)).mean(dim=1)  # [K, W, all tokens]
        if view.positions.shape[-1] == self.prompt_tokens:
            keys = view.keys[0]
            cosine = F.cosine_similarity(keys, keys.mean(dim=-2, keepdim=True), dim=-1)
            self._cosine[view.layer] = cosine.gather(1, order)
            self._from_prompt[view.layer] = rows.mean(dim=1).gather(1, order)
        self._from_answer.setdefault(view.layer, []).append(rows[:, -1].gather(1, order))
        return view.positions.float()

    def table(self, sample_id: str) -> pd.DataFrame:
        """One line per layer, KV head and key of the prompt; measures are float32.

        Attention is the mean over queries and over the query heads that share the KV head. Not
        every query of the window sees the keys within it: their ``prompt_attention`` is NaN.
        """
        layers = sorted(self._cosine)
        frames = []
        for layer in layers:
            cosine = self._cosine[layer].cpu().numpy()
            num_heads, num_tokens = cosine.shape
            from_prompt = self._from_prompt[layer].cpu().numpy().copy()
            from_prompt[:, -self.window :] = np.nan
            answer = self._from_answer[layer]
            from_answer = (sum(answer[1:], answer[0]) / len(answer)).cpu().numpy()
            frames.append(
                pd.DataFrame(
                    {
                        "sample_id": sample_id,
                        "layer": layer,
                        "head": np.repeat(np.arange(num_heads), num_tokens),
                        "position": np.tile(np.arange(num_tokens), num_heads),
                        "cosine": cosine.ravel(),
                        "prompt_attention": from_prompt.ravel(),
                        "answer_attention": from_answer.ravel(),
                    }
                )
            )
        return pd.concat(frames, ignore_index=True)


def agreement(keys: pd.DataFrame, num_kept: int) -> pd.DataFrame:
    """How far a low cosine goes with much attention; keys: ``KeyProbe.table`` of some prompts.

    One line per prompt, layer, KV head and kind of queries ("prompt", "answer"):
    correlation: Spearman's, of cosine and attention; KeyDiff's premise says it is negative.
    first_share: attention on the first token of the text, which often draws most of it.
    distinct_share, top_share, chance_share: of the attention on all other keys, what falls on the
    ``num_kept`` with the lowest cosine, on those with the most attention, and (expected) on as
    many keys picked at random.
    """
    lines = []
    for head, group in keys.groupby(HEAD):
        for queries in ("prompt", "answer"):
            name = f"{queries}_attention"
            seen = group[["position", "cosine", name]].dropna()
            others = seen[seen["position"] > 0]
            total = others[name].sum()
            lines.append(
                {
                    **dict(zip(HEAD, head, strict=True)),
                    "queries": queries,
                    "correlation": seen[["cosine", name]].corr(method="spearman").iloc[0, 1],
                    "first_share": 1 - total / seen[name].sum(),
                    "distinct_share": others.nsmallest(num_kept, "cosine")[name].sum() / total,
                    "top_share": others.nlargest(num_kept, name)[name].sum() / total,
                    "chance_share": min(1.0, num_kept / len(others)),
                }
            )
    return pd.DataFrame(lines)
