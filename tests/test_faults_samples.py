"""A sample that fails is a row with a status and costs no other sample anything.

T11  out of memory at one prompt     T20  a scorer that hangs or fails, a clock that jumps,
T12  logits that are not numbers          and no network
"""

import re
import socket
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from faulty import Hook, Kvarena, comparable, hook_model, logits_row, needle_prompts, read_rows
from kvarena.harness.cells import run_cell, sample_rows
from kvarena.harness.engine import Batch
from kvarena.harness.store.cell_files import read_status
from kvarena.policies.base import LayerView
from kvarena.policies.keydiff import KeyDiff
from kvarena.tasks.base import Sample, Task
from kvarena.tasks.gsm8k import Gsm8k
from kvarena.tasks.longbench import LongBench
from kvarena.tasks.math import grader
from kvarena.tasks.math.answers import is_correct, last_box
from kvarena.tasks.math.grader import UndecidedError
from kvarena.tasks.math500 import Math500
from kvarena.tasks.needle import Needle
from toy_folder import toy_overrides

DEPTHS = (0, 50, 100)
HANGING = "5^{5^{5^5}}"


@pytest.fixture
def kvarena(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Kvarena:
    overrides = toy_overrides(tmp_path)
    return Kvarena(monkeypatch, capsys, tmp_path, [*overrides, "task.depths=[0,50,100]"])


@pytest.fixture
def prompts(kvarena: Kvarena) -> dict[str, Any]:
    return needle_prompts(kvarena.overrides, DEPTHS)


def counts(kvarena: Kvarena) -> dict[str, int]:
    (path,) = kvarena.results.glob("runs/*/*/*")
    return read_status(path)["counts"]


def calm(kvarena: Kvarena) -> dict[str, dict[str, Any]]:
    """Rows of a run that nothing happens to, in a folder of their own."""
    own, kvarena.results = kvarena.results, kvarena.folder / "calm"
    assert kvarena().code == 0
    rows, kvarena.results = comparable(kvarena.rows), own
    return rows


def check_one_fails(kvarena: Kvarena, hook: Hook, bad: str) -> dict[str, Any]:
    """Run with the fault and again without it; returns the row of the sample that failed."""
    undisturbed = calm(kvarena)
    with pytest.MonkeyPatch.context() as patch:
        hook_model(patch, hook)
        failed = kvarena()
    assert failed.code == 1
    assert "1 of 3 samples failed and are in no score; the same command runs them" in failed.err
    first = kvarena.rows
    assert len(first) == 3
    good = comparable([row for row in first if row["sample_id"] != bad])
    assert good == {name: row for name, row in undisturbed.items() if name != bad}
    (row,) = (row for row in first if row["sample_id"] == bad)
    assert counts(kvarena) == {"ok": 2, row["status"]: 1}
    assert "score" not in row

    assert kvarena().code == 0
    assert kvarena.rows[:3] == first
    (again,) = kvarena.rows[3:]  # that one alone has run
    assert comparable([again]) == {bad: undisturbed[bad]}
    return row


# ---- T11 ----


def raise_at(prompt: Any, kind: type[Exception], text: str) -> Hook:
    def hook(inputs: Mapping[str, Any], output: Any) -> None:
        if logits_row(prompt, inputs) is not None:
            raise kind(text)

    return hook


@pytest.mark.parametrize(
    ("kind", "text", "status"),
    [
        (torch.OutOfMemoryError, "CUDA out of memory.\nTried to allocate", "oom"),
        (RuntimeError, "DefaultCPUAllocator: can't allocate memory: you tried", "oom"),
        (RuntimeError, "an index out of range", "error"),
    ],
)
def test_a_sample_that_fails_has_a_status_and_runs_again_alone(
    kind: type[Exception], text: str, status: str, kvarena: Kvarena, prompts: dict[str, Any]
) -> None:
    bad = list(prompts)[1]
    row = check_one_fails(kvarena, raise_at(prompts[bad], kind, text), bad)
    assert row["status"] == status
    assert row["error"] == f"{kind.__name__}: {' '.join(text.split())}"
    assert "prediction" not in row
    assert row["prompt_tokens"] == len(prompts[bad])


def test_a_failed_attempt_lets_go_of_its_caches_before_memory_is_tidied(
    kvarena: Kvarena, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, score, held, failures = Batch.__init__, KeyDiff.score, [], []
    still_there: dict[str, list[int]] = {"empty_cache": [], "next attempt": []}

    def count(moment: str) -> None:
        still_there[moment].append(sum(layer() is not None for layer in held))

    def watched(batch: Batch, *arguments: Any, **options: Any) -> None:
        count("next attempt")
        start(batch, *arguments, **options)
        held.extend(weakref.ref(layer) for layer in batch.layers)

    def fail_once(policy: KeyDiff, view: LayerView) -> torch.Tensor:
        if not failures:
            failures.append(view.layer)
            raise torch.OutOfMemoryError("no room")
        return score(policy, view)

    cuda = SimpleNamespace(is_available=lambda: True, empty_cache=lambda: count("empty_cache"))
    fake_torch = SimpleNamespace(cuda=cuda, OutOfMemoryError=torch.OutOfMemoryError)
    monkeypatch.setattr(run_cell, "torch", fake_torch)
    monkeypatch.setattr(Batch, "__init__", watched)
    monkeypatch.setattr(KeyDiff, "score", fail_once)
    assert kvarena().code == 0
    # All together, then each of the three alone.
    assert still_there == {"empty_cache": [0], "next attempt": [0] * 4}


def test_a_run_where_everything_fails_ends_after_three(kvarena: Kvarena) -> None:
    def fail(inputs: Mapping[str, Any], output: Any) -> None:
        raise torch.OutOfMemoryError("no room")

    hook_model(kvarena.monkeypatch, fail)
    outcome = kvarena("task.num_seeds=2")
    assert outcome.code == 1
    assert "gave up, the first 3 samples all failed" in outcome.err
    assert "Traceback" not in outcome.err
    assert [row["status"] for row in kvarena.rows] == ["oom"] * 3
    assert counts(kvarena) == {"oom": 3}


@pytest.mark.parametrize("kind", ["None", "shape", "exception"])
def test_a_policys_bug_is_one_line_a_log_in_the_cell_and_no_score(
    kind: str, kvarena: Kvarena, monkeypatch: pytest.MonkeyPatch
) -> None:
    def score(policy: KeyDiff, view: LayerView) -> Any:
        if kind == "exception":
            raise KeyError("nothing of that name")
        return None if kind == "None" else view.keys

    monkeypatch.setattr(KeyDiff, "score", score)
    outcome = kvarena()
    assert outcome.code == 1
    assert "Traceback" not in outcome.err
    assert outcome.err.count("PolicyError: policy KeyDiff (policies/keydiff.py line") == 1
    rows = kvarena.rows
    assert [row["status"] for row in rows] == ["error"] * 3
    assert all("policies/keydiff.py line" in row["error"] for row in rows)
    (log,) = kvarena.results.glob("runs/*/*/*/errors.log")
    assert "Traceback" in log.read_text()
    assert str(log) in outcome.err


def test_scores_that_are_not_finite_are_invalid_samples_with_one_line(
    kvarena: Kvarena, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(KeyDiff, "score", lambda policy, view: view.positions / 0.0)
    outcome = kvarena()
    assert outcome.code == 1
    told = (
        r"policy KeyDiff gave scores that are not finite in layer 0, in the pass of tokens \d+ to"
    )
    *_, last = outcome.err.splitlines()
    assert re.match(f"the first of them: {told}", last)
    for row in kvarena.rows:
        assert row["status"] == row["finish_reason"] == "invalid"
        assert re.match(told, row["error"])
        assert "score" not in row


# ---- T12 ----


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_make_no_score(
    value: float, kvarena: Kvarena, prompts: dict[str, Any]
) -> None:
    bad = list(prompts)[1]

    def poison(inputs: Mapping[str, Any], output: Any) -> None:
        index = logits_row(prompts[bad], inputs)
        if index is not None:
            output.logits[0, index, 7] = value

    row = check_one_fails(kvarena, poison, bad)
    assert row["status"] == row["finish_reason"] == "invalid"
    assert row["error"] == "logits were not finite after 0 new tokens"


def test_an_invalid_row_says_how_far_the_answer_came(kvarena: Kvarena) -> None:
    passes: list[int] = []

    def poison(inputs: Mapping[str, Any], output: Any) -> None:
        passes.append(inputs["input_ids"].shape[1])
        if passes[-3:] == [1, 1, 1]:  # the fourth token of an answer is being chosen
            output.logits.fill_(float("nan"))

    hook_model(kvarena.monkeypatch, poison)
    assert kvarena("limit=1").code == 1
    (row,) = kvarena.rows
    assert row["error"] == "logits were not finite after 3 new tokens"
    assert row["generated_tokens"] == 3


def test_a_forced_answer_with_bad_logits_has_no_measures(
    kvarena: Kvarena, monkeypatch: pytest.MonkeyPatch
) -> None:
    haystack = kvarena.overrides[1].partition("=")[2]
    kvarena.overrides[1:] = [
        *("task=fidelity", "task.max_tokens=4", "budget=64"),
        f"+task.options.haystack={haystack}",
        *("+task.options.lengths=[400]", "+task.options.depths=[0,100]"),
    ]
    assert kvarena("policy=full").code == 0  # also keeps what the full cache says
    hook_model(monkeypatch, lambda inputs, output: output.logits.fill_(float("nan")))
    assert kvarena("policy=keydiff").code == 1
    (path,) = kvarena.results.glob("runs/*/*/keydiff-*/samples.jsonl")
    rows = read_rows(path)
    assert [row["status"] for row in rows] == ["invalid", "invalid"]
    assert all("kl_mean" not in row and "score" not in row for row in rows)


# ---- T20 ----


def math_sample(answer: str) -> Sample:
    return Sample(id="m", prompt_token_ids=(1,), references=(answer,), max_new_tokens=9)


def test_an_answer_that_the_grader_cannot_decide_has_no_score(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    task, text = Math500(data="sample"), rf"\boxed{{{HANGING}}}"
    assert is_correct(r"\boxed{0.5}", "1/2")  # the child is there
    monkeypatch.setattr(grader, "WALL_LIMIT_SEC", 1.0)
    with pytest.raises(UndecidedError, match="math-verify gave up comparing"):
        task.score(math_sample("5"), text)
    found = sample_rows.score(task, math_sample("5"), text, finished=True)
    assert found.keys() == {"status", "error"}
    assert found["status"] == "score_error"
    assert found["error"].startswith("UndecidedError: math-verify gave up comparing '5^{5^{5^5}}'")
    with pytest.warns(UserWarning, match="counted as wrong"):
        assert is_correct(text, "5") is False
    # Cut off by the token limit it is wrong, whatever it says.
    assert task.score(math_sample("5"), text, finished=False)["score"] == 0
    assert task.score(math_sample("1/2"), r"\boxed{0.5}") == {"score": 1, "boxed_em": 0}


def test_a_scorer_that_fails_costs_neither_the_answer_nor_the_next_one(
    kvarena: Kvarena, prompts: dict[str, Any]
) -> None:
    bad, score = list(prompts)[1], Needle.score

    def fail(task: Needle, sample: Sample, text: str, **options: Any) -> dict[str, float]:
        if sample.id == bad:
            raise ZeroDivisionError("no words")
        return score(task, sample, text, **options)

    undisturbed = calm(kvarena)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Needle, "score", fail)
        assert kvarena().code == 1
    rows = comparable(kvarena.rows)
    row = rows.pop(bad)
    assert (row["status"], row["error"]) == ("score_error", "ZeroDivisionError: no words")
    assert row["prediction"] == undisturbed[bad]["prediction"]
    assert "score" not in row
    assert rows == {name: other for name, other in undisturbed.items() if name != bad}
    assert kvarena().code == 0
    assert [row["sample_id"] for row in kvarena.rows[3:]] == [bad]


def longbench_sample(dataset: str) -> Sample:
    meta = {"dataset": dataset, "all_classes": ["Abbreviation", "Entity"]}
    references = {"passage_count": "3", "passage_retrieval_en": "Paragraph 3"}
    answer = references.get(dataset, "Entity of some kind, or two")
    return Sample(id="l", prompt_token_ids=(1,), references=(answer,), max_new_tokens=9, meta=meta)


SCORERS: dict[str, tuple[Callable[[], Task], Callable[[], Sample]]] = {
    "needle": (lambda: Needle(), lambda: math_sample("1234567")),
    "math500": (lambda: Math500(data="sample"), lambda: math_sample("5")),
    "gsm8k": (lambda: Gsm8k(data="sample"), lambda: math_sample("5")),
    **{
        name: (lambda: LongBench(data="sample", tasks="qasper"), lambda n=name: longbench_sample(n))
        for name in ("qasper", "gov_report", "trec", "lcc", "passage_count", "passage_retrieval_en")
    },
}


@pytest.mark.parametrize("scorer", SCORERS)
@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{" * 10_000,
        "111," * 4_000 + "1111",
        "word " * 3_000,
        "Paragraph " * 3_000,
        "9" * 32_000,
        "{" * 20_000 + "}" * 20_000,
        "\n" * 32_000 + "\u2028" * 9,
    ],
    ids=lambda text: repr(text[:9]),
)
def test_no_text_of_a_model_that_repeats_itself_holds_a_scorer_up(scorer: str, text: str) -> None:
    """The most that 10,000 to 30,000 tokens can do, in a few seconds of processor time."""
    make_task, make_sample = SCORERS[scorer]
    task, sample = make_task(), make_sample()
    started = time.process_time()
    found = task.score(sample, text)
    assert time.process_time() - started < 4
    assert 0 <= found["score"] <= 1


def test_an_open_box_is_never_closed_by_a_later_one() -> None:
    assert last_box(r"\boxed{" * 3 + "1}") == "1"
    assert last_box(r"\boxed{1} and \boxed{2") == "1"
    assert last_box(r"} \boxed{a{b}\}c} }") == r"a{b}\}c"


def test_a_clock_that_jumps_back_spoils_no_time(
    kvarena: Kvarena, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(2_000_000_000, 0, -3600))
    monkeypatch.setattr(time, "time", lambda: float(next(clock)))
    assert kvarena().code == 0
    assert all(0 < row["ttft_sec"] < 60 for row in kvarena.rows)
    assert all(row["decode_tokens_per_sec"] > 0 for row in kvarena.rows)


def test_a_run_on_local_files_never_asks_the_network(
    kvarena: Kvarena, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def refuse(*arguments: object, **options: object) -> None:
        asked.append(arguments)
        raise OSError("no network")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    assert kvarena(with_report=True).code == 0
    assert asked == []
