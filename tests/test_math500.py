"""MATH-500: which answers count, how they are asked, and what becomes of an answer that hangs."""

import gzip
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pandas as pd
import pytest

from kvarena.tasks import math500
from kvarena.tasks.base import Sample
from kvarena.tasks.benchmark.source import SAMPLE_FOLDER
from kvarena.tasks.math import grader
from kvarena.tasks.math.answers import is_correct, last_box, normalised
from kvarena.tasks.math.task import pass_at_1
from kvarena.tasks.math500 import Math500
from toy_tokenizers import CharTokenizer

SHARED = Path(__file__).parents[2] / "shared" / "data" / "math500"
SAMPLE_FILE = SAMPLE_FOLDER / "math500" / "test.jsonl"
HANGING = r"5^{5^{5^5}}"

# (content of the box, gold answer, equal)
ANSWERS = [
    # fractions, decimals, leading and trailing zeros
    (r"\frac{1}{2}", "0.5", True),
    (r"\dfrac{7}{4}", r"\frac{7}{4}", True),
    (r"\tfrac34", "0.75", True),
    ("1/3", r"\frac13", True),
    (r"\frac{3}{5}", r"\frac{5}{3}", False),
    ("0.333", r"\frac{1}{3}", False),
    (r"0.\overline{3}", r"\frac{1}{3}", True),
    (r"0.1\overline{6}", r"\frac{1}{6}", True),
    (r"0.\overline{3}", "0", False),
    ("007", "7", True),
    (".5", "0.50", True),
    ("-.25", r"-\frac14", True),
    (r"2\frac{1}{2}", r"\frac{5}{2}", True),
    (r"2 \frac12", "2.5", True),
    (r"2\frac{1}{2}", "1", False),
    # commas in numbers, and lists
    ("12,345", "12345", True),
    ("12{,}345", r"12,\!345", True),
    ("1,234,567", "1234576", False),
    ("3, 1, 2", "1,2,3", True),
    ("1,2", "1,2,3", False),
    (r"1 \text{ and } 2", "1,2", True),
    (r"x = 1 \text{ or } x = 2", "1, 2", True),
    # tuples keep their order, sets do not
    (r"\left( 3, \frac{\pi}{2} \right)", r"(3,\frac{\pi}{2})", True),
    ("(2,1)", "(1,2)", False),
    ("(1,2,3)", "(1,3,2)", False),
    (r"\{2, 1\}", r"\{1,2\}", True),
    # units, money, percent, degrees
    (r"5\text{ cm}", "5", True),
    (r"5\,\mathrm{cm}^2", r"5 \text{ cm}^2", True),
    ("6 inches", "6", True),
    (r"\$18.90", "18.9", True),
    ("32{,}348", r"\$32,\!348", True),
    (r"10\%", "10", True),
    ("10", r"10\%", True),
    (r"20\%", r"10\%", False),
    (r"90^\circ", "90", True),
    (r"\frac{270}{7}", r"\frac{270}7\text{ degrees}", True),
    (r"45^{\circ}", "54^\\circ", False),
    # intervals
    ("[0,1)", r"\left[0, 1\right)", True),
    ("(0,1)", "[0,1)", False),
    (r"(1,\infty)\cup(-\infty,0)", r"(-\infty, 0) \cup (1, \infty)", True),
    (r"x \in [-2,7]", "[-2,7]", True),
    # matrices
    (
        r"\begin{bmatrix}1&2\\3&4\end{bmatrix}",
        r"\begin{pmatrix} 1 & 2 \\ 3 & 4 \end{pmatrix}",
        True,
    ),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", r"\begin{pmatrix}2\\1\end{pmatrix}", False),
    (r"\begin{pmatrix}1\\2\end{pmatrix}", "1", False),
    # words and choices
    ("Evelyn", r"\text{Evelyn}", True),
    (r"\mathrm{east}", r"\text{east}", True),
    ("EAST", r"\text{east}", True),
    ("No solution.", r"\text{no solution}", True),
    (r"\text{odd}", r"\text{even}", False),
    ("C", r"\text{(C)}", True),
    (r"\textbf{(C)}", r"\text{(C)}", True),
    ("(C)", "C", True),
    ("B", r"\text{(C)}", False),
    # equations and expressions
    ("x=5", "5", True),
    ("5", "x = 5", True),
    ("x=5", "x=6", False),
    ("y = -2x + 1", "y=1-2x", True),
    ("y=2x+1", "y=2x-1", False),
    ("(x+1)^2", "x^2+2x+1", True),
    (r"\sqrt{50}", r"5\sqrt2", True),
    (r"1\pm\sqrt{19}", r"1+\sqrt{19}, 1-\sqrt{19}", True),
    ("9i+6", "6+9i", True),
    ("6-9i", "6+9i", False),
    (r"4\times10^3", "4000", True),
    ("3.14", r"\pi", False),
    # number bases
    ("2516_8", "2516_{8}", True),
    ("2516_9", "2516_8", False),
    # no answer
    ("", "5", False),
    (" ", "5", False),
    (r"\text{I give up}", "5", False),
]


