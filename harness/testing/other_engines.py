"""What kvarena's engine promises, asked of any other one that evicts.

The replay oracle (oracle.py) needs the logits of all tokens fed and what each head held after each
pass; the memory bound needs the latter alone; independence needs texts run alone and together.

Shape letters: K KV heads, T tokens held, N tokens of a text, V vocabulary.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from kvarena.harness.testing.oracle import Held


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What one sequence held after a pass.

    seen_tokens: of its text so far; positions: per layer the places in the text of the tokens held,
    [K, T] or K tensors where heads hold different numbers.
    """

    seen_tokens: int
    positions: Sequence[Iterable[Tensor]]


def most_held(held: Sequence[Held]) -> int:
    """Most tokens that any KV head of any layer held after a pass: at most the budget."""
    return max(len(head) for snapshot in held for heads in snapshot.positions for head in heads)


def neighbour_difference(
    run: Callable[[Sequence[Sequence[int]]], Sequence[Tensor]], texts: Sequence[Sequence[int]]
) -> float:
    """The largest difference that neighbours make to the logits [N, V] of a text.

    run: token ids of texts to their logits, in the order of the texts, however it runs them side by
    side. Asked for each text alone, for all together, and for all in the opposite order. Raises
    ValueError for a text whose logits have other shapes then.
    """
    alone = [run([text])[0] for text in texts]
    together, turned = run(texts), list(run(texts[::-1]))[::-1]
    largest = 0.0
    for expected, *found in zip(alone, together, turned, strict=True):
        for logits in found:
            if logits.shape != expected.shape:
                raise ValueError(
                    f"a text alone has logits of {tuple(expected.shape)}, beside others of "
                    f"{tuple(logits.shape)}"
                )
            largest = max(largest, float((logits - expected).abs().max()))
    return largest
