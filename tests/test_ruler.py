"""RULER: what its prompts hold, how long they are, and how answers and lengths are scored."""

import gzip
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from kvarena.tasks.base import Sample, content_id
from kvarena.tasks.ruler import Ruler
from kvarena.tasks.ruler.documents import DOCUMENT, SOURCES
from kvarena.tasks.ruler.effective import effective_length
from kvarena.tasks.ruler.needles import NIAH_TASKS, niah_recipe, word_list
from kvarena.tasks.ruler.prompts import (
    COMMON_WORDS,
    FREQUENT_WORDS,
    NEEDLE,
    NIAH,
    NOISE,
    QUESTION_ANSWERING,
    SINGULAR,
    VARIABLE_TRACKING,
    PromptParts,
    Recipe,
)
from kvarena.tasks.ruler.task import ANSWER_TOKENS, OFFLINE_TASKS
from toy_tokenizers import WordTokenizer

SHARED = Path(__file__).parents[2] / "shared" / "data" / "ruler" / "4096"
LENGTH = 1500
# The most words that one more unit adds: a line of noise, a needle, an entry of a list; in the
# other tasks a sentence, which has at most 8, or some coded words.
UNIT_WORDS = {"niah_single_1": 20, "vt": 20, "niah_multikey_2": 10, "niah_multikey_3": 10}


TEMPLATE = "SYSTEM be brief USER {} ASSISTANT\n"


@dataclass(frozen=True)
class Made:
    sample: Sample
    text: str
    question: str

    @property
    def context(self) -> str:
        return self.text.removesuffix(self.question)


@pytest.fixture
def folder(tmp_path: Path) -> str:
    """80 sentences of 4 to 8 words."""
    lines = [f"Line {n} says" + " more" * (n % 5) + " here." for n in range(80)]
    (tmp_path / "a.txt").write_text("\n".join(lines), encoding="utf-8")
    return str(tmp_path)


def made(folder: str, *tasks: str, seed: int = 0, template: str | None = TEMPLATE, **options: Any):
    tokenizer = WordTokenizer(chat_template=template)
    options = {"lengths": [LENGTH], "num_samples": 3, "haystack": folder} | options
    found = Ruler(tasks=tasks or OFFLINE_TASKS, **options).samples(tokenizer, seed)
    return [
        Made(
            sample,
            tokenizer.decode(sample.prompt_token_ids),
            tokenizer.decode(sample.prompt_token_ids[-sample.question_tokens :]),
        )
        for sample in found
    ]


def test_the_same_arguments_give_the_same_samples_in_the_same_order(folder):
    again = [m.sample for m in made(folder, num_samples=2)]
    assert [m.sample for m in made(folder, num_samples=2)] == again
    assert [s.meta["ruler_task"] for s in again] == [*OFFLINE_TASKS, *OFFLINE_TASKS]
    assert len({s.id for s in again}) == 22


def test_the_part_of_a_sample_is_its_task_at_its_length(folder):
    found = made(folder, "vt", "niah_single_2", lengths=[LENGTH, 1200], num_samples=2)
    assert {m.sample.part for m in found} == {
        "vt-1500", "vt-1200", "niah_single_2-1500", "niah_single_2-1200"
    }  # fmt: skip
    assert {m.sample.document for m in found} == {""}


def test_a_sample_does_not_depend_on_what_else_is_asked_for(folder):
    everything = made(folder, lengths=[LENGTH, 1200], num_samples=2)
    (alone,) = made(folder, "vt", lengths=[1200], num_samples=1)
    assert alone.sample.id in {m.sample.id for m in everything}


def test_another_seed_or_number_gives_other_answers(folder):
    found = made(folder, num_samples=2) + made(folder, num_samples=2, seed=1)
    assert len({m.sample.references for m in found}) == 44


@pytest.mark.parametrize("template", [None, TEMPLATE])
@pytest.mark.parametrize("task", OFFLINE_TASKS)
def test_prompt_and_answer_are_as_long_as_allowed_but_not_longer(folder, task, template):
    for length in (LENGTH, 4100):
        for m in made(folder, task, lengths=[length], template=template):
            num_tokens = len(m.sample.prompt_token_ids) + ANSWER_TOKENS[task]
            assert length - UNIT_WORDS.get(task, 8) < num_tokens <= length
            assert m.sample.max_new_tokens == ANSWER_TOKENS[task]
            assert m.sample.meta["length_tokens"] == num_tokens
            assert m.sample.meta["length_target"] == length


