"""GSM8K: the prompt to the letter, which number is the answer, and where rows come from."""

import gzip
import json
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kvarena.tasks.base import Sample
from kvarena.tasks.benchmark.source import SAMPLE_FOLDER
from kvarena.tasks.gsm8k import EXAMPLES, Gsm8k, worked_examples
from kvarena.tasks.math.answers import is_correct
from toy_tokenizers import CharTokenizer

SAMPLE_FILE = SAMPLE_FOLDER / "gsm8k" / "test.jsonl"
ROW = {"question": "How many are 1 and 1?", "answer": "1 + 1 = <<1+1=2>>2\n#### 2"}


TOKENIZER = CharTokenizer("The protocol has no chat template: {}", has_start=True)


def samples(data: object = "sample", **options: object) -> list[Sample]:
    return Gsm8k(data=str(data), **options).samples(TOKENIZER, 0)


# ---- the prompt ----


def test_the_prompt_is_eight_examples_and_the_question_in_plain_text() -> None:
    examples = [json.loads(line) for line in EXAMPLES.read_text("utf-8").splitlines()]
    assert len(examples) == 8
    blocks = [f"Q: {example['question']}\nA: {example['answer']}" for example in examples]
    row = json.loads(SAMPLE_FILE.read_text("utf-8").splitlines()[0])
    expected = "\n\n".join([*blocks, f"Q: {row['question']}\nA:"])
    first = samples()[0]
    assert TOKENIZER.decode(first.prompt_token_ids) == "<s>" + expected
    assert not first.stop_newline


def test_the_examples_end_in_the_answers_they_reason_to() -> None:
    answers = [line.rpartition("The answer is ")[2] for line in worked_examples().split("\n\n")]
    assert answers == ["6.", "5.", "39.", "8.", "9.", "29.", "33.", "8.", ""]


def test_the_question_follows_the_examples_so_they_can_be_compressed_alone() -> None:
    for sample in samples():
        question = TOKENIZER.decode(sample.prompt_token_ids[-sample.question_tokens :])
        assert question.startswith("Q: ")
        assert question.count("Q: ") == 1


def test_answers_have_256_tokens_or_what_the_context_leaves() -> None:
    assert {sample.max_new_tokens for sample in samples()} == {256}
    task = Gsm8k(data="sample")
    assert task.settle(10**6) == {"max_new_tokens": 256}
    short = Gsm8k(data="sample")
    prompt_tokens = len(samples()[0].prompt_token_ids)
    assert short.settle(prompt_tokens + 20) == {"max_new_tokens": 256}
    assert short.samples(TOKENIZER, 0)[0].max_new_tokens == 20


# ---- scores ----

# (text, gold, score, answered, strict_em, flexible_em); the last two as lm-evaluation-harness's
# filters and exact_match give them.
SCORES = [
    ("So 9 + 9 = 18. The answer is 18.", "18", 1, 1, 1, 1),
    ("The answer is 18. ", "18", 1, 1, 1, 1),
    (" The answer is 18.\n\nQ: What is 5 + 5?\nA: The answer is 10.", "18", 1, 1, 1, 1),
    ("The answer is 17.", "18", 0, 1, 0, 0),
    ("The answer is 1,800.", "1800", 1, 1, 1, 1),
    ("The answer is 2000.", "2,000", 1, 1, 1, 1),
    ("The answer is -4.", "-4", 1, 1, 1, 1),
    ("The answer is 4.", "-4", 0, 1, 0, 0),
    ("The answer is 18.00.", "18", 1, 1, 0, 0),
    ("The answer is 0.5.", "0.5", 1, 1, 1, 1),
    ("The answer is $18.", "18", 1, 1, 0, 1),
    ("The answer is: 18", "18", 1, 1, 0, 1),
    ("the answer is 18.", "18", 1, 1, 0, 1),
    ("The answer is 60%.", "60", 1, 1, 1, 1),
    ("The answer is 18 dollars.", "18", 1, 1, 1, 1),
    ("The answer is 18", "18", 1, 1, 0, 1),  # the strict pattern wants a character after the number
    ("The answer is 8", "8", 1, 1, 0, 1),
    ("The answer is 3. No, the answer is 4.", "3", 1, 1, 1, 0),
    ("The answer is 3. The answer is 4.", "4", 0, 1, 0, 1),
    ("It is 18 in all", "18", 0, 0, 0, 1),
    ("#### 18", "18", 0, 0, 0, 1),
    (r"\boxed{18}", "18", 0, 0, 0, 1),
    ("eighteen", "18", 0, 0, 0, 0),
    ("Q: What?", "18", 0, 0, 0, 0),
    ("", "18", 0, 0, 0, 0),
]


