"""LongBench's scores: recorded values of the official code, and the rules behind them by name.

``golden/longbench.jsonl`` and ``golden/rouge_l.jsonl`` hold predictions written for these tests,
with the scores that the official ``metrics.py`` and ``rouge`` 1.0.1 gave them. ``score_difflib`` is
fuzzywuzzy's without python-Levenshtein, ``score`` its value with it.
"""

import importlib.util
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvarena.tasks.longbench import metrics
from kvarena.tasks.longbench.metrics import all_scores
from kvarena.tasks.longbench.names import METRIC_OF, NEEDS_JIEBA, TASKS
from kvarena.tasks.longbench.rouge_l import rouge_l
from kvarena.tasks.longbench.task import score_prediction
from kvarena.tasks.longbench.token_f1 import CJK_PUNCTUATION, chinese_segmenter

GOLDEN = Path(__file__).parent / "golden"
HAS_JIEBA = importlib.util.find_spec("jieba") is not None
CLASSES = ["Number", "Number of things", "Number of years", "Person"]


def read(name: str) -> list[Any]:
    return [json.loads(line) for line in (GOLDEN / name).read_text("utf-8").split("\n") if line]


CASES = read("longbench.jsonl")


# ---- recorded values ----


@pytest.mark.parametrize("task", TASKS)
def test_scores_are_the_official_ones(task: str) -> None:
    if task in NEEDS_JIEBA and not HAS_JIEBA:
        pytest.skip("jieba is not installed")
    cases = [case for case in CASES if case["task"] == task]
    assert cases
    for case in cases:
        given = (task, case["prediction"], case["answers"], case["all_classes"])
        assert score_prediction(*given) == pytest.approx(case["score"], abs=1e-9), case
        if "score_difflib" in case:
            found = score_prediction(*given, code_similarity="difflib")
            assert found == pytest.approx(case["score_difflib"], abs=1e-9), case


def test_the_recorded_cases_have_every_outcome() -> None:
    for metric in set(METRIC_OF.values()):
        scores = [case["score"] for case in CASES if METRIC_OF[case["task"]] == metric]
        assert min(scores) == 0, metric
        assert max(scores) > 0.9, metric
        assert any(0 < score < 1 for score in scores), metric
    assert any(case["score"] != case.get("score_difflib", case["score"]) for case in CASES)


def test_rouge_l_equals_the_recorded_values_bit_for_bit() -> None:
    cases = read("rouge_l.jsonl")
    assert len({value for _, _, value in cases}) > 50
    for prediction, reference, value in cases:
        assert rouge_l(prediction, reference).f == value, (prediction, reference)


def test_rouge_l_equals_the_package_where_it_is_installed() -> None:
    package = pytest.importorskip("rouge").Rouge()
    rng = random.Random(7)
    words = [*"abcde", "the", "3.5", ".", " . ", "..", "\n", "\u3000", "\u2028", "钟", "b.c", "ä"]
    for _ in range(500):
        texts = [
            "".join(rng.choice(words) + rng.choice(["", " "]) for _ in range(rng.randint(0, 30)))
            for _ in range(2)
        ]
        if all(text.strip(".") for text in texts):  # the package refuses the others
            expected = package.get_scores(*texts)[0]["rouge-l"]["f"]
            assert rouge_l(*texts).f == expected, texts


# ---- ROUGE-L by hand ----


@pytest.mark.parametrize(
    ("prediction", "reference", "shared", "predicted", "wanted"),
    [
        ("the cow fell", "the cow ran", 2, 3, 3),
        ("a b c d", "d c b a", 1, 4, 4),  # order counts within a sentence
        ("d. c. b. a", "a b c d", 4, 4, 4),  # and not between sentences
        ("b b b a", "a b", 1, 2, 2),  # repeated words count once
        ("3.5", "5", 1, 2, 1),  # every full stop ends a sentence
        ("a . b", "b.a", 2, 2, 2),
        (" . x", "y . ", 1, 2, 2),  # a sentence of spaces has one word, the empty one
        ("Cow", "cow", 0, 1, 1),
    ],
)
def test_rouge_l_counts_distinct_words_in_common_subsequences(
    prediction: str, reference: str, shared: int, predicted: int, wanted: int
) -> None:
    precision, recall = shared / predicted, shared / wanted
    expected = 2 * precision * recall / (precision + recall + 1e-8)
    assert rouge_l(prediction, reference).f == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize("text", ["", ".", "....."])
