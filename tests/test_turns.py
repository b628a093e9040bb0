"""Cells whose samples ask of one context: read once, in turns or each for itself, resumed."""

import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from faulty import Kvarena
from kvarena.harness.cells.cell import Cell
from kvarena.harness.cells.plan import plan_cell
from kvarena.harness.cells.run_cell import run_cell
from kvarena.harness.registry import load_choice
from toy_folder import save_haystack, save_model_folder, toy_cell, toy_overrides

SEVERAL = {"questions_per_context": 4, "num_needles": 4, "lengths": [500, 560], "depths": [50]}
OBSERVED = ("prediction", "prompt_tokens", "kept_tokens", "kv_bytes_kept", "generated_tokens")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    save_model_folder(folder / "toy")
    save_haystack(folder / "hay")
    return folder


def cell_of(folder: Path, policy: str = "h2o", task: Mapping[str, Any] = SEVERAL,
            **settings: Any) -> Cell:  # fmt: skip
    chosen = load_choice("task", "needle") | {"haystack": str(folder / "hay"), "max_new_tokens": 5}
    options = {"budget": "128", "question": "after", "slots": 3} | settings
    return toy_cell(folder, policy, task=chosen | dict(task), **options)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "samples.jsonl").read_text().splitlines()]


def observed(rows: list[dict[str, Any]]) -> dict[str, tuple[Any, ...]]:
    return {row["sample_id"]: tuple(row[name] for name in OBSERVED) for row in rows}


def without_the_last(path: Path, num_rows: int) -> list[str]:
    """As if the process had been killed so many rows earlier; the ids that are left."""
    rows = path / "samples.jsonl"
    lines = rows.read_text().splitlines(keepends=True)[:-num_rows]
    rows.write_text("".join(lines))
    return [json.loads(line)["sample_id"] for line in lines]


def test_a_context_counts_once_in_the_tokens_that_were_computed(
    folder: Path, tmp_path: Path
) -> None:
    cell = cell_of(folder)
    rows = rows_of(run_cell(cell, tmp_path).path)
    samples = {sample.id: sample for sample in cell.samples(tokenizer_of(cell))}
    assert len(rows) == len(samples) == 8
    for document in {row["document"] for row in rows}:
        own = [row for row in rows if row["document"] == document]
        questions = [samples[row["sample_id"]].question_tokens for row in own]
        context = own[0]["prompt_tokens"] - questions[0]
        assert sum(row["prefill_tokens_computed"] for row in own) == context + sum(questions)
        assert sorted(row["turn"] for row in own) == [1, 2, 3, 4]
        assert max(row["kept_tokens"] for row in own) <= 128


def tokenizer_of(cell: Cell) -> Any:
    from kvarena.harness.models import loading

    return loading.load_tokenizer(cell.model)


@pytest.mark.parametrize(("turns", "question"), [
    ("independent", "after"), ("dialogue", "after"), ("dialogue", "inside"),
])  # fmt: skip
@pytest.mark.parametrize("num_lost", [1, 3, 6])
def test_a_killed_run_goes_on_between_questions_and_repeats_none(
    folder: Path, tmp_path: Path, turns: str, question: str, num_lost: int
) -> None:
    cell = cell_of(folder, turns=turns, question=question)
    path = run_cell(cell, tmp_path).path
    calm = rows_of(path)
    left = without_the_last(path, num_lost)
    assert run_cell(cell, tmp_path).num_new == num_lost
    rows = rows_of(path)
    assert [row["sample_id"] for row in rows[: len(left)]] == left
    assert len(rows) == len(calm)
    assert observed(rows) == observed(calm)


@pytest.mark.parametrize("policy", ["keydiff", "oracle", "full"])
def test_shards_answer_as_the_whole(folder: Path, tmp_path: Path, policy: str) -> None:
    whole = rows_of(run_cell(cell_of(folder, policy), tmp_path / "whole").path)
    for part in ("1/2", "2/2"):
        run_cell(cell_of(folder, policy, shard=part), tmp_path / part)
    lines = [
        json.loads(line)
        for path in tmp_path.glob("?/2/**/samples-*.jsonl")
        for line in path.read_text().splitlines()
    ]
    assert observed(lines) == observed(whole)


