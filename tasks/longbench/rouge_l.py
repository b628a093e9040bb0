"""ROUGE-L as version 1.0.1 of the ``rouge`` package on PyPI computes it, for texts of any length.

Sentences end at a full stop and words at whitespace. For each pair of a reference and a predicted
sentence a longest common subsequence is found; the distinct words of all of them together are set
against the distinct words of each text.

Paper: "ROUGE: A Package for Automatic Evaluation of Summaries",
https://aclanthology.org/W04-1013/. Differs from the paper: as that package does, distinct words
are counted where the paper counts words, and an F value with equal weights is taken. Differs from
the package: a subsequence is traced back in a loop. The package recurses once for each step,
which Python ends at about a thousand.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class RougeL:
    """f: the F value, 0 to 1. num_steps: the most steps that one pair's trace took."""

    f: float
    num_steps: int


def rouge_l(prediction: str, reference: str) -> RougeL:
    """F value of a prediction; 0 where the package refuses a text, one of full stops or nothing."""
    predicted, wanted = _sentences(prediction), _sentences(reference)
    if not predicted or not wanted:
        return RougeL(0.0, 0)
    shared: set[str] = set()
    most_steps = 0
    for sentence in wanted:
        for candidate in predicted:
            words, num_steps = _common_words(sentence, candidate)
            shared |= words
            most_steps = max(most_steps, num_steps)
    precision = len(shared) / len(set().union(*predicted))
    recall = len(shared) / len(set().union(*wanted))
    # Written as the package does: another order of the operations rounds differently.
    return RougeL(2.0 * ((precision * recall) / (precision + recall + 1e-8)), most_steps)


def _sentences(text: str) -> list[list[str]]:
    # A sentence of whitespace has one word, the empty one: it counts, and equals another such.
    return [part.split() or [""] for part in text.split(".") if part]


def _common_words(wanted: Sequence[str], predicted: Sequence[str]) -> tuple[set[str], int]:
    """The words of a longest common subsequence, and the steps taken to trace it back.

    Subsequences of one length can differ in their words, so the choice between them is the
    package's: from the ends back, equal words are taken; else a word of ``wanted`` is given up
    only where that leaves more, and one of ``predicted`` otherwise.
    """
    # lengths[i][j]: of the first i words of wanted and the first j of predicted.
    lengths = [[0] * (len(predicted) + 1)]
    for word in wanted:
        above, row = lengths[-1], [0]
        for j, other in enumerate(predicted):
            row.append(above[j] + 1 if word == other else max(above[j + 1], row[j]))
        lengths.append(row)
    words: set[str] = set()
    i, j, num_steps = len(wanted), len(predicted), 0
    while i and j:
        num_steps += 1
        if wanted[i - 1] == predicted[j - 1]:
            words.add(wanted[i - 1])
            i, j = i - 1, j - 1
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return words, num_steps
