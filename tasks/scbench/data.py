"""SCBench's own rows, read from the files of its release and checked.

Files are those of https://huggingface.co/datasets/microsoft/SCBench: ``data/scbench_kv.jsonl``, or
``scbench_kv/test-00000-of-00001.parquet``, and likewise for the other families. Retr.MultiHop has
its context in the field ``input``, Math.Find a list of numbers, which is written as Python does.
Turns of En.MultiChoice have four ``options``, one of them the answer; those of Mix.Sum+NIAH a
``task``, which says whether a summary or a needle is asked for.

The hub's files are not downloaded by kvarena: their checksums were not at hand to pin them.
"""

import re
from dataclasses import dataclass
from typing import Any, TypeGuard

from kvarena.tasks.benchmark.rows import Field, Row, is_text, is_texts
from kvarena.tasks.benchmark.source import Source, open_source
from kvarena.tasks.ruler.prompts import PromptParts
from kvarena.tasks.scbench.families import (
    BEFORE,
    EN_MULTICHOICE,
    FILE_STEMS,
    MADE_FAMILIES,
    MATH_FIND,
    MIX_SUM_NIAH,
    QUESTIONS,
    RETR_MULTIHOP,
    TURN_TASKS,
    conversation,
)

PARQUET = "test-00000-of-00001.parquet"
RANK = re.compile("The .+ is")
LETTERS = "ABCD"
WAYS = (
    "Ways to get SCBench (with make: DATA=...): task.data=generated, contexts by its rules, needs "
    f"none, for {', '.join(MADE_FAMILIES)}; "
    "task.data=<folder or zip> has scbench_kv.jsonl and so on of "
    "https://huggingface.co/datasets/microsoft/SCBench/tree/main/data, or its folders with "
    f"{PARQUET}"
)


@dataclass(frozen=True)
class FamilyData:
    """Rows of one family. source: a label for result rows; sha256: of the file."""

    family: str
    rows: list[Row]
    source: str
    sha256: str


def load_families(data: str, families: tuple[str, ...]) -> list[FamilyData]:
    """All rows of all families. ValueError for missing data; for a bad row: file, line, field."""
    source = open_source(data, "scbench", _refuse_hub, WAYS)
    loaded = []
    for family in families:
        stem = FILE_STEMS[family]
        try:
            file = source.rows_file(stem, f"{stem}/{PARQUET}")
        except ValueError as error:
            raise ValueError(f"{error}. {WAYS}") from error
        if stem not in file.name:
            raise ValueError(f"{file.name} is not called {stem}, as a file of {family} must be")
        rows = file.rows(_fields(family))
        loaded.append(FamilyData(family, rows, source.label, file.sha256))
    return loaded


def prompt_of_row(family: str, row: Row, most_turns: int) -> PromptParts:
    """A row's first turns, in the layout of the benchmark's requests that share a context."""
    turns = row["multi_turns"][:most_turns]
    questions = [_question(family, turn) for turn in turns]
    before = BEFORE.get(family, "")
    if family == MATH_FIND:
        # The benchmark puts the first question before the list as well.
        before = f"{turns[0]['input']}\n\n"
    answers = [_references(family, turn) for turn in turns]
    context = str(row[_context_field(family)])
    has_place = family in (*MADE_FAMILIES, MIX_SUM_NIAH)
    return conversation(
        before, context, list(zip(questions, answers, strict=True)), marked=has_place
    )


def turn_tasks_of_row(family: str, row: Row, most_turns: int) -> list[str | None]:
    """What each of a row's first turns asks for: en_sum or needle in a mixture, else None."""
    turns = row["multi_turns"][:most_turns]
    return [TURN_TASKS[turn["task"]] if family == MIX_SUM_NIAH else None for turn in turns]


def _refuse_hub() -> Source:
    raise ValueError("its files on the hub have no checksums here, download them yourself")


def _context_field(family: str) -> str:
    return "input" if family == RETR_MULTIHOP else "context"


def _fields(family: str) -> dict[str, Field]:
    context: Field = ("a text", is_text)
    if family == MATH_FIND:
        context = ("a list of whole numbers", _are_numbers)
    more = {
        MATH_FIND: ", inputs with the words The ... is, answers whole numbers",
        EN_MULTICHOICE: ", which is one of its four options",
        MIX_SUM_NIAH: f", and a task: {' or '.join(TURN_TASKS)}",
    }
    meaning = "a list of turns, each with a text as input and an answer" + more.get(family, "")
    return {
        _context_field(family): context,
        "multi_turns": (meaning, lambda value: _are_turns(family, value)),
    }


def _are_numbers(value: Any) -> TypeGuard[list[int]]:  # Any: JSON
    return isinstance(value, list) and len(value) > 0 and all(type(n) is int for n in value)


def _are_turns(family: str, value: Any) -> bool:  # Any: JSON
    return isinstance(value, list) and len(value) > 0 and all(_is_turn(family, v) for v in value)


def _is_turn(family: str, turn: Any) -> bool:  # Any: JSON
    if not isinstance(turn, dict):
        return False
    question, answer = turn.get("input"), turn.get("answer")
    if not is_text(question) or not question.strip():
        return False
    if family == MATH_FIND:
        is_number = type(answer) is int or (_are_numbers(answer) and len(answer) == 1)
        return is_number and RANK.search(question) is not None
    if family == RETR_MULTIHOP:
        return is_texts(answer)
    if not is_text(answer) or answer == "":
        return False
    if family == EN_MULTICHOICE:
        options: Any = turn.get("options")
        return is_texts(options) and len(options) == len(LETTERS) and answer in options
    return family != MIX_SUM_NIAH or turn.get("task") in TURN_TASKS


def _question(family: str, turn: Any) -> str:  # Any: JSON, checked when rows are loaded
    question = str(turn["input"])
    if family == MATH_FIND:
        return f"What is {_rank(question)}?\n\n{question}"
    options = turn["options"] if family == EN_MULTICHOICE else []
    return QUESTIONS.get(family, "{}").format(question, *options)


def _references(family: str, turn: Any) -> list[str]:  # Any: JSON
    if family == EN_MULTICHOICE:
        return [turn["answer"], LETTERS[turn["options"].index(turn["answer"])]]
    return _texts(turn["answer"])


def _rank(question: str) -> str:
    found = RANK.search(question)
    assert found is not None, "rows are checked when they are loaded"
    return found[0].lower().removesuffix(" is")


def _texts(answer: Any) -> list[str]:  # Any: JSON
    return [str(one) for one in answer] if isinstance(answer, list) else [str(answer)]
