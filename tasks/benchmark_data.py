"""Finding, reading and checking benchmark data. None of it is ever copied into kvarena.

A source is a folder, a zip, or the sample that comes with kvarena; the hub's files are downloaded
to its cache and read from there. Rows are in a ``.jsonl`` or ``.jsonl.gz``; the checksum is that of
the uncompressed bytes, so the same rows have the same one in every packing.
"""

import gzip
import hashlib
import json
import os
import re
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

SAMPLE_FOLDER = Path(__file__).parent / "sample_data"
ROW_FOLDERS = (".", "data")
# Templates and lengths often lie beside the folder of rows; rows are only looked for inside it, as
# one level up may be another version of the same task.
SETTINGS_FOLDERS = (".", "config", "..", "../config")

SURROGATE = re.compile("[\ud800-\udfff]")

# Any: a value as it came out of JSON.
Row = dict[str, Any]
# What a field must be, in words, and the test for it.
Field = tuple[str, Callable[[Any], bool]]


def is_text(value: Any) -> TypeGuard[str]:
    """A string that can be written as UTF-8, which a lone surrogate in it would prevent."""
    return isinstance(value, str) and not SURROGATE.search(value)


def is_texts(value: Any) -> bool:
    """A list of at least one text."""
    return isinstance(value, list) and len(value) > 0 and all(map(is_text, value))


def is_count(value: Any) -> bool:
    """A whole number from 0 on."""
    return type(value) is int and value >= 0


@dataclass(frozen=True)
class DataFile:
    """name: what messages call it. content: uncompressed bytes."""

    name: str
    content: bytes

    @property
    def sha256(self) -> str:
        """Checksum of the content."""
        return hashlib.sha256(self.content).hexdigest()

    def rows(self, fields: Mapping[str, Field]) -> list[Row]:
        """All rows of a jsonl file; blank lines are left out.

        Raises ValueError that names file, line and field for a row that lacks one of ``fields``
        or has a wrong value in it, and for a file without rows.
        """
        rows = []
        # Not splitlines(): U+2028 and others inside a text are no line ends.
        for number, line in enumerate(self.content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
            if line.strip():
                rows.append(_checked_row(f"{self.name} line {number}", line, fields))
        if not rows:
            raise ValueError(f"{self.name} has no rows")
        return rows

    def mapping(self) -> Row:
        """The one JSON object of the file. Raises ValueError that names the file."""
        value = _parsed(self.name, self.content)
        if not isinstance(value, dict):
            raise ValueError(f"{self.name} must hold one JSON object, got {_short(value)}")
        return value


@dataclass(frozen=True)
class Source:
    """A folder or a zip with data.

    label: what result rows say about it, without a machine's paths. settings_path: the folder of
    the settings files if they are not with the rows.
    """

    label: str
    path: Path
    settings_path: Path | None = None

    def rows_file(self, stem: str) -> DataFile:
        """``<stem>.jsonl`` or ``.jsonl.gz``. Raises ValueError when there is none, or two."""
        names = [f"{stem}.jsonl", f"{stem}.jsonl.gz"]
        found = (
            _in_folder(self.path, names, ROW_FOLDERS)
            if self.path.is_dir()
            else _in_zip(self.path, names)
        )
        return _only(found, names, str(self.path))

    def settings_file(self, name: str) -> DataFile:
        """A JSON file beside the rows, in ``config/`` or one level up. Raises as above."""
        if self.settings_path:
            found = _in_folder(self.settings_path, [name], (".",))
        elif self.path.is_dir():
            found = _in_folder(self.path, [name], SETTINGS_FOLDERS)
        else:
            beside = (".", "config")
            found = _in_zip(self.path, [name]) or _in_folder(self.path.parent, [name], beside)
        return _only(found, [name], f"{self.path}, its config folder or one level up")


def open_source(data: str, benchmark: str, open_hub: Callable[[], Source], ways: str) -> Source:
    """The source that ``data`` names: hub, sample, or a folder or zip.

    ways: every way to get the data, for the ValueError that is raised when it cannot be had.
    """
    if data == "sample":
        return Source("sample", SAMPLE_FOLDER / benchmark)
    try:
        return open_hub() if data == "hub" else _open_path(Path(data).expanduser())
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"data {data!r} cannot be read: {reason}. {ways}") from error


