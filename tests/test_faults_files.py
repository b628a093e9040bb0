"""Files that are damaged, full, or no longer what a run began with.

T3  a torn character, odd and double lines   T7  other settings, other contents, other habits
T4  damage in the middle, and its repair     T8  two models or two policies under one folder
T5  a full disk, for rows and for reports    T9  data with other rows, or the same in other order
"""

import errno
import io
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from faulty import Kvarena, comparable, no_model_loads, read_only, read_rows
from kvarena.harness.analysis.comparison import compare_cells
from kvarena.harness.analysis.row_frame import read_rows as tidy_rows
from kvarena.harness.cells import fingerprints
from kvarena.harness.errors import UsageError
from kvarena.harness.report import status as cell_status
from kvarena.harness.report.html_page import write_report
from kvarena.harness.report.paper_tables import write_tables
from kvarena.harness.store.cell_files import find_cells, flat, read_status
from kvarena.harness.store.cell_folder import CellFolder
from kvarena.tasks.benchmark.source import SAMPLE_FOLDER
from toy_folder import save_model_folder, toy_overrides
from toys import toy_model

LONGBENCH = SAMPLE_FOLDER / "longbench"


@pytest.fixture
def kvarena(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Kvarena:
    return Kvarena(monkeypatch, capsys, tmp_path, toy_overrides(tmp_path))


def rows_path(kvarena: Kvarena) -> Path:
    (path,) = kvarena.results.glob("runs/*/*/*/samples.jsonl")
    return path


def cell(folder: Path) -> CellFolder:
    names = {key: {"name": "x"} for key in ("task", "model", "policy", "budget")}
    found = CellFolder(folder, {**names, "seed": 0, "content": {"data": "abc", "model": "def"}})
    found.open({})
    return found


# ---- T3 ----


def test_a_line_torn_inside_a_character_is_cut_off(tmp_path: Path) -> None:
    """kvarena writes ASCII; an editor or another tool may have written the characters out."""
    folder = cell(tmp_path)
    whole = '{"sample_id": "a", "status": "ok", "prediction": "汉"}\n'.encode()
    folder.rows_path.write_bytes(whole + whole[: whole.index("汉".encode()) + 1])
    with pytest.warns(UserWarning, match=r"torn last line of 51 bytes"):
        assert [row["prediction"] for row in folder.rows()] == ["汉"]
    assert folder.rows_path.read_bytes() == whole


@pytest.mark.parametrize("line", [b"null", b"[" * 100_000, b'{"sample_id": []}', b"{}", b" "])
def test_a_line_that_is_no_row_is_named(line: bytes, tmp_path: Path) -> None:
    folder = cell(tmp_path)
    folder.append({"sample_id": "a", "status": "ok"})
    folder.rows_path.write_bytes(folder.rows_path.read_bytes() + line + b"\n")
    with pytest.raises(UsageError, match=r"samples\.jsonl line 2 is damaged"):
        folder.rows()


@pytest.mark.parametrize(
    ("statuses", "counts"),
    [
        (["ok", "ok"], 1),  # the last of two good ones
        (["error", "ok"], 1),
        (["ok", "error"], 0),  # a later failure takes nothing away
        (["ok", "ok", "oom"], 1),
        (["error", "invalid"], 1),
    ],
)
def test_of_several_rows_the_last_good_one_counts(
    statuses: list[str], counts: int, tmp_path: Path
) -> None:
    folder = cell(tmp_path)
    for number, status in enumerate(statuses):
        folder.append({"sample_id": "a", "status": status, "score": 1, "number": number})
    folder.append({"sample_id": "b", "status": "ok", "score": 1, "number": 9})
    assert [row["number"] for row in folder.rows()] == [counts, 9]


def test_a_row_without_a_status_runs_again(kvarena: Kvarena) -> None:
    kvarena()
    path = rows_path(kvarena)
    path.write_bytes(path.read_bytes().replace(b'"status": "ok"', b'"startus": "ok"', 1))
    assert kvarena().code == 0
    first, second, again = read_rows(path)
    assert (first["sample_id"], first.get("status")) == (again["sample_id"], None)
    assert [row["status"] for row in (second, again)] == ["ok", "ok"]


# ---- T4 ----


def test_damage_is_refused_and_repaired_on_request(kvarena: Kvarena) -> None:
    kvarena("task.depths=[0,50,100]")
    path = rows_path(kvarena)
    before = read_rows(path)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1] = lines[1][:40] + bytes(byte ^ 0x80 for byte in lines[1][40:60]) + lines[1][60:]
    path.write_bytes(damaged := b"".join(lines))
    with no_model_loads():
        refused = kvarena("task.depths=[0,50,100]")
    assert (refused.code, refused.is_one_line) == (2, True)
    assert f"{path} line 2 is damaged; run again with repair=true" in refused.err
    assert path.read_bytes() == damaged
    repaired = kvarena("task.depths=[0,50,100]", "repair=true")
    assert repaired.code == 0
    (kept,) = path.parent.glob("samples.corrupt-*.jsonl")
    assert kept.read_bytes() == damaged
    assert f"left out 1 damaged lines, see {kept}" in repaired.out
    after = read_rows(path)
    assert [row["sample_id"] for row in after] == [before[i]["sample_id"] for i in (0, 2, 1)]
    assert after[:2] == [before[0], before[2]]
    assert comparable(after) == comparable(before)
    assert kvarena("task.depths=[0,50,100]").code == 0


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"{}"])
def test_a_damaged_manifest_is_one_line(content: bytes, kvarena: Kvarena) -> None:
    kvarena("limit=1")
    manifest = rows_path(kvarena).with_name("manifest.json")
    manifest.write_bytes(content)
    outcome = kvarena()
    assert (outcome.code, outcome.is_one_line) == (2, True)
    assert f"{manifest} is damaged; move the folder away" in outcome.err


