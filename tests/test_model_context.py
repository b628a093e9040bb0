"""What is auto follows the model's context: in prompts, answers, rows and a cell's identity."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import LlamaConfig

from faulty import Kvarena, no_model_loads
from kvarena.harness.cells.cell import Cell
from kvarena.harness.errors import UsageError
from kvarena.harness.models.loading import load_tokenizer
from kvarena.harness.registry import load_choice
from kvarena.tasks.base import Sample
from kvarena.tasks.fidelity import Fidelity
from kvarena.tasks.longbench import LongBench
from kvarena.tasks.longbench.length import LEAST_ROOM_TOKENS, longest_prompt
from kvarena.tasks.math500 import Math500
from toy_folder import save_haystack, save_model_folder, toy_cell, toy_overrides
from toy_tokenizers import CharTokenizer


@pytest.fixture
def kvarena(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Kvarena:
    """LongBench's sample rows of one task, or whatever the arguments say, on a context of 1024."""
    overrides = [toy_overrides(tmp_path)[0], "task=longbench", "task.data=sample", "budget=64"]
    return Kvarena(monkeypatch, capsys, tmp_path, overrides)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("models")
    save_model_folder(found / "toy")
    save_haystack(found / "hay")
    return found


def cell(folder: Path, task: str, context_tokens: int | None, **options: Any) -> Cell:
    """A cell on a folder with the toy's tokenizer and a configuration, but without weights."""
    model = folder / f"context-{context_tokens}"
    if not model.exists():
        model.mkdir()
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (model / name).write_bytes((folder / "toy" / name).read_bytes())
        LlamaConfig(max_position_embeddings=context_tokens).save_pretrained(model)
    settings = load_choice("task", task) | options
    spec = {"name": "toy", "source": str(model)}
    return toy_cell(folder, task=settings, model=spec, budget="8k")


def samples_of(found: Cell) -> list[Sample]:
    return list(found.samples(load_tokenizer(found.model)))


def manifest_task(kvarena: Kvarena) -> list[dict[str, Any]]:
    paths = sorted(kvarena.results.glob("runs/*/*/*/manifest.json"))
    return [json.loads(path.read_text())["identity"]["task"] for path in paths]


# ---- LongBench ----


@pytest.mark.parametrize(
    ("context_tokens", "longest"),
    [(4096, 3500), (8192, 7500), (16384, 15500), (32768, 31500), (131072, 127500)],
)
def test_prompts_are_as_long_as_longbench_makes_them_for_such_a_context(
    context_tokens: int, longest: int
) -> None:
    assert longest_prompt(context_tokens) == longest
    task = LongBench()
    assert task.settle(context_tokens) == {"max_length": longest}
    assert task.max_tokens == longest


@pytest.mark.parametrize("context_tokens", [1024, 2048, 2500, 4096, 5000, 40960, 10**6])
def test_any_context_has_room_for_the_longest_answer_and_a_template(context_tokens: int) -> None:
    longest_answer = 512
    room = context_tokens - longest_prompt(context_tokens)
    assert room >= LEAST_ROOM_TOKENS > longest_answer + 64


def test_a_context_without_room_is_refused_with_what_to_change(folder: Path) -> None:
    with pytest.raises(ValueError, match=r"a context of 597 tokens is too short .*MAX_LENGTH"):
        LongBench().settle(597)
    with pytest.raises(UsageError, match=r"^longbench: max_length=auto: a context of 512 tokens"):
        _ = cell(folder, "longbench", 512).identity
    assert LongBench(max_length=40).settle(512) == {}


def test_without_a_limit_nothing_is_cut() -> None:
    task = LongBench(data="sample", tasks="qasper")
    assert task.settle(None) == {"max_length": None}
    for sample in (
        *task.samples(CharTokenizer(), 0),
        *LongBench(data="sample").samples(CharTokenizer(), 0),
    ):
        assert sample.meta["max_length"] is None
        assert not sample.meta["truncated"]


def test_an_8k_budget_binds_on_a_128k_model_with_the_defaults(folder: Path) -> None:
    found = cell(folder, "longbench", 131072, data="sample")
    samples = samples_of(found)
    assert not any(sample.meta["truncated"] for sample in samples)
    assert {sample.meta["max_length"] for sample in samples} == {127500}
    assert max(len(sample.prompt_token_ids) for sample in samples) > 3600
    assert found.identity["task"]["max_length"] == 127500


