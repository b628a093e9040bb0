"""Short hashes of what settings only point to: code of a policy or codec, files of a model.

They are part of a cell's identity, so an edited policy or a retrained model in the same folder can
never find the rows of the old one.
"""

import hashlib
import inspect
from pathlib import Path

from kvarena.codecs.base import Codec
from kvarena.harness import models
from kvarena.harness.models import ModelSpec
from kvarena.policies.base import Policy

_SAMPLED_BYTES, _NUM_SAMPLED = 65536, 16
_WEIGHTS = {".safetensors", ".bin", ".pt", ".gguf"}
_TEXTS = {".json", ".jinja", ".txt", ".model", ".py"}


def code_fingerprint(chosen: Policy | Codec, base: type) -> str:
    """Of the files that define the class of a policy or codec and its parents below ``base``.

    The files that a policy's options name, such as trained weights, count as well.
    """
    files = {inspect.getfile(kind) for kind in type(chosen).__mro__[: -len(base.__mro__)]}
    named = [getattr(chosen, option) for option in getattr(chosen, "file_options", ())]
    return _digest(*(Path(file).read_bytes() for file in [*sorted(files), *named]))


def model_fingerprint(spec: ModelSpec) -> str:
    """Of a folder's files, or the commit of a hub id ("unknown" if the cache does not tell).

    Weights are sampled at 16 places of 64 KiB: training changes nearly all of a file, and reading
    all of a large model before every run would take longer than many runs.
    """
    place = models.locate(spec)
    if spec.is_packaged:  # its folder is named after the hash of the packaged file
        return Path(place).name.rpartition("-")[2]
    if not Path(place).is_dir():
        return getattr(models.load_config(spec), "_commit_hash", None) or "unknown"
    parts = []
    for path in sorted(Path(place).iterdir()):
        if path.suffix in _WEIGHTS:
            parts += [path.name.encode(), *_sampled(path)]
        elif path.suffix in _TEXTS:
            parts += [path.name.encode(), path.read_bytes()]
    return _digest(*parts)


def _sampled(path: Path) -> list[bytes]:
    """The size of a file and bytes from evenly spread places, its first and last among them."""
    size = path.stat().st_size
    last = max(0, size - _SAMPLED_BYTES)
    pieces = [str(size).encode()]
    with path.open("rb") as stream:
        for number in range(_NUM_SAMPLED):
            stream.seek(last * number // (_NUM_SAMPLED - 1))
            pieces.append(stream.read(_SAMPLED_BYTES))
    return pieces


def _digest(*parts: bytes) -> str:
    whole = hashlib.sha256()
    for part in parts:
        whole.update(hashlib.sha256(part).digest())
    return whole.hexdigest()[:16]