@pytest.mark.parametrize("content", [b"", b"[]"])
def test_a_damaged_status_file_is_written_anew(content: bytes, kvarena: Kvarena) -> None:
    kvarena("limit=1")
    path = rows_path(kvarena).with_name("status.json")
    path.write_bytes(content)
    assert kvarena().code == 0
    assert read_status(path.parent)["num_planned"] == 2
    assert read_status(path.parent)["state"] == "done"


# ---- T5 ----


class SmallDisk(io.FileIO):
    """A file on a disk with ``room`` bytes left; what fits is written before it complains."""

    room = 0

    def write(self, data: Any) -> int:  # Any: bytes of some kind
        if not SmallDisk.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        num_bytes = min(SmallDisk.room, len(data))
        SmallDisk.room -= num_bytes
        return super().write(data[:num_bytes])


def fill_disk(patch: pytest.MonkeyPatch, room: int, *, rows_only: bool) -> None:
    """``room`` bytes are left for rows; then, unless ``rows_only``, nothing else fits either."""
    opened, write_text, SmallDisk.room = Path.open, Path.write_text, room

    def open_small(path: Path, mode: str = "r", *arguments: Any, **options: Any) -> Any:
        if mode == "ab" and path.name == "samples.jsonl":
            return SmallDisk(path, "ab")
        return opened(path, mode, *arguments, **options)

    def write(path: Path, text: str) -> int:
        if not rows_only and not SmallDisk.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_text(path, text)

    patch.setattr(Path, "open", open_small)
    patch.setattr(Path, "write_text", write)


@pytest.mark.parametrize(("room", "rows_only"), [(0, True), (50, True), (50, False)])
def test_a_full_disk_is_one_line_and_the_run_goes_on_when_there_is_room(
    room: int, rows_only: bool, kvarena: Kvarena
) -> None:
    kvarena("limit=1")
    path = rows_path(kvarena)
    before = path.read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        fill_disk(patch, room, rows_only=rows_only)
        full = kvarena()
    assert full.code == 1
    (line,) = (text for text in full.err.splitlines() if text.startswith("error: "))
    assert str(path) in line
    assert line.endswith(f"bytes free in {kvarena.results})")
    assert "Traceback" not in full.err
    assert path.read_bytes() == before
    assert kvarena().code == 0
    assert path.read_bytes().startswith(before)
    assert len(comparable(read_rows(path))) == 2


