"""The reference that pages quote comes from recorded rows, and those from a results folder."""

import sys
from pathlib import Path

import pandas as pd
import pytest

from kvarena.harness.analysis.row_frame import recorded_rows
from kvarena.harness.report.after_run import summaries
from kvarena.harness.report.text_tables import write_csv
from kvarena.harness.studies import reference
from kvarena.harness.studies.reference import REFERENCE, recorded_tasks


@pytest.mark.parametrize("task", recorded_tasks())
def test_what_is_committed_comes_from_the_committed_rows(task: str, tmp_path: Path) -> None:
    found = summaries(task, recorded_rows(REFERENCE / f"{task}.csv"))
    committed = {path.stem for path in REFERENCE.glob(f"{task}-*.csv")}
    assert committed == {f"{task}-{name}" for name in found}
    for name, table in found.items():
        fresh = pd.read_csv(write_csv(table, tmp_path / "fresh.csv"), dtype={"budget": str})
        old = pd.read_csv(REFERENCE / f"{task}-{name}.csv", dtype={"budget": str})
        pd.testing.assert_frame_equal(fresh, old)
    assert found["summary"]["num_compressed"].notna().all()


def test_rows_are_recorded_without_texts_and_their_tables_follow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    target, page = tmp_path / "reference", tmp_path / "page.md"
    rows = recorded_rows(REFERENCE / "needle.csv").assign(prediction="the number is 5")
    write_csv(rows, tmp_path / "tables" / "needle.csv")
    page.write_text("before\n<!-- needle table: begin -->\n<!-- needle table: end -->\nafter\n")
    monkeypatch.setattr(reference, "REFERENCE", target)
    monkeypatch.setattr(reference, "PAGES", (page,))
    monkeypatch.setattr(sys, "argv", ["reference", str(tmp_path), "needle"])
    reference.main()
    names = ["needle-summary.csv", "needle.csv", "needle.png"]
    assert sorted(path.name for path in target.iterdir()) == names
    assert "prediction" not in pd.read_csv(target / "needle.csv")
    assert page.read_text().count("| keydiff |") == 2
    monkeypatch.setattr(sys, "argv", ["reference", str(tmp_path)])
    with pytest.raises(SystemExit):
        reference.main()
    assert "name the tasks" in capsys.readouterr().err
