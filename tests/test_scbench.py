"""SCBench: contexts that turns share, how long they are, what is asked, and which answers count."""

import json
import re
import zipfile
from dataclasses import fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from kvarena.tasks.base import Sample
from kvarena.tasks.scbench import SCBench
from kvarena.tasks.scbench.families import ANSWER_TOKENS, FAMILIES, FILE_STEMS, MADE_FAMILIES
from kvarena.tasks.scbench.metrics import score_answer
from toy_tokenizers import CharTokenizer

TEMPLATE = "SYSTEM be brief USER {} ASSISTANT\n"
LENGTH = 4000  # characters, which are the tokens here
# The most characters that one more unit adds: a pair, a string, a line of noise, two numbers.
UNIT_CHARS = {"retr_kv": 80, "retr_prefix_suffix": 126, "retr_multihop": 91, "math_find": 10}


def made(*families: str, seed: int = 0, template: str | None = TEMPLATE, **options: Any):
    options = {"lengths": [LENGTH], "num_contexts": 2} | options
    task = SCBench(families=families or MADE_FAMILIES, **options)
    return task.samples(CharTokenizer(chat_template=template), seed)


def text_of(token_ids: tuple[int, ...]) -> str:
    return CharTokenizer().decode(token_ids)


def context(sample: Sample) -> str:
    return text_of(sample.prompt_token_ids[: -sample.question_tokens])


def question(sample: Sample) -> str:
    return text_of(sample.prompt_token_ids[-sample.question_tokens :])


def by_context(samples: list[Sample]) -> list[list[Sample]]:
    found: dict[str, list[Sample]] = {}
    for sample in samples:
        found.setdefault(sample.context.id, []).append(sample)
    return list(found.values())


# ---- contexts ----


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_the_turns_of_a_context_share_it_and_ask_for_something_else_each(template):
    contexts = by_context(made(template=template, turns_per_context=6))
    assert len(contexts) == 8
    for turns in contexts:
        assert [sample.context.turn for sample in turns] == [1, 2, 3, 4, 5, 6]
        assert len({context(sample) for sample in turns}) == 1
        assert {sample.document for sample in turns} == {turns[0].context.id}
        assert len({question(sample) for sample in turns}) == 6
        assert len({sample.id for sample in turns}) == 6
        assert question(turns[0]).startswith("\n\n")
        longest = max(len(sample.prompt_token_ids) for sample in turns)
        assert turns[0].context.longest_prompt_tokens == longest
        assert turns[0].context.longest_question_tokens == max(s.question_tokens for s in turns)


@pytest.mark.parametrize("template", [None, TEMPLATE])
@pytest.mark.parametrize("family", MADE_FAMILIES)
def test_the_longest_prompt_is_as_long_as_allowed_but_not_longer(family, template):
    for length in (LENGTH, 9001):
        for turns in by_context(made(family, lengths=[length], template=template)):
            longest = turns[0].context.longest_prompt_tokens
            assert length - UNIT_CHARS[family] <= longest <= length
            assert {sample.meta["length_target"] for sample in turns} == {length}


def test_the_same_seed_gives_the_same_samples_and_another_seed_others():
    assert made() == made()
    assert not {s.id for s in made()} & {s.id for s in made(seed=1)}
    assert not {s.document for s in made()} & {s.document for s in made(seed=1)}


def test_a_context_does_not_depend_on_what_else_is_asked_for():
    everything = {sample.id for sample in made(lengths=[3000, LENGTH])}
    assert {sample.id for sample in made("retr_multihop", num_contexts=1)} <= everything


def test_a_limit_counts_contexts_of_each_part_with_all_their_turns():
    task = SCBench(lengths=[LENGTH, 3000], num_contexts=5)
    found = task.samples(CharTokenizer(), 0, limit=1)
    assert {s.part for s in found} == {f"{f}-{n}" for f in MADE_FAMILIES for n in (LENGTH, 3000)}
    assert len(by_context(found)) == 8
    assert len(found) == 40


