"""AIME 2025: asked and graded as MATH-500, with whole numbers as answers."""

import json
from pathlib import Path

import pytest

from kvarena.tasks.aime25 import Aime25, is_answer
from kvarena.tasks.base import Sample
from kvarena.tasks.math500 import Math500
from toy_tokenizers import CharTokenizer

ROW = {"problem": "Find $1+1$.", "answer": "2", "id": "0"}
CHAT = CharTokenizer("USER {} ASSISTANT")


def samples(data: object = "sample", **options: object) -> list[Sample]:
    return Aime25(data=str(data), **options).samples(CHAT, 0)


def test_a_problem_is_asked_as_one_of_math500_is() -> None:
    asked = {
        type(task): CHAT.decode(task.samples(CHAT, 0, 1)[0].prompt_token_ids)
        for task in (Aime25(data="sample"), Math500(data="sample"))
    }
    endings = {text[text.rindex("\nPlease reason") :] for text in asked.values()}
    assert len(endings) == 1
    assert all(text.startswith("USER ") for text in asked.values())


def test_every_problem_is_asked_so_often_and_says_what_it_is() -> None:
    found = samples(num_samples=4)
    assert len(found) == len({sample.id for sample in found}) == 32
    assert len({sample.document for sample in found}) == 8
    assert found[0].max_new_tokens == 32768
    assert found[0].meta == {
        "unique_id": "sample/0", "repeat": 0, "is_sample": True, "max_new_tokens": 32768
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "gold", "finished", "score"),
    [
        (r"so \boxed{070}", "70", True, 1),
        (r"<think>\boxed{71}</think> It is $\boxed{70}$.", "70", True, 1),
        (r"\boxed{336^\circ}", "336", True, 1),
        (r"\boxed{70}", "336", True, 0),
        (r"\boxed{m+n=70}", "70", True, 1),
        ("70", "70", True, 0),
        (r"\boxed{70}, wait", "70", False, 0),
    ],
)
def test_the_last_box_is_graded(text: str, gold: str, finished: bool, score: float) -> None:
    sample = Sample(id="a", prompt_token_ids=(1,), references=(gold,), max_new_tokens=9)
    assert Aime25(data="sample").score(sample, text, finished=finished)["score"] == score


@pytest.mark.parametrize(
    ("value", "good"),
    [
        ("0", True), ("999", True), ("070", True), (588, True), (r"336^\circ", True),
        ("1000", False), ("-1", False), (-1, False), ("1.5", False), (1.5, False), ("", False),
        (None, False), (True, False), ("seventy", False),
    ],
)  # fmt: skip
def test_an_answer_is_a_whole_number_of_three_digits(value: object, good: bool) -> None:
    assert is_answer(value) == good


def test_an_answer_may_be_a_number_or_text(tmp_path: Path) -> None:
    ids = set()
    for answer in ("2", 2):
        path = tmp_path / "test.jsonl"
        path.write_text(json.dumps(ROW | {"answer": answer}) + "\n")
        (sample,) = samples(path)
        ids.add((sample.id, sample.references))
    assert len(ids) == 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([ROW | {"answer": "1000"}], "'answer' must be a whole number from 0 to 999, got"),
        ([{"problem": "p", "answer": "1"}], "lacks the field 'id'"),
        ([ROW, ROW | {"id": "1"}], r"several rows with the problem 'Find \$1\+1\$\.'"),
    ],
)
def test_bad_data_is_named(tmp_path: Path, rows: list[dict[str, str]], message: str) -> None:
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=message):
        samples(path)


def test_missing_data_comes_with_every_way_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Ways to get AIME 2025 .*hub.*math-ai/aime25.*sample"):
        samples(tmp_path)