@dataclass(frozen=True)
class HubFile:
    """A file on the hub at one commit, with the SHA-256 of its bytes."""

    repo: str
    revision: str
    name: str
    sha256: str

    def fetch(self) -> Path:
        """Path in the hub's cache, downloaded on first use.

        Raises OSError when it cannot be had and ValueError when it is not the file that was pinned.
        """
        from huggingface_hub import hf_hub_download

        path = hf_hub_download(self.repo, self.name, repo_type="dataset", revision=self.revision)
        return _pinned(Path(path), self.sha256)


@dataclass(frozen=True)
class WebFile:
    """A file at a URL that names a commit, with the SHA-256 of its bytes."""

    url: str
    sha256: str

    def fetch(self, folder: Path) -> Path:
        """Path in ``folder``, downloaded on first use. Raises as ``HubFile.fetch`` does."""
        path = folder / self.url.rpartition("/")[2]
        if not path.exists():
            if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
                raise OSError("HF_HUB_OFFLINE is set")
            with urllib.request.urlopen(self.url, timeout=30) as answer:
                content = answer.read()
            partial = path.with_name(f"{path.name}.{os.getpid()}")
            partial.write_bytes(content)
            partial.replace(path)
        return _pinned(path, self.sha256)


def _pinned(path: Path, sha256: str) -> Path:
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != sha256:
        raise ValueError(f"{path} has sha256 {found}, pinned is {sha256}; delete it and try again")
    return path


def _open_path(path: Path) -> Source:
    if path.is_dir():
        return Source(f"folder:{path.resolve().name}", path)
    if zipfile.is_zipfile(path):
        return Source(f"zip:{path.name}", path)
    raise ValueError("not a folder and not a zip" if path.exists() else "there is no such path")


def _in_folder(path: Path, names: Sequence[str], folders: Sequence[str]) -> list[DataFile]:
    for folder in folders:
        found = [path / folder / name for name in names if (path / folder / name).is_file()]
        if found:
            return [DataFile(str(file), _unpacked(str(file), file.read_bytes())) for file in found]
    return []


def _in_zip(path: Path, names: Sequence[str]) -> list[DataFile]:
    """Members of these names in whatever folder of the zip: LongBench's has data/, others none."""
    found = []
    with zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            if member.rpartition("/")[2] in names and not member.startswith("__MACOSX/"):
                name = f"{path}:{member}"
                try:
                    content = archive.read(member)
                except (zipfile.BadZipFile, zlib.error) as error:
                    raise ValueError(f"{name} is damaged ({error})") from error
                found.append(DataFile(name, _unpacked(name, content)))
    return found


def _only(found: Sequence[DataFile], names: Sequence[str], where: str) -> DataFile:
    if not found:
        raise ValueError(f"no {' or '.join(names)} in {where}")
    if len(found) > 1:
        raise ValueError(f"keep one of {' and '.join(file.name for file in found)}")
    return found[0]


def _unpacked(name: str, content: bytes) -> bytes:
    if not name.endswith(".gz"):
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{name} is not a whole gzip file ({error})") from error


def _checked_row(where: str, line: bytes, fields: Mapping[str, Field]) -> Row:
    row = _parsed(where, line)
    if not isinstance(row, dict):
        raise ValueError(f"{where} must be a JSON object, got {_short(row)}")
    for name, (meaning, is_good) in fields.items():
        if name not in row:
            raise ValueError(f"{where} lacks the field {name!r}, which must be {meaning}")
        if not is_good(row[name]):
            raise ValueError(f"{where}: field {name!r} must be {meaning}, got {_short(row[name])}")
    return row


def _parsed(where: str, content: bytes) -> Any:  # Any: JSON
    try:
        return json.loads(content.decode("utf-8-sig"))
    except ValueError as error:
        raise ValueError(f"{where} is not JSON in UTF-8 ({error})") from error


def _short(value: Any) -> str:  # Any: JSON
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