@pytest.mark.parametrize("template", [None, TEMPLATE])
def test_a_turn_after_an_answer_is_its_question_alone(template):
    for sample in made(template=template):
        asked = question(sample).replace(" ASSISTANT\n", "").strip()
        follow_up = text_of(sample.follow_up_token_ids)
        assert follow_up == (template.format(asked) if template else f"\n\n{asked}")


# ---- what is asked ----


def test_keys_and_values_are_uuids_and_each_turn_asks_for_a_value():
    uuid = r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
    for sample in made("retr_kv"):
        pairs = json.loads(context(sample)[context(sample).index("{") :])
        assert len(pairs) > 20
        assert all(re.fullmatch(uuid, text) for pair in pairs.items() for text in pair)
        key = re.search(r'Key: "(.+)"', question(sample))[1]
        assert sample.references == (pairs[key],)


def test_one_string_only_has_both_the_prefix_and_the_suffix():
    for sample in made("retr_prefix_suffix"):
        strings = json.loads(context(sample)[context(sample).index("[") :])
        assert all(65 <= len(text) < 123 for text in strings)
        prefix, suffix = re.search(r'Prefix: "(.+)"\nSuffix: "(.+)"', question(sample)).groups()
        having = [text for text in strings if text.startswith(prefix) and text.endswith(suffix)]
        assert sample.references == tuple(having)
    assert sum(text.startswith(prefix) for text in strings) > 1
    assert sum(text.endswith(suffix) for text in strings) > 1


def test_following_the_assignments_gives_the_variables_asked_for():
    for sample in made("retr_multihop", lengths=[3000, LENGTH]):
        values: dict[str, str] = {}
        for name, source in re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)", context(sample)):
            values[name] = values.get(source, source)  # a source comes before what it is given to
        (value,) = re.findall(r"\d{5}", question(sample))
        assert len(values) == 15
        assert [name for name, given in values.items() if given == value] == [*sample.references]
        assert len(sample.references) == 3


def test_there_are_two_chains_even_for_one_turn():
    (sample,) = made("retr_multihop", turns_per_context=1, num_contexts=1)
    assert len(re.findall(r"VAR [A-Z]{5} = \d{5}\n", context(sample))) == 2


def test_the_number_asked_for_has_that_rank_in_the_list():
    found = made("math_find", turns_per_context=9)
    for sample in found:
        numbers = sorted(json.loads(context(sample)[context(sample).index("[") :]))
        kind = re.search(r"What is the (.+) number of the list", question(sample))[1]
        ranked = {"median": numbers[len(numbers) // 2]}
        for rank, word in enumerate(("", "second ", "third ", "fourth ")):
            ranked |= {f"{word}largest": numbers[-1 - rank], f"{word}smallest": numbers[rank]}
        assert sample.references == (str(ranked[kind]),)
        assert all(100 <= number <= 999 for number in numbers)
        assert numbers.count(numbers[0]) == numbers.count(numbers[-4]) == len(numbers) % 2 == 1


@pytest.mark.parametrize("family", MADE_FAMILIES)
def test_answers_stand_all_over_the_context(family):
    depths = [s.meta["answer_depths"][0] for s in made(family, num_contexts=8)]
    assert min(depths) < 20
    assert max(depths) > 60 if family == "retr_multihop" else max(depths) > 75


# ---- options ----


def test_answers_are_as_long_as_the_protocol_allows_unless_told():
    protocol = {family: ANSWER_TOKENS[family] for family in MADE_FAMILIES}
    assert {s.meta["family"]: s.max_new_tokens for s in made()} == protocol
    assert {s.max_new_tokens for s in made(max_new_tokens=40)} == {40}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"families": ["kv"]}, "unknown scbench family 'kv'; known: retr_kv"),
        ({"families": []}, r"scbench families must be a list of different values, got \[\]"),
        ({"families": "retr_kv"}, "'retr_kv'"),
        ({"lengths": [100, 100]}, "100, 100"),
        ({"lengths": [0]}, "ints >= 1, got 0"),
        ({"turns_per_context": 0}, "ints >= 1, got 0"),
        ({"turns_per_context": 10}, "turns_per_context is 10, math_find has 9 questions"),
        ({"num_contexts": 1.5}, "1.5"),
        ({"max_new_tokens": 0}, "0"),
        ({"families": ["en_qa"]}, "en_qa cannot be made, only read: .*microsoft/SCBench"),
        ({"families": ["retr_kv", "mix_sum_niah"]}, "mix_sum_niah cannot be made"),
        ({"families": ["code_repoqa"], "data": "x"}, "unknown scbench family 'code_repoqa'"),
    ],
)
def test_a_bad_option_is_named_with_its_value(options, message):
    with pytest.raises(ValueError, match=message):
        SCBench(**options)


