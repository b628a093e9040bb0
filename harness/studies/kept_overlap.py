"""How alike are the tokens that two policies, or two ways of reading, keep of one prompt.

Works on the tables of kept_tokens.py: ``kept`` has one line per policy, prefill, layer, KV head
and token held; ``samples`` one per prompt. Shape letters: L layers, K KV heads, T prompt tokens.
"""

from itertools import combinations

import numpy as np
import pandas as pd

Cell = tuple[str, str, str]  # sample_id, policy, prefill


def masks(kept: pd.DataFrame, samples: pd.DataFrame) -> dict[Cell, np.ndarray]:
    """Which tokens of its prompt each cell holds: bool [L, K, T]."""
    lengths = dict(zip(samples["sample_id"], samples["prompt_tokens"], strict=True))
    shape = int(kept["layer"].max()) + 1, int(kept["head"].max()) + 1
    found = {}
    for (sample_id, policy, prefill), lines in kept.groupby(["sample_id", "policy", "prefill"]):
        mask = np.full((*shape, lengths[str(sample_id)]), False)
        mask[lines["layer"], lines["head"], lines["position"]] = True
        found[str(sample_id), str(policy), str(prefill)] = mask
    return found


def policy_overlap(kept: pd.DataFrame, samples: pd.DataFrame) -> pd.DataFrame:
    """Jaccard index of every two policies (chunked): tokens both hold over tokens either holds.

    One line per prompt, pair and layer: the mean over heads, and its value expected by chance for
    two policies that pick as many tokens at random.
    """
    cells = masks(kept[kept["prefill"] == "chunked"], samples)
    policies = sorted({policy for _, policy, _ in cells})
    frames = []
    for sample_id in samples["sample_id"]:
        for policy, other in combinations(policies, 2):
            one, two = cells[sample_id, policy, "chunked"], cells[sample_id, other, "chunked"]
            both, either = (one & two).sum(axis=-1), (one | two).sum(axis=-1)  # [L, K]
            num_kept, num_tokens = one[0, 0].sum(), one.shape[-1]
            frames.append(
                pd.DataFrame({"layer": range(len(one)), "jaccard": (both / either).mean(axis=-1)})
                .assign(sample_id=sample_id, policy=policy, other=other)
                .assign(chance=num_kept / (2 * num_tokens - num_kept))
            )
    return pd.concat(frames, ignore_index=True)


def prefill_overlap(kept: pd.DataFrame, samples: pd.DataFrame) -> pd.DataFrame:
    """Share of a policy's tokens that it keeps both when chunked and when pruned once at the end.

    One line per prompt, policy and layer: the mean over heads, and what chance would give.
    """
    cells = masks(kept, samples)
    frames = []
    for (sample_id, policy, prefill), chunked in cells.items():
        if prefill == "chunked":
            both = chunked & cells[sample_id, policy, "whole"]
            shared = both.sum(axis=-1) / chunked.sum(axis=-1)  # [L, K]
            frames.append(
                pd.DataFrame({"layer": range(len(shared)), "shared": shared.mean(axis=-1)})
                .assign(sample_id=sample_id, policy=policy)
                .assign(chance=chunked[0, 0].mean())
            )
    return pd.concat(frames, ignore_index=True)


def needle_shares(held: pd.DataFrame, samples: pd.DataFrame) -> pd.DataFrame:
    """Share of the needle's tokens held after each pass, over all layers and heads.

    One line per prompt, policy, prefill and pass; passes before the needle is read are left out.
    """
    cell = ["sample_id", "policy", "prefill", "seen_tokens"]
    means = held.groupby(cell, as_index=False)["num_held"].mean().merge(samples, on="sample_id")
    means["share"] = means["num_held"] / means["num_needle_tokens"]
    read = means["seen_tokens"] >= means["needle_first_token"] + means["num_needle_tokens"]
    return means[read]
