"""SCBench's contexts made anew, at any length and for any seed, by the rules of its Table 3.

Retr.KV: keys and values of 36 characters, UUIDs. Retr.Prefix-Suffix: strings of 65 to 122
characters. Retr.MultiHop: chains of two hops in RULER's noise. Math.Find: numbers of three digits.

The paper leaves open, and here it is so: questions are in our words; a given prefix or suffix has 8
characters, two thirds of the other strings share one of them and none both; each turn of
Retr.MultiHop has a chain of its own; the four largest and the four smallest numbers stand in their
list once, and differ from list to list.
"""

import json
import random
import string
import uuid
from collections.abc import Callable
from itertools import pairwise

from kvarena.tasks.ruler.prompts import NOISE, VARIABLE_TRACKING, PromptParts, Recipe
from kvarena.tasks.scbench.families import (
    KV_FRAME,
    MATH_FIND,
    RETR_KV,
    RETR_MULTIHOP,
    RETR_PREFIX_SUFFIX,
    conversation,
)

NUM_HOPS = 2
AFFIX_CHARS = 8
STRING_CHARS = range(65, 123)
SIGNS = string.ascii_letters + string.digits
RANKS = ("", "second ", "third ", "fourth ")
MOST_TURNS = {MATH_FIND: 2 * len(RANKS) + 1}  # from both ends, and the median


def kv_recipe(num_turns: int, seed: int) -> Recipe:
    """Sizes count pairs of the JSON object; those asked for are anywhere in it."""
    rng = random.Random(seed)
    pairs: list[tuple[str, str]] = []  # grows with the size; the first ones are asked for

    def make(size: int) -> PromptParts:
        while len(pairs) < size:
            pairs.append((_uuid(rng), _uuid(rng)))
        chosen = pairs[:size]
        _order(seed, size).shuffle(chosen)
        turns = [
            (f'Key: "{key}"\nWhich value does this key have? The value is:', [value])
            for key, value in pairs[:num_turns]
        ]
        return conversation(KV_FRAME, json.dumps(dict(chosen)), turns)

    return Recipe(make=make, smallest=num_turns)


def prefix_suffix_recipe(num_turns: int, seed: int) -> Recipe:
    """Sizes count strings; each asked for is the only one with its prefix and its suffix."""
    rng = random.Random(seed)
    strings: list[str] = []
    affixes: set[tuple[str, str]] = set()

    def add() -> None:
        """One more: after those asked for, by turns with the prefix of one, its suffix, neither."""
        text = "".join(rng.choices(SIGNS, k=rng.choice(STRING_CHARS)))
        if len(strings) >= num_turns:
            likeness, asked = len(strings) % 3, rng.choice(strings[:num_turns])
            if likeness == 0:
                text = asked[:AFFIX_CHARS] + text[AFFIX_CHARS:]
            elif likeness == 1:
                text = text[:-AFFIX_CHARS] + asked[-AFFIX_CHARS:]
        if _affixes(text) not in affixes:
            affixes.add(_affixes(text))
            strings.append(text)

    def make(size: int) -> PromptParts:
        while len(strings) < size:
            add()
        chosen = strings[:size]
        _order(seed, size).shuffle(chosen)
        turns = [
            (
                'Prefix: "{}"\nSuffix: "{}"\nWhich string of the dictionary has both? '
                "The string is:".format(*_affixes(text)),
                [text],
            )
            for text in strings[:num_turns]
        ]
        before = "Below is a dictionary of strings. Find those that you are asked for.\n\n"
        return conversation(before, json.dumps(chosen), turns)

    return Recipe(make=make, smallest=num_turns)


def multihop_recipe(num_turns: int, seed: int) -> Recipe:
    """Sizes count lines of noise; chains run through it side by side, two of them at the least."""
    rng = random.Random(seed)
    num_chains, length = max(2, num_turns), NUM_HOPS + 1
    names: list[str] = []
    while len(names) < num_chains * length:
        name = "".join(rng.choices(string.ascii_uppercase, k=5))
        if name not in names:
            names.append(name)
    chains = [names[length * n : length * (n + 1)] for n in range(num_chains)]
    values = [str(value) for value in rng.sample(range(10_000, 100_000), num_chains)]
    steps_of = [
        iter([f"VAR {chain[0]} = {value}", *(f"VAR {b} = VAR {a}" for a, b in pairwise(chain))])
        for chain, value in zip(chains, values, strict=True)
    ]
    which = [chain for chain in range(num_chains) for _ in range(length)]
    rng.shuffle(which)
    steps = [next(steps_of[chain]) for chain in which]
    before = VARIABLE_TRACKING[0].split("{context}")[0]
    turns = [
        (
            f"Which {length} variables are assigned the value {value} in the text above? "
            "Answer with their names only.",
            chain,
        )
        for chain, value in list(zip(chains, values, strict=True))[:num_turns]
    ]

    def make(size: int) -> PromptParts:
        lines = [NOISE] * size
        cuts = sorted(_order(seed, size).choices(range(size + 1), k=len(steps)))
        for cut, step in zip(reversed(cuts), reversed(steps), strict=True):
            lines.insert(cut, step)
        return conversation(before, "\n".join(lines), turns)

    return Recipe(make=make, smallest=1)


def math_find_recipe(num_turns: int, seed: int) -> Recipe:
    """Sizes count pairs of numbers besides those at both ends; the list is of odd length."""
    rng = random.Random(seed)
    low = sorted(rng.sample(range(100, 400), len(RANKS)))
    high = sorted(rng.sample(range(700, 1000), len(RANKS)), reverse=True)
    asked = [f"{rank}{end}" for end in ("largest", "smallest") for rank in RANKS]
    answers = dict(zip(asked, [*high, *low], strict=True))
    kinds = rng.sample([*asked, "median"], num_turns)
    between: list[int] = []

    def make(size: int) -> PromptParts:
        while len(between) < 2 * size + 1:
            between.append(rng.randrange(low[-1] + 1, high[-1]))
        numbers = [*low, *high, *between[: 2 * size + 1]]
        answers["median"] = sorted(numbers)[len(numbers) // 2]
        _order(seed, size).shuffle(numbers)
        turns = [
            (
                f"What is the {kind} number of the list? Answer with one number only.",
                [str(answers[kind])],
            )
            for kind in kinds
        ]
        return conversation("Below is a list of numbers.\n\n", str(numbers), turns)

    return Recipe(make=make, smallest=0)


RECIPES: dict[str, Callable[[int, int], Recipe]] = {
    RETR_KV: kv_recipe,
    RETR_PREFIX_SUFFIX: prefix_suffix_recipe,
    RETR_MULTIHOP: multihop_recipe,
    MATH_FIND: math_find_recipe,
}


def _order(seed: int, size: int) -> random.Random:
    """Another generator, so that what is drawn does not depend on the sizes tried before."""
    return random.Random(f"{seed} {size}")


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _affixes(text: str) -> tuple[str, str]:
    return text[:AFFIX_CHARS], text[-AFFIX_CHARS:]
