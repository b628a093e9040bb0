"""Benchmark data: every packing gives the same rows, and what is wrong is named where it is."""

import gzip
import hashlib
import io
import json
import os
import re
import subprocess
import sys
import urllib.request
import zipfile
from pathlib import Path
from subprocess import PIPE

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from kvarena.tasks.base import Task
from kvarena.tasks.benchmark import source
from kvarena.tasks.benchmark.downloads import WebFile
from kvarena.tasks.benchmark.rows import DataFile, is_count, is_text, is_texts
from kvarena.tasks.benchmark.source import Source, open_source
from kvarena.tasks.longbench import LongBench
from kvarena.tasks.math500 import Math500
from toy_tokenizers import CharTokenizer

FIELDS = {"text": ("a text", is_text), "num": ("a whole number", is_count)}
ROWS = [{"text": "línea 1\u2028still line 1", "num": 1}, {"text": "", "num": 2}]
CONTENT = b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in ROWS)
SHARED = Path(os.environ.get("KVARENA_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
WAYS = "Ways to get it: ask."


def no_hub() -> Source:
    raise OSError("no network\n here")


def opened(path: Path) -> Source:
    return open_source(str(path), "benchmark", no_hub, WAYS)


def written(folder: Path, content: bytes, name: str = "f.jsonl") -> DataFile:
    (folder / name).write_bytes(content)
    return DataFile(folder / name)


def zipped(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


@pytest.fixture
def packings(tmp_path: Path) -> list[Path]:
    """The same rows in folders, with data/ and gzip, in zips of two layouts, and as two files."""
    packed = gzip.compress(CONTENT)
    folders = {"a": ("task.jsonl", CONTENT), "b": ("task.jsonl.gz", packed)}
    folders |= {"c": ("data/task.jsonl", CONTENT), "d": ("data/task.jsonl.gz", packed)}
    for folder, (name, content) in folders.items():
        (tmp_path / folder / name).parent.mkdir(parents=True)
        (tmp_path / folder / name).write_bytes(content)
    junk = {"data/other_task.jsonl": b"{}", "__MACOSX/data/task.jsonl": b"junk"}
    zips = [
        zipped(tmp_path / "e.zip", {"data/task.jsonl": CONTENT, **junk}),
        zipped(tmp_path / "f.zip", {"task.jsonl": CONTENT}),
    ]
    files = [tmp_path / "rows.jsonl", tmp_path / "rows.jsonl.gz"]
    for file, content in zip(files, (CONTENT, packed), strict=True):
        file.write_bytes(content)
    return [*(tmp_path / folder for folder in folders), *zips, *files]


# ---- reading ----


def test_every_packing_gives_the_same_rows_and_checksum(packings: list[Path]) -> None:
    for path in packings:
        file = opened(path).rows_file("task")
        assert file.rows(FIELDS) == ROWS
        assert file.sha256 == hashlib.sha256(CONTENT).hexdigest()


def test_lines_end_at_newlines_only_and_blank_ones_are_left_out(tmp_path: Path) -> None:
    content = b"\xef\xbb\xbf" + CONTENT.replace(b"\n", b"\r\n\n") + b"  \n"
    assert written(tmp_path, content).rows(FIELDS) == ROWS


def test_fields_that_nobody_asked_for_stay(tmp_path: Path) -> None:
    file = written(tmp_path, b'{"more": [1], "num": 3}')
    assert file.rows({"num": FIELDS["num"]}) == [{"more": [1], "num": 3}]


# What a reader with one type for each column would change, line by line as plain JSON has it.
ODD = [
    [{"a": "2020-01-01"}, {"a": "2021-05-06"}],
    [{"a": "2020-01-01 00:00:00"}, {"a": "2021-05-06 12:00:00"}],
    [{"a": "x", "b": 1}, {"a": "y"}, {"b": None, "a": "z", "c": [1]}],
    [{"a": None}, {"a": "y"}],
    [{"a": 1}, {"a": 1.5}, {"a": 2**70}, {"a": -0.0}, {"a": 1e300}],
    [{"a": 1}, {"a": "1"}, {"a": True}],
    [{"a": {"x": 1}}, {"a": {"y": [{}]}}, {"a": []}, {"a": ["x"]}, {"a": "x"}],
    [{"a": "\u2028 \x85 \x0b \x1c \x00 \r \U0001f469"}, {"é": "\ufeff"}],
    [{"a": "\ud800"}, {"a": float("inf")}],
    [{"type": "user", "message": {}}, {"id": "a", "source": "b", "model": "c"}],
]  # fmt: skip


@pytest.mark.parametrize("rows", ODD)
@pytest.mark.parametrize("ascii_only", [True, False])
def test_rows_are_to_the_letter_what_plain_json_gives(
    tmp_path: Path, rows: list[dict[str, object]], ascii_only: bool
) -> None:
    lines = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
    if any("\ud800" in line for line in lines):
        lines = [json.dumps(row) for row in rows]  # half a pair has no UTF-8
    content = "".join(line + "\n" for line in lines).encode()
    plain = [json.loads(line) for line in content.split(b"\n") if line]
    packed = written(tmp_path, gzip.compress(content), "f.jsonl.gz")
    path = zipped(tmp_path / "f.zip", {"data/f.jsonl": content})
    for file in (written(tmp_path, content), packed, DataFile(path, "data/f.jsonl")):
        assert repr(file.rows({})) == repr(plain)
        assert file.sha256 == hashlib.sha256(content).hexdigest()


@pytest.mark.shared_data
def test_real_rows_are_to_the_letter_what_plain_json_gives() -> None:
    paths = [path for path in SHARED.rglob("*.jsonl*") if path.is_file()]
    if not paths:
        pytest.skip(f"{SHARED} is not there")
    for path in paths:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.suffix == ".gz" else content
        plain = [json.loads(line) for line in content.split(b"\n") if line]
        assert repr(DataFile(path).rows({})) == repr(plain), path
        assert DataFile(path).sha256 == hashlib.sha256(content).hexdigest()


def names_of(task: Task) -> tuple[str, str | None, str]:
    """Of the sample ids in order, of the data, and of the files it was read from."""
    samples = task.samples(CharTokenizer(), 0)
    files = [
        sample.meta.get(name, "")
        for sample in samples
        for name in ("data_sha256", "settings_sha256")
    ]
    ids, files_read = (
        hashlib.sha256("".join(texts).encode()).hexdigest()[:16]
        for texts in ([sample.id for sample in samples], files)
    )
    return ids, task.data_fingerprint(), files_read


# As they were when kvarena read the files by itself; with others, no old cell would be found again.
SAMPLE_NAMES = {
    "longbench": ("d3d8df9ad1bbebdd", "d21fb84d4a0526da", "2689ae7c46d829e3"),
    "math500": ("22150a0ef92dcb03", "387e4bf3723849ae", "e3b0c44298fc1c14"),
}


def test_samples_data_and_files_keep_their_names() -> None:
    found = {"longbench": names_of(LongBench(data="sample", max_length=3500))}
    found["math500"] = names_of(Math500(data="sample"))
    assert found == SAMPLE_NAMES


@pytest.mark.shared_data
def test_real_samples_data_and_files_keep_their_names() -> None:
    if not SHARED.is_dir():
        pytest.skip(f"{SHARED} is not there")
    tasks = "multi_news,multifieldqa_zh"
    full = LongBench(data=str(SHARED / "longbench"), tasks=tasks, max_length=3500)
    assert names_of(full) == ("d4247063e9f7e85d", "348ab04c30277437", "e4517d94c3d8908c")
    math = Math500(data=str(SHARED / "math500"))
    assert names_of(math)[:2] == ("3b85c7d55a0ca603", "de89b79689c85b0d")


def test_a_parquet_has_the_rows_of_its_table(tmp_path: Path) -> None:
    rows = [{**row, "more": ["2020-01-01"]} for row in ROWS]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    file = opened(tmp_path / "rows.parquet").rows_file("task")
    assert file.rows(FIELDS) == rows
    assert file.sha256 == hashlib.sha256((tmp_path / "rows.parquet").read_bytes()).hexdigest()
    with pytest.raises(ValueError, match=r"rows\.parquet row 1: field 'text' must be a number"):
        file.rows({"text": ("a number", is_count)})


@pytest.mark.parametrize(
    "name", ["a,b (c) $d=e", "[a]*?{b}", "\"q\" 'r'", "p%20q#r", "~t;!", "汉 é", "c:d"]
)
def test_a_folder_may_have_any_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name / "data").mkdir(parents=True)
    (tmp_path / name / "data" / "task.jsonl").write_bytes(CONTENT)
    zipped(tmp_path / name / "z.zip", {"data/task.jsonl": CONTENT})
    written(tmp_path / name, gzip.compress(CONTENT), "t.jsonl.gz")
    for path in (tmp_path / name, tmp_path / name / "z.zip", tmp_path / name / "t.jsonl.gz"):
        assert opened(path).rows_file("task").rows(FIELDS) == ROWS


def test_a_path_from_here_is_read_like_any_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "a" / "task.jsonl").write_bytes(CONTENT)
    monkeypatch.chdir(tmp_path / "b")
    assert opened(Path("../a")).rows_file("task").rows(FIELDS) == ROWS


def test_reading_leaves_nothing_behind(tmp_path: Path) -> None:
    """In a home that nobody can write, in two processes at once, and without a progress bar."""
    path = zipped(tmp_path / "rows.zip", {"data/task.jsonl": CONTENT})
    home, temporary = tmp_path / "home", tmp_path / "temporary"
    home.mkdir(mode=0o500)
    temporary.mkdir()
    caches = {name: str(home / "cache") for name in ("XDG_CACHE_HOME", "HF_HOME")}
    environment = os.environ | {"HOME": str(home), "TMPDIR": str(temporary), **caches}
    code = f"""
from kvarena.tasks.benchmark.rows import DataFile
from pathlib import Path
print(DataFile(Path({str(path)!r}), "data/task.jsonl").rows({{}}) == {ROWS!a})
"""
    command = [sys.executable, "-c", code]
    running = [
        subprocess.Popen(command, env=environment, stdout=PIPE, stderr=PIPE, text=True)
        for _ in range(2)
    ]
    for process in running:
        assert process.communicate(timeout=120) == ("True\n", "")
    assert list(home.iterdir()) == list(temporary.iterdir()) == []


def test_a_packed_file_is_refused_where_the_locale_would_change_its_text(tmp_path: Path) -> None:
    packed = written(tmp_path, gzip.compress(CONTENT), "f.jsonl.gz")
    environment = os.environ | {
        "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"
    }  # fmt: skip
    code = f"""
from kvarena.tasks.benchmark.rows import DataFile
from pathlib import Path
assert DataFile(Path({str(written(tmp_path, CONTENT).path)!r})).rows({{}}) == {ROWS!a}
try:
    DataFile(Path({str(packed.path)!r})).rows({{}})
except ValueError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120
    )
    told = (
        r"f\.jsonl\.gz is packed and would be read in this locale's encoding, .*: set PYTHONUTF8=1"
    )
    assert re.search(told, done.stdout), done.stderr


def test_datasets_is_imported_when_rows_are_read_and_not_before() -> None:
    code = """
import sys
import kvarena.harness.cells.cell, kvarena.harness.engine, kvarena.harness.bench.sections
from kvarena.harness.registry import build, choices, load_choice
for name in choices("task"):
    build(load_choice("task", name))
assert "datasets" not in sys.modules
from kvarena.tasks.math500 import Math500
Math500(data="sample").data_fingerprint()
assert "datasets" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_settings_are_found_beside_the_rows_in_config_or_one_level_up(tmp_path: Path) -> None:
    for place in ("lb/rows/s.json", "lb/rows/config/s.json", "lb/s.json", "lb/config/s.json"):
        root = tmp_path / place.replace("/", "-")
        (root / "lb" / "rows").mkdir(parents=True)
        (root / place).parent.mkdir(exist_ok=True)
        (root / place).write_text('{"a": 1}')
        assert opened(root / "lb" / "rows").settings_file("s.json").mapping() == {"a": 1}


def test_settings_of_a_zip_are_inside_or_beside_it(tmp_path: Path) -> None:
    inside = zipped(tmp_path / "inside.zip", {"lb/s.json": b'{"a": 1}'})
    bare = zipped(tmp_path / "bare.zip", {"x.jsonl": b"{}"})
    assert opened(inside).settings_file("s.json").mapping() == {"a": 1}
    with pytest.raises(ValueError, match=r"no s\.json in .*bare\.zip"):
        opened(bare).settings_file("s.json")
    (tmp_path / "s.json").write_text('{"a": 2}')
    assert opened(bare).settings_file("s.json").mapping() == {"a": 2}
    assert opened(inside).settings_file("s.json").mapping() == {"a": 1}


def test_rows_are_never_taken_from_one_level_up(tmp_path: Path) -> None:
    (tmp_path / "task.jsonl").write_bytes(CONTENT)
    (tmp_path / "mini").mkdir()
    with pytest.raises(ValueError, match=r"no task\.jsonl or task\.jsonl\.gz in .*mini$"):
        opened(tmp_path / "mini").rows_file("task")


def test_a_label_has_no_machine_path(packings: list[Path]) -> None:
    labels = [opened(path).label for path in packings]
    assert labels[:4] == ["folder:a", "folder:b", "folder:c", "folder:d"]
    assert labels[4:6] == ["zip:e.zip", "zip:f.zip"]
    assert labels[6:] == ["file:rows.jsonl", "file:rows.jsonl.gz"]


def test_the_sample_comes_with_the_package() -> None:
    source = open_source("sample", "longbench", no_hub, WAYS)
    assert source.label == "sample"
    assert len(source.rows_file("qasper").rows({})) == 2


# ---- what is refused ----


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", r"f\.jsonl line 2 is not JSON"),
        (b"[1]", r"f\.jsonl line 2 must be a JSON object, got \[1\]"),
        (b"null", r"f\.jsonl line 2 must be a JSON object, got null"),
        (b'{"text": "a"}', r"f\.jsonl line 2 lacks the field 'num', which must be a whole number"),
        (b'{"num": 1, "text": null}', r"f\.jsonl line 2: field 'text' must be a text, got null"),
        (b'{"num": 1, "text": 5}', r"f\.jsonl line 2: field 'text' must be a text, got 5"),
        (b'{"num": 1, "text": "\\ud800"}', r"f\.jsonl line 2: field 'text' must be a text, got "),
        (
            b'{"num": -1, "text": ""}',
            r"f\.jsonl line 2: field 'num' must be a whole number, got -1",
        ),
        (
            b'{"num": true, "text": ""}',
            r"f\.jsonl line 2: field 'num' must be a whole number, got true",
        ),
        (b'{"num": "1", "text": ""}', r"f\.jsonl line 2: field 'num' must be a whole number, got "),
    ],
)
def test_a_bad_row_is_named_by_file_line_and_field(
    tmp_path: Path, line: bytes, message: str
) -> None:
    file = written(tmp_path, CONTENT.split(b"\n")[0] + b"\n" + line + b"\n")
    with pytest.raises(ValueError, match=message):
        file.rows(FIELDS)


