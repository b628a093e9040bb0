"""A plan is what a run would take, without its model."""

import json
from pathlib import Path
from typing import Any

import pytest

from kvarena.harness.cells.plan import plan_cell
from kvarena.harness.cells.run_cell import run_cell
from kvarena.harness.command.plan_table import print_plans
from kvarena.harness.errors import UsageError
from kvarena.harness.models import loading
from kvarena.harness.models.kv_size import bytes_per_token
from kvarena.harness.report.status import cell_statuses
from kvarena.harness.store.row_files import read_lines
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
    monkeypatch.setattr(loading, "load_weights", lambda *a, **k: pytest.fail("loaded a model"))
    cell = toy_cell(folder)
    plan = plan_cell(cell, tmp_path)
    samples = cell.samples(loading.load_tokenizer(cell.model))
    totals = [len(sample.prompt_token_ids) + 6 for sample in samples]
    per_token = bytes_per_token(loading.load_config(cell.model), 4)
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
        assert plan_cell(toy_cell(folder), tmp_path / "another").state == "missing"
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


# ---- whether the budget binds ----


def test_a_plan_counts_the_samples_whose_budget_binds(folder: Path, tmp_path: Path) -> None:
    cell = toy_cell(folder)
    totals = sorted(
        len(sample.prompt_token_ids) + sample.max_new_tokens
        for sample in cell.samples(loading.load_tokenizer(cell.model))
    )
    assert len(set(totals)) == 2

    def binding(budget: int | str, **changes: Any) -> int | None:
        return plan_cell(toy_cell(folder, budget=budget, **changes), tmp_path).num_binding

    short, long = totals
    # The last new token is chosen but never fed.
    assert [binding(n) for n in (64, short - 2, short - 1, long - 2, long - 1)] == [2, 2, 1, 1, 0]
    assert [binding(share) for share in ("25%", "99%", "100%")] == [2, 2, 2]
    assert [binding(n, question="after") for n in (short - 2, long - 1)] == [2, 0]
    assert not plan_cell(toy_cell(folder, "full"), tmp_path).evicts


def test_what_a_plan_says_will_bind_is_what_runs_say_has_bound(
    folder: Path, tmp_path: Path
) -> None:
    for budget in ("128", "320", "1k", "100%"):
        for question in ("inside", "after"):
            cell = toy_cell(folder, budget=budget, question=question)
            plan = plan_cell(cell, tmp_path)
            rows = read_lines(run_cell(cell, tmp_path).path)
            assert all(row["generated_tokens"] == 6 for row in rows)  # the longest answer
            assert plan.num_binding == sum(row["compressed"] for row in rows), cell.label


def test_a_budget_in_bytes_binds_once_it_is_settled(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cell = toy_cell(folder, budget="20kB")
    before = plan_cell(cell, tmp_path)
    run_cell(cell, tmp_path)
    after = plan_cell(toy_cell(folder, budget="20kB"), tmp_path)
    capsys.readouterr()
    print_plans([before])
    shown = capsys.readouterr().out
    assert "?/2" in shown
    assert "how many tokens a budget in bytes comes to is measured when the cell runs" in shown
    assert (before.num_binding, after.num_binding) == (None, 2)


def test_a_budget_that_never_binds_is_told_in_a_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = [
        toy_cell(folder),
        toy_cell(folder, budget="1k"),
        toy_cell(folder, "h2o", budget="1k"),
        toy_cell(folder, "full"),
    ]
    plans = [plan_cell(cell, tmp_path) for cell in cells]
    capsys.readouterr()
    print_plans(plans)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[-2] for line in lines if line.startswith(("keydiff", "h2o", "full"))] == [
        *("2/2", "0/2", "0/2", "-")
    ]
    (told,) = (line for line in lines if "nothing would be evicted" in line)
    longest = plans[0].longest_tokens
    assert told.startswith("needle, toy: at 1k nothing would be evicted: ")
    assert told.endswith(f"the longest prompt and answer take {longest} tokens")
    assert max(map(len, lines)) <= 100


def test_memory_follows_kv_dtype_and_says_that_codecs_are_left_out(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, half = (
        plan_cell(toy_cell(folder, kv_dtype=kv_dtype), tmp_path)
        for kv_dtype in ("model", "float16")
    )
    config = loading.load_config(toy_cell(folder).model)
    assert whole.kv_bytes_full == whole.longest_tokens * bytes_per_token(config, 4)
    assert half.kv_bytes_full == half.longest_tokens * bytes_per_token(config, 2)
    assert half.kv_bytes_budget == (64 + 32) * bytes_per_token(config, 2)
    capsys.readouterr()
    print_plans([whole])
    assert "codecs" not in capsys.readouterr().out
    coded = plan_cell(toy_cell(folder, codec="kivi"), tmp_path)
    print_plans([coded])
    shown = capsys.readouterr().out
    assert coded.kv_bytes_budget == whole.kv_bytes_budget
    assert "KV MB leave codecs out; what is coded takes less" in shown
    assert "keydiff+kivi" in shown


def test_rows_in_another_data_type_tell_nothing_of_time(folder: Path, tmp_path: Path) -> None:
    run_cell(toy_cell(folder), tmp_path)
    assert plan_cell(toy_cell(folder, budget="96"), tmp_path).eta_sec is not None
    assert plan_cell(toy_cell(folder, budget="96", dtype="bfloat16"), tmp_path).eta_sec is None


@pytest.mark.parametrize("name", ["policy", "prefill_tokens_computed", "ttft_sec", "slots"])
def test_rows_that_lack_a_figure_tell_nothing_of_time(
    name: str, folder: Path, tmp_path: Path
) -> None:
    path = run_cell(toy_cell(folder), tmp_path).path / "samples.jsonl"
    assert plan_cell(toy_cell(folder, budget="96"), tmp_path).eta_sec is not None
    rows = [json.loads(line) for line in path.read_bytes().splitlines()]
    for row in rows:
        del row[name]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert plan_cell(toy_cell(folder, budget="96"), tmp_path).eta_sec is None