MULTI_KEY = ("niah_multikey_1", "niah_multikey_2", "niah_multikey_3")


@pytest.mark.parametrize("template", [None, TEMPLATE])
@pytest.mark.parametrize("task", MULTI_KEY)
def test_questions_about_one_text_ask_for_another_key_each(folder, task, template):
    options = {"questions_per_context": 4, "num_samples": 2, "template": template}
    found = made(folder, task, **options)
    assert [m.sample.context.turn for m in found] == [1, 2, 3, 4] * 2
    for asked in (found[:4], found[4:]):
        assert len({m.context for m in asked}) == len({m.sample.document for m in asked}) == 1
        assert len({m.sample.references for m in asked}) == 4
        for m in asked:
            kind = "uuid" if task == "niah_multikey_3" else "number"
            key = re.search(rf"special magic {kind} for (\S+) mentioned", m.question)[1]
            (value,) = m.sample.references
            assert NEEDLE.format(kind=f"{kind}s", key=key, value=value) in m.context
        longest = asked[0].sample.context.longest_prompt_tokens + ANSWER_TOKENS[task]
        assert LENGTH - UNIT_WORDS.get(task, 8) < longest <= LENGTH
    assert found[0].sample.document != found[4].sample.document


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_a_question_after_an_answer_is_the_same_with_the_answer_begun(folder, template):
    tokenizer = WordTokenizer(chat_template=template)
    task = Ruler(tasks=MULTI_KEY, lengths=[LENGTH], haystack=folder, questions_per_context=3)
    for sample in task.samples(tokenizer, 0, limit=3):
        question = tokenizer.decode(sample.prompt_token_ids[-sample.question_tokens :])
        begun = tokenizer.decode(sample.follow_up_token_ids)
        assert begun.split()[2 if template else 0 :][-9:] == question.split()[-9:]
        assert " ".join(question.split()) in " ".join(begun.split())


def test_one_question_to_a_text_is_what_it_was_before_there_could_be_more(folder):
    found = made(folder, *NIAH_TASKS, num_samples=1)
    assert content_id([m.sample.id for m in found]) == "8a8bab836995ff6c"
    assert not any(m.sample.context or m.sample.follow_up_token_ids for m in found)


def test_the_name_tells_how_many_questions_a_text_has():
    assert Ruler().name == "ruler"
    assert Ruler(tasks=MULTI_KEY, questions_per_context=4).name == "ruler-4questions"


@pytest.mark.parametrize(
    ("task", "most"),
    [("niah_multikey_1", 4), ("niah_single_1", 1), ("niah_multiquery", 1), ("vt", 1), ("cwe", 1)],
)
def test_more_questions_than_a_text_has_are_refused(task, most):
    with pytest.raises(ValueError, match=f"is 5, but a text of {task} has {most} to ask"):
        Ruler(tasks=[task], questions_per_context=5)


PREFIXES = {
    "vt": r" Answer: According to the chain\(s\) of variable assignment in the text above, "
    r"5 variables are assgined the value \d{5}, they are: ",
    "cwe": r" Answer: The top 10 words that appear most often in the list are:",
    "fwe": r" Answer: According to the coded text above, the three most frequently appeared words "
    r"are:",
}
NIAH_PREFIX = r" The special magic (number|uuid)s? for .* mentioned in the provided text (is|are)"


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_the_answer_is_begun_after_the_turn(folder, template):
    for m in made(folder, num_samples=1, template=template):
        task = m.sample.meta["ruler_task"]
        end = "ASSISTANT\n" if template else "in the text above." if task == "vt" else "?"
        begun = m.text.rsplit(end, maxsplit=1)[1]
        assert re.fullmatch(PREFIXES.get(task, NIAH_PREFIX), begun)


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_the_question_tokens_are_what_follows_the_context(folder, template):
    for m in made(folder, num_samples=1, template=template):
        niah = m.sample.meta["ruler_task"] in NIAH_TASKS
        # Spaces and newlines that end the context may share a token with the question.
        assert re.match(r"\s*\nWhat " if niah else r"\s*\nQuestion: ", m.question), m.question
        assert m.text.endswith(m.question)
        for reference in m.sample.references:
            assert reference in m.context
            assert reference not in m.question