def test_auto_and_the_number_it_stands_for_are_one_cell_and_other_contexts_are_others(
    folder: Path,
) -> None:
    auto, typed = (
        cell(folder, "longbench", 8192, data="sample", **options).identity
        for options in ({}, {"max_length": 7500})
    )
    assert auto == typed
    longer = cell(folder, "longbench", 16384, data="sample").identity["task"]
    assert longer == {**auto["task"], "max_length": 15500}


def test_rows_and_manifest_say_what_auto_stood_for(kvarena: Kvarena) -> None:
    kvarena.overrides += ["task.tasks=[hotpotqa]"]
    assert kvarena().code == 0
    assert [row["meta_max_length"] for row in kvarena.rows] == [428, 428]
    assert all(row["meta_truncated"] for row in kvarena.rows)
    (task,) = manifest_task(kvarena)
    assert task["max_length"] == 428
    with no_model_loads():
        outcome = kvarena("task.max_length=428")
    assert "all 2 samples are there already" in outcome.out
    assert kvarena.num_cells == 1


def test_a_number_that_does_not_fit_is_refused_with_a_way_out_that_works(kvarena: Kvarena) -> None:
    kvarena.overrides += ["task.tasks=[hotpotqa]"]
    with no_model_loads():
        outcome = kvarena("task.max_length=1010")
    assert (outcome.code, outcome.is_one_line) == (2, True)
    assert "1034: over the model's context of 1024; leave out MAX_LENGTH (task.max_" in outcome.err
    assert kvarena("mode=plan").code == 0


# ---- MATH-500 ----


def test_an_answer_takes_what_its_prompt_leaves_and_no_more_than_the_protocol(
    folder: Path,
) -> None:
    short, long = (
        cell(folder, "math500", 1024, data="sample"),
        cell(folder, "math500", 65536, data="sample"),
    )
    for sample in samples_of(short):
        assert len(sample.prompt_token_ids) + sample.max_new_tokens == 1024
        assert sample.meta["max_new_tokens"] == sample.max_new_tokens
    assert {sample.max_new_tokens for sample in samples_of(long)} == {32768}
    assert short.identity["task"]["max_new_tokens"] == 1024
    assert long.identity["task"]["max_new_tokens"] == 32768
    assert (
        long.identity
        == cell(folder, "math500", 65536, data="sample", max_new_tokens=32768).identity
    )


def test_the_same_number_typed_is_never_other_rows_under_the_same_name(folder: Path) -> None:
    auto = cell(folder, "math500", 1024, data="sample")
    typed = cell(folder, "math500", 1024, data="sample", max_new_tokens=1024)
    assert auto.identity == typed.identity
    with pytest.raises(UsageError, match=r"context of 1024; use MAX_TOKENS=\d+ or less"):
        samples_of(typed)


def test_without_a_limit_answers_are_as_long_as_the_protocol_says() -> None:
    task = Math500(data="sample")
    assert task.settle(None) == {"max_new_tokens": 32768}
    assert {sample.max_new_tokens for sample in task.samples(CharTokenizer(), 0)} == {32768}


# ---- fidelity ----


def test_fidelity_hands_the_context_through(folder: Path) -> None:
    options = {"data": "sample", "tasks": "hotpotqa"}
    auto, typed, longer = (
        cell(folder, "fidelity", context_tokens, of="longbench", options=own)
        for context_tokens, own in (
            (2048, options),
            (2048, {**options, "max_length": 1452}),
            (4096, options),
        )
    )
    assert auto.identity == typed.identity
    assert auto.identity["task"]["options"]["max_length"] == 1452
    assert auto.task.version != longer.task.version
    assert {sample.meta["max_length"] for sample in samples_of(auto)} == {1452}
    assert longer.identity["task"]["options"] == {**options, "max_length": 3500}


def test_a_task_that_has_nothing_to_settle_keeps_its_name_and_version() -> None:
    task = Fidelity(of="needle")
    before = task.version
    assert task.settle(8192) == {}
    assert task.version == before
