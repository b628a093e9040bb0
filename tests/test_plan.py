"""A plan is what a run would take, without its model."""

from pathlib import Path

import pytest

from kvarena.harness import models
from kvarena.harness.errors import UsageError
from kvarena.harness.kv_bytes import bytes_per_token
from kvarena.harness.plan import plan_cell, print_plans
from kvarena.harness.run_cell import run_cell
from kvarena.harness.status import cell_statuses
from toy_folder import save_haystack, save_model_folder, toy_cell


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    save_model_folder(folder / "toy")
    save_haystack(folder / "hay")
    return folder


def test_a_plan_counts_samples_tokens_and_bytes_and_loads_no_model(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "load_weights", lambda *a, **k: pytest.fail("loaded a model"))
    cell = toy_cell(folder)
    plan = plan_cell(cell, tmp_path)
    samples = cell.samples(models.load_tokenizer(cell.model))
    totals = [len(sample.prompt_token_ids) + 6 for sample in samples]
    per_token = bytes_per_token(models.load_config(cell.model), 4)
    assert per_token == 3 * 2 * (2 * 16 * 4 + 4)  # the toy: layers, KV heads, channels, position
    assert (plan.state, plan.num_done, plan.num_samples) == ("missing", 0, 2)
    assert plan.num_tokens == sum(totals)
    assert plan.kv_bytes_full == max(totals) * per_token
    assert plan.kv_bytes_budget == (64 + 32) * per_token
    assert plan.eta_sec is None  # nothing has run here yet
    assert [status.state for status in cell_statuses(tmp_path)] == ["missing"]


def test_a_plan_says_what_would_stop_the_run(folder: Path, tmp_path: Path) -> None:
    run_cell(toy_cell(folder, limit=1), tmp_path)
    text = folder / "hay" / "more.txt"
    text.write_text("Another line that changes the data.")
    try:
        with pytest.raises(UsageError, match=r"other contents: content\.data"):
            plan_cell(toy_cell(folder), tmp_path)
        assert plan_cell(toy_cell(folder), tmp_path, fork=True).state == "missing"
    finally:
        text.unlink()


def test_what_has_run_is_taken_off_and_tells_how_fast(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_cell(toy_cell(folder, limit=1), tmp_path)
    plan = plan_cell(toy_cell(folder), tmp_path)
    assert (plan.state, plan.num_done) == ("incomplete", 1)
    assert plan.eta_sec is not None
    assert 0 < plan.eta_sec < 60
    outcome = run_cell(toy_cell(folder), tmp_path)
    done = plan_cell(toy_cell(folder), tmp_path)
    assert (outcome.num_new, done.state, done.num_tokens) == (1, "done", 0)
    assert [status.state for status in cell_statuses(tmp_path)] == ["done"]
    print_plans([plan, plan])  # one cell under two budgets, as the full cache is
    shown = capsys.readouterr().out
    assert "all 1 cells" in shown
    assert shown.count("1/2") == 2  # the cell's line and the sum