def test_a_length_that_is_too_small_is_refused_with_what_it_takes():
    with pytest.raises(ValueError, match=r"length 300 is too small: retr_kv takes \d+ tokens"):
        made("retr_kv", lengths=[300])


def test_the_yaml_gives_the_defaults():
    path = Path(__file__).parents[1] / "conf" / "task" / "scbench.yaml"
    options = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert options.pop("_target_") == "kvarena.tasks.scbench.SCBench"
    assert SCBench(**options) == SCBench()
    assert list(options) == [option.name for option in fields(SCBench)]


# ---- files in the format of the benchmark's ----

ROWS = {
    "retr_kv": {
        "id": 3,
        "context": 'JSON data:\n{"a": "one", "b": "two", "c": "three"}',
        "multi_turns": [{"input": f"The value of {k} is", "answer": v} for k, v in
                        [("b", "two"), ("a", "one"), ("c", "three")]],
    },
    "retr_prefix_suffix": {
        "context": '["abc", "abd"]',
        "multi_turns": [{"input": "Prefix ab, suffix d", "answer": "abd"}],
    },
    "retr_multihop": {
        "index": 0,
        "input": "Track the variables.\n\nVAR X = 12 VAR Y = X",
        "length": 9,
        "multi_turns": [{"input": "Which are 12?", "answer": ["X", "Y"]}],
    },
    "math_find": {
        "id": 0,
        "context": [312, 101, 999],
        "multi_turns": [
            {"input": "One number only. The largest number of it is", "answer": 999},
            {"input": "One number only. The second largest number of it is", "answer": [312]},
        ],
    },
}  # fmt: skip
BOOK = "Anne came to Avonlea in June."
OPTIONS = ["Whitby", "Avonlea", "Zenith", "Carthage"]
TEXT_ROWS = {
    "en_qa": {
        "context": BOOK,
        "id": 0,
        "multi_turns": [
            {"input": "Where to?", "answer": "Avonlea"},
            {"input": "When {not}?", "answer": "In June"},
        ],
    },
    "zh_qa": {
        "context": "安妮六月到了。",
        "id": 0,
        "multi_turns": [{"input": "什么时候？", "answer": "六月"}],  # noqa: RUF001
    },
    "en_multichoice": {
        "context": BOOK,
        "id": 0,
        "multi_turns": [{"input": "Where to?", "answer": "Avonlea", "options": OPTIONS}],
    },
    "en_sum": {
        "context": "Paper 1: Trees are tall.\n\nPaper 2: Fish swim.",
        "id": 0,
        "multi_turns": [{"input": "Summarize paper 2.", "answer": "This paper is about fish."}],
    },
    "icl_manyshot": {
        "context": "Q: True?\nA: (A)\n\nQ: False?\nA: (B)",
        "id": 0,
        "task": "boolean",
        "multi_turns": [{"input": "Q: True?\nA:", "answer": "(A)"}],
    },
    "mix_sum_niah": {
        "context": "Paper 1: Trees are tall. The pass key is 71432. Fish swim.",
        "id": 0,
        "multi_turns": [
            {"input": "Summarize paper 1.", "answer": "Trees, tall.", "task": "scbench_summary"},
            {"input": "What is the pass key?", "answer": "71432", "task": "scbench_passkey"},
        ],
    },
}