def test_a_limit_takes_whole_contexts(folder: Path) -> None:
    cell = cell_of(folder, limit=1)
    samples = cell.samples(tokenizer_of(cell))
    assert [sample.context.turn for sample in samples if sample.context] == [1, 2, 3, 4]


def test_a_later_turn_comes_after_all_before_it(folder: Path, tmp_path: Path) -> None:
    cell = cell_of(folder, "full", turns="dialogue", question="inside")
    rows = rows_of(run_cell(cell, tmp_path).path)
    for document in {row["document"] for row in rows}:
        own = sorted((r for r in rows if r["document"] == document), key=lambda r: r["turn"])
        lengths = [row["prompt_tokens"] for row in own]
        assert lengths == sorted(set(lengths))
        assert own[0]["prefill_tokens_computed"] == lengths[0]
        for before, row in pairwise(own):
            computed = row["prefill_tokens_computed"]
            # The last token of the answer before is fed with the next question, a stop token never.
            ended = before["finish_reason"] == "stop"
            assert row["prompt_tokens"] - computed == (
                before["prompt_tokens"] + before["generated_tokens"] - 1
            )
            assert computed > (0 if ended else 1)


def test_a_plan_counts_shared_contexts_once(folder: Path, tmp_path: Path) -> None:
    alone = plan_cell(cell_of(folder, question="inside"), tmp_path).num_tokens
    shared = plan_cell(cell_of(folder), tmp_path).num_tokens
    talk = plan_cell(cell_of(folder, turns="dialogue"), tmp_path).num_tokens
    rows = rows_of(run_cell(cell_of(folder), tmp_path).path)
    answers = 8 * 5
    assert shared == sum(row["prefill_tokens_computed"] for row in rows) + answers
    assert shared <= talk < alone / 2
    assert plan_cell(cell_of(folder), tmp_path).num_tokens == 0


def test_a_plan_of_a_shard_counts_the_turns_before_its_own(folder: Path, tmp_path: Path) -> None:
    whole = cell_of(folder, "full", turns="dialogue", question="inside")
    longest = plan_cell(whole, tmp_path).longest_tokens
    parts = [
        plan_cell(
            cell_of(folder, "full", turns="dialogue", question="inside", shard=part), tmp_path
        ).longest_tokens
        for part in (f"{number}/8" for number in range(1, 9))
    ]
    assert max(parts) == longest


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        (["turns=dialogue"], "asks one question of each context; use turns=independent"),
        (["turns=both"], "unknown turns 'both'. Available: independent, dialogue"),
        (["turns=dialogue", "policy=oracle"], "oracle must know each answer beforehand"),
        (["turns=dialogue", "budget=1MB"], "needs a budget in tokens, not in bytes"),
        (["turns=dialogue", "task=fidelity", "~task.lengths"], "forces its answers"),
        (["task.questions_per_context=3"], "set task.num_needles=3"),
        (["task.questions_per_context=2", "task.num_needles=2", "question=after", "budget=80"],
         "leaves nothing to choose"),
        (["task.questions_per_context=9", "task.num_needles=9", "turns=dialogue",
          "task.lengths=[900]"], "over the model's context of 1024"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_told_in_one_line(
    typed: list[str], message: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    kvarena = Kvarena(monkeypatch, capsys, tmp_path, toy_overrides(tmp_path))
    if "task=fidelity" in typed:
        kvarena = Kvarena(monkeypatch, capsys, tmp_path, toy_overrides(tmp_path)[:1])
        typed = ["turns=dialogue", "task=fidelity"]
    ended = kvarena(*typed)
    assert ended.code == 2
    assert message in ended.err
    assert len(ended.err.strip().splitlines()) == 1
