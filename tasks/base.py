"""What a task is: samples to answer and a score for each answer.

To add one: a file here with a ``Task`` subclass, and ``conf/task/<file name>.yaml``.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from kvarena.harness.column import Column

if TYPE_CHECKING:
    import pandas as pd


# What tables and pictures make something of, whichever task tells it.
LENGTH_TARGET = Column(
    "meta_length_target",
    int,
    "tokens",
    "length asked for: of the prompt; of RULER, of prompt and answer",
    low=0,
)
DEPTH_TARGET = Column(
    "meta_depth_target",
    float,
    "percent",
    "needle depth asked for; 0 is the start of the text, 100 its end",
    low=0,
    high=100,
)
IS_SAMPLE = Column(
    "meta_is_sample",
    bool,
    "",
    "true: rows or problems of kvarena's own, NOT the benchmark",
)
READ_BY_REPORTS = (LENGTH_TARGET, DEPTH_TARGET, IS_SAMPLE)


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that tasks and the harness use."""

    chat_template: str | None

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...
    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str: ...
    # Any: the real signature has many options that differ between releases.
    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class SharedContext:
    """What questions about one context know of each other; made by ``ask_of_one_context``.

    turn: 1 for the one that is asked first. longest_question_tokens, longest_prompt_tokens: of all
    of them, so that each one's budget is that of every other.
    """

    id: str
    turn: int
    longest_question_tokens: int
    longest_prompt_tokens: int


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One question. ``id`` comes from content, so order and limits never change it."""

    id: str
    prompt_token_ids: tuple[int, ...]
    references: tuple[str, ...]
    max_new_tokens: int
    # Last tokens of the prompt, from the end of the context on; 0: the two cannot be told apart.
    question_tokens: int = 0
    # Set where several samples ask of one context; a limit counts contexts then, not samples.
    context: SharedContext | None = None
    # The question as it follows an answer to an earlier one of the same context: the end of that
    # answer, which it does not have itself, then what the chat template puts around the question.
    follow_up_token_ids: tuple[int, ...] = ()
    # End the answer at a newline, after at least one new token (LongBench's samsum).
    stop_newline: bool = False
    # What samples have in common: the id of a source document they share (their scores are then not
    # independent; "": nobody else's) and the sub-benchmark they belong to ("": there is one only).
    document: str = ""
    part: str = ""
    # JSON values, written to the row as meta_<key>; Task.row_columns says what they are.
    meta: Mapping[str, Any] = field(default_factory=dict)


class Task(ABC):
    """Base of all tasks. ``version`` changes whenever a score could."""

    name: ClassVar[str]
    version: ClassVar[str]
    # True: the answer is given, and the harness measures how the model would have answered.
    is_teacher_forced: ClassVar[bool] = False
    # What its rows have besides those of every task: meta_<key>, and metrics other than ``score``.
    row_columns: ClassVar[tuple[Column, ...]] = ()

    def settle(self, context_tokens: int | None) -> dict[str, Any]:
        """Fit what is ``auto`` to a model; returns those options by name as they are from now on.

        Called once, before ``samples``. context_tokens: most tokens of prompt and answer that the
        model handles, None if it states no limit, which is also how a task is that was never
        settled. Raises ValueError for a context that is too short for the task.
        """
        return {}

    @classmethod
    def parts(cls, text: str) -> frozenset[str]:
        """The parts that a text names, with commas between. ValueError for one there is not."""
        return frozenset(name.strip() for name in text.split(",")) - {""}

    def advice(self, longest: Sample, context_tokens: int) -> str:
        """What to change, in words to paste, when that sample is too long for the context."""
        return "use shorter prompts or fewer new tokens"

    @abstractmethod
    def samples(self, tokenizer: Tokenizer, seed: int, limit: int | None = None) -> list[Sample]:
        """The samples in a fixed order; the same arguments give the same samples.

        limit: only the first so many (of each part, where a task has parts; of contexts with all
        their questions, where they share some).
        """

    @abstractmethod
    def score(self, sample: Sample, text: str, *, finished: bool = True) -> dict[str, float]:
        """Metrics of one answer, each 0 to 1. ``score`` is the headline one and must be present.

        finished: the model ended the answer itself; False if the token limit cut it off.
        """

    def data_fingerprint(self) -> str | None:
        """Hash of the data that the samples are made of, whatever the order of its rows.

        None for a task that makes its samples from its options alone. ValueError as in ``samples``.
        """
        return None

    @classmethod
    def summaries(cls, rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
        """The benchmark's own tables of stored rows, by name; none unless a task has some."""
        return {}


