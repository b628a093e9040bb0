"""The comparison at equal bytes: labelled by what ran, and made from the rows that are recorded."""

import sys
from pathlib import Path

import pandas as pd
import pytest

from kvarena.harness.analysis.comparison import CELL
from kvarena.harness.analysis.row_frame import recorded_rows
from kvarena.harness.studies import equal_bytes
from kvarena.harness.studies.equal_bytes import FOLDER, labelled, summarise
from kvarena.harness.studies.reference import REPOSITORY

ASKED, RAN = "full+kivi(window=64,bits=4)", "full+kivi(window=64,bits=2)"
README = "before\n<!-- equal-bytes table: begin -->\nold\n<!-- equal-bytes table: end -->\nafter\n"


def test_a_method_is_called_by_the_codec_that_ran() -> None:
    settled = "kivi(window=64,bits=4)[bits=2]"
    cases = [
        (ASKED, settled, RAN),
        (RAN, settled, RAN),
        (RAN, "kivi(window=64,bits=2)", RAN),
        ("keydiff(sinks=4)", "none", "keydiff(sinks=4)"),
        ("keydiff+kivi@3fa9", "kivi[bits=2]", "keydiff+kivi(bits=2)@3fa9"),
    ]
    rows = pd.DataFrame(cases, columns=["policy", "codec", "label"])
    assert labelled(rows)["policy"].tolist() == rows["label"].tolist()


def test_what_is_committed_comes_from_the_committed_rows() -> None:
    rows = recorded_rows(FOLDER / "equal-bytes.csv")
    pd.testing.assert_frame_equal(labelled(rows), rows)
    committed = pd.read_csv(FOLDER / "equal-bytes-summary.csv", dtype={"budget": str})
    columns = ["policy", "budget", "codec", "num_ok", "score", "kept_tokens", "bits_per_value"]
    pd.testing.assert_frame_equal(summarise(rows)[columns], committed[columns], check_dtype=False)
    labels = committed["policy"].tolist()
    assert RAN in labels
    assert ASKED not in labels
    section = (FOLDER / "README.md").read_text().split("<!-- equal-bytes table: begin -->")[1]
    assert f"| {RAN} | 12MB | 20.0 " in section.split("<!-- equal-bytes table: end -->")[0]


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with the recorded rows alone, still labelled as asked; files go there."""
    folder = tmp_path / "results" / "equal-bytes"
    folder.mkdir(parents=True)
    text = (FOLDER / "equal-bytes.csv").read_text()
    (folder / "equal-bytes.csv").write_text(text.replace(RAN, ASKED))
    (folder / "README.md").write_text(README)
    monkeypatch.setattr(equal_bytes, "FOLDER", folder)
    monkeypatch.setattr(sys, "argv", ["equal_bytes"])
    return folder


def test_tables_and_picture_can_be_made_from_recorded_rows(copy: Path) -> None:
    equal_bytes.main()
    assert (copy / "equal-bytes.csv").read_bytes() == (FOLDER / "equal-bytes.csv").read_bytes()
    picture = (copy / "equal-bytes.svg").read_bytes()
    assert picture.startswith(b"<?xml")
    readme = (copy / "README.md").read_text()
    assert readme.startswith("before\n")
    assert readme.endswith("after\n")
    assert RAN in readme
    assert ASKED not in readme
    equal_bytes.main()
    assert (copy / "equal-bytes.svg").read_bytes() == picture


def test_a_folder_without_cells_is_refused_in_one_line(
    copy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (copy / "equal-bytes.csv").read_bytes()
    monkeypatch.setattr(sys, "argv", ["equal_bytes", str(copy)])
    with pytest.raises(SystemExit) as ended:
        equal_bytes.main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert (copy / "equal-bytes.csv").read_bytes() == before


def test_the_summary_has_only_columns_that_its_dictionary_explains() -> None:
    explained = (REPOSITORY / "results" / "README.md").read_text().split("## Summary")[1]
    for column in pd.read_csv(FOLDER / "equal-bytes-summary.csv").drop(columns=CELL):
        assert f"`{column}`" in explained, column
