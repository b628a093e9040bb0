"""Shards of one cell: disjoint, at the same time, and together what one run writes."""

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from test_rescore_and_status import cell as needle_cell
from test_rescore_and_status import row as needle_row

from faulty import Kvarena, comparable, no_model_loads, read_rows, stopped_after_one_row
from kvarena.harness.analysis.row_frame import read_rows as read_tidy
from kvarena.harness.cells.rescore import rescore_cell
from kvarena.harness.errors import LockedError, UsageError
from kvarena.harness.report.status import cell_statuses
from kvarena.harness.store.cell_files import find_cells, read_status
from kvarena.harness.store.cell_folder import CellFolder
from kvarena.harness.store.row_files import read_lines
from kvarena.harness.store.shards import Shard, parse_shard
from kvarena.tasks.needle import Needle
from toy_folder import toy_overrides

SIX = "task.depths=[0,20,40,60,80,100]"
NAMES = {key: {"name": "x"} for key in ("task", "model", "policy", "budget")}


@pytest.fixture
def kvarena(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Kvarena:
    return Kvarena(monkeypatch, capsys, tmp_path, [*toy_overrides(tmp_path), SIX])


def cell(folder: Path, shard: str | None = None) -> CellFolder:
    found = CellFolder(folder, NAMES, parse_shard(shard))
    found.open({})
    return found


def all_rows(results: Path) -> list[dict[str, Any]]:
    """All lines of the one cell there is."""
    return [row for path in results.glob("runs/*/*/*/samples*.jsonl") for row in read_rows(path)]


def ids(rows: list[dict[str, Any]]) -> set[str]:
    return {row["sample_id"] for row in rows}


# ---- which sample belongs where ----


@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_every_sample_is_in_one_shard_and_no_shard_has_them_all(count: int) -> None:
    names = [f"sample-{number}" for number in range(800)]
    parts = [[n for n in names if Shard(number + 1, count).holds(n)] for number in range(count)]
    assert sorted(name for part in parts for name in part) == sorted(names)
    assert all(0.6 < len(part) * count / len(names) < 1.4 for part in parts)


def test_machines_of_any_version_agree_on_what_a_shard_holds() -> None:
    """A change here would have a restarted shard skip or repeat samples."""
    assert [n for n in range(12) if Shard(2, 3).holds(f"s{n}")] == [1, 2, 4, 7]


@pytest.mark.parametrize("value", ["0/8", "9/8", "x", "3", "3/", "/8", "1/0", "-1/2", "1.5/2", ""])
def test_a_shard_that_is_none_is_one_line_before_a_model_loads(
    value: str, kvarena: Kvarena
) -> None:
    with no_model_loads():
        outcome = kvarena(f"shard={value}")
    assert (outcome.code, outcome.is_one_line) == (2, True)
    assert f"error: shard={value} is not one of several parts; write shard=3/8" in outcome.err


def test_one_bad_shard_of_a_sweep_stops_it_before_its_first_cell(kvarena: Kvarena) -> None:
    with no_model_loads():
        outcome = kvarena("-m", "shard=1/2,3/2")
    assert (outcome.code, outcome.is_one_line) == (2, True)
    assert kvarena.num_cells == 0


# ---- runs ----


def test_the_rows_of_three_shards_are_those_of_one_run(kvarena: Kvarena) -> None:
    assert kvarena().code == 0
    whole = comparable(kvarena.rows)
    kvarena.results = kvarena.folder / "shards"
    outcome = kvarena("-m", "shard=1/3,2/3,3/3", with_report=True)
    assert outcome.code == 0
    assert comparable(all_rows(kvarena.results)) == whole
    table = pd.read_csv(kvarena.results / "tables" / "needle-summary.csv")
    assert table["num_ok"].tolist() == table["num_planned"].tolist() == [6]
    (path,) = find_cells(kvarena.results)
    assert read_tidy([path])["num_planned"].tolist() == [6] * 6
    assert [status.state for status in cell_statuses(kvarena.results)] == ["done"]


def test_a_run_without_shard_does_what_shards_have_left(kvarena: Kvarena) -> None:
    kvarena("shard=2/3")
    first = all_rows(kvarena.results)
    assert 0 < len(first) < 6
    (status,) = cell_statuses(kvarena.results)
    assert (status.state, status.num_ok, status.num_planned) == ("incomplete", len(first), 6)
    assert kvarena().code == 0
    assert ids(kvarena.rows).isdisjoint(ids(first))
    assert len(kvarena.rows) + len(first) == 6
    with no_model_loads():
        assert kvarena("-m", "shard=1/3,2/3,1/2").code == 0


def test_a_limit_takes_samples_away_and_moves_none(kvarena: Kvarena) -> None:
    kvarena("-m", "shard=1/2,2/2", "limit=3")
    for number in (1, 2):
        (few,) = kvarena.results.glob(f"runs/*/*/*/samples-{number}of2.jsonl")
        assert all(Shard(number, 2).holds(row["sample_id"]) for row in read_rows(few))
    assert len(all_rows(kvarena.results)) == 3
    kvarena("-m", "shard=1/2,2/2")
    assert len(all_rows(kvarena.results)) == len(ids(all_rows(kvarena.results))) == 6


def test_a_stopped_shard_goes_on_where_it_stopped(kvarena: Kvarena) -> None:
    with stopped_after_one_row() as written:
        assert kvarena("shard=2/2").code == 130
    assert kvarena("shard=2/2").code == 0
    rows = all_rows(kvarena.results)
    assert rows[0]["sample_id"] == written[0]
    assert len(ids(rows)) == len(rows) > 1


def test_a_shard_without_samples_is_no_failure(kvarena: Kvarena) -> None:
    outcome = kvarena("-m", "limit=1", "shard=1/2,2/2", with_report=True)
    assert outcome.code == 0
    assert len(all_rows(kvarena.results)) == 1
    assert "needle-summary.csv" in outcome.out


def test_a_plan_of_shards_adds_up_to_the_plan_of_the_cell(kvarena: Kvarena) -> None:
    with no_model_loads():
        outcome = kvarena("-m", "mode=plan", "shard=1/2,2/2")
    assert outcome.code == 0
    assert "0/6" in next(line for line in outcome.out.splitlines() if "all 2 cells" in line)
    assert [status.num_planned for status in cell_statuses(kvarena.results)] == [6]


# ---- the folder ----


def test_shards_write_side_by_side_and_nobody_else_does(tmp_path: Path) -> None:
    cell(tmp_path).append({"sample_id": "a", "status": "ok", "score": 1})
    with cell(tmp_path, "1/2").claimed(), cell(tmp_path, "2/2").claimed():
        assert [status.state for status in cell_statuses(tmp_path)] == ["running"]
        for shard in ("1/2", "2/2", None):
            with (
                pytest.raises(LockedError, match="another process is writing"),
                cell(tmp_path, shard).claimed(),
            ):
                pass
    with cell(tmp_path).claimed(), pytest.raises(LockedError), cell(tmp_path, "1/2").claimed():
        pass
    assert [status.state for status in cell_statuses(tmp_path)] == ["done"]


def test_a_shard_leaves_the_torn_line_of_another_alone(tmp_path: Path) -> None:
    """The other one may be about to end it."""
    one, two = cell(tmp_path, "1/2"), cell(tmp_path, "2/2")
    one.append({"sample_id": "a", "status": "ok"})
    two.append({"sample_id": "b", "status": "ok"})
    whole, torn = one.rows_path.read_bytes(), one.rows_path.read_bytes() + b'{"sample_id": "c'
    one.rows_path.write_bytes(torn)
    assert ids(two.rows()) == {"a", "b"}
    assert one.rows_path.read_bytes() == torn
    with pytest.warns(UserWarning, match=r"samples-1of2\.jsonl: cut off a torn last line"):
        assert ids(cell(tmp_path).rows()) == {"a", "b"}
    assert one.rows_path.read_bytes() == whole


def test_damage_in_another_shard_is_repaired_without_a_shard(tmp_path: Path) -> None:
    one, two = cell(tmp_path, "1/2"), cell(tmp_path, "2/2")
    one.append({"sample_id": "a", "status": "ok"})
    damaged = b"{\n" + one.rows_path.read_bytes()
    one.rows_path.write_bytes(damaged)
    with pytest.raises(
        UsageError, match=r"samples-1of2\.jsonl line 1 is damaged; .*repair=true and without shard"
    ):
        two.rows(repair=True)
    assert one.rows_path.read_bytes() == damaged
    assert ids(cell(tmp_path).rows(repair=True)) == {"a"}
    (kept,) = one.path.glob("samples.corrupt-*-1of2.jsonl")
    assert kept.read_bytes() == damaged
    assert ids(two.rows()) == {"a"}


def test_a_good_row_of_any_shard_counts(tmp_path: Path) -> None:
    for shard, status in ((None, "error"), ("1/2", "ok"), ("1/3", "oom")):
        cell(tmp_path, shard).append({"sample_id": "a", "status": status, "score": 1})
    (row,) = read_lines(cell(tmp_path).path)
    assert row["status"] == "ok"


def test_what_was_scored_again_counts_wherever_the_answer_lies(tmp_path: Path) -> None:
    identity = needle_cell(tmp_path).identity
    settings = {key: value for key, value in identity.items() if key != "schema"}
    shard = CellFolder(tmp_path, settings, parse_shard("1/2"))
    shard.append(needle_row("a", "It is 48213."))
    assert rescore_cell(shard.path) == (1, 1)
    (row,) = read_lines(shard.path)
    assert (row["score"], row["task_version"]) == (1.0, Needle.version)
    assert rescore_cell(shard.path) == (1, 0)


def test_the_status_of_shards_is_one_status(tmp_path: Path) -> None:
    for shard, num_planned in (("1/2", 6), ("2/2", 9), (None, 4)):
        folder = cell(tmp_path, shard)
        folder.begin(num_planned, {})
        folder.write_status("done")
    folder = cell(tmp_path, "1/2")
    folder.note_plan(12)
    noted = read_status(folder.path)
    assert (noted["num_planned"], noted["num_in_plan"], noted["state"]) == (9, 12, "done")
    names = {path.name for path in folder.path.glob("status*")}
    assert names == {"status.json", "status-1of2.json", "status-2of2.json"}
    assert json.loads((folder.path / "status-2of2.json").read_text())["num_planned"] == 9