def test_rouge_l_without_a_sentence_is_0(text: str) -> None:
    assert rouge_l(text, "a b").f == rouge_l("a b", text).f == 0
    assert score_prediction("gov_report", text, ["a b"]) == 0


def test_rouge_l_of_texts_too_long_for_the_package_is_computed() -> None:
    text = " ".join(f"w{n}" for n in range(1500))
    found = rouge_l(text, text)
    assert found.f == pytest.approx(1)
    assert found.num_steps == 1500


# ---- where the official code gives up ----


@pytest.mark.parametrize(("num_words", "fails"), [(990, 0), (991, 1)])
def test_rows_that_the_official_recursion_would_zero_are_marked(num_words: int, fails: int) -> None:
    text = " ".join(f"w{n}" for n in range(num_words))
    found = all_scores("gov_report", text, [text], None, "rapidfuzz")
    assert found == {"score": pytest.approx(1), "rouge_official_zero": fails}


def test_a_row_is_not_marked_when_another_answer_scores_as_much_or_both_are_0() -> None:
    text = " ".join(f"w{n}" for n in range(1200))
    marks = [
        all_scores("qmsum", text, answers, None, "rapidfuzz")["rouge_official_zero"]
        for answers in ([text], [text, "w0"], ["nothing " * 5], [f"{text}. {text}"], ["x"])
    ]
    assert marks == [1, 1, 0, 1, 0]


def test_only_rouge_tasks_have_the_mark() -> None:
    for task in TASKS:
        if task in NEEDS_JIEBA and not HAS_JIEBA:
            continue
        answer = {"passage_retrieval_en": "Paragraph 1", "passage_retrieval_zh": "段落1"}
        found = all_scores(task, "1", [answer.get(task, "1")], ["1"], "rapidfuzz")
        assert found["score"] == pytest.approx(1), task
        assert ("rouge_official_zero" in found) == METRIC_OF[task].startswith("rouge")


FRAMES = """
import sys
from rouge import Rouge

def rouge_score(prediction, answer, **options):
    try:
        return Rouge().get_scores([prediction], [answer], avg=True)["rouge-l"]["f"]
    except RecursionError:
        return None

def rouge_zh_score(prediction, answer, **options):
    return rouge_score(prediction, answer)

def scorer(score):
    for num_words in range(980, 1000):
        if score(" ".join(f"w{n}" for n in range(num_words)), "x") is None:
            return num_words

if __name__ == "__main__":
    print(scorer(rouge_score), scorer(rouge_zh_score))
"""


def test_the_official_limit_is_where_the_package_fails_below_the_frames_of_its_eval() -> None:
    pytest.importorskip("rouge")
    run = [sys.executable, "-c", FRAMES]
    found = subprocess.run(run, capture_output=True, text=True, check=True).stdout.split()
    limits = metrics.MOST_STEPS
    assert [int(steps) - 1 for steps in found] == [limits["rouge"], limits["rouge_zh"]]


# ---- post-processing ----


def test_four_tasks_are_scored_on_their_first_line_after_newlines_only() -> None:
    assert score_prediction("triviaqa", "\n\nswan\nheron", ["swan"]) == 1
    assert score_prediction("hotpotqa", "\n\nswan\nheron", ["swan"]) == pytest.approx(2 / 3)
    assert score_prediction("triviaqa", " \nswan", ["swan"]) == 0
    assert score_prediction("samsum", "\r\nswan", ["swan"]) == 0
    assert score_prediction("trec", "\nPerson\nNumber", ["Person"], CLASSES) == 1


def test_the_best_answer_counts_and_none_gives_0() -> None:
    assert score_prediction("qasper", "swan", ["heron", "swan", "the heron"]) == 1
    assert score_prediction("qasper", "swan", []) == 0


def test_an_e_task_is_scored_like_the_task_it_is_made_from() -> None:
    assert score_prediction("trec_e", "\nPerson\nx", ["Person"], CLASSES) == 1
    assert score_prediction("passage_count_e", "7 8", ["7"]) == 0.5


# ---- single metrics ----


def test_qa_f1_ignores_case_articles_and_punctuation() -> None:
    assert score_prediction("qasper", "The SWAN, bridge!", ["swan bridge"]) == 1
    assert score_prediction("qasper", "swan-bridge", ["swan bridge"]) == 0
    assert score_prediction("qasper", "theatre", ["atre"]) == 0