@pytest.mark.parametrize(("box", "answer", "equal"), ANSWERS)
def test_a_box_counts_when_it_equals_the_gold_answer(box, answer, equal):
    assert is_correct(rf"Therefore it is $\boxed{{{box}}}$.", answer) is equal


@pytest.mark.parametrize(
    ("text", "box"),
    [
        ("no box, but 5", None),
        ("boxed{5}", None),
        (r"\boxed 5", None),
        (r"\fbox{5}", None),
        (r"\boxed{5}", "5"),
        (r"\boxed {5}", "5"),
        (r"\boxed{1} and then \boxed{2}", "2"),
        (r"\boxed{\frac{\sqrt{3}}{\frac{1}{2}}} ok", r"\frac{\sqrt{3}}{\frac{1}{2}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ x \right.} }", r"\left\{ x \right."),
        (r"\boxed{a \\{b}}", r"a \\{b}"),
        (r"\boxed{\boxed{5}}", "5"),
        ("\\boxed{1\n2}", "1\n2"),
        (r"\boxed{\frac{1}{2}", None),
        (r"\boxed{1}, no, \boxed{2", "1"),
        (r"<think>\boxed{1}</think> \boxed{2}", "2"),
        (r"\boxed{1}</think> it is \boxed{2}", "2"),
        (r"<think>\boxed{1}</think> it is 2", None),
        (r"<think> maybe \boxed{1}", None),
        (r"<think>a</think> \boxed{1} <think> wait", None),
        (r"<think></think>\boxed{1} or \boxed{3}", "3"),
    ],
)
def test_the_last_closed_box_after_the_thinking_counts(text, box):
    assert last_box(text) == box


def test_normalised_text_keeps_what_matters():
    assert normalised(r"\left( \dfrac{1}{2},\, 3 \right)") == r"(\frac{1}{2},3)"
    assert normalised(r"1 \\ 2") == normalised(r"1\\2") == r"1\\2"
    assert normalised(r"\leftarrow") == r"\leftarrow"


def sample(answer: str) -> Sample:
    return Sample(id="a", prompt_token_ids=(1,), references=(answer,), max_new_tokens=9)


@pytest.mark.parametrize(
    ("text", "answer", "finished", "score", "boxed_em"),
    [
        (r"\boxed{\dfrac{1}{2}}", r"\frac{1}{2}", True, 1, 1),
        (r"\boxed{0.5}", r"\frac{1}{2}", True, 1, 0),
        (r"\boxed{0.6}", r"\frac{1}{2}", True, 0, 0),
        ("0.5", r"\frac{1}{2}", True, 0, 0),
        (r"\boxed{0.5}, wait", "0.5", False, 0, 0),
    ],
)
def test_scores(text, answer, finished, score, boxed_em):
    found = Math500(data="sample").score(sample(answer), text, finished=finished)
    assert found == {"score": score, "boxed_em": boxed_em}


# ---- the grader's child process ----


@pytest.mark.parametrize("box", [HANGING, r"\binom{1000000}{500000}", "9^{9^{9}}"])
def test_a_hanging_answer_is_wrong_and_the_next_one_is_graded(box, monkeypatch):
    assert is_correct(r"\boxed{0.5}", "1/2")  # the child is there
    monkeypatch.setattr(grader, "WALL_LIMIT_SEC", 2.0)
    started = time.monotonic()
    with pytest.warns(UserWarning, match="gave up"):
        assert not is_correct(rf"\boxed{{{box}}}", "5")
    assert time.monotonic() - started < 5
    assert is_correct(r"\boxed{0.5}", "1/2")


@pytest.mark.slow
def test_a_child_stops_itself_when_it_has_used_its_time():
    started = time.monotonic()
    with pytest.warns(UserWarning, match="gave up"):
        assert not is_correct(rf"\boxed{{{HANGING}}}", "5")
    assert time.monotonic() - started < grader.WALL_LIMIT_SEC


def test_one_child_does_all_the_work():
    child = grader.Grader()
    try:
        assert child.compare("1", "1.0") is True
        first = child._process.pid
        assert child.compare("1", "2") is False
        assert child._process.pid == first
        child._process.kill()
        child._process.wait()
        assert child.compare("1", "1.0") is True
        assert child._process.pid != first
    finally:
        child.close()


