"""The checks that other engines can use tell a sound one from one that is not."""

import pytest
import torch

from kvarena.harness.testing import Snapshot, most_held, neighbour_difference


def test_the_most_tokens_of_any_head_count():
    pair = torch.arange(6).view(2, 3)
    uneven = [torch.arange(2), torch.arange(5)]
    held = [
        Snapshot(seen_tokens=3, positions=[pair, pair]),
        Snapshot(seen_tokens=9, positions=[pair, uneven]),
    ]
    assert most_held(held) == 5
    assert most_held(held[:1]) == 3


def logits(text):
    return torch.tensor(text, dtype=torch.float32)[:, None]


def test_no_neighbour_makes_no_difference():
    assert neighbour_difference(lambda texts: [logits(t) for t in texts], [[1, 2], [3]]) == 0


@pytest.mark.parametrize("place", [0, -1])
def test_a_leak_between_sequences_is_found_in_either_order(place):
    def leaky(texts):
        found = [logits(text) for text in texts]
        if len(texts) > 1:
            found[place] = found[place] + 0.25
        return found

    assert neighbour_difference(leaky, [[1, 2], [3], [4, 5]]) == 0.25


def test_logits_of_another_shape_are_refused():
    with pytest.raises(
        ValueError, match=r"alone has logits of \(1, 1\), beside others of \(2, 1\)"
    ):
        neighbour_difference(lambda texts: [logits([7] * len(texts)) for _ in texts], [[1], [2]])