def content_id(*parts: object) -> str:
    """A 16-character id that depends on nothing but the given JSON values."""
    canonical = json.dumps(parts, ensure_ascii=False, sort_keys=True)
    return hashlib.sha256(canonical.encode()).hexdigest()[:16]


def rows_fingerprint(rows: Iterable[object]) -> str:
    """One id for a set of JSON rows, the same in any order."""
    return content_id(sorted(content_id(row) for row in rows))


# Any: yaml and the command line give what they like.
def different_values(option: str, values: Any) -> tuple[Any, ...]:
    """The values of an option that is a list. ValueError unless there are some, all different."""
    good = isinstance(values, Sequence) and not isinstance(values, str) and len(values) > 0
    if not good or len(set(values)) < len(values):
        raise ValueError(f"{option} must be a list of different values, got {values!r}")
    return tuple(values)


def ask_of_one_context(context_id: str, samples: Sequence[Sample]) -> list[Sample]:
    """The samples, in the order of their turns, as questions about one context.

    Raises ValueError unless all have the same prompt before the question, and a question.
    """
    if not samples:
        raise ValueError(f"context {context_id}: no question")
    contexts = {s.prompt_token_ids[: len(s.prompt_token_ids) - s.question_tokens] for s in samples}
    if len(contexts) > 1:
        raise ValueError(f"context {context_id}: its questions come after different texts")
    for turn, sample in enumerate(samples, start=1):
        if not sample.question_tokens or (turn > 1 and not sample.follow_up_token_ids):
            raise ValueError(f"context {context_id}: turn {turn} is empty")
    longest_question = max(sample.question_tokens for sample in samples)
    longest_prompt = max(len(sample.prompt_token_ids) for sample in samples)
    return [
        replace(
            sample,
            document=sample.document or context_id,
            context=SharedContext(
                id=context_id,
                turn=turn,
                longest_question_tokens=longest_question,
                longest_prompt_tokens=longest_prompt,
            ),
        )
        for turn, sample in enumerate(samples, start=1)
    ]


def render_follow_up(tokenizer: Tokenizer, user_text: str, *, chat: bool = True) -> list[int]:
    """Token ids of a further user turn, from the end of the answer before it on.

    Through the model's chat template, or as plain text if it has none.
    """
    if not chat or tokenizer.chat_template is None:
        return tokenizer.encode(user_text, add_special_tokens=False)
    answer = "An answer."
    turns = [{"role": "user", "content": "A question."}, {"role": "assistant", "content": answer}]
    turns.append({"role": "user", "content": user_text})
    rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    after = rendered[rendered.index(answer) + len(answer) :]
    return tokenizer.encode(after, add_special_tokens=False)


def render_prompt(tokenizer: Tokenizer, user_text: str, *, chat: bool = True) -> list[int]:
    """Token ids of one user turn: through the model's chat template, or as plain text if none."""
    if not chat or tokenizer.chat_template is None:
        return tokenizer.encode(user_text)
    # The template writes its own special tokens; adding them again would double the BOS.
    return tokenizer.encode(_in_template(tokenizer, user_text), add_special_tokens=False)


def count_question_tokens(
    tokenizer: Tokenizer, user_text: str, context_end: int, *, chat: bool = True
) -> int:
    """How many tokens of ``render_prompt(...)`` follow the context.

    context_end: index in ``user_text`` of the first character after the context. A token that
    straddles it counts as question.
    """
    token_ids = render_prompt(tokenizer, user_text, chat=chat)
    if not chat or tokenizer.chat_template is None:
        before = tokenizer.encode(user_text[:context_end])
    else:
        # The template may trim the turn, so the context is found from the end of the text.
        rendered = _in_template(tokenizer, user_text)
        question = user_text[context_end:].rstrip()
        start = (
            rendered.rindex(question) if question else rendered.rindex(user_text.strip()[-1]) + 1
        )
        before = tokenizer.encode(rendered[:start], add_special_tokens=False)
    shared = 0
    for one, other in zip(before, token_ids, strict=False):
        if one != other:
            break
        shared += 1
    return len(token_ids) - shared


def _in_template(tokenizer: Tokenizer, user_text: str) -> str:
    return tokenizer.apply_chat_template(
        [{"role": "user", "content": user_text}], tokenize=False, add_generation_prompt=True
    )