# ---- needles ----


def needles(m: Made) -> list[tuple[str, str]]:
    return re.findall(r"One of the special magic \w+ for (\S+) is: (\S+)\.", m.context)


@pytest.mark.parametrize("task", NIAH_TASKS)
def test_needles_are_there_and_the_asked_ones_hold_the_answers(folder, task):
    spec = NIAH_TASKS[task]
    for m in made(folder, task):
        found = needles(m)
        assert len(set(value for _, value in found)) == len(found)
        assert len(set(key for key, _ in found)) == len(found) / spec.num_values
        if spec.haystack == "needles":
            assert len(found) > 50
        else:
            assert len(found) == spec.num_keys * spec.num_values
        asked = [key for key, value in found if value in m.sample.references]
        assert len(m.sample.references) == spec.num_queries * spec.num_values
        assert set(asked) == {key for key, _ in found if key in m.question}
        assert len(set(asked)) == spec.num_queries
        number, words = r"[1-9]\d{6}", r"[a-z]+-[a-z]+"
        an_uuid = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
        for key, value in found:
            assert re.fullmatch(an_uuid if spec.keys == "uuids" else words, key)
            assert re.fullmatch(an_uuid if spec.values == "uuids" else number, value)


def test_haystacks_are_noise_text_or_needles(folder):
    for m in made(folder, *NIAH_TASKS):
        haystack = NIAH_TASKS[m.sample.meta["ruler_task"]].haystack
        rest = re.sub(r"One of the special magic \w+ for \S+ is: \S+\.", "", m.context)
        assert (rest.count(NOISE) > 50) == (haystack == "noise")
        assert (len(re.findall(r"Line \d+ says", rest)) > 50) == (haystack == "text")


def test_one_needle_is_asked_for_in_the_singular(folder):
    for m in made(folder, *NIAH_TASKS, num_samples=1):
        task = m.sample.meta["ruler_task"]
        kind = "uuid" if NIAH_TASKS[task].values == "uuids" else "number"
        single = len(m.sample.references) == 1
        begin = f"A special magic {kind} is" if single else f"Some special magic {kind}s are"
        assert f"USER {begin} hidden within the following text. Make sure to" in m.text
        assert (f"What is the special magic {kind} for" in m.question) == single
        assert (f"What are all the special magic {kind}s for" in m.question) != single


def test_depths_are_the_share_of_the_context_before_each_answer(folder):
    for m in made(folder, "niah_multiquery", "niah_single_1"):
        start = m.context.index("afterwards.\n") + len("afterwards.\n")
        context = m.context[start:]
        for answer, depth in zip(m.sample.references, m.sample.meta["depths_percent"], strict=True):
            assert depth == pytest.approx(100 * context.index(answer) / len(context), abs=0.1)


def test_a_needle_at_an_end_of_the_text_keeps_the_space_beyond_it():
    """As in the benchmark, whose empty stretches of text are joined like the others."""
    recipes = [niah_recipe(NIAH_TASKS["niah_single_2"], ["A.", "B."], seed) for seed in range(300)]
    contexts = [recipe.make(2).context for recipe in recipes]
    shapes = {re.sub(r"One of .*? is: \d+\.", "N", context) for context in contexts}
    assert shapes == {f"{a} {b}" for a, b in [("A. N", "B."), ("B. N", "A.")]} | {
        f"{a}{b}"
        for a, b in [(" N ", "A. B."), (" N ", "B. A."), ("A. B.", " N "), ("B. A.", " N ")]
    }


def test_text_starts_at_different_sentences(folder):
    found = made(folder, "niah_single_2", num_samples=10)
    assert len({re.search(r"Line \d+ says", m.context)[0] for m in found}) > 5


# ---- chains of variables ----