def test_text_that_is_not_utf_8_is_refused_by_name(tmp_path: Path) -> None:
    packed = written(tmp_path, gzip.compress(CONTENT + b"\xff\n"), "g.jsonl.gz")
    for file in (written(tmp_path, CONTENT + b'{"text": "\xff"}'), packed):
        with pytest.raises(ValueError, match=r"[fg]\.jsonl.* cannot be read as text \(Unicode"):
            file.rows(FIELDS)


def test_a_long_bad_value_is_shortened(tmp_path: Path) -> None:
    file = written(tmp_path, json.dumps({"num": "x" * 10**6}).encode())
    with pytest.raises(ValueError, match=r"got \"x{56}\.\.\.$"):
        file.rows({"num": FIELDS["num"]})


@pytest.mark.parametrize("value", [[], "a", None, ["a", 1], ["\ud800"]])
def test_texts_are_a_list_of_at_least_one_text(value: object) -> None:
    assert not is_texts(value)
    assert is_texts(["a", ""])


@pytest.mark.parametrize("content", [b"", b"\n \n"])
def test_an_empty_file_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ValueError, match=r"f\.jsonl has no rows"):
        written(tmp_path, content).rows(FIELDS)


@pytest.mark.parametrize("content", [b"[]", b"{", b"\xff"])
def test_settings_that_are_no_object_are_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ValueError, match=r"/s\.json "):
        written(tmp_path, content, "s.json").mapping()