def scored(text: str, gold: str, *, finished: bool = True) -> dict[str, float]:
    sample = Sample(id="a", prompt_token_ids=(1,), references=(gold,), max_new_tokens=9)
    return Gsm8k(data="sample").score(sample, text, finished=finished)


@pytest.mark.parametrize(("text", "gold", *("score", "answered", "strict", "flexible")), SCORES)
def test_scores(
    text: str, gold: str, score: float, answered: float, strict: float, flexible: float
) -> None:
    found = scored(text, gold)
    expected = {"score": score, "answered": answered, "strict_em": strict, "flexible_em": flexible}
    assert found == expected


def test_an_answer_counts_though_the_model_writes_on_until_the_limit() -> None:
    goes_on = "The answer is 18.\n\nQ: Sam has"
    for text in (goes_on, "The answer is 18. So she", "The answer is 18Q:"):
        assert scored(text, "18", finished=False)["score"] == 1


def test_a_number_that_the_limit_may_have_cut_is_no_answer() -> None:
    found = scored("The answer is 18", "18", finished=False)
    assert (found["score"], found["answered"]) == (0, 0)


def test_the_sample_problems_are_right_and_say_that_they_are_samples() -> None:
    rows = [json.loads(line) for line in SAMPLE_FILE.read_text("utf-8").splitlines()]
    for row, sample in zip(rows, samples(), strict=True):
        (gold,) = sample.references
        last_line = row["answer"].splitlines()[-2]
        number = last_line.rstrip(".").rpartition(" = ")[2].split()[0]
        assert is_correct(rf"\boxed{{{number}}}", gold) or gold in last_line
        assert sample.meta == {"repeat": 0, "is_sample": True, "max_new_tokens": 256}
    assert len({sample.id for sample in samples(num_samples=3)}) == 3 * len(rows)
    assert len({sample.document for sample in samples(num_samples=3)}) == len(rows)


# ---- data ----


def test_the_authors_file_and_the_hubs_parquet_give_the_same_samples(tmp_path: Path) -> None:
    text = json.dumps(ROW) + "\n"
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "test.jsonl").write_text(text)
    (tmp_path / "b" / "main").mkdir(parents=True)
    parquet = tmp_path / "b" / "main" / "test-00000-of-00001.parquet"
    pq.write_table(pa.Table.from_pylist([ROW]), parquet)
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    places = [tmp_path / "a", tmp_path / "b", parquet.parent, parquet, tmp_path / "c.jsonl.gz"]
    found = [samples(place) for place in places]
    assert {sample.id for (sample,) in found} == {found[0][0].id}
    assert found[0][0].references == ("2",)
    assert len({Gsm8k(data=str(place)).data_fingerprint() for place in places}) == 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"question": "1?"}],
            "line 1 lacks the field 'answer', which must be a text that ends in",
        ),
        ([ROW | {"answer": "2"}], "'answer' must be a text that ends in #### and a number, got"),
        ([ROW | {"answer": "#### two"}], "'answer' must be a text that ends in #### and a number"),
        ([ROW | {"question": ""}], "'question' must be a text that is not empty"),
        ([ROW, ROW], r"several rows with the question 'How many are 1 and 1\?', answer"),
    ],
)
def test_bad_data_is_named(tmp_path: Path, rows: list[dict[str, str]], message: str) -> None:
    path = tmp_path / "test.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(ValueError, match=message):
        samples(path)


def test_missing_data_comes_with_every_way_to_get_it(tmp_path: Path) -> None:
    for place in (tmp_path, tmp_path / "absent"):
        with pytest.raises(
            ValueError, match=r"Ways to get GSM8K .*task\.data=hub.*=sample"
        ) as told:
            samples(place)
        assert "openai/gsm8k or a test.jsonl from https://github.com/openai/grade" in str(
            told.value
        )
        assert "\n" not in str(told.value)


# ---- summary ----


def test_only_an_answer_that_was_never_given_is_cut_off() -> None:
    shared = {
        "task": "gsm8k", "model": "m", "policy": "p", "budget": "512", "status": "ok",
        "finish_reason": "length", "generated_tokens": 256, "meta_is_sample": False,
    }  # fmt: skip
    rows = pd.DataFrame(
        [
            {**shared, "document": "a", "score": 1.0, "answered": 1.0},
            {**shared, "document": "b", "score": 0.0, "answered": 0.0},
        ]
    )
    (line,) = Gsm8k.summaries(rows)["pass"].to_dict("records")
    assert (line["pass_at_1"], line["truncation_rate"], line["num_problems"]) == (0.5, 0.5, 2)