def test_vt_hides_one_chain_and_shows_another_with_its_answer(folder):
    for m in made(folder, "vt"):
        example, task = m.context.split("\n\nMemorize and track", maxsplit=1)
        for text, names, letters in (
            (example, re.search(r"they are:  ([A-Z ]+)\n\n$", example)[1].split(), 3),
            (task, m.sample.references, 5),
        ):
            lines = re.findall(r"VAR [A-Z]+ = (?:VAR )?(?:[A-Z]+|\d+)", text)
            value = lines[0].split()[-1]
            assert re.fullmatch(r"[1-9]\d{4}", value)
            assert lines == [
                f"VAR {names[0]} = {value}",
                *(f"VAR {names[i]} = VAR {names[i - 1]}" for i in range(1, 5)),
            ]
            assert len(set(names)) == 5
            assert {len(name) for name in names} == {letters}
            assert f"assigned the value {value} in the text above" in text + m.question
        assert len(example.split()) <= 500


def test_a_step_of_vt_shares_the_line_of_the_noise_after_it(folder):
    """As in the benchmark: parts that are joined by spaces, the noise with its own line end."""
    for m in made(folder, "vt", template=None):
        text = re.sub(r"VAR [A-Z]+ = (VAR )?([A-Z]+|\d{5})", r"VAR A = \1B", m.text)
        for part in text.split("\n\n\n\nMemorize"):
            context = part.split("hidden in the following text.\n\n")[1].split("Question")[0]
            assert context.endswith(f"{NOISE}\n\n")
            first, *lines = context.removesuffix("\n\n").split("\n")
            steps = rf"(VAR A = B )?(VAR A = VAR B  )*{re.escape(NOISE)}"
            assert re.fullmatch(steps, first)
            assert all(re.fullmatch(f" {steps}", line) for line in lines)
            assert context.count("VAR A") == 5


# ---- counting words ----


@pytest.mark.parametrize(
    ("length", "repeats", "example"), [(LENGTH, (6, 1), (3, 1)), (4100, (30, 3), (10, 3))]
)
def test_cwe_repeats_ten_words_more_often_than_all_others(folder, length, repeats, example):
    for m in made(folder, "cwe", lengths=[length]):
        shown, asked = m.context.split("Memorize the ones that appear most often.")[1:]
        answered = re.search(r"in the list are:(1\. .*)\n", shown)[1]
        for text, common, times in (
            (shown[: shown.index("\nQuestion")], re.findall(r"\d+\. (\w+)", answered), example),
            (asked, m.sample.references, repeats),
        ):
            words = re.findall(r"(\d+)\. (\w+)", text)
            assert [int(number) for number, _ in words] == list(range(1, len(words) + 1))
            counts = Counter(word for _, word in words)
            assert {word for word, count in counts.items() if count == times[0]} == set(common)
            assert set(counts.values()) == set(times)
            assert len(common) == 10
        assert not set(re.findall(r"[a-z]+", answered)) & set(m.sample.references)


@pytest.mark.parametrize("length", [300, LENGTH])
def test_fwe_asks_for_the_second_to_fourth_most_frequent(folder, length):
    for m in made(folder, "fwe", lengths=[length]):
        words = m.context.split("coded words. ")[1].split()
        ranked = Counter(words).most_common()
        assert ranked[0][0] == "..."
        assert {word for word, _ in ranked[1:4]} == set(m.sample.references)
        assert ranked[3][1] > ranked[4][1]
        # A share of 1/4 and of 1/9 of the most frequent.
        assert ranked[1][1] == pytest.approx(ranked[0][1] / 4, abs=1)
        assert ranked[2][1] == pytest.approx(ranked[0][1] / 9, abs=1)
        assert all(re.fullmatch("[a-z]{6}", word) for word, _ in ranked[1:])


# ---- questions with documents ----

SQUAD = {
    "data": [
        {
            "paragraphs": [
                {
                    "context": f"Article {a} paragraph {p} has number {a}{p}.",
                    "qas": [
                        {"question": f"Which {a}{p}?", "is_impossible": p == 2,
                         "answers": [{"text": f"number {a}{p}"}, {"text": f"{a}{p}"}]}
                    ],
                }
                for p in range(4)
            ]
        }
        for a in range(30)
    ]
}  # fmt: skip
HOTPOT = [
    {
        "question": f"Who {n}?", "answer": f"person {n}",
        "context": [[f"Title {n} {k}", [f"It is person {n}.", f" Also {k}."]] for k in range(10)],
    }
    for n in range(6)
]  # fmt: skip


@pytest.fixture
def qa_files(tmp_path: Path) -> list[str]:
    paths = [tmp_path / "squad.json", tmp_path / "hotpot.json"]
    for path, content in zip(paths, (SQUAD, HOTPOT), strict=True):
        path.write_text(json.dumps(content), encoding="utf-8")
    return [str(path) for path in paths]