def write_rows(folder: Path, rows: dict[str, dict[str, Any]] = ROWS) -> Path:
    folder.mkdir()
    for family, row in rows.items():
        path = folder / f"{FILE_STEMS[family]}.jsonl"
        path.write_text(json.dumps(row) + "\n", encoding="utf-8")
    return folder


def test_rows_of_files_are_asked_as_the_benchmark_asks_them(tmp_path):
    found = made(data=str(write_rows(tmp_path / "rows")), template=None)
    prompts = {s.part: text_of(s.prompt_token_ids) for s in reversed(found)}
    assert prompts == {
        "retr_kv": "Extract the value corresponding to the specified key in the JSON object "
        'below.\n\nJSON data:\n{"a": "one", "b": "two", "c": "three"}\n\nThe value of b is',
        "retr_prefix_suffix": '["abc", "abd"]\n\nPrefix ab, suffix d',
        "retr_multihop": "Track the variables.\n\nVAR X = 12 VAR Y = X\n\nWhich are 12?",
        "math_find": "One number only. The largest number of it is\n\n[312, 101, 999]\n\n"
        "What is the largest number of it?\n\nOne number only. The largest number of it is",
    }
    assert [s.references for s in found] == [
        ("two",), ("one",), ("three",), ("abd",), ("X", "Y"), ("999",), ("312",)
    ]  # fmt: skip
    assert question(found[-1]).startswith("\n\nWhat is the second largest number of it?\n\nOne")
    assert [len(turns) for turns in by_context(found)] == [3, 1, 1, 2]
    assert {s.meta["data"] for s in found} == {"folder:rows"}
    assert len({s.meta["data_sha256"] for s in found}) == 4


def test_rows_of_text_families_are_asked_as_the_benchmark_asks_them(tmp_path):
    folder = write_rows(tmp_path / "rows", TEXT_ROWS)
    found = made(*TEXT_ROWS, data=str(folder), template=None)
    assert [(s.part, text_of(s.prompt_token_ids)) for s in found] == [
        ("en_qa", "Read the book and answer the question. Be very concise in your answer.\n\n"
         f"{BOOK}\n\nQuestion: Where to?\nAnswer:"),
        ("en_qa", "Read the book and answer the question. Be very concise in your answer.\n\n"
         f"{BOOK}\n\nQuestion: When {{not}}?\nAnswer:"),
        ("zh_qa",
         "阅读以下书籍然后回答问题。\n\n安妮六月到了。\n\n问题：什么时候？\n答案："),  # noqa: RUF001
        ("en_multichoice", f"Read the book and answer the question.\n\n{BOOK}\n\n"
         "Question: Where to?\nA. Whitby\nB. Avonlea\nC. Zenith\nD. Carthage\n\n"
         "The the correct answer is"),
        ("en_sum", "Paper 1: Trees are tall.\n\nPaper 2: Fish swim.\n\nSummarize paper 2."),
        ("icl_manyshot", "Q: True?\nA: (A)\n\nQ: False?\nA: (B)\n\nQ: True?\nA:"),
        ("mix_sum_niah-en_sum", "Paper 1: Trees are tall. The pass key is 71432. Fish swim.\n\n"
         "Summarize paper 1."),
        ("mix_sum_niah-needle", "Paper 1: Trees are tall. The pass key is 71432. Fish swim.\n\n"
         "What is the pass key?"),
    ]  # fmt: skip
    assert [s.references for s in found] == [
        ("Avonlea",), ("In June",), ("六月",), ("Avonlea", "B"), ("This paper is about fish.",),
        ("(A)",), ("Trees, tall.",), ("71432",),
    ]  # fmt: skip
    assert [s.max_new_tokens for s in found] == [40, 40, 40, 40, 200, 10, 800, 15]
    assert [len(turns) for turns in by_context(found)] == [2, 1, 1, 1, 1, 2]