def test_answers_with_odd_characters_reach_the_child():
    assert not is_correct("\\boxed{\ud83d \u2028 \x00 \"'\n\\n é}", "5")
    assert is_correct("\\boxed{\n1/2\n}", "0.5")


def test_threads_share_the_child():
    wrong: list[int] = []

    def check(number: int) -> None:
        if is_correct(rf"\boxed{{{number}.0}}", str(number % 5)) != (number < 5):
            wrong.append(number)

    threads = [threading.Thread(target=check, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


SCRIPT = r"""
import os
from kvarena.tasks.math.answers import is_correct
from kvarena.tasks.math.grader import _grader
assert is_correct(r"\boxed{0.5}", "1/2")
child = os.fork()
if child == 0:
    assert is_correct(r"\boxed{0.25}", "1/4") and not is_correct(r"\boxed{2}", "3")
    print("fork", _grader(os.getpid())._process.pid, flush=True)
    raise SystemExit
assert os.waitpid(child, 0)[1] == 0
assert is_correct(r"\boxed{0.25}", "1/4")
print("main", _grader(os.getpid())._process.pid, flush=True)
"""


def test_a_fork_gets_its_own_child_and_no_child_outlives_its_parent():
    command = [sys.executable, "-c", SCRIPT]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    pids = {line.split()[0]: int(line.split()[1]) for line in done.stdout.splitlines()}
    assert set(pids) == {"fork", "main"}
    assert pids["fork"] != pids["main"]
    for pid in pids.values():
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_without_math_verify_the_task_says_what_to_install(monkeypatch):
    monkeypatch.setattr(grader.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install math-verify"):
        Math500(data="sample")


# ---- prompts and data ----


TOKENIZER = CharTokenizer("USER {} ASSISTANT")


def test_the_prompt_is_the_problem_and_the_instruction_in_one_turn():
    tokenizer = TOKENIZER
    first = Math500(data="sample").samples(tokenizer, 0)[0]
    row = json.loads(SAMPLE_FILE.read_text(encoding="utf-8").splitlines()[0])
    asked = r"Please reason step by step, and put your final answer within \boxed{}."
    assert tokenizer.decode(first.prompt_token_ids) == f"USER {row['problem']}\n{asked} ASSISTANT"
    assert first.references == (row["answer"],)
    assert first.max_new_tokens == 32768
    assert first.question_tokens == 0


def test_each_repeat_of_a_problem_is_a_sample_of_its_own():
    found = Math500(data="sample", num_samples=3).samples(TOKENIZER, 0)
    assert len({s.id for s in found}) == len(found) == 60
    assert len({s.prompt_token_ids for s in found}) == 20
    assert [s.meta["repeat"] for s in found] == [0] * 20 + [1] * 20 + [2] * 20
    assert [s.document for s in found] == [s.document for s in found[:20]] * 3
    assert len({s.document for s in found}) == 20
    assert {s.part for s in found} == {""}
    once = Math500(data="sample").samples(TOKENIZER, 5)
    assert [s.id for s in once] == [s.id for s in found[:20]]


def test_the_sample_problems_are_right_and_say_that_they_are_samples():
    rows = [json.loads(line) for line in SAMPLE_FILE.read_text(encoding="utf-8").splitlines()]
    assert len(rows) == len({row["unique_id"] for row in rows}) == 20
    for row in rows:
        assert tuple(row) == tuple(Math500.problems.fields)
        assert is_correct(row["solution"], row["answer"])
    assert len({row["subject"] for row in rows}) == 7
    assert {row["level"] for row in rows} == {1, 2, 3, 4, 5}
    for found in Math500(data="sample").samples(TOKENIZER, 0):
        assert found.meta["is_sample"] is True
        assert set(found.meta) == {
            "subject", "level", "unique_id", "repeat", "is_sample", "max_new_tokens"
        }  # fmt: skip


ROW = {
    "problem": "1+1?", "solution": "2", "answer": "2", "subject": "Algebra", "level": 1,
    "unique_id": "a",
}  # fmt: skip


def test_data_comes_from_a_file_of_any_name_a_folder_a_zip_or_gzip(tmp_path):
    text = json.dumps(ROW) + "\n"
    for name in ("test.jsonl", "mine.jsonl"):
        (tmp_path / name).write_text(text, encoding="utf-8")
    packed = tmp_path / "packed" / "test.jsonl.gz"
    packed.parent.mkdir()
    packed.write_bytes(gzip.compress(text.encode()))
    with zipfile.ZipFile(tmp_path / "any.zip", "w") as archive:
        archive.writestr("math/test.jsonl", text)
    names = (".", "test.jsonl", "mine.jsonl", "packed", "packed/test.jsonl.gz", "any.zip")
    ids = {Math500(data=str(tmp_path / n)).samples(TOKENIZER, 0)[0].id for n in names}
    assert len(ids) == 1
    (found,) = Math500(data=str(tmp_path)).samples(TOKENIZER, 0)
    assert found.meta["is_sample"] is False


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([json.dumps(ROW), "{"], r"test\.jsonl line 2"),
        ([json.dumps(ROW | {"answer": ""})], r"test\.jsonl line 1.*'answer'"),
        ([json.dumps(ROW | {"level": "one"})], r"test\.jsonl line 1.*'level'"),
        ([json.dumps({"problem": "1+1?"})], r"test\.jsonl line 1.*'solution'"),
        ([json.dumps(ROW), json.dumps(ROW)], "test.jsonl has several rows .* unique_id 'a'"),
        ([], "test.jsonl"),
    ],
)
def test_bad_data_is_named(tmp_path, lines, message):
    path = tmp_path / "test.jsonl"
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        Math500(data=str(path)).samples(TOKENIZER, 0)


def test_missing_data_comes_with_every_way_to_get_it(tmp_path):
    with pytest.raises(ValueError, match=r"absent.*hub.*sample"):
        Math500(data=str(tmp_path / "absent")).samples(TOKENIZER, 0)


def test_a_folder_without_the_file_comes_with_every_way_to_get_it(tmp_path):
    with pytest.raises(ValueError, match=r"no test\.jsonl or test\.jsonl\.gz in .*hub.*sample"):
        Math500(data=str(tmp_path)).samples(TOKENIZER, 0)


def test_the_hub_gives_the_pinned_file(tmp_path, monkeypatch):
    (tmp_path / "test.jsonl").write_text(json.dumps(ROW), encoding="utf-8")
    monkeypatch.setattr(math500.HubFile, "fetch", lambda file: tmp_path / file.name)
    (found,) = Math500(data="hub").samples(TOKENIZER, 0)
    assert found.references == ("2",)
    assert found.meta["is_sample"] is False


def test_offline_the_message_has_every_way_to_get_the_data(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ValueError, match=r"data 'hub' cannot be read.*Ways to get MATH-500"
    ) as found:
        Math500(data="hub").samples(TOKENIZER, 0)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize("options", [{"num_samples": 0}, {"max_new_tokens": "many"}])
def test_a_bad_option_is_named_with_its_value(options):
    ((name, value),) = options.items()
    with pytest.raises(ValueError, match=rf"{name}.*{value!r}"):
        Math500(data="sample", **options)


# ---- summary ----


def test_the_summary_averages_over_repeats_then_problems():
    answers = [("p", 1.0, "stop", 10), ("p", 0.0, "stop", 20), ("p", 1.0, "length", 90),
               ("q", 1.0, "stop", 40), ("q", 1.0, "stop", 40)]  # fmt: skip
    rows = pd.DataFrame(
        {
            "task": "math500", "model": "m", "policy": "keydiff", "budget": "512", "status": "ok",
            "document": name, "score": score, "finish_reason": reason,
            "generated_tokens": num_tokens, "meta_is_sample": True,
        }
        for name, score, reason, num_tokens in answers
    )  # fmt: skip
    others = rows.assign(task="needle"), rows.assign(status="error")
    summaries = Math500.summaries(pd.concat([rows, *others]))
    assert list(summaries) == ["pass"]
    (line,) = summaries["pass"].to_dict("records")
    assert pass_at_1(rows).to_dict("records") == [line]
    assert line["num_problems"] == 2
    assert line["num_answers"] == 5
    assert line["pass_at_1"] == pytest.approx((1 / 3 + 1) / 2)  # the cut off answer is wrong
    assert line["pass_at_1_se"] == pytest.approx(1 / 3)  # half the distance of two problems
    assert line["truncation_rate"] == pytest.approx(0.2)
    assert line["mean_generated_tokens"] == pytest.approx(40)
    assert line["is_sample"]


# ---- the real set ----


@pytest.mark.shared_data
def test_all_gold_answers_equal_themselves_and_no_different_neighbour():
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not there")
    content = (SHARED / "test.jsonl").read_bytes()
    assert hashlib.sha256(content).hexdigest() == math500.TEST_FILE.sha256
    found = Math500(data=str(SHARED)).samples(TOKENIZER, 0)
    golds = [s.references[0] for s in found]
    assert len(golds) == 500
    started = time.monotonic()
    for gold, following in zip(golds, [*golds[1:], golds[0]], strict=True):
        assert is_correct(rf"So it is \boxed{{{gold}}}.", gold), gold
        # The neighbours "5" and "x=5" are the same answer.
        if normalised(gold) != normalised(following.removeprefix("x=")):
            assert not is_correct(rf"So it is \boxed{{{following}}}.", gold), (gold, following)
    assert time.monotonic() - started < 120