def documents(m: Made) -> list[str]:
    return re.findall(r"Document \d+:\n(.*?)(?=\n\nDocument|\n\nAnswer|$)", m.context, re.DOTALL)


def test_squad_adds_paragraphs_of_the_same_article_first(folder, qa_files):
    found = made(folder, "qa_1", qa_file=qa_files[0], lengths=[150])
    assert [m.sample.references for m in found] == [
        ("number 00", "00"), ("number 01", "01"), ("number 03", "03")
    ]  # fmt: skip
    for m, number in zip(found, ("00", "01", "03"), strict=True):
        texts = documents(m)
        assert f"Article 0 paragraph {number[1]} has number {number}." in texts
        assert {f"Article 0 paragraph {p} has number 0{p}." for p in range(4)} <= set(texts)
        assert len(set(texts)) == len(texts) > 4
        assert m.question.endswith(f"Question: Which {number}? ASSISTANT\n Answer:")
        assert len(m.sample.prompt_token_ids) + 32 <= 150


def test_hotpotqa_keeps_all_ten_documents_of_the_question(folder, qa_files):
    for n, m in enumerate(made(folder, "qa_2", qa_file=qa_files[1], lengths=[250])):
        texts = documents(m)
        assert {f"Title {n} {k}\nIt is person {n}. Also {k}." for k in range(10)} <= set(texts)
        assert len(texts) > 10
        assert len(m.sample.meta["depths_percent"]) == 10


def test_a_small_file_is_used_up_before_the_length(folder, qa_files):
    (m,) = made(folder, "qa_1", qa_file=qa_files[0], lengths=[9000], num_samples=1)
    assert len(documents(m)) == 120


def test_documents_are_shuffled(folder, qa_files):
    found = made(folder, "qa_1", qa_file=qa_files, lengths=[400], num_samples=8)
    assert len({m.sample.meta["depths_percent"][0] for m in found}) > 4


@pytest.mark.parametrize("task", SOURCES)
def test_qa_without_its_file_says_how_to_get_it(task, qa_files):
    with pytest.raises(ValueError, match=rf"{task} needs .*https://.*qa_file="):
        Ruler(tasks=[task])
    with pytest.raises(ValueError, match=rf"{task} needs"):
        Ruler(tasks=[task], qa_file=qa_files[task == "qa_1"])
    assert Ruler(tasks=[*SOURCES], qa_file=qa_files, num_samples=1).tasks == tuple(SOURCES)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"data": []}', '[{"question": "?"}]', "3"])
def test_a_file_in_another_format_is_named(tmp_path, content):
    path = tmp_path / "other.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"other\.json.*SQuAD.*HotpotQA"):
        Ruler(tasks=["qa_1"], qa_file=str(path))
    with pytest.raises(ValueError, match="absent"):
        Ruler(tasks=["qa_1"], qa_file=str(tmp_path / "absent"))


def test_more_samples_than_questions_are_refused(qa_files):
    with pytest.raises(ValueError, match=r"num_samples is 7, qa_2 has 6"):
        Ruler(tasks=["qa_2"], qa_file=qa_files[1], num_samples=7)


# ---- sizes ----


@pytest.mark.parametrize("tokens_of_unit", [1, 7, 30])
def test_the_largest_size_is_found_in_few_tries(tokens_of_unit):
    tries = []

    def make(size: int) -> PromptParts:
        tries.append(size)
        # Odd units take more, so that guesses are a little off.
        context = "w " * (tokens_of_unit * size + size % 2)
        return PromptParts(before="", context=context, after="", prefix="", references=())

    best = Recipe(make=make, smallest=3).fitted(lambda p: len(p.context.split()), 10_000)
    assert 10_000 - 2 * tokens_of_unit <= len(best.context.split()) <= 10_000
    assert len(tries) < 16


def test_a_length_that_is_too_small_is_refused_with_what_it_takes(folder):
    with pytest.raises(ValueError, match=r"length 100 is too small: vt takes \d+ tokens or more"):
        made(folder, "vt", lengths=[100])