def test_only_needles_of_text_families_have_a_place_and_only_mixtures_a_task_per_turn(tmp_path):
    folder = write_rows(tmp_path / "rows", TEXT_ROWS)
    found = made(*TEXT_ROWS, data=str(folder))
    assert [s.meta["answer_depths"] for s in found] == [[]] * 7 + [[70.7]]
    assert [s.meta.get("turn_task") for s in found] == [None] * 6 + ["en_sum", "needle"]
    assert {s.meta["family"] for s in found} == set(TEXT_ROWS)
    assert set(TEXT_ROWS) | set(ROWS) == set(FAMILIES)
    assert SCBench(families=["en_qa"], data=str(folder)).data_fingerprint()


def test_each_turn_of_a_mixture_is_scored_as_what_it_asks_for(tmp_path):
    folder = write_rows(tmp_path / "rows", TEXT_ROWS)
    task = SCBench(families=["mix_sum_niah"], data=str(folder))
    summary, needle = task.samples(CharTokenizer(), 0)
    assert task.score(summary, "Trees, tall.")["score"] == pytest.approx(1.0)
    assert task.score(summary, "71432") == {"score": 0.0}
    assert task.score(needle, "It is 71432.") == {"score": 1.0}
    assert task.score(needle, "Trees, tall.") == {"score": 0.0}


@pytest.mark.parametrize("family", ["en_multichoice", "mix_sum_niah"])
def test_the_extra_fields_of_turns_come_from_a_parquet_too(tmp_path, family):
    folder = write_rows(tmp_path / "rows", TEXT_ROWS)
    parquet = tmp_path / "hub" / FILE_STEMS[family] / "test-00000-of-00001.parquet"
    parquet.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist([TEXT_ROWS[family]]), parquet)
    found = [made(family, data=str(place)) for place in (folder, tmp_path / "hub")]
    assert [s.id for s in found[0]] == [s.id for s in found[1]]


def test_of_files_there_are_at_most_so_many_turns(tmp_path):
    found = made(data=str(write_rows(tmp_path / "rows")), turns_per_context=2)
    assert [len(turns) for turns in by_context(found)] == [2, 1, 1, 2]


def test_folder_zip_file_and_parquet_give_the_same_samples(tmp_path):
    rows = write_rows(tmp_path / "rows")
    with zipfile.ZipFile(tmp_path / "rows.zip", "w") as archive:
        for path in rows.iterdir():
            archive.write(path, f"data/{path.name}")
    parquet = tmp_path / "hub" / "scbench_kv" / "test-00000-of-00001.parquet"
    parquet.parent.mkdir(parents=True)
    pq.write_table(pa.Table.from_pylist([ROWS["retr_kv"]]), parquet)
    places = [rows, tmp_path / "rows.zip", rows / "scbench_kv.jsonl", tmp_path / "hub", parquet]
    found = [made("retr_kv", data=str(place)) for place in places]
    assert len({tuple(s.id for s in samples) for samples in found}) == 1
    tasks = [SCBench(families=["retr_kv"], data=str(place)) for place in places]
    assert len({task.data_fingerprint() for task in tasks}) == 1
    assert SCBench().data_fingerprint() is None


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("retr_kv", {"context": None}, "'context' must be a text, got null"),
        ("retr_kv", {"multi_turns": []}, "'multi_turns' must be a list of turns"),
        ("retr_kv", {"multi_turns": [{"input": "?"}]}, "each with a text as input and an answer"),
        ("retr_multihop", {"input": 3}, "'input' must be a text, got 3"),
        ("retr_multihop", {"multi_turns": [{"input": "?", "answer": []}]}, "'multi_turns' must"),
        ("math_find", {"context": ["1"]}, "'context' must be a list of whole numbers"),
        ("math_find", {"multi_turns": [{"input": "?", "answer": 1}]}, "words The ... is"),
        ("en_qa", {"multi_turns": [{"input": "?", "answer": ["a"]}]}, "a text as input"),
        ("en_sum", {"multi_turns": [{"input": "?", "answer": ""}]}, "'multi_turns' must"),
        ("en_multichoice", {"multi_turns": [{"input": "?", "answer": "a"}]}, "its four options"),
        (
            "en_multichoice",
            {"multi_turns": [{"input": "?", "answer": "Here", "options": OPTIONS}]},
            "its four options",
        ),
        (
            "en_multichoice",
            {"multi_turns": [{"input": "?", "answer": "Zenith", "options": OPTIONS[1:]}]},
            "its four options",
        ),
        (
            "mix_sum_niah",
            {"multi_turns": [{"input": "?", "answer": "1", "task": "scbench_kv"}]},
            "a task: scbench_summary or scbench_passkey",
        ),
        ("mix_sum_niah", {"multi_turns": [{"input": "?", "answer": "1"}]}, "and a task"),
    ],
)
def test_a_bad_row_is_named_with_file_line_and_field(tmp_path, family, change, message):
    path = tmp_path / f"{FILE_STEMS[family]}.jsonl"
    path.write_text(json.dumps((ROWS | TEXT_ROWS)[family] | change), encoding="utf-8")
    with pytest.raises(ValueError, match=rf"{path.name} line 1.*{message}"):
        made(family, data=str(tmp_path))