def test_a_row_that_did_not_reach_the_disk_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    folder = cell(tmp_path)
    folder.append({"sample_id": "a"})
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(OSError, match=r"Input/output error: .*samples\.jsonl"):
            folder.append({"sample_id": "b"})
    assert [row["sample_id"] for row in folder.rows()] == ["a"]


def test_no_room_for_the_report_is_one_line_and_the_old_table_stays(kvarena: Kvarena) -> None:
    assert kvarena("limit=1", with_report=True).code == 0
    table = kvarena.results / "tables" / "needle.csv"
    before = table.read_bytes()
    # Where the new table is written before it takes the place of the old one.
    temporary = f".{table.name}.{os.uname().nodename}.{os.getpid()}.tmp"
    table.with_name(temporary).symlink_to("/dev/full")
    full = kvarena(with_report=True)
    assert full.code == 1
    assert "Traceback" not in full.err
    assert f"error: [Errno {errno.ENOSPC}] {os.strerror(errno.ENOSPC)}" in full.err
    assert f"bytes free in {kvarena.results})" in full.err
    assert table.read_bytes() == before
    assert len(comparable(read_rows(rows_path(kvarena)))) == 2
    assert kvarena(with_report=True).code == 0
    assert table.read_bytes() != before


@pytest.mark.parametrize("place", ["a file", "/dev/null/results"])
def test_a_results_folder_that_cannot_be_is_one_line(place: str, kvarena: Kvarena) -> None:
    kvarena.results = kvarena.folder / place
    (kvarena.folder / "a file").write_text("not a folder")
    with no_model_loads():
        outcome = kvarena()
    assert (outcome.code, outcome.is_one_line) == (2, True)
    assert "cannot be written (Not a directory); choose another results_dir" in outcome.err


def test_a_results_folder_may_have_any_name(kvarena: Kvarena) -> None:
    kvarena.results = kvarena.folder / "ein Ordner, 结果 =1"
    assert kvarena("limit=1", with_report=True).code == 0
    assert len(kvarena.rows) == 1


# ---- a folder for reading only ----