@pytest.mark.parametrize(
    ("options", "value"),
    [
        ({"tasks": ["niah"]}, "'niah'; known: niah_single_1"),
        ({"tasks": []}, r"\[\]"),
        ({"tasks": "vt"}, "'vt'"),
        ({"tasks": ["vt", "vt"]}, "'vt', 'vt'"),
        ({"lengths": 4096}, "4096"),
        ({"lengths": [0]}, "0"),
        ({"lengths": ["4k"]}, "'4k'"),
        ({"num_samples": 0}, "0"),
        ({"questions_per_context": 0}, "0"),
    ],
)
def test_a_bad_option_is_named_with_its_value(options, value):
    with pytest.raises(ValueError, match=value):
        Ruler(**options)


# ---- scores ----


def scored(task: str, references: tuple[str, ...], text: str) -> float:
    sample = Sample(
        id="a", prompt_token_ids=(1,), references=references, max_new_tokens=9,
        meta={"ruler_task": task},
    )  # fmt: skip
    return Ruler().score(sample, text)["score"]


@pytest.mark.parametrize(
    ("task", "references", "text", "score"),
    [
        ("niah_single_1", ("1234567",), " 1234567.", 1.0),
        ("niah_single_1", ("1234567",), "1,234,567", 0.0),  # containment is all there is
        ("niah_single_1", ("1234567",), "912345678", 1.0),
        ("niah_single_3", ("ab-CD",), "AB-cd", 1.0),
        ("niah_multivalue", ("11", "22", "33", "44"), "11, 33 and 55", 0.5),
        ("niah_multiquery", ("11", "22", "33", "44"), "", 0.0),
        ("vt", ("AAAAA", "BBBBB", "CCCCC", "DDDDD", "EEEEE"), "aaaaa bbbbb\nVAR", 0.4),
        ("cwe", tuple("abcdefghij"), "1. a 2. b", 0.2),
        ("fwe", ("xyz", "uvw", "rst"), "xyz uvw rst", 1.0),
        ("fwe", ("xyz", "uvw", "rst"), "x\tyz\x00uvw\x1f", 1 / 3),
        ("niah_single_1", ("12 34",), "12\x0034", 0.0),
        ("qa_1", ("Paris", "the city of Paris"), "It is paris.", 1.0),
        ("qa_1", ("Paris", "Lyon"), "Nice", 0.0),
        ("qa_2", ("yes",), "Yesterday", 1.0),
    ],
)
def test_the_share_of_references_in_the_answer(task, references, text, score):
    assert scored(task, references, text) == pytest.approx(score)


def rows_of(means: dict[int, list[float]], policy: str) -> pd.DataFrame:
    """Two samples of each task, a little under and over the task's mean."""
    return pd.DataFrame(
        {
            "task": "ruler", "model": "m", "policy": policy, "budget": "1k", "status": "ok",
            "meta_length_target": length, "meta_ruler_task": f"task{number}",
            "score": mean + difference,
        }
        for length, task_means in means.items()
        for number, mean in enumerate(task_means)
        for difference in (-0.05, 0.05)
    )  # fmt: skip


def test_effective_length_is_the_longest_whose_mean_is_over_the_bar():
    good = rows_of({4096: [0.95, 0.9], 8192: [0.9, 0.82], 16384: [0.9, 0.7]}, "full")
    bad = rows_of({4096: [0.856, 0.85], 8192: [0.1]}, "h2o")
    ignored = good.assign(task="needle"), good.assign(status="error", score=1.0)
    # More rows of one task weigh no more.
    repeated = good[good["meta_ruler_task"] == "task1"]
    found = effective_length(pd.concat([good, bad, repeated, *ignored]))
    full, h2o = found.to_dict("records")
    assert (full["policy"], full["effective_length"], full["num_tasks"]) == ("full", 8192, 2)
    assert full["mean_percent"] == pytest.approx({4096: 92.5, 8192: 86.0, 16384: 80.0})
    assert (h2o["policy"], h2o["effective_length"], h2o["num_tasks"]) == ("h2o", 0, 1)


def test_a_mean_at_the_bar_is_not_over_it():
    (line,) = effective_length(rows_of({4096: [0.856]}, "full")).to_dict("records")
    assert line["effective_length"] == 0


# ---- against the benchmark ----


def test_words_are_single_and_many():
    assert len(word_list("noun", "adjective", "verb")) > 7000
    assert all(re.fullmatch("[A-Za-z]+", word) for word in word_list("noun"))


