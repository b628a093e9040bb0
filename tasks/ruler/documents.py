"""RULER's question answering tasks, from files in the format of SQuAD 2.0 and of HotpotQA."""

import json
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvarena.tasks.ruler.prompts import QUESTION_ANSWERING, PromptParts, Recipe

DOCUMENT = "Document {number}:\n{text}"
SOURCES = {
    "qa_1": "SQuAD 2.0 (dev-v2.0.json from https://rajpurkar.github.io/SQuAD-explorer/)",
    "qa_2": "HotpotQA (hotpot_dev_distractor_v1.json from https://hotpotqa.github.io/)",
}
MOST_OTHERS = 20_000  # documents; more than the longest context of any model holds


@dataclass(frozen=True, kw_only=True)
class Question:
    """Indices of documents: ``needed`` hold the answer, ``near`` are the first distractors."""

    text: str
    answers: tuple[str, ...]
    needed: tuple[int, ...]
    near: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class QuestionSet:
    task: str  # qa_1 | qa_2
    documents: tuple[str, ...]
    questions: tuple[Question, ...]


def load_questions(path: Path) -> QuestionSet:
    """Questions of one file, in its order. Raises ValueError for another format."""
    if not path.is_file():
        raise ValueError(f"qa_file {str(path)!r} is not a file")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return _squad(content["data"])
        return _hotpotqa(content)
    except (KeyError, TypeError, ValueError) as error:
        known = " nor ".join(SOURCES.values())
        raise ValueError(f"qa_file {str(path)!r} is neither {known}: {error!r}") from error


def _squad(articles: Sequence[dict[str, Any]]) -> QuestionSet:
    """qa_1: a document is a paragraph; the article's other paragraphs are near. No answer: out."""
    numbers = _numbered(p["context"] for article in articles for p in article["paragraphs"])
    questions = []
    for article in articles:
        own = dict.fromkeys(numbers[p["context"]] for p in article["paragraphs"])
        for paragraph in article["paragraphs"]:
            needed = numbers[paragraph["context"]]
            questions += [
                Question(
                    text=question["question"],
                    answers=tuple(answer["text"] for answer in question["answers"]),
                    needed=(needed,),
                    near=tuple(number for number in own if number != needed),
                )
                for question in paragraph["qas"]
                if not question["is_impossible"]
            ]
    return _question_set("qa_1", numbers, questions)


def _hotpotqa(rows: Sequence[dict[str, Any]]) -> QuestionSet:
    """qa_2: a document is a title and its sentences; the ten of a question are all needed."""
    texts = [[f"{title}\n{''.join(lines)}" for title, lines in row["context"]] for row in rows]
    numbers = _numbered(text for row_texts in texts for text in row_texts)
    questions = [
        Question(
            text=row["question"],
            answers=(row["answer"],),
            needed=tuple(dict.fromkeys(numbers[text] for text in row_texts)),
            near=(),
        )
        for row, row_texts in zip(rows, texts, strict=True)
    ]
    return _question_set("qa_2", numbers, questions)


def _numbered(texts: Iterable[str]) -> dict[str, int]:
    return {text: number for number, text in enumerate(sorted(set(texts)))}


def _question_set(task: str, numbers: dict[str, int], questions: list[Question]) -> QuestionSet:
    if not questions:
        raise ValueError("no question with an answer")
    return QuestionSet(task=task, documents=tuple(numbers), questions=tuple(questions))


def qa_recipe(source: QuestionSet, question: Question, seed: int) -> Recipe:
    """Sizes count distracting documents; near ones come first, all are shuffled with the needed."""
    rng = random.Random(seed)
    near = rng.sample(question.near, len(question.near))
    known = {*question.needed, *near}
    others = [number for number in range(len(source.documents)) if number not in known]
    distractors = near + rng.sample(others, min(len(others), MOST_OTHERS))

    def make(size: int) -> PromptParts:
        chosen = [*question.needed, *distractors[:size]]
        random.Random(f"{seed} {size}").shuffle(chosen)
        texts = [source.documents[number] for number in chosen]
        context = "\n\n".join(
            DOCUMENT.format(number=number, text=text) for number, text in enumerate(texts, 1)
        )
        return PromptParts.worded(
            QUESTION_ANSWERING,
            context,
            question.answers,
            marks=[source.documents[number] for number in question.needed],
            query=question.text,
        )

    return Recipe(make=make, smallest=0, largest=len(distractors))
