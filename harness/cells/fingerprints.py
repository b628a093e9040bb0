"""Short hashes of what settings only point to: code of a policy, codec or shape, files of a model.

They are part of a cell's identity, so an edited policy or a retrained model in the same folder can
never find the rows of the old one.
"""

import ast
import hashlib
import importlib.util
import inspect
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from kvarena.codecs.base import Codec
from kvarena.harness.errors import UsageError
from kvarena.harness.models import ModelSpec, loading
from kvarena.policies.base import Policy
from kvarena.shapes.base import Shape

_SAMPLED_BYTES, _NUM_SAMPLED = 65536, 16
_WEIGHTS = {".safetensors", ".bin", ".pt", ".gguf"}
_TEXTS = {".json", ".jinja", ".txt", ".model", ".py"}


def code_fingerprint(chosen: Policy | Codec | Shape, base: type) -> str:
    """Of the files that define the class of a plug-in, and of what they import of kvarena.

    The files that a policy's options name (``file_options``), such as trained weights, count as
    well. Raises UsageError for one that cannot be read; what to do then says ``if_missing`` in the
    metadata of the option's field.
    """
    found: set[Path] = set()
    for kind in type(chosen).__mro__[: 1 - len(base.__mro__)]:
        _add_imported(Path(inspect.getfile(kind)), found)
    # By name within kvarena, so that one code has one hash wherever it is installed.
    files = sorted(found, key=lambda path: path.parts[-2:])
    named = [_named_file(chosen, option) for option in getattr(chosen, "file_options", ())]
    return _digest(*(path.read_bytes() for path in files), *named)


def _named_file(chosen: Policy | Codec | Shape, option: str) -> bytes:
    path = getattr(chosen, option)
    try:
        return Path(path).read_bytes()
    except OSError as error:
        (declared,) = (field for field in fields(chosen) if field.name == option)
        advice = declared.metadata.get("if_missing", "name a file that can be read")
        raise UsageError(
            f"{type(chosen).__name__}: {option}: cannot read {path!r} ({error.strerror}); {advice}"
        ) from error


def _add_imported(path: Path, found: set[Path]) -> None:
    """Add a file of Python and all files of kvarena that it imports, directly or through others."""
    if path in found:
        return
    found.add(path)
    for module in _imported_modules(path):
        spec = importlib.util.find_spec(module)
        if spec is not None and spec.origin is not None:
            _add_imported(Path(spec.origin), found)


def _imported_modules(path: Path) -> Iterator[str]:
    """Names of kvarena's modules in a file's import statements, wherever they stand."""
    for node in ast.walk(ast.parse(path.read_bytes())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            # ``from package import name`` may name a module, whose package must exist to be asked.
            children = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [node.module, *filter(_is_module, children)]
        yield from (name for name in names if name.startswith("kvarena."))


def _is_module(name: str) -> bool:
    try:
        return name.startswith("kvarena.") and importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # its parent is a module, so it names what stands in that
        return False


def model_fingerprint(spec: ModelSpec) -> str:
    """Of a folder's files, or the commit of a hub id ("unknown" if the cache does not tell).

    Weights are sampled at 16 places of 64 KiB: training changes nearly all of a file, and reading
    all of a large model before every run would take longer than many runs.
    """
    place = loading.locate(spec)
    if spec.is_packaged:  # its folder is named after the hash of the packaged file
        return Path(place).name.rpartition("-")[2]
    if not Path(place).is_dir():
        return getattr(loading.load_config(spec), "_commit_hash", None) or "unknown"
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