WORDINGS = dict.fromkeys(NIAH_TASKS, NIAH) | dict.fromkeys(SOURCES, QUESTION_ANSWERING)
WORDINGS |= {"vt": VARIABLE_TRACKING, "cwe": COMMON_WORDS, "fwe": FREQUENT_WORDS}


def fixed_text(task: str, num_answers: int) -> str:
    """A pattern for a whole prompt of the benchmark without a chat template."""
    wording = "".join(WORDINGS[task])
    if task in NIAH_TASKS and num_answers == 1:
        for plural, singular in SINGULAR:
            wording = wording.replace(plural, singular)
    pattern = re.sub(r"\\{\w+\\}", ".+", re.escape(wording))
    example = {"vt": rf"{pattern} [A-Z ]+\n{{4}}", "cwe": rf"{pattern}1\..+\n"}
    return example.get(task, "") + pattern


@pytest.mark.parametrize("task", WORDINGS)
def test_a_prompt_is_the_wording_filled_in(folder, qa_files, task):
    for m in made(folder, task, template=None, qa_file=qa_files, lengths=[1200]):
        pattern = fixed_text(task, len(m.sample.references))
        assert re.fullmatch(pattern, m.text, re.DOTALL)


def test_the_wording_is_the_one_that_was_compared_with_the_benchmark():
    """With copies of NVIDIA/RULER's generators and with lm-eval 0.4.13, whose text was equal.

    Who changes a word changes the benchmark: compare again, and change the task's version.
    """
    wordings = (NIAH, SINGULAR, VARIABLE_TRACKING, COMMON_WORDS, FREQUENT_WORDS, QUESTION_ANSWERING)
    found = [content_id(wording) for wording in (*wordings, NEEDLE, NOISE, DOCUMENT)]
    assert found == [
        "821403091850aa54",
        "7339affa377f514e",
        "7d3f73f16be284b0",
        "5ac0a3d6f38de8bb",
        "db6220cde276410f",
        "e9924d87da70f289",
        "e187b16bcd8175fa",
        "c513cca3e11ed5a7",
        "de3560caad9512b9",
    ]


def published_files() -> list[Path]:
    files = sorted(SHARED.glob("*.jsonl.gz"))
    if not files:
        pytest.skip(f"{SHARED} has no files")
    return files


@pytest.mark.shared_data
def test_published_prompts_are_our_wording_filled_in():
    for path in published_files():
        task = path.name.removesuffix(".jsonl.gz")
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        assert rows
        for row in rows:
            assert re.fullmatch(fixed_text(task, len(row["outputs"])), row["input"], re.DOTALL)


@pytest.mark.shared_data
def test_a_published_haystack_of_needles_has_our_layout(folder):
    if SHARED / "niah_multikey_3.jsonl.gz" not in published_files():
        pytest.skip("niah_multikey_3 is not there")
    with gzip.open(SHARED / "niah_multikey_3.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines][:20]
    (ours,) = made(folder, "niah_multikey_3", template=None, num_samples=1)
    # The same text once the random parts are blanked and the haystack is cut to three needles.
    for row in rows:
        uuids = r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
        shapes = [
            re.sub(r"(One of [^\n]*\n){3,}", "NEEDLES\n", re.sub(uuids, "UUID", text))
            for text in (row["input"], ours.text)
        ]
        assert shapes[0] == shapes[1]


@pytest.mark.slow
def test_the_real_tokenizer_gives_full_prompts():
    from kvarena.harness.models import find_model
    from kvarena.harness.models.loading import load_tokenizer

    tokenizer = load_tokenizer(find_model("smollm2-135m"))
    for sample in Ruler(lengths=[2000], num_samples=2).samples(tokenizer, 0):
        # The longest verse has 171 tokens.
        assert 2000 - 171 < sample.meta["length_tokens"] <= 2000
        assert len(sample.prompt_token_ids) + sample.max_new_tokens == sample.meta["length_tokens"]
        question = tokenizer.decode(list(sample.prompt_token_ids[-sample.question_tokens :]))
        assert question.lstrip().startswith(("What", "Question"))
        text = tokenizer.decode(list(sample.prompt_token_ids))
        assert all(reference in text for reference in sample.references)