def test_class_names_within_the_answer_are_dropped_but_the_one_after_a_dropped_one_stays() -> None:
    def score(prediction: str, classes: list[str]) -> float:
        return score_prediction("trec", prediction, ["AB"], classes)

    assert score("AB", ["A", "AB"]) == 1
    # A is dropped, and B, which moved to its place, is never looked at.
    assert score("AB", ["A", "B", "AB"]) == 0.5
    assert score("AB", ["A", "AB", "B"]) == 1
    assert score("AB", ["A", "B", "C", "AB"]) == 0.5
    assert score("A", ["A", "B", "AB"]) == 0
    assert score("ABC", ["AB", "ABC"]) == 0.5


def test_the_recorded_class_cases_include_a_skipped_name() -> None:
    [case] = [case for case in CASES if case["prediction"] == "A B AB"]
    assert case["score"] == 0.5


def test_numbers_are_compared_as_text_and_share_the_score() -> None:
    assert score_prediction("passage_count", "7 of 10, so 7", ["7"]) == pytest.approx(2 / 3)
    assert score_prediction("passage_count", "07", ["7"]) == 0
    assert score_prediction("passage_count", "seven", ["7"]) == 0
    assert score_prediction("passage_retrieval_en", "17 7", ["Paragraph 7"]) == 0.5
    assert score_prediction("passage_retrieval_zh", "段落7", ["段落7"]) == 1


def test_code_is_compared_by_the_first_line_without_comment_signs() -> None:
    def score(prediction: str) -> float:
        return score_prediction("lcc", prediction, ["x = 1"])

    assert score("# why\nx = 1\ny") == 1
    assert score("```\nx = 1") == 1
    assert score("\n\nx = 1") == 1
    assert score("# why\n\nx = 1") == 0  # an empty line is a line
    assert score("x = 1  # one") == 0
    assert score("x = 'http://a'\nx = 1") == 1


def test_code_similarity_is_a_whole_percentage() -> None:
    found = [score_prediction("lcc", "abcdef"[:n], ["abcxyz"]) for n in range(7)]
    assert all(score == round(100 * score) / 100 for score in found)
    assert score_prediction("lcc", "", [""]) == 1
    assert score_prediction("lcc", "", ["x"], code_similarity="difflib") == 0


@pytest.mark.skipif(not HAS_JIEBA, reason="jieba is not installed")
def test_chinese_is_split_into_words_and_loses_its_punctuation() -> None:
    assert score_prediction("multifieldqa_zh", "“给大家烧茶”。", ["给大家烧茶。"]) == 1
    # The official list lacks the opening title mark.
    assert "》" in CJK_PUNCTUATION
    assert "《" not in CJK_PUNCTUATION
    assert score_prediction("multifieldqa_zh", "《烧茶》", ["烧茶"]) < 1


@pytest.mark.skipif(not HAS_JIEBA, reason="jieba is not installed")
def test_no_cache_file_in_the_temporary_folder_can_change_the_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "jieba.cache").write_bytes(b"somebody else's")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    chinese_segmenter.cache_clear()
    assert chinese_segmenter()("星期四加开一班轮渡") == ["星期四", "加开", "一班", "轮渡"]
    assert (tmp_path / "jieba.cache").read_bytes() == b"somebody else's"


# ---- what is refused ----


@pytest.mark.parametrize("task", NEEDS_JIEBA)
def test_without_jieba_there_is_a_hint_how_to_install_it(
    task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    chinese_segmenter.cache_clear()
    monkeypatch.setitem(sys.modules, "jieba", None)
    with pytest.raises(ValueError, match=r"pip install jieba==0\.42\.1"):
        score_prediction(task, "烧茶", ["烧茶"])
    assert score_prediction("lsht", "体育", ["体育"], ["体育"]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("qaspr", "a", ["a"]), "unknown LongBench task 'qaspr'; known: narrativeqa"),
        (("qasper", "a", "abc"), "answers must be a list of texts, got the text 'abc'"),
        (("trec", "a", ["a"]), "trec is scored against all_classes"),
        (("passage_retrieval_en", "1", ["段落1"]), "must name a paragraph by its number"),
        (("passage_retrieval_zh", "1", ["Paragraph 1"]), "must name a paragraph by its number"),
    ],
)
def test_what_cannot_be_scored_is_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score_prediction(*arguments)


def test_an_unknown_code_similarity_is_refused() -> None:
    with pytest.raises(ValueError, match="one of rapidfuzz, difflib, got 'fuzzy'"):
        score_prediction("lcc", "a", ["a"], code_similarity="fuzzy")


def test_scoring_needs_no_torch() -> None:
    code = (
        "import sys; from kvarena.tasks.longbench.metrics import score_prediction as score; "
        "score('qasper', 'a', ['b']); print('torch' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
