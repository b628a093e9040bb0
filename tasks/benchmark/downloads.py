"""Files that are downloaded on first use, pinned to a commit and checked against a SHA-256."""

import hashlib
import os
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class HubFile:
    """A file of a data set on the hub at one commit, with the SHA-256 of its bytes."""

    repo: str
    revision: str
    name: str
    sha256: str

    def fetch(self) -> Path:
        """Path in the hub's cache, where ``datasets`` puts it on first use.

        What is there already needs no network. Raises OSError at once when the hub cannot be
        reached, and ValueError when it is not the file that was pinned.
        """
        from huggingface_hub import try_to_load_from_cache

        cached = try_to_load_from_cache(
            self.repo, self.name, revision=self.revision, repo_type="dataset"
        )
        return _pinned(Path(cached if isinstance(cached, str) else self._download()), self.sha256)

    def _download(self) -> str:
        from datasets import DownloadConfig, DownloadManager

        # This address is asked for before the file is, and not again when there is no answer;
        # the hub's own download would try for half a minute.
        address = f"hf://datasets/{self.repo}@{self.revision}/{self.name}"
        with _no_bars():
            manager = DownloadManager(download_config=DownloadConfig(disable_tqdm=True))
            try:
                return manager.download(address)
            except Exception as error:  # of the hub's http client, which changes between releases
                raise OSError(f"{type(error).__name__}: {error}") from error


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


@contextmanager
def _no_bars() -> Iterator[None]:
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    were_off = are_progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not were_off:
            enable_progress_bars()


def _pinned(path: Path, sha256: str) -> Path:
    with path.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != sha256:
        raise ValueError(f"{path} has sha256 {found}, pinned is {sha256}; delete it and try again")
    return path