def test_two_files_for_one_task_are_refused(tmp_path: Path) -> None:
    (tmp_path / "task.jsonl").write_bytes(CONTENT)
    (tmp_path / "task.jsonl.gz").write_bytes(gzip.compress(CONTENT))
    with pytest.raises(ValueError, match=r"keep one of .*task\.jsonl and .*task\.jsonl\.gz"):
        opened(tmp_path).rows_file("task")
    double = zipped(tmp_path / "double.zip", {"a/task.jsonl": CONTENT, "b/task.jsonl": CONTENT})
    with pytest.raises(ValueError, match=r"keep one of .*a/task\.jsonl and .*b/task\.jsonl"):
        opened(double).rows_file("task")


def test_a_file_cut_short_is_named(tmp_path: Path) -> None:
    (tmp_path / "task.jsonl.gz").write_bytes(gzip.compress(CONTENT)[:-9])
    with pytest.raises(ValueError, match=r"task\.jsonl\.gz cannot be read as text \(EOFError"):
        opened(tmp_path).rows_file("task").rows(FIELDS)
    path = zipped(tmp_path / "damaged.zip", {"task.jsonl": CONTENT})
    path.write_bytes(
        path.read_bytes().replace(b"task.jsonl", b"task.jsonl", 1)[:35]
        + b"\0" * 9
        + path.read_bytes()[44:]
    )
    with pytest.raises(ValueError, match=r"damaged\.zip:task\.jsonl cannot be read as text \("):
        opened(path).rows_file("task").rows(FIELDS)


