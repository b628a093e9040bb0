"""How a RULER prompt is put together: wording, the beginning of the answer, the size that fits.

The wording is what makes a score RULER's: it is that of https://github.com/NVIDIA/RULER
(Apache-2.0), down to a misspelled word, and changes only with it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from kvarena.tasks.base import (
    Tokenizer,
    count_question_tokens,
    render_follow_up,
    render_prompt,
)

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
NEEDLE = "One of the special magic {kind} for {key} is: {value}."
NIAH = (
    "Some special magic {kind} are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the {kind} afterwards.\n{context}\n"
    "What are all the special magic {kind} for {query} mentioned in the provided text?",
    " The special magic {kind} for {query} mentioned in the provided text are",
)
VARIABLE_TRACKING = (
    "Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n"
    "{context}\n"
    "Question: Find all variables that are assigned the value {query} in the text above.",
    " Answer: According to the chain(s) of variable assignment in the text above, "
    "{count} variables are assgined the value {query}, they are: ",
)
COMMON_WORDS = (
    "Below is a numbered list of words. In these words, some appear more often than others. "
    "Memorize the ones that appear most often.\n{context}\n"
    "Question: What are the 10 most common words in the above list?",
    " Answer: The top 10 words that appear most often in the list are:",
)
FREQUENT_WORDS = (
    "Read the following coded text and track the frequency of each coded word. "
    "Find the three most frequently appeared coded words. {context}\n"
    "Question: Do not provide any explanation. Please ignore the dots '....'. "
    "What are the three most frequently appeared words in the above coded text?",
    " Answer: According to the coded text above, the three most frequently appeared words are:",
)
QUESTION_ANSWERING = (
    "Answer the question based on the given documents. "
    "Only give me the answer and do not output any other words.\n\n"
    "The following are given documents.\n\n{context}\n\n"
    "Answer the question based on the given documents. "
    "Only give me the answer and do not output any other words.\n\nQuestion: {query}",
    " Answer:",
)
SINGULAR = (("Some", "A"), ("are all", "is"), ("are", "is"))  # in this order, for one needle


@dataclass(frozen=True, kw_only=True)
class PromptParts:
    """A user turn ``before + context + after`` and the beginning of the answer, ``prefix``.

    marks: what the answer depends on, each word for word in the context. others: prompts with the
    same context and another question.
    """

    before: str
    context: str
    after: str
    prefix: str
    references: tuple[str, ...]
    marks: tuple[str, ...] = ()
    others: tuple["PromptParts", ...] = ()

    @classmethod
    def worded(
        cls,
        wording: tuple[str, str],
        context: str,
        references: Sequence[str],
        *,
        marks: Sequence[str] = (),
        example: str = "",
        **words: object,
    ) -> "PromptParts":
        """``words`` fill the gaps of a template with ``{context}`` and a prefix; example leads."""
        # Split before formatting: the context may hold braces.
        before, after = (part.format(**words) for part in wording[0].split("{context}"))
        return cls(
            before=example + before,
            context=context,
            after=after,
            prefix=wording[1].format(**words),
            references=tuple(references),
            marks=tuple(marks),
        )

    @property
    def user_text(self) -> str:
        return self.before + self.context + self.after

    def token_ids(self, tokenizer: Tokenizer) -> list[int]:
        """The turn through the chat template if there is one, then the prefix as plain text."""
        if tokenizer.chat_template is None:
            return tokenizer.encode(self.user_text + self.prefix)
        turn = [{"role": "user", "content": self.user_text}]
        text = tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True)
        return tokenizer.encode(text + self.prefix, add_special_tokens=False)

    def follow_up_token_ids(self, tokenizer: Tokenizer) -> list[int]:
        """The question as it follows an answer to another one, the prefix again at its end."""
        plain = tokenizer.chat_template is None
        turn = render_follow_up(tokenizer, self.after if plain else self.after.lstrip())
        return [*turn, *tokenizer.encode(self.prefix, add_special_tokens=False)]

    def question_tokens(self, tokenizer: Tokenizer) -> int:
        """How many of ``token_ids`` follow the context: the question and the prefix."""
        context_end = len(self.before) + len(self.context)
        plain = render_prompt(tokenizer, self.user_text)
        before = len(plain) - count_question_tokens(tokenizer, self.user_text, context_end)
        return len(self.token_ids(tokenizer)) - before

    def depths_percent(self) -> list[float]:
        """For each mark, the share of the context's characters before its first occurrence."""
        return [round(100 * self.context.index(mark) / len(self.context), 1) for mark in self.marks]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A prompt of any ``size`` from smallest to largest; a larger one takes more tokens."""

    make: Callable[[int], PromptParts]
    smallest: int
    largest: int = 10**9

    def fitted(self, num_tokens: Callable[[PromptParts], int], limit_tokens: int) -> PromptParts:
        """The prompt of the largest size within the limit. ValueError if even the smallest is over.

        Sizes are guessed from the tokens that one more unit takes, so a few tries are enough; from
        the tenth on the rest is halved.
        """
        best = self.make(self.smallest)
        smallest_tokens = num_tokens(best)
        if smallest_tokens > limit_tokens:
            raise ValueError(f"takes {smallest_tokens} tokens or more")
        fits, too_large, num_tries = self.smallest, self.largest + 1, 0
        size = min(fits + 16, self.largest)
        while too_large - fits > 1:
            prompt = self.make(size)
            spare = limit_tokens - num_tokens(prompt)
            per_unit = max(1.0, (limit_tokens - spare - smallest_tokens) / (size - self.smallest))
            if spare >= 0:
                fits, best = size, prompt
            else:
                too_large = size
            num_tries += 1
            guess = size + int(spare // per_unit) if num_tries < 10 else (fits + too_large) // 2
            size = min(max(guess, fits + 1), too_large - 1)
        return best
