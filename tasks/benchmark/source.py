"""Finding benchmark data. None of it is ever copied into kvarena.

A source is a folder, a zip, one file, or the sample that comes with kvarena; the hub's files are
downloaded to its cache and read from there.
"""

import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvarena.harness.column import Column
from kvarena.tasks.benchmark.rows import DataFile

READ_FROM = Column("meta_data", str, "", "where the rows were read")
ROWS_SHA256 = Column("meta_data_sha256", str, "16 digits", "of the file with the rows")
SAMPLE_FOLDER = Path(__file__).parents[1] / "sample_data"
ROW_FOLDERS = (".", "data")
ROW_SUFFIXES = (".jsonl", ".jsonl.gz", ".parquet")
# Templates and lengths often lie beside the folder of rows; rows are only looked for inside it, as
# one level up may be another version of the same task.
SETTINGS_FOLDERS = (".", "config", "..", "../config")


@dataclass(frozen=True)
class Source:
    """A folder or a zip with data.

    label: what result rows say about it, without a machine's paths. settings_path: the folder of
    the settings files if they are not with the rows. file_name: the one file of the folder that was
    named; it has the rows, whatever it is called.
    """

    label: str
    path: Path
    settings_path: Path | None = None
    file_name: str | None = None

    def rows_file(self, stem: str, hub_name: str = "") -> DataFile:
        """``<stem>.jsonl`` or ``.jsonl.gz``, or under the hub's name, with its folder or without.

        Raises ValueError when there is none, or two.
        """
        jsonl, hub = f"{stem}.jsonl", hub_name or f"{stem}.jsonl"
        names = list(dict.fromkeys([jsonl, f"{jsonl}.gz", hub, hub.rpartition("/")[2]]))
        names = [self.file_name] if self.file_name else names
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
    """The source that ``data`` names: hub, sample, or a folder, a zip or a file of rows.

    ways: every way to get the data, for the ValueError that is raised when it cannot be had.
    """
    if data == "sample":
        return Source("sample", SAMPLE_FOLDER / benchmark)
    try:
        return open_hub() if data == "hub" else _open_path(Path(data).expanduser())
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"data {data!r} cannot be read: {reason}. {ways}") from error


def _open_path(path: Path) -> Source:
    if path.is_dir():
        return Source(f"folder:{path.resolve().name}", path)
    if zipfile.is_zipfile(path):
        return Source(f"zip:{path.name}", path)
    if path.is_file() and path.name.endswith(ROW_SUFFIXES):
        return Source(f"file:{path.name}", path.parent, file_name=path.name)
    refused = f"not a folder, not a zip and not a {', '.join(ROW_SUFFIXES)} file"
    raise ValueError(refused if path.exists() else "there is no such path")


def _in_folder(path: Path, names: Sequence[str], folders: Sequence[str]) -> list[DataFile]:
    for folder in folders:
        found = [path / folder / name for name in names if (path / folder / name).is_file()]
        if found:
            return [DataFile(file) for file in found]
    return []


def _in_zip(path: Path, names: Sequence[str]) -> list[DataFile]:
    """Members of these names in whatever folder of the zip: LongBench's has data/, others none."""
    with zipfile.ZipFile(path) as archive:
        members = archive.namelist()
    return [
        DataFile(path, member)
        for member in members
        if member.rpartition("/")[2] in names and not member.startswith("__MACOSX/")
    ]


def _only(found: Sequence[DataFile], names: Sequence[str], where: str) -> DataFile:
    if not found:
        raise ValueError(f"no {' or '.join(names)} in {where}")
    if len(found) > 1:
        raise ValueError(f"keep one of {' and '.join(file.name for file in found)}")
    return found[0]