def test_a_file_that_is_packed_twice_is_refused(tmp_path: Path) -> None:
    path = zipped(tmp_path / "z.zip", {"task.jsonl.gz": gzip.compress(CONTENT)})
    with pytest.raises(ValueError, match=r"z\.zip:task\.jsonl\.gz is packed twice; unpack the zip"):
        opened(path).rows_file("task").rows(FIELDS)


def test_what_is_no_source_is_refused_with_every_way(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("text")
    for data, reason in [
        ("hub", "no network here"),
        (str(tmp_path / "nowhere"), "there is no such path"),
        (
            str(tmp_path / "text.txt"),
            "not a folder, not a zip and not a .jsonl, .jsonl.gz, .parquet file",
        ),
    ]:
        with pytest.raises(ValueError, match=reason) as refusal:
            open_source(data, "benchmark", no_hub, WAYS)
        assert str(refusal.value) == f"data {data!r} cannot be read: {reason}. {WAYS}"


# ---- the web; for the hub see test_hub.py ----


def web_file(content: bytes, monkeypatch: pytest.MonkeyPatch, answer: bytes | None) -> WebFile:
    """A file pinned to ``content`` on a web that answers ``answer``, or not at all."""

    def urlopen(url: str, timeout: float) -> io.BytesIO:
        assert url == "https://example.org/0a1b/s.json"
        if answer is None:
            raise OSError("no network")
        return io.BytesIO(answer)

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    return WebFile("https://example.org/0a1b/s.json", hashlib.sha256(content).hexdigest())


def test_a_web_file_is_downloaded_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    assert web_file(b"{}", monkeypatch, b"{}").fetch(tmp_path).read_bytes() == b"{}"
    assert web_file(b"{}", monkeypatch, None).fetch(tmp_path).read_bytes() == b"{}"
    assert [path.name for path in tmp_path.iterdir()] == ["s.json"]


def test_offline_no_request_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(OSError, match="HF_HUB_OFFLINE is set"):
        web_file(b"{}", monkeypatch, b"{}").fetch(tmp_path)


def test_a_file_that_is_not_the_pinned_one_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    with pytest.raises(ValueError, match=r"s\.json has sha256 .*, pinned is .*; delete it"):
        web_file(b"{}", monkeypatch, b"{ }").fetch(tmp_path)


def test_the_samples_are_small() -> None:
    sizes = [path.stat().st_size for path in source.SAMPLE_FOLDER.rglob("*.json*")]
    assert sum(sizes) < 400_000
