"""Benchmark data: every packing gives the same rows, and what is wrong is named where it is."""

import gzip
import hashlib
import io
import json
import urllib.request
import zipfile
from pathlib import Path

import pytest

from kvarena.tasks import benchmark_data
from kvarena.tasks.benchmark_data import Source, open_source
from kvarena.tasks.benchmark_downloads import HubFile, WebFile
from kvarena.tasks.benchmark_rows import DataFile, is_count, is_text, is_texts

FIELDS = {"text": ("a text", is_text), "num": ("a whole number", is_count)}
ROWS = [{"text": "línea 1\u2028still line 1", "num": 1}, {"text": "", "num": 2}]
CONTENT = b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in ROWS)
WAYS = "Ways to get it: ask."


def no_hub() -> Source:
    raise OSError("no network\n here")


def opened(path: Path) -> Source:
    return open_source(str(path), "benchmark", no_hub, WAYS)


def zipped(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


@pytest.fixture
def packings(tmp_path: Path) -> list[Path]:
    """The same rows in folders, with data/ and gzip, in zips of three layouts, and as two files."""
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
        zipped(tmp_path / "g.zip", {"any/where/task.jsonl.gz": packed}),
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


def test_lines_end_at_newlines_only_and_blank_ones_are_left_out() -> None:
    content = b"\xef\xbb\xbf" + CONTENT.replace(b"\n", b"\r\n\n") + b"  \n"
    assert DataFile("f", content).rows(FIELDS) == ROWS


def test_fields_that_nobody_asked_for_stay() -> None:
    assert DataFile("f", b'{"more": [1], "num": 3}').rows({"num": FIELDS["num"]}) == [
        {"more": [1], "num": 3}
    ]


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
    assert labels[4:7] == ["zip:e.zip", "zip:f.zip", "zip:g.zip"]
    assert labels[7:] == ["file:rows.jsonl", "file:rows.jsonl.gz"]


def test_the_sample_comes_with_the_package() -> None:
    source = open_source("sample", "longbench", no_hub, WAYS)
    assert source.label == "sample"
    assert len(source.rows_file("qasper").rows({})) == 2


# ---- what is refused ----


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{", "f line 2 is not JSON in UTF-8"),
        (b'{"text": "\xff"}', "f line 2 is not JSON in UTF-8"),
        (b"[1]", r"f line 2 must be a JSON object, got \[1\]"),
        (b"null", "f line 2 must be a JSON object, got null"),
        (b'{"text": "a"}', "f line 2 lacks the field 'num', which must be a whole number"),
        (b'{"num": 1, "text": null}', "f line 2: field 'text' must be a text, got null"),
        (b'{"num": 1, "text": 5}', "f line 2: field 'text' must be a text, got 5"),
        (b'{"num": 1, "text": "\\ud800"}', "f line 2: field 'text' must be a text, got "),
        (b'{"num": -1, "text": ""}', "f line 2: field 'num' must be a whole number, got -1"),
        (b'{"num": true, "text": ""}', "f line 2: field 'num' must be a whole number, got true"),
        (b'{"num": "1", "text": ""}', "f line 2: field 'num' must be a whole number, got "),
    ],
)
def test_a_bad_row_is_named_by_file_line_and_field(line: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DataFile("f", CONTENT.split(b"\n")[0] + b"\n" + line + b"\n").rows(FIELDS)


def test_a_long_bad_value_is_shortened() -> None:
    with pytest.raises(ValueError, match=r"got \"x{56}\.\.\.$"):
        DataFile("f", json.dumps({"num": "x" * 10**6}).encode()).rows({"num": FIELDS["num"]})


@pytest.mark.parametrize("value", [[], "a", None, ["a", 1], ["\ud800"]])
def test_texts_are_a_list_of_at_least_one_text(value: object) -> None:
    assert not is_texts(value)
    assert is_texts(["a", ""])


def test_an_empty_file_is_refused() -> None:
    with pytest.raises(ValueError, match="f has no rows"):
        DataFile("f", b"\n \n").rows(FIELDS)


@pytest.mark.parametrize("content", [b"[]", b"{", b"\xff"])
def test_settings_that_are_no_object_are_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"^s\.json "):
        DataFile("s.json", content).mapping()


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
    with pytest.raises(ValueError, match=r"task\.jsonl\.gz is not a whole gzip file"):
        opened(tmp_path).rows_file("task")
    path = zipped(tmp_path / "damaged.zip", {"task.jsonl": CONTENT})
    path.write_bytes(
        path.read_bytes().replace(b"task.jsonl", b"task.jsonl", 1)[:35]
        + b"\0" * 9
        + path.read_bytes()[44:]
    )
    with pytest.raises(ValueError, match=r"damaged\.zip:task\.jsonl is damaged"):
        opened(path).rows_file("task")


def test_what_is_no_source_is_refused_with_every_way(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("text")
    for data, reason in [
        ("hub", "no network here"),
        (str(tmp_path / "nowhere"), "there is no such path"),
        (str(tmp_path / "text.txt"), "not a folder, not a zip and not a .jsonl or .jsonl.gz file"),
    ]:
        with pytest.raises(ValueError, match=reason) as refusal:
            open_source(data, "benchmark", no_hub, WAYS)
        assert str(refusal.value) == f"data {data!r} cannot be read: {reason}. {WAYS}"


# ---- the hub and the web ----


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


def test_a_hub_file_is_asked_for_at_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    (tmp_path / "data.zip").write_bytes(b"zip")

    def download(*arguments: str, **options: str) -> str:
        asked.append((arguments, options))
        return str(tmp_path / "data.zip")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    pinned = {"repo": "org/set", "revision": "0a1b", "name": "data.zip"}
    file = HubFile(**pinned, sha256=hashlib.sha256(b"zip").hexdigest())
    assert file.fetch() == tmp_path / "data.zip"
    assert asked == [(("org/set", "data.zip"), {"repo_type": "dataset", "revision": "0a1b"})]
    with pytest.raises(ValueError, match="pinned is 00; delete it"):
        HubFile(**pinned, sha256="00").fetch()


def test_offline_the_hub_has_nothing_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(OSError):  # noqa: PT011  (whatever subclass the hub has for it)
        HubFile("org/set", "0" * 40, "data.zip", "00").fetch()


def test_the_samples_are_small() -> None:
    sizes = [path.stat().st_size for path in benchmark_data.SAMPLE_FOLDER.rglob("*.json*")]
    assert sum(sizes) < 400_000
