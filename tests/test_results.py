"""Rows survive: torn lines, damage, odd characters, and a manifest that is written once."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kvarena.harness.analysis.row_frame import read_rows
from kvarena.harness.errors import UsageError
from kvarena.harness.files import file_name
from kvarena.harness.store.cell_files import find_cells, read_status
from kvarena.harness.store.cell_folder import SCHEMA_VERSION, CellFolder
from kvarena.harness.store.shards import parse_shard

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
        "from kvarena.harness.store.cell_folder import CellFolder\n"
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


KIVI = {"name": "kivi(window=64,bits=4)", "window": 64, "bits": 4}


def test_a_folder_names_the_codec_and_its_hash_does_not_change(tmp_path: Path) -> None:
    plain = CellFolder(tmp_path, {**IDENTITY, "codec": {"name": "none"}})
    coded = CellFolder(tmp_path, {**IDENTITY, "codec": KIVI})
    assert plain.path.name == "keydiff-25%-0d7e1f7f"
    assert coded.path.name == "keydiff+kivi_window=64_bits=4_-25%-011a7ec3"
    assert (plain.run_id, coded.run_id) == ("0d7e1f7f7f49", "011a7ec34a35")


def test_a_cell_begun_under_a_name_without_codec_goes_on_there(tmp_path: Path) -> None:
    folder = cell(tmp_path, codec=KIVI)
    folder.append({"sample_id": "a", "status": "ok", "score": 1.0})
    before = folder.path.with_name(f"keydiff-25%-{folder.run_id[:8]}")
    folder.path.rename(before)
    again = cell(tmp_path, codec=KIVI)
    assert again.path == before
    assert [row["sample_id"] for row in again.rows()] == ["a"]
    assert find_cells(tmp_path) == [before]
    changed = CellFolder(tmp_path, {**IDENTITY, "codec": KIVI, "content": {"data": "other"}})
    other = CellFolder(tmp_path, {**IDENTITY, "codec": {**KIVI, "bits": 2}})
    with pytest.raises(UsageError, match="begun with the same settings but other contents"):
        changed.open({})
    other.open({})
    assert other.path.name.startswith("keydiff+kivi_")


def test_drift_of_a_cell_with_a_codec_is_seen(tmp_path: Path) -> None:
    cell(tmp_path, codec=KIVI)
    cell(tmp_path, codec={"name": "none"})
    with pytest.raises(UsageError, match=r"keydiff\+kivi.* was begun with the same settings"):
        cell(tmp_path, codec=KIVI, content={"data": "other"})


def test_a_name_of_many_options_fits_the_file_system_and_stays_its_own(tmp_path: Path) -> None:
    names = [f"keydiff({'option=value,' * 40}last={last})" for last in (1, 2)]
    one, two = (cell(tmp_path, policy={"name": name}) for name in names)
    assert one.path != two.path
    assert len(one.path.name) < 255
    assert file_name(names[0]) != file_name(names[1])


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


# ---- what people and other programs leave in the files ----


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"score": 7}, "score 7: Input should be less than or equal to 1"),
        ({"score": -0.1}, "score -0.1: Input should be greater than or equal to 0"),
        ({"score": "high"}, 'score "high": Input should be a valid number'),
        ({"score": True}, "score true: Input should be a valid number"),
        ({"prompt_tokens": -3}, "prompt_tokens -3: Input should be greater than or equal to 0"),
        ({"kept_tokens": 1.5}, "kept_tokens 1.5: Input should be a multiple of 1"),
        ({"slots": 0}, "slots 0: Input should be greater than or equal to 1"),
        ({"ttft_sec": float("nan")}, "ttft_sec NaN: Input should be a finite number"),
        ({"status": "fine"}, "status \"fine\": Input should be 'ok', 'oom', 'error'"),
        ({"budget": "lots"}, 'budget "lots": Value error, budget=lots is not a number of tokens'),
        ({"references": ["a", 1]}, "references 1: Input should be an instance of str"),
        ({"meta_depth_target": 101}, "meta_depth_target 101: Input should be less than or equal"),
    ],
    ids=str,
)
def test_a_figure_out_of_bounds_is_told_with_file_line_and_field(
    change: dict[str, Any], told: str, tmp_path: Path
) -> None:
    folder = cell(tmp_path)
    good = {"sample_id": "a", "status": "ok", "score": 1.0, "prompt_tokens": 9}
    folder.append(good)
    folder.append({**good, "sample_id": "b", **change})
    for read in (folder.rows, lambda: read_rows([folder.path])):
        with pytest.raises(UsageError) as caught:
            read()
        assert f"{folder.rows_path} line 2 has {told}" in str(caught.value)
        assert "run again with repair=true" in str(caught.value)
        assert len(str(caught.value).splitlines()) == 1
    assert [row["sample_id"] for row in folder.rows(repair=True)] == ["a"]
    (kept,) = folder.path.glob("samples.corrupt-*.jsonl")
    assert kept.read_bytes().count(b"\n") == 2


@pytest.mark.parametrize("score", [float("nan"), float("inf"), -float("inf"), None])
def test_an_answer_whose_score_is_no_number_counts_as_failed(
    score: float | None, tmp_path: Path
) -> None:
    folder = cell(tmp_path)
    folder.append({"sample_id": "a", "status": "ok", "score": score, "prediction": "x"})
    folder.append({"sample_id": "b", "status": "ok", "score": 0.5, "prediction": "x"})
    folder.append({"sample_id": "b", "status": "ok", "score": score, "prediction": "y"})
    failed, good = folder.rows()
    assert (failed["status"], failed["prediction"]) == ("score_error", "x")
    assert "score" not in failed
    assert failed["error"] == f"the score is {score}, not a number"
    assert (good["status"], good["score"], good["prediction"]) == ("ok", 0.5, "x")


def test_a_sample_that_no_command_asked_for_is_left_out_with_a_warning(tmp_path: Path) -> None:
    folder = cell(tmp_path)
    for name in ("a", "b", "z"):
        folder.append({"sample_id": name, "status": "ok", "score": 1.0})
    assert len(read_rows([folder.path])) == 3  # nobody has said yet which there are
    folder.note_samples(["a"])
    folder.note_samples(["a", "b"])
    with pytest.warns(UserWarning, match="left out 1 of 3 samples, which no command asked for: z"):
        assert read_rows([folder.path])["sample_id"].tolist() == ["a", "b"]
    folder.note_samples(["b"])  # a shorter command takes nothing away
    with pytest.warns(UserWarning, match="asked for: z"):
        assert [row["sample_id"] for row in folder.rows()] == ["a", "b"]
    assert folder.rows_path.read_bytes().count(b"\n") == 3
    (folder.path / "sample_ids.json").write_text("[[1]]")
    with pytest.raises(UsageError, match=r"sample_ids\.json is damaged; delete it"):
        read_rows([folder.path])


def test_samples_of_shards_are_those_of_the_cell(tmp_path: Path) -> None:
    for shard, name in (("1/2", "a"), ("2/2", "b")):
        folder = CellFolder(tmp_path, IDENTITY, parse_shard(shard))
        folder.open({})
        folder.note_samples(["a", "b"] if shard == "1/2" else ["b", "c"])
        folder.append({"sample_id": name, "status": "ok", "score": 1.0})
    assert [row["sample_id"] for row in folder.rows()] == ["a", "b"]
    assert {path.name for path in folder.path.glob("sample_ids*")} == {
        "sample_ids-1of2.json",
        "sample_ids-2of2.json",
    }


@pytest.mark.parametrize(
    "noted",
    [
        {"num_planned": "many"},
        {"num_planned": -1, "num_in_plan": 10**30},
        {"num_planned": True, "state": ["done"], "updated": 7, "identity": {"task": 1}},
    ],
    ids=str,
)
def test_nonsense_in_the_status_file_is_passed_over(noted: dict[str, Any], tmp_path: Path) -> None:
    folder = cell(tmp_path)
    folder.append({"sample_id": "a", "status": "ok", "score": 1.0})
    (folder.path / "status.json").write_text(json.dumps({**noted, "host": "h"}))
    assert read_status(folder.path) == {"host": "h"}
    assert read_rows([folder.path])["num_planned"].tolist() == [1]
    folder.begin(3, {"ok": 1})
    folder.note_plan(4)
    assert read_status(folder.path)["num_planned"] == 3


@pytest.mark.parametrize(
    "change",
    [
        {"identity": {}},
        {"identity": []},
        {"identity": {**IDENTITY, "policy": "keydiff"}},
        {"identity": {**IDENTITY, "budget": {"name": 512}}},
        {"identity": {**IDENTITY, "codec": "kivi"}},
        {"identity": {**IDENTITY, "content": "abc"}},
        {"argv": None},
        {"git": {"commit": 7}},
        {"machine": "mine"},
    ],
    ids=str,
)
def test_a_manifest_of_another_shape_is_one_line(change: dict[str, Any], tmp_path: Path) -> None:
    folder = cell(tmp_path)
    folder.append({"sample_id": "a", "status": "ok", "score": 1.0})
    manifest = folder.path / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | change))
    with pytest.raises(UsageError, match=r"manifest\.json is damaged; move the folder away"):
        read_rows([folder.path])


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("a folder", "manifest.json"),
        ("a folder", "samples.jsonl"),
        ("a folder", "status.json"),
        ("a loop", "manifest.json"),
        ("a loop", "status.json"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(kind: str, name: str, tmp_path: Path) -> None:
    folder = cell(tmp_path)
    folder.append({"sample_id": "a", "status": "ok", "score": 1.0})
    folder.write_status("done")
    path = folder.path / name
    path.unlink()
    path.symlink_to(name) if kind == "a loop" else path.mkdir()
    with pytest.raises(UsageError, match=f"{path} cannot be read|no manifest"):
        read_rows([folder.path])


def test_a_lock_that_cannot_be_opened_is_one_line(tmp_path: Path) -> None:
    folder = cell(tmp_path)
    (folder.path / ".lock").mkdir()
    with pytest.raises(UsageError, match="cannot be written"), folder.claimed():
        pass
