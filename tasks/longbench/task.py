"""LongBench: 21 tasks on long texts in English, Chinese and code, and LongBench-E, by the book.

"LongBench: A Bilingual, Multitask Benchmark for Long Context Understanding",
https://arxiv.org/abs/2308.14508. Prompts follow ``LongBench/pred.py`` of
https://github.com/THUDM/LongBench at 2e00731: a template is filled in, a prompt that is too long
loses its middle as text, and then comes the chat template, except for six tasks. Templates and
generation lengths are read from where the rows are.

Differs from the paper: nothing in the prompts; metrics.py names two things in the scores.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import pandas as pd

from kvarena.harness.column import Column
from kvarena.tasks.base import (
    IS_SAMPLE,
    Sample,
    Task,
    Tokenizer,
    content_id,
    count_question_tokens,
    render_prompt,
    rows_fingerprint,
)
from kvarena.tasks.benchmark.rows import Row
from kvarena.tasks.benchmark.source import READ_FROM, ROWS_SHA256
from kvarena.tasks.longbench.averages import macro_averages
from kvarena.tasks.longbench.data import TaskData, load_tasks
from kvarena.tasks.longbench.length import cut_middle, longest_prompt
from kvarena.tasks.longbench.metrics import CODE_SIMILARITIES, all_scores, score_prediction
from kvarena.tasks.longbench.names import NEEDS_JIEBA, base_task, chosen_tasks
from kvarena.tasks.longbench.token_f1 import chinese_segmenter

__all__ = ["LongBench", "score_prediction"]

NO_CHAT = ("trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p")

COLUMNS = (
    Column("meta_dataset", str, "name", "its task, as `part`"),
    Column("meta_language", str, "", "the row's own field: `en`, `zh`, or of which code"),
    Column("meta_length", int, "", "the row's own field: words, or characters in Chinese", low=0),
    Column("meta_row_id", str, "name", "the row's own field"),
    Column("meta_truncated", bool, "", "whether the prompt lost its middle"),
    Column(
        "meta_prompt_tokens_before_truncation",
        int,
        "tokens",
        "length of the prompt before, without a chat template",
        low=0,
    ),
    Column(
        "meta_max_length",
        int,
        "tokens",
        "most of a prompt; what `auto` stood for, as in the cell's identity: 3500, 7500, 15500, "
        "31500, 127500 for contexts of 4k, 8k, 16k, 32k, 128k. Empty: no limit",
        low=2,
    ),
    READ_FROM,
    ROWS_SHA256,
    Column("meta_settings_sha256", str, "16 digits", "of templates and generation lengths"),
    IS_SAMPLE,
    Column(
        "meta_code_similarity", str, "", "what compared lines of code", choices=CODE_SIMILARITIES
    ),
    Column("meta_all_classes", list[str], "", "of classification: the classes to choose from"),
    Column(
        "rouge_official_zero",
        float,
        "",
        "1 if the official code would have lost this ROUGE-L score to its recursion limit, else 0",
        low=0,
        high=1,
    ),
)


@dataclass(kw_only=True)
class LongBench(Task):
    """Rows of some tasks. ValueError on a bad option.

    tasks: names, or all, en_code16 or e; data: hub, sample, or a folder or zip.
    """

    name: ClassVar[str] = "longbench"
    version: ClassVar[str] = "1"
    row_columns: ClassVar[tuple[Column, ...]] = COLUMNS

    tasks: tuple[str, ...] | str = "all"
    # Tokens of a prompt without its chat template; auto: what suits the model; None: no limit.
    max_length: int | str | None = "auto"
    data: str = "hub"
    code_similarity: str = "rapidfuzz"

    def __post_init__(self) -> None:
        self.tasks = chosen_tasks(self.tasks)
        self.data = str(self.data)
        self._is_auto = False  # until settled
        is_length = type(self.max_length) is int and self.max_length >= 2
        if not is_length and self.max_length not in ("auto", None):
            raise ValueError(
                f"max_length must be auto, an int from 2 on or null, got {self.max_length!r}"
            )
        if self.code_similarity not in CODE_SIMILARITIES:
            allowed = " or ".join(CODE_SIMILARITIES)
            raise ValueError(f"code_similarity must be {allowed}, got {self.code_similarity!r}")

    def settle(self, context_tokens: int | None) -> dict[str, Any]:
        """``max_length``, the longest prompt that suits the model."""
        self._is_auto = self.max_length == "auto"
        if not self._is_auto:
            return {}
        self.max_length = None if context_tokens is None else longest_prompt(context_tokens)
        return {"max_length": self.max_length}

    def advice(self, longest: Sample, context_tokens: int) -> str:
        if not self._is_auto or self.max_tokens is None:
            return "leave out MAX_LENGTH (task.max_length=auto): what it stands for suits the model"
        # The chat template is longer than the room for it.
        excess_tokens = len(longest.prompt_token_ids) + longest.max_new_tokens - context_tokens
        most = self.max_tokens - excess_tokens
        return f"use MAX_LENGTH={most} or less (task.max_length={most})"

    @property
    def max_tokens(self) -> int | None:
        """Most tokens of a prompt without its chat template; None if it is never cut."""
        return self.max_length if isinstance(self.max_length, int) else None

    @classmethod
    def parts(cls, text: str) -> frozenset[str]:
        """As ``tasks`` takes them: also a group, such as en_code16."""
        return frozenset(chosen_tasks(text)) if text else frozenset()

    def samples(self, tokenizer: Tokenizer, seed: int, limit: int | None = None) -> list[Sample]:
        """Task by task, the first ``limit`` rows of each; there is no chance in them.

        Raises ValueError for data that is missing or wrong, and when a chosen task is scored by
        Chinese words and jieba is not installed.
        """
        if any(base_task(task) in NEEDS_JIEBA for task in self.tasks):
            chinese_segmenter()
        return [
            self._sample(tokenizer, data, row)
            for data in load_tasks(self.data, self.tasks)
            for row in data.rows[:limit]
        ]

    def data_fingerprint(self) -> str:
        return content_id(
            [
                [data.task, data.settings_sha256, rows_fingerprint(data.rows)]
                for data in load_tasks(self.data, self.tasks)
            ]
        )

    @classmethod
    def summaries(cls, rows: pd.DataFrame) -> dict[str, pd.DataFrame]:
        return {"averages": macro_averages(rows)}

    def score(self, sample: Sample, text: str, *, finished: bool = True) -> dict[str, float]:
        """The official score; with ROUGE-L also whether the official code would have failed."""
        return all_scores(
            sample.meta["dataset"],
            text,
            sample.references,
            sample.meta.get("all_classes"),
            self.code_similarity,
        )

    def _sample(self, tokenizer: Tokenizer, data: TaskData, row: Row) -> Sample:
        task = base_task(data.task)
        prompt, context_end = data.render(row)
        text, text_context_end, num_tokens = cut_middle(
            tokenizer, prompt, context_end, self.max_tokens
        )
        chat = task not in NO_CHAT
        meta: dict[str, Any] = {  # Any: JSON values
            "dataset": data.task,
            "language": row["language"],
            "length": row["length"],
            "row_id": row["_id"],
            "truncated": self.max_tokens is not None and num_tokens > self.max_tokens,
            "prompt_tokens_before_truncation": num_tokens,
            "max_length": self.max_tokens,
            "data": data.source,
            "data_sha256": data.sha256[:16],
            "settings_sha256": data.settings_sha256[:16],
            "is_sample": data.source == "sample",
            "code_similarity": self.code_similarity,
        }
        if row["all_classes"] is not None:
            meta["all_classes"] = row["all_classes"]  # with it a row can be scored again
        answers = tuple(row["answers"])
        return Sample(
            id=content_id(self.name, self.version, data.task, row["_id"], prompt, answers),
            prompt_token_ids=tuple(render_prompt(tokenizer, text, chat=chat)),
            references=answers,
            max_new_tokens=data.max_new_tokens,
            question_tokens=count_question_tokens(tokenizer, text, text_context_end, chat=chat),
            stop_newline=task == "samsum",
            document=content_id(row["context"]),
            part=data.task,
            meta=meta,
        )
