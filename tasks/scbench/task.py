"""SCBench: several questions about one long context, whose cache they share.

"SCBench: A KV Cache-Centric Analysis of Long-Context Methods", https://arxiv.org/abs/2412.10319.
Ten of its twelve families. Four need no texts of others, so that contexts of any length can be made
by its rules; rows of its own files are read for these and for En.QA, Zh.QA, En.MultiChoice, En.Sum,
ICL.ManyShot and Mix.Sum+NIAH, whose summaries and needles are scored apart.

Differs from the benchmark: generated.py says what of the contexts, metrics.py what of the scores;
an answer is followed by the next question as the model gave it, where the benchmark by default puts
the right answer there; contexts of files are not cut, so they need a model with room for them; the
file formats are those of its code and dataset card, read without its files at hand. Code.RepoQA and
Mix.RepoQA+KV are not here: they are scored by NLTK's smoothed BLEU against all functions asked for
in a repository, after parsers of six languages, which kvarena does not depend on.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from kvarena.harness.column import Column
from kvarena.tasks.base import (
    LENGTH_TARGET,
    Sample,
    Task,
    Tokenizer,
    ask_of_one_context,
    content_id,
    different_values,
    rows_fingerprint,
)
from kvarena.tasks.benchmark.source import READ_FROM, ROWS_SHA256
from kvarena.tasks.ruler.prompts import PromptParts
from kvarena.tasks.scbench.data import load_families, prompt_of_row, turn_tasks_of_row
from kvarena.tasks.scbench.families import (
    ANSWER_TOKENS,
    FAMILIES,
    MADE_FAMILIES,
    MIXTURE_ANSWER_TOKENS,
)
from kvarena.tasks.scbench.generated import MOST_TURNS, RECIPES
from kvarena.tasks.scbench.metrics import score_answer

GENERATED = "generated"
COLUMNS = (
    Column(
        "meta_family",
        str,
        "name",
        "its family, as `part` without what follows a hyphen",
        choices=FAMILIES,
    ),
    Column(
        "meta_turn_task",
        str,
        "name",
        "of a mixture: what this turn asks for, and is scored as; also the end of `part`",
        choices=tuple(MIXTURE_ANSWER_TOKENS),
    ),
    LENGTH_TARGET,
    Column("meta_context_index", int, "", "which context of that family and length", low=0),
    Column(
        "meta_answer_depths",
        list[float],
        "percent",
        "where in the context what is asked for stands, by characters; none in a text as a whole",
        low=0,
        high=100,
    ),
    READ_FROM,
    ROWS_SHA256,
)


@dataclass(kw_only=True)
class SCBench(Task):
    """``num_contexts`` of each of ``families`` and ``lengths``. ValueError on a bad option."""

    name: ClassVar[str] = "scbench"
    version: ClassVar[str] = "1"
    row_columns: ClassVar[tuple[Column, ...]] = COLUMNS

    families: tuple[str, ...] = MADE_FAMILIES
    lengths: tuple[int, ...] = (4096,)  # tokens of the longest prompt of a context
    turns_per_context: int = 5
    num_contexts: int = 10
    data: str = GENERATED
    max_new_tokens: int | None = None  # tokens of an answer; None: the protocol's

    def __post_init__(self) -> None:
        self.families = different_values("scbench families", self.families)
        self.lengths = different_values("scbench lengths", self.lengths)
        self.data = str(self.data)
        for family in self.families:
            if family not in FAMILIES:
                raise ValueError(f"unknown scbench family {family!r}; known: {', '.join(FAMILIES)}")
            if self.data == GENERATED and family not in MADE_FAMILIES:
                raise ValueError(
                    f"scbench family {family} cannot be made, only read: set task.data (DATA=...) "
                    "to a folder, zip or file of microsoft/SCBench"
                )
            most = MOST_TURNS.get(family, self.turns_per_context)
            if self.data == GENERATED and self.turns_per_context > most:
                raise ValueError(
                    f"scbench turns_per_context is {self.turns_per_context}, {family} has {most} "
                    "questions: use fewer, or other families"
                )
        counts = [self.turns_per_context, self.num_contexts, *self.lengths]
        counts += [] if self.max_new_tokens is None else [self.max_new_tokens]
        for value in counts:
            if type(value) is not int or value < 1:
                raise ValueError(
                    "scbench lengths, turns_per_context, num_contexts and max_new_tokens must be "
                    f"ints >= 1, got {value!r}"
                )

    def samples(self, tokenizer: Tokenizer, seed: int, limit: int | None = None) -> list[Sample]:
        """By family, length, context, turn; of files, the rows as they come, and no chance.

        Raises ValueError for a length that is too small, and for data that are missing or wrong.
        """
        if self.data == GENERATED:
            return [
                sample
                for family in self.families
                for length in self.lengths
                for index in range(self.num_contexts)[:limit]
                for sample in self._generated(tokenizer, seed, family, length, index)
            ]
        samples = []
        for data in load_families(self.data, self.families):
            origin = {"data": data.source, "data_sha256": data.sha256[:16]}
            for index, row in enumerate(data.rows[:limit]):
                prompt = prompt_of_row(data.family, row, self.turns_per_context)
                meta = {"context_index": index, **origin}
                asked = turn_tasks_of_row(data.family, row, self.turns_per_context)
                samples += self._samples_of(
                    tokenizer, prompt, data.family, data.family, meta, asked
                )
        return samples

    def advice(self, longest: Sample, context_tokens: int) -> str:
        if self.data != GENERATED:
            return "use a model with a longer context, or task.data=generated"
        most = context_tokens - longest.max_new_tokens
        return f"use LENGTHS={most} or less (task.lengths=[{most}])"

    def data_fingerprint(self) -> str | None:
        if self.data == GENERATED:
            return None
        families = load_families(self.data, self.families)
        return content_id([[data.family, rows_fingerprint(data.rows)] for data in families])

    def score(self, sample: Sample, text: str, *, finished: bool = True) -> dict[str, float]:
        scored_as = sample.meta.get("turn_task", sample.meta["family"])
        return {"score": score_answer(scored_as, text, sample.references)}

    def _generated(
        self, tokenizer: Tokenizer, seed: int, family: str, length: int, index: int
    ) -> list[Sample]:
        number = int(content_id(seed, family, length, index), 16)
        recipe = RECIPES[family](self.turns_per_context, number)

        def longest_tokens(prompt: PromptParts) -> int:
            return max(len(one.token_ids(tokenizer)) for one in (prompt, *prompt.others))

        try:
            prompt = recipe.fitted(longest_tokens, length)
        except ValueError as error:
            raise ValueError(f"scbench length {length} is too small: {family} {error}") from error
        meta = {"length_target": length, "context_index": index, "data": GENERATED}
        return self._samples_of(tokenizer, prompt, family, f"{family}-{length}", meta)

    def _samples_of(
        self,
        tokenizer: Tokenizer,
        first: PromptParts,
        family: str,
        part: str,
        meta: dict[str, Any],
        turn_tasks: Sequence[str | None] = (),
    ) -> list[Sample]:
        """All turns about one context. turn_tasks: of a mixture, what each of them asks for."""
        prompts = [first, *first.others]
        asked = turn_tasks or [None] * len(prompts)
        token_ids = [prompt.token_ids(tokenizer) for prompt in prompts]
        questions = [prompt.question_tokens(tokenizer) for prompt in prompts]
        # A token that a context shares with one question belongs to the questions of all.
        shared = min(len(ids) - num for ids, num in zip(token_ids, questions, strict=True))
        context = first.before + first.context
        samples = [
            Sample(
                id=content_id(self.name, self.version, family, prompt.user_text, prompt.references),
                prompt_token_ids=tuple(ids),
                references=prompt.references,
                max_new_tokens=self.max_new_tokens
                or (MIXTURE_ANSWER_TOKENS[task] if task else ANSWER_TOKENS[family]),
                question_tokens=len(ids) - shared,
                follow_up_token_ids=tuple(prompt.follow_up_token_ids(tokenizer)),
                part=f"{part}-{task}" if task else part,
                meta={
                    "family": family,
                    **({"turn_task": task} if task else {}),
                    **meta,
                    "answer_depths": prompt.depths_percent(),
                },
            )
            for prompt, ids, task in zip(prompts, token_ids, asked, strict=True)
        ]
        return ask_of_one_context(
            content_id(self.name, self.version, family, context, len(samples)), samples
        )
