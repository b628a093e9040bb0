"""How well a score finds the tokens that answers look at most, on held-out samples.

The truth are the prompt tokens with the largest targets (locret_heads.py), per layer and KV
head. Beside the trained heads stand untrained ones, recency and KeyDiff.
"""

from collections.abc import Callable, Iterable

import pandas as pd
import torch
from torch import Tensor

from kvarena.harness.training.locret_heads import Observation, RetainingHeads
from kvarena.policies.base import LayerView
from kvarena.policies.keydiff import KeyDiff

TOP_SHARE = 0.1
BUDGETS_TOKENS = (128, 256)

Scorer = Callable[[Observation], Tensor]


def top_overlap(scores: Tensor, targets: Tensor, num_top: int) -> float:
    """Mean share of the ``num_top`` largest targets [L, K, P] that are among the largest scores."""
    chosen = torch.zeros_like(targets).scatter_(-1, scores.topk(num_top).indices, 1)
    return float(chosen.gather(-1, targets.topk(num_top).indices).mean())


def scorers(trained: RetainingHeads, untrained: RetainingHeads) -> dict[str, Scorer]:
    """Each gives scores [L, K, P] of an observation."""
    return {
        "trained": lambda seen: trained(seen.features),
        "untrained": lambda seen: untrained(seen.features),
        "recency": lambda seen: torch.ones_like(seen.targets).cumsum(dim=-1),
        "keydiff": _keydiff_scores,
    }


@torch.no_grad()
def overlap_table(
    observations: Iterable[tuple[str, Observation]], by_name: dict[str, Scorer]
) -> pd.DataFrame:
    """One line per kind of sample and scorer: mean overlap of the top tenth and of each budget.

    A budget counts in the samples whose prompt is longer; chance is the share of tokens chosen.
    """
    lines = []
    for kind, seen in observations:
        num_tokens = seen.targets.shape[-1]
        tops = {"top_10_percent": max(1, round(TOP_SHARE * num_tokens))}
        tops |= {f"budget_{num}": num for num in BUDGETS_TOKENS if num < num_tokens}
        lines += [
            {
                "kind": kind,
                "scorer": name,
                **{top: top_overlap(score(seen), seen.targets, num) for top, num in tops.items()},
            }
            for name, score in by_name.items()
        ]
        chance = {top: num / num_tokens for top, num in tops.items()}
        lines.append({"kind": kind, "scorer": "chance", **chance})
    table = pd.DataFrame(lines)
    return table.groupby(["kind", "scorer"], sort=False).mean().round(4).reset_index()


def _keydiff_scores(seen: Observation) -> Tensor:
    """Layers take the place of sequences, which KeyDiff scores one by one."""
    assert seen.keys is not None, "only observations for learning are without keys"
    positions = torch.zeros(seen.keys.shape[:3], dtype=torch.long)  # KeyDiff reads none
    view = LayerView(layer=0, stored_keys=seen.keys, stored_values=seen.keys, positions=positions)
    return KeyDiff().score(view)
