"""Rows survive: torn lines, damage, odd characters, and a manifest that is written once."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvarena.harness.errors import UsageError
from kvarena.harness.results import SCHEMA_VERSION, CellFolder
from kvarena.harness.rows import read_rows

IDENTITY = {
    "task": {"name": "needle", "version": "1", "lengths": [1000]},
    "model": {"name": "toy", "source": "/models/toy"},
    "policy": {"name": "keydiff", "sinks": 0},
    "budget": {"name": "25%"},
    "seed": 0,
}


def cell(results_dir: Path, **changes: Any) -> CellFolder:  # Any: identities hold JSON values
    folder = CellFolder(results_dir, {**IDENTITY, **changes})
    folder.open({})
    return folder


def test_rows_come_back_in_order_with_the_run_id(tmp_path: Path) -> None:
    folder = cell(tmp_path)
    assert folder.rows() == []
    for number in range(3):
        folder.append({"sample_id": f"s{number}", "score": number / 2, "reference": None})
    assert [row["sample_id"] for row in cell(tmp_path).rows()] == ["s0", "s1", "s2"]
    assert folder.rows()[1] == {
        "sample_id": "s1",
        "score": 0.5,
        "reference": None,
        "run_id": folder.run_id,
    }


@pytest.mark.parametrize("num_cut", [1, 2, 15, 36])
def test_a_torn_last_line_is_cut_off_with_a_warning(tmp_path: Path, num_cut: int) -> None:
    folder = cell(tmp_path)
    for name in ("a", "b"):
        folder.append({"sample_id": name})
    whole = folder.rows_path.read_bytes()
    folder.rows_path.write_bytes(whole[:-num_cut])
    with pytest.warns(UserWarning, match=r"samples\.jsonl: cut off a torn last line of \d+ bytes"):
        assert [row["sample_id"] for row in folder.rows()] == ["a"]
    folder.append({"sample_id": "b"})
    assert folder.rows_path.read_bytes() == whole


def test_a_reader_that_does_not_own_the_folder_leaves_a_torn_line_alone(tmp_path: Path) -> None:
    folder = cell(tmp_path)
    folder.append({"sample_id": "a"})
    torn = folder.rows_path.read_bytes() + b'{"sample_id": "b'
    folder.rows_path.write_bytes(torn)
    assert read_rows([folder.path])["sample_id"].tolist() == ["a"]
    assert folder.rows_path.read_bytes() == torn


@pytest.mark.parametrize(
    "damage", [b'{"sample_id": "b', b"\xff\xfe", b"", b"[1, 2]", b"7", b'{"score": 1}', b"\x00" * 9]
)
def test_damage_in_the_middle_names_file_and_line(tmp_path: Path, damage: bytes) -> None:
    folder = cell(tmp_path)
    for name in ("a", "b", "c"):
        folder.append({"sample_id": name})
    first, _, last = folder.rows_path.read_bytes().splitlines(keepends=True)
    folder.rows_path.write_bytes(first + damage + b"\n" + last)
    for read in (folder.rows, lambda: read_rows([folder.path])):
        with pytest.raises(
            UsageError, match=r"samples\.jsonl line 2 is damaged; run again with repair=true"
        ):
            read()


def test_the_manifest_is_written_once(tmp_path: Path) -> None:
    folder = CellFolder(tmp_path, IDENTITY)
    folder.open({"slots": 8})
    path = folder.path / "manifest.json"
    before, manifest = path.read_bytes(), json.loads(path.read_bytes())
    assert manifest["identity"] == {**IDENTITY, "schema": SCHEMA_VERSION}
    assert manifest["config"] == {"slots": 8}
    assert manifest["run_id"] == folder.run_id
    assert {"started", "argv", "git", "python", "machine", "packages"} <= set(manifest)
    CellFolder(tmp_path, IDENTITY).open({"slots": 1})
    assert path.read_bytes() == before
    assert [entry.name for entry in folder.path.iterdir()] == ["manifest.json"]


@pytest.mark.parametrize(
    "text",
    ["🪡 naïve 汉字", "line\u2028separator\u2029", "cr\r\nlf\n\x85\x0b\x0c", "nul\x00", '"\\'],
)
def test_odd_characters_survive(tmp_path: Path, text: str) -> None:
    folder = cell(tmp_path)
    folder.append({"sample_id": "a", "prediction": text})
    folder.append({"sample_id": "b", "prediction": "plain"})
    assert [row["prediction"] for row in folder.rows()] == [text, "plain"]
    assert read_rows([folder.path])["prediction"].tolist() == [text, "plain"]


def test_half_a_surrogate_pair_survives(tmp_path: Path) -> None:
    folder = cell(tmp_path)
    folder.append({"sample_id": "a", "prediction": "x\ud83ey"})
    assert folder.rows()[0]["prediction"] == "x\ud83ey"
    frame = read_rows([folder.path])
    frame["prediction"].astype("string").str.encode("utf-8")  # tables can be written


def test_a_row_that_does_not_fit_on_the_disk_leaves_no_half_line(tmp_path: Path) -> None:
    """A process that may write 4 kB to a file stands for a full disk."""
    code = (
        "import resource, signal, sys\n"
        "from pathlib import Path\n"
        "from kvarena.harness.results import CellFolder\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "folder = CellFolder(Path(sys.argv[1]), eval(sys.argv[2]))\n"
        "folder.open({})\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "for number in range(9): folder.append({'sample_id': number, 'text': 'x' * 1000})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), repr(IDENTITY)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "no space left for a row" in done.stderr
    assert [row["sample_id"] for row in cell(tmp_path).rows()] == [0, 1, 2]


def test_a_cell_has_one_writer_at_a_time(tmp_path: Path) -> None:
    with (
        cell(tmp_path).claimed(),
        pytest.raises(UsageError, match=r"another process is writing .*keydiff-25%"),
        cell(tmp_path).claimed(),
    ):
        pass
    with cell(tmp_path, seed=1).claimed(), cell(tmp_path).claimed():
        pass


def test_the_identity_does_not_depend_on_the_order_of_keys(tmp_path: Path) -> None:
    def reverse(value: Any) -> Any:  # Any: a JSON value
        if isinstance(value, dict):
            return {key: reverse(value[key]) for key in reversed(value)}
        return value

    assert CellFolder(tmp_path, reverse(IDENTITY)).path == CellFolder(tmp_path, IDENTITY).path


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"seed": "0"},
        {"budget": {"name": "26%"}},
        {"policy": {"name": "keydiff", "sinks": 1}},
        {"task": {"name": "needle", "version": "2", "lengths": [1000]}},
        {"model": {"name": "toy", "source": "/other/toy"}},
        {"dtype": "bfloat16"},
    ],
)
def test_any_other_identity_gets_another_folder(tmp_path: Path, change: dict[str, Any]) -> None:
    first, second = CellFolder(tmp_path, IDENTITY), CellFolder(tmp_path, {**IDENTITY, **change})
    assert first.run_id != second.run_id
    assert first.path != second.path


def test_folder_names_tell_what_is_inside(tmp_path: Path) -> None:
    folder = CellFolder(
        tmp_path, {**IDENTITY, "policy": {"name": "keydiff(anchor=median, sinks=4)"}}
    )
    parts = folder.path.relative_to(tmp_path).parts
    assert parts[:3] == ("runs", "needle", "toy")
    assert parts[3] == f"keydiff_anchor=median_sinks=4_-25%-{folder.run_id[:8]}"


@pytest.mark.parametrize("name", ["a/b", "../../etc", "..", ".", "", "a\\b c\n", "naïve"])
def test_names_cannot_leave_the_results_folder(tmp_path: Path, name: str) -> None:
    path = CellFolder(tmp_path, {**IDENTITY, "model": {"name": name}}).path
    assert len(path.relative_to(tmp_path).parts) == 4
    assert os.path.normpath(path) == str(path)


def test_cells_are_read_together_and_empty_ones_add_nothing(tmp_path: Path) -> None:
    one, two, empty = (cell(tmp_path, seed=seed) for seed in range(3))
    one.append({"sample_id": "a", "score": 1.0})
    two.append({"sample_id": "a", "score": 0.0})
    frame = read_rows([one.path, two.path, empty.path])
    assert frame["score"].tolist() == [1.0, 0.0]
    assert frame["run_id"].tolist() == [one.run_id, two.run_id]
    assert read_rows([empty.path]).empty
