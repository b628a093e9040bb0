"""Files that are downloaded on first use, pinned to a commit and checked against a SHA-256."""

import hashlib
import os
import urllib.request
from dataclasses import dataclass
from pathlib import Path


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