def test_a_file_of_another_family_is_not_taken_for_it(tmp_path):
    path = write_rows(tmp_path / "rows") / "scbench_kv.jsonl"
    with pytest.raises(ValueError, match="is not called scbench_prefix_suffix"):
        made("retr_prefix_suffix", data=str(path))


@pytest.mark.parametrize("data", ["hub", "/absent"])
def test_missing_data_comes_with_every_way_to_get_it(data):
    with pytest.raises(ValueError, match=r"Ways to get SCBench .*=generated.*microsoft/SCBench"):
        made("retr_kv", data=data)


# ---- scores ----


@pytest.mark.parametrize(
    ("family", "references", "text", "score"),
    [
        ("retr_kv", ("0c-1d",), "0c-1d", 1.0),
        ("retr_kv", ("0c-1d",), ' "0c-1d"}\n\nKey: "x"', 1.0),
        ("retr_kv", ("0c-1d",), "0C-1D", 0.0),
        ("retr_kv", ("0c-1d",), "0c-1", 0.0),
        ("retr_kv", ("0c-1d",), "", 0.0),
        ("retr_prefix_suffix", ("abXY",), "The string is: abXY.", 1.0),
        ("retr_prefix_suffix", ("abXY",), "zabXYz", 1.0),  # containment is all there is
        ("retr_prefix_suffix", ("abXY",), "abxy", 0.0),
        ("retr_multihop", ("AAAAA", "BBBBB", "CCCCC"), "aaaaa, BBBBB and CCCCC", 1.0),
        ("retr_multihop", ("AAAAA", "BBBBB", "CCCCC"), "BBBBB BBBBB DDDDD", 0.33),
        ("retr_multihop", ("AAAAA", "BBBBB", "CCCCC"), "AAAAA\nBBBBB", 0.67),
        ("retr_multihop", ("AAAAA", "BBBBB", "CCCCC"), "", 0.0),
        ("math_find", ("912",), "912", 1.0),
        ("math_find", ("912",), "It is 912.", 1.0),
        ("math_find", ("912",), "912.7 or so", 1.0),  # decimals are cut off
        ("math_find", ("912",), "-912", 1.0),
        ("math_find", ("912",), "1st: 912", 0.0),  # the first number counts
        ("math_find", ("912",), "9,12", 0.0),
        ("math_find", ("912",), "nine hundred and twelve", 0.0),
        ("math_find", ("912",), "", 0.0),
        ("en_qa", ("Avonlea",), "She went to AVONLEA.\n", 1.0),
        ("en_qa", ("Avonlea",), "Avon lea", 0.0),
        ("en_qa", ("Avonlea",), "", 0.0),
        ("icl_manyshot", ("(A)",), " (a)\n\nQ:", 1.0),
        ("icl_manyshot", ("(A)",), "(B)", 0.0),  # a shared bracket is no right answer
        ("icl_manyshot", ("(A)",), "", 0.0),
        ("en_multichoice", ("Avonlea", "B"), "B", 1.0),
        ("en_multichoice", ("Avonlea", "B"), " B. Whitby", 1.0),  # the letter decides
        ("en_multichoice", ("Avonlea", "B"), "A", 0.0),
        ("en_multichoice", ("Avonlea", "B"), "Avonlea", 0.0),  # an A at the start, as officially
        ("en_multichoice", ("Whitby", "A"), "Whitby", 1.0),
        ("en_multichoice", ("Whitby", "A"), "It says: the answer is: A", 1.0),
        ("en_multichoice", ("Whitby", "A"), "the answer is Whitby, surely", 1.0),
        ("en_multichoice", ("Whitby", "A"), "the option is\n\n'C'", 0.0),
        ("en_multichoice", ("Whitby", "A"), "the answer is", 0.0),
        ("en_multichoice", ("Whitby", "A"), "the answer:A", 0.0),  # one character is skipped
        ("en_multichoice", ("Whitby", "A"), "I say (A), then A.", 1.0),
        ("en_multichoice", ("Whitby", "A"), "I say B or A", 0.0),
        ("en_multichoice", ("Whitby", "A"), "I do not know", 0.0),
        ("en_multichoice", ("Whitby", "A"), " \n", 0.0),
        ("needle", ("71432",), "71432", 1.0),
        ("needle", ("71432",), "The pass key is 71432. Remember 9.", 1.0),
        ("needle", ("71432",), "1) 71432", 0.0),  # the first digits count
        ("needle", ("71432",), "714321", 0.0),
        ("needle", ("71432",), "", 0.0),
        ("zh_qa", ("六月",), " 六月。", 1.0),
        ("zh_qa", ("六月",), "六月二日", pytest.approx(2 / 3)),
        ("zh_qa", ("六月",), "五年", 0.0),
        ("zh_qa", ("Bob",), "bOB!", 1.0),
        ("zh_qa", ("六月",), "", 0.0),
        ("en_sum", ("fish swim far",), "fish swim far", pytest.approx(1.0)),
        ("en_sum", ("fish swim far",), "fish\nswim", pytest.approx(0.8)),
        ("en_sum", ("fish swim far",), "trees", 0.0),
        ("en_sum", ("fish swim far",), "...", 0.0),
        ("en_sum", ("fish swim far",), "", 0.0),
    ],
)  # fmt: skip
def test_an_answer_scores_as_metrics_says(family, references, text, score):
    assert score_answer(family, text, references) == score
    sample = Sample(
        id="a", prompt_token_ids=(1,), references=references, max_new_tokens=9,
        meta={"family": family},
    )  # fmt: skip
    assert SCBench().score(sample, text) == {"score": score}


@pytest.mark.slow
def test_the_real_tokenizer_gives_full_prompts_with_one_context():
    from kvarena.harness.models import find_model
    from kvarena.harness.models.loading import load_tokenizer

    tokenizer = load_tokenizer(find_model("smollm2-135m"))
    units = {"retr_kv": 75, "retr_prefix_suffix": 110, "retr_multihop": 30, "math_find": 10}
    task = SCBench(lengths=[2000], turns_per_context=8, num_contexts=1)
    for turns in by_context(task.samples(tokenizer, 0)):
        assert len(turns) == 8
        family, longest = turns[0].meta["family"], turns[0].context.longest_prompt_tokens
        assert 2000 - units[family] < longest <= 2000
        for sample in turns:
            text = tokenizer.decode(list(sample.prompt_token_ids))
            assert all(reference in text for reference in sample.references)
            asked = tokenizer.decode(list(sample.prompt_token_ids[-sample.question_tokens :]))
            follow_up = tokenizer.decode(list(sample.follow_up_token_ids))
            assert asked.strip("\n ")[:60] in follow_up
