"""RULER's tracing and counting tasks: chains of variables, common words, frequent coded words."""

import math
import random
import string
from collections.abc import Callable, Sequence
from itertools import pairwise

from kvarena.tasks.ruler.needles import word_list
from kvarena.tasks.ruler.prompts import (
    COMMON_WORDS,
    FREQUENT_WORDS,
    NOISE,
    VARIABLE_TRACKING,
    PromptParts,
    Recipe,
)

NUM_HOPS = 4
EXAMPLE_TOKENS = 500  # of the worked example of vt, its answer included
NUM_COMMON = 10
ALPHA = 2.0  # of the Zipf distribution of the coded words; zeta(2) is pi^2 / 6
SHORT_TOKENS = 4096  # below this length the words of cwe are repeated less often


def vt_recipe(count_tokens: Callable[[str], int], answer_tokens: int, seed: int) -> Recipe:
    """Sizes count noise lines, among which one chain of 5 variables gets its value.

    A worked example with a chain of its own comes before it, as long as ``EXAMPLE_TOKENS`` allow.
    """
    rng = random.Random(seed)
    recipe = _chain_recipe("", 3, rng)

    def tokens(example: PromptParts) -> int:
        return count_tokens(example.user_text + example.prefix) + answer_tokens

    least_tokens = tokens(recipe.make(recipe.smallest))
    example = recipe.fitted(tokens, max(EXAMPLE_TOKENS, least_tokens))
    # Two spaces before the names (one ends the prefix) and three empty lines after them: the
    # benchmark puts both twice.
    answered = f"{example.user_text}{example.prefix} {' '.join(example.references)}\n\n\n\n"
    return _chain_recipe(answered, 5, rng)


def _chain_recipe(example: str, num_letters: int, rng: random.Random) -> Recipe:
    names: list[str] = []
    while len(names) < NUM_HOPS + 1:
        name = "".join(rng.choices(string.ascii_uppercase, k=num_letters))
        if name not in names and name != "VAR":
            names.append(name)
    value = rng.randrange(10_000, 100_000)
    steps = [f"VAR {names[0]} = {value}"]
    steps += [f"VAR {new} = VAR {old}" for old, new in pairwise(names)]
    seed = rng.getrandbits(64)

    def make(size: int) -> PromptParts:
        lines = [f"{NOISE}\n"] * size
        cuts = random.Random(f"{seed} {size}").sample(range(size), len(steps))
        # A step shares the line of the noise after it, and all but the first end in a space.
        for cut, step in sorted(zip(sorted(cuts), steps, strict=True), reverse=True):
            lines.insert(cut, step if step is steps[0] else f"{step} ")
        context = " ".join(lines)
        return PromptParts.worded(
            VARIABLE_TRACKING,
            context,
            names,
            marks=steps,
            example=example,
            query=value,
            count=len(names),
        )

    return Recipe(make=make, smallest=len(steps))


def cwe_recipe(length_tokens: int, seed: int) -> Recipe:
    """Sizes count different words, 10 of them common, after a worked example with other words."""
    pool = list(word_list("noun", "adjective", "verb"))
    rng = random.Random(seed)
    rng.shuffle(pool)
    short = length_tokens < SHORT_TOKENS
    num_example = 20 if short else 40
    example_words, words = pool[:num_example], pool[num_example:]
    example_list = _numbered_list(example_words, *((3, 1) if short else (10, 3)), rng)
    example = PromptParts.worded(COMMON_WORDS, example_list, ())
    # The benchmark puts no space between the prefix and the example's answer.
    answered = example.user_text + example.prefix + _numbered(example_words[:NUM_COMMON])

    def make(size: int) -> PromptParts:
        order = random.Random(f"{seed} {size}")
        context = _numbered_list(words[:size], *((6, 1) if short else (30, 3)), order)
        return PromptParts.worded(
            COMMON_WORDS, context, words[:NUM_COMMON], example=f"{answered}\n"
        )

    return Recipe(make=make, smallest=NUM_COMMON + 1, largest=len(words))


def _numbered_list(
    words: Sequence[str], num_common: int, num_others: int, rng: random.Random
) -> str:
    """The first ten words so many times, the others so many, in random order."""
    tokens = [*words[:NUM_COMMON]] * num_common + [*words[NUM_COMMON:]] * num_others
    rng.shuffle(tokens)
    return _numbered(tokens)


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, 1))


def fwe_recipe(length_tokens: int, seed: int) -> Recipe:
    """Sizes count words before rounding; the k-th most frequent gets a share of k^-2 / zeta(2).

    The most frequent of all is "...", which is noise, so the answer is ranks 2 to 4.
    """
    rng = random.Random(seed)
    vocabulary = ["..."]
    while len(vocabulary) < max(5, length_tokens // 50):
        word = "".join(rng.choices(string.ascii_lowercase, k=6))
        if word not in vocabulary:
            vocabulary.append(word)

    def make(size: int) -> PromptParts:
        share = 6 / math.pi**2
        words = [
            word
            for rank, word in enumerate(vocabulary, 1)
            for _ in range(int(size * share * rank**-ALPHA))
        ]
        random.Random(f"{seed} {size}").shuffle(words)
        return PromptParts.worded(FREQUENT_WORDS, " ".join(words), vocabulary[1:4])

    # From 74 words on, the fourth rank is always more frequent than the fifth.
    return Recipe(make=make, smallest=74)
