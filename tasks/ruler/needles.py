"""RULER's retrieval tasks: needles in noise, in running text, or among needles that differ.

A needle gives a key a value; the question asks for the values of one key or of several.
"""

import random
import re
import sys
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain, pairwise

from wonderwords import RandomWord

from kvarena.tasks.ruler.prompts import NEEDLE, NIAH, NOISE, SINGULAR, PromptParts, Recipe

DEPTHS_PERCENT = tuple(round(100 * step / 39) for step in range(40))


@dataclass(frozen=True, kw_only=True)
class Niah:
    """One row of the benchmark's table; each of ``num_keys`` keys has ``num_values`` values."""

    haystack: str  # noise | text | needles
    keys: str = "words"
    values: str = "numbers"
    num_keys: int = 1
    num_values: int = 1
    num_queries: int = 1


NIAH_TASKS = {
    "niah_single_1": Niah(haystack="noise"),
    "niah_single_2": Niah(haystack="text"),
    "niah_single_3": Niah(haystack="text", values="uuids"),
    "niah_multikey_1": Niah(haystack="text", num_keys=4),
    "niah_multikey_2": Niah(haystack="needles"),
    "niah_multikey_3": Niah(haystack="needles", keys="uuids", values="uuids"),
    "niah_multivalue": Niah(haystack="text", num_values=4),
    "niah_multiquery": Niah(haystack="text", num_keys=4, num_queries=4),
}


def most_questions(name: str) -> int:
    """How many questions, each for another key, one text of a task has; 1 of all but multi-key."""
    task = NIAH_TASKS.get(name)
    if task is None or task.num_queries > 1:
        return 1
    return sys.maxsize if task.haystack == "needles" else task.num_keys


def niah_recipe(task: Niah, sentences: Sequence[str], seed: int, num_questions: int = 1) -> Recipe:
    """Sizes count noise lines, sentences of text from a random one on, or distracting needles.

    num_questions: each asks for keys of its own; at most ``most_questions``.
    """
    if task.haystack == "needles":  # all lines are needles, so any of them can be asked for
        task = replace(task, num_keys=num_questions)
    rng = random.Random(seed)
    used: set[str] = set()
    keys = [_unused(task.keys, rng, used) for _ in range(task.num_keys)]
    values = [[_unused(task.values, rng, used) for _ in range(task.num_values)] for _ in keys]
    needles = [
        NEEDLE.format(kind=task.values, key=key, value=value)
        for key, its_values in zip(keys, values, strict=True)
        for value in its_values
    ]
    rng.shuffle(needles)
    asked = rng.sample(range(task.num_keys), task.num_queries * num_questions)
    depths = sorted(rng.sample(DEPTHS_PERCENT, len(needles)))
    first = rng.randrange(len(sentences))
    distractors: list[str] = []  # grows with the size, so that a longer haystack begins the same

    def with_text(size: int) -> str:
        taken = [sentences[(first + number) % len(sentences)] for number in range(size)]
        cuts = [0, *(size * depth // 100 for depth in depths), size]
        stretches = [" ".join(taken[start:end]) for start, end in pairwise(cuts)]
        # An empty stretch keeps the spaces around it, as in the benchmark.
        before = zip(stretches[:-1], needles, strict=True)
        return " ".join([*chain.from_iterable(before), stretches[-1]])

    def in_lines(size: int) -> str:
        while task.haystack == "needles" and len(distractors) < size:
            key, value = _unused(task.keys, rng, used), _unused(task.values, rng, used)
            distractors.append(NEEDLE.format(kind=task.values, key=key, value=value))
        lines = distractors[:size] if task.haystack == "needles" else [NOISE] * size
        # Another generator, so that the distractors do not depend on the sizes tried before.
        cuts = random.Random(f"{seed} {size}").sample(range(size), len(needles))
        for cut, needle in zip(sorted(cuts, reverse=True), needles, strict=True):
            lines.insert(cut, needle)
        return "\n".join(lines)

    def ask(context: str, numbers: Sequence[int]) -> PromptParts:
        answers = tuple(value for number in numbers for value in values[number])
        wording, kind = _wording(task.values, len(answers))
        query = _listed([keys[number] for number in numbers])
        return PromptParts.worded(wording, context, answers, marks=answers, kind=kind, query=query)

    def make(size: int) -> PromptParts:
        context = with_text(size) if task.haystack == "text" else in_lines(size)
        starts = range(0, len(asked), task.num_queries)
        first, *others = (ask(context, asked[at : at + task.num_queries]) for at in starts)
        return replace(first, others=tuple(others))

    return Recipe(make=make, smallest=len(needles))


def _wording(kind: str, num_answers: int) -> tuple[tuple[str, str], str]:
    template, prefix = NIAH
    if num_answers == 1:
        kind = kind[:-1]
        for plural, singular in SINGULAR:
            template, prefix = (text.replace(plural, singular) for text in (template, prefix))
    return (template, prefix), kind


def _listed(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])}, and {names[-1]}"


def _unused(kind: str, rng: random.Random, used: set[str]) -> str:
    """A random word pair, 7-digit number or UUID that is not in ``used``, and is from now on."""
    while True:
        if kind == "words":
            name = f"{rng.choice(word_list('adjective'))}-{rng.choice(word_list('noun'))}"
        elif kind == "numbers":
            name = str(rng.randrange(10**6, 10**7))
        else:
            name = str(uuid.UUID(int=rng.getrandbits(128), version=4))
        if name not in used:
            used.add(name)
            return name


@cache
def word_list(*categories: str) -> tuple[str, ...]:
    """Sorted words of wonderwords' categories, without names and words of several parts."""
    words = RandomWord().filter(include_categories=categories)
    return tuple(sorted({word for word in words if re.fullmatch("[a-z]+", word)}))