def test_reading_commands_work_on_a_folder_that_cannot_be_written(
    kvarena: Kvarena, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert kvarena().code == 0
    before = {path: path.read_bytes() for path in kvarena.results.rglob("*") if path.is_file()}
    monkeypatch.setattr(sys, "argv", ["status", str(kvarena.results)])
    with read_only(kvarena.results):
        with pytest.raises(OSError, match="Read-only file system"):
            (kvarena.results / "x").touch()
        capsys.readouterr()
        cell_status.main()
        assert "1 done" in capsys.readouterr().out
        assert len(tidy_rows(find_cells(kvarena.results))) == 2
        done, other = kvarena("mode=plan"), kvarena("mode=plan", "budget=96")
        refused = kvarena("budget=96")
    assert (done.code, other.code) == (0, 0)
    assert "0/2" in other.out
    for plan in (done, other):
        assert "not noted for make status: Read-only file system" in plan.out
    assert (refused.code, refused.is_one_line) == (2, True)
    assert "cannot be written (Read-only file system); choose another results_dir" in refused.err
    assert before == {p: p.read_bytes() for p in kvarena.results.rglob("*") if p.is_file()}


def test_a_running_cell_is_seen_from_where_nothing_can_be_written(tmp_path: Path) -> None:
    folder = cell(tmp_path)
    folder.append({"sample_id": "a", "status": "ok", "score": 1})
    with folder.claimed(), read_only(tmp_path):
        assert [one.state for one in cell_status.cell_statuses(tmp_path)] == ["running"]


@pytest.mark.parametrize("place", ["a file", "/dev/null/results"])
def test_a_plan_for_a_folder_that_cannot_be_is_one_line(place: str, kvarena: Kvarena) -> None:
    kvarena.results = kvarena.folder / place
    (kvarena.folder / "a file").write_text("not a folder")
    outcome = kvarena("mode=plan")
    assert (outcome.code, outcome.is_one_line) == (2, True)
    assert "cannot be written" in outcome.err
    with pytest.raises(UsageError, match="no cells in"):
        cell_status.cell_statuses(kvarena.results)


# ---- rows that people edit ----


def test_a_score_that_is_nan_runs_again_and_is_in_no_score(kvarena: Kvarena) -> None:
    kvarena()
    path = rows_path(kvarena)
    first, second = read_rows(path)
    path.write_text(json.dumps({**first, "score": float("nan")}) + "\n" + json.dumps(second) + "\n")
    (one,) = cell_status.cell_statuses(kvarena.results)
    assert (one.state, one.num_ok, one.num_failed) == ("failed", 1, {"score_error": 1})
    table = tidy_rows([path.parent])
    assert table["status"].tolist() == ["score_error", "ok"]
    assert pd.isna(compare_cells(table)["score"].item())
    assert kvarena().code == 0
    *_, again = read_rows(path)
    assert len(read_rows(path)) == 3
    assert comparable([again]) == comparable([first])


def test_a_row_of_an_unknown_sample_is_left_out_everywhere_alike(kvarena: Kvarena) -> None:
    assert kvarena(with_report=True).code == 0
    table = kvarena.results / "tables" / "needle.csv"
    path = rows_path(kvarena)
    first, _ = read_rows(path)
    before = pd.read_csv(table)
    with path.open("a") as stream:
        stream.write(json.dumps({**first, "sample_id": "of-another-day", "score": 1.0}) + "\n")
    with pytest.warns(
        UserWarning, match="left out 1 of 3 samples, which no command asked for: of-"
    ):
        assert kvarena(with_report=True).code == 0
    pd.testing.assert_frame_equal(pd.read_csv(table), before)
    with pytest.warns(UserWarning, match="of-another-day"):
        write_tables(kvarena.results)
    with pytest.warns(UserWarning, match="of-another-day"):
        page = write_report(kvarena.results).read_text()
    with pytest.warns(UserWarning, match="of-another-day"):
        (one,) = cell_status.cell_statuses(kvarena.results)
    with pytest.warns(UserWarning, match="of-another-day"):
        plan = kvarena("mode=plan").out
    everything = pd.read_csv(kvarena.results / "tables" / "rows.csv")
    assert everything["sample_id"].tolist() == before["sample_id"].tolist()
    summary = pd.read_csv(kvarena.results / "tables" / "summary.csv")
    assert summary[["num_ok", "num_planned"]].to_numpy().tolist() == [[2, 2]]
    assert "of-another-day" not in page
    assert (one.state, one.num_ok, one.num_planned) == ("done", 2, 2)
    assert "2/2" in plan
    assert len(read_rows(path)) == 3  # nothing is taken out of the file


def test_a_cell_of_before_the_list_of_samples_gets_one_from_its_command(kvarena: Kvarena) -> None:
    kvarena()
    path = rows_path(kvarena)
    noted = path.with_name("sample_ids.json")
    assert json.loads(noted.read_text()) == [row["sample_id"] for row in read_rows(path)]
    noted.unlink()
    with path.open("a") as stream:
        stream.write(json.dumps({**read_rows(path)[0], "sample_id": "z"}) + "\n")
    assert len(tidy_rows([path.parent])) == 3
    with no_model_loads():
        assert kvarena().code == 0
    with pytest.warns(UserWarning, match="asked for: z"):
        assert len(tidy_rows([path.parent])) == 2


# ---- T7 ----


def test_every_field_of_the_identity_makes_another_cell_or_is_refused(kvarena: Kvarena) -> None:
    kvarena("limit=1")
    identity = json.loads(rows_path(kvarena).with_name("manifest.json").read_text())["identity"]
    own = CellFolder(kvarena.results, identity)
    assert own.path == rows_path(kvarena).parent
    contents = []
    for name in flat(identity):
        changed = json.loads(json.dumps(identity))
        *parents, last = name.split(".")
        inner = changed
        for parent in parents:
            inner = inner[parent]
        before, inner[last] = inner[last], "another"
        other = CellFolder(kvarena.results, changed)
        assert other.path != own.path, name
        if name.startswith("content."):
            contents.append(name)
            with pytest.raises(UsageError, match=f"other contents: {name} {before} -> another; "):
                other.open({})
        else:
            other.open({})
            shutil.rmtree(other.path)
    parts = ("codec", "data", "model", "policy", "shape")
    assert sorted(contents) == [f"content.{name}" for name in parts]
    # What a user may set is in it; what changes no output is not.
    assert {name.partition(".")[0] for name in flat(identity)} == {
        *("schema", "task", "policy", "model", "budget", "question", "turns", "sampling", "seed"),
        *("chunk", "attention", "device", "dtype", "kv_dtype", "codec", "engine", "content"),
        *("shape", "protect", "evict_every"),
    }


def edit_data(kvarena: Kvarena, patch: pytest.MonkeyPatch) -> None:
    with (kvarena.folder / "hay" / "lines.txt").open("a") as stream:
        stream.write("\nOne more line.")


def edit_model(kvarena: Kvarena, patch: pytest.MonkeyPatch) -> None:
    model = toy_model("llama", vocab_size=259, max_position_embeddings=1024, initializer_range=0.2)
    model.save_pretrained(kvarena.folder / "other")
    weights = kvarena.folder / "other" / "model.safetensors"
    shutil.copy(weights, kvarena.folder / "toy" / "model.safetensors")


def edit_template(kvarena: Kvarena, patch: pytest.MonkeyPatch) -> None:
    (kvarena.folder / "toy" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")


def edit_policy(kvarena: Kvarena, patch: pytest.MonkeyPatch) -> None:
    get_file = fingerprints.inspect.getfile

    def edited(kind: type) -> str:
        copy = kvarena.folder / "keydiff.py"
        copy.write_bytes(Path(get_file(kind)).read_bytes() + b"# edited\n")
        return str(copy) if kind.__name__ == "KeyDiff" else get_file(kind)

    patch.setattr(fingerprints.inspect, "getfile", edited)


@pytest.mark.parametrize(
    ("edit", "field"),
    [
        (edit_data, "data"),
        (edit_model, "model"),
        (edit_template, "model"),
        (edit_policy, "policy"),
    ],
)
def test_other_contents_are_refused_with_what_differs_and_kept_apart_in_another_folder(
    edit: Callable[[Kvarena, pytest.MonkeyPatch], None], field: str, kvarena: Kvarena
) -> None:
    kvarena("limit=1")
    path = rows_path(kvarena)
    before = path.read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        edit(kvarena, patch)
        with no_model_loads():
            refused = kvarena()
        assert (refused.code, refused.is_one_line) == (2, True)
        assert f"the same settings but other contents: content.{field} " in refused.err
        assert refused.err.count(" -> ") == 1
        assert refused.err.endswith(
            "; restore them, or choose another results_dir for the new ones\n"
        )
        assert kvarena.num_cells == 1
        other = kvarena.folder / "other"
        assert kvarena(f"results_dir={other}").code == 0
        assert len(list(other.glob("runs/*/*/*/samples.jsonl"))) == kvarena.num_cells == 1
    assert path.read_bytes() == before


def test_what_changes_no_output_goes_on_in_the_same_cell(kvarena: Kvarena) -> None:
    kvarena("limit=1", "slots=1")
    (before,) = kvarena.rows
    kvarena.results.rename(kvarena.folder / "moved")
    kvarena.results = kvarena.folder / "moved"
    text = kvarena.folder / "hay" / "lines.txt"
    text.write_text(text.read_text())
    os.utime(text, (0, 0))
    outcome = kvarena("slots=3", "allow_partial=true", "repair=true")
    assert outcome.code == 0
    assert kvarena.rows[0] == before
    assert len(comparable(kvarena.rows)) == 2


# ---- T8 ----


def test_two_models_of_one_name_never_share_a_row(kvarena: Kvarena) -> None:
    first = kvarena.overrides[0]
    assert kvarena().code == 0
    (kvarena.folder / "b").mkdir()
    folder = save_model_folder(kvarena.folder / "b" / "toy")
    toy_model(
        "llama",
        vocab_size=259,
        max_position_embeddings=1024,
        initializer_range=0.2,
        eos_token_id=None,
    ).save_pretrained(folder)
    kvarena.overrides[0] = f"model={folder}"
    assert kvarena().code == 0
    found = [read_rows(path) for path in kvarena.results.glob("runs/needle/toy/*/samples.jsonl")]
    assert [len(rows) for rows in found] == [2, 2]
    one, other = ({row["sample_id"]: row["prediction"] for row in rows} for rows in found)
    assert one.keys() == other.keys()
    assert all(one[name] != other[name] for name in one)
    kvarena.overrides[0] = first
    assert "all 2 samples are there already" in kvarena().out


def test_what_the_full_cache_says_is_kept_by_model(kvarena: Kvarena) -> None:
    haystack = kvarena.overrides[1].partition("=")[2]
    kvarena.overrides[1:5] = [
        "task=fidelity",
        f"+task.options.haystack={haystack}",
        "+task.options.lengths=[400]",
        "+task.options.depths=[0]",
        "task.max_tokens=4",
    ]
    assert kvarena().code == 0
    edit_model(kvarena, kvarena.monkeypatch)
    shutil.rmtree(kvarena.results / "runs")
    assert kvarena().code == 0
    folders = sorted((kvarena.results / "cache" / "fidelity").iterdir())
    assert [len(list(folder.iterdir())) for folder in folders] == [1, 1]
    one, other = (next(folder.iterdir()).read_bytes() for folder in folders)
    assert one != other


# ---- T9 ----


@pytest.fixture
def longbench(kvarena: Kvarena) -> Kvarena:
    """Three short rows of qasper in a folder of their own."""
    data = kvarena.folder / "data"
    data.mkdir()
    (row, _) = map(json.loads, (LONGBENCH / "qasper.jsonl").read_text("utf-8").splitlines())
    rows = [{**row, "_id": f"r{n}", "context": f"{n} is a number. " * 9} for n in range(3)]
    (data / "qasper.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copy(LONGBENCH / "dataset2prompt.json", data)
    (data / "dataset2maxlen.json").write_text('{"qasper": 3}')
    kvarena.overrides[1:] = ["task=longbench", f"task.data={data}", "task.tasks=[qasper]"]
    kvarena.overrides += ["task.max_length=600", "budget=64", "limit=2"]
    return kvarena


def test_rows_in_another_order_are_the_same_data(longbench: Kvarena) -> None:
    longbench("limit=null")
    calm = comparable(longbench.rows)
    shutil.rmtree(longbench.results)
    assert longbench().code == 0
    before = longbench.rows
    path = longbench.folder / "data" / "qasper.jsonl"
    path.write_text("\n".join(reversed(path.read_text().splitlines())) + "\n\n")
    assert longbench("limit=null").code == 0
    assert longbench.rows[:2] == before
    # The checksum in a row is that of the file as it was read.
    leave_out = "meta_data_sha256"
    assert comparable(longbench.rows, leave_out) == {
        name: {key: value for key, value in row.items() if key != leave_out}
        for name, row in calm.items()
    }


def test_a_row_that_was_edited_is_refused(longbench: Kvarena) -> None:
    longbench()
    before = longbench.rows
    path = longbench.folder / "data" / "qasper.jsonl"
    path.write_text(path.read_text().replace("2 is a number", "2 is another number", 1))
    with no_model_loads():
        outcome = longbench()
    assert (outcome.code, outcome.is_one_line) == (2, True)
    assert "other contents: content.data " in outcome.err
    assert longbench.rows == before
