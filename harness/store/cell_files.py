"""What lies in the folders of cells, only read: manifest and status; rows are in row_files.py."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvarena.harness.errors import UsageError
from kvarena.harness.files import read_json
from kvarena.harness.store.row_files import ROW_FILES

_MOST_SAMPLES = 10**9  # a number above it in status.json was never written by kvarena


def read_status(cell_path: Path) -> dict[str, Any]:
    """state, num_planned, num_in_plan, counts, updated of a cell; empty if nothing is noted.

    ``identity`` of a cell that is only planned. What a shard noted last counts, and the most
    samples that any wanted. Values that kvarena cannot have written are left out.
    """
    found = [read_json(path) for path in sorted(cell_path.glob("status*.json"))]
    sound = [
        {name: value for name, value in noted.items() if _is_sound(name, value)}
        for noted in found
        if isinstance(noted, dict)
    ]
    merged: dict[str, Any] = {}
    for noted in sorted(sound, key=lambda noted: noted.get("updated", "")):
        for name in {"num_planned", "num_in_plan"} & noted.keys():
            noted[name] = max(noted[name], merged.get(name, 0))
        merged |= noted
    return merged


def _is_sound(name: str, value: Any) -> bool:  # Any: a JSON value
    """Whether a value of status.json is of the kind that its name says."""
    if name in ("num_planned", "num_in_plan"):
        return type(value) is int and 0 <= value <= _MOST_SAMPLES
    if name == "identity":
        return _is_identity(value)
    return isinstance(value, str) if name in ("state", "updated") else True


def find_cells(results_dir: Path) -> list[Path]:
    """Folders of all cells below ``results_dir`` that have rows."""
    cells = results_dir / "runs"
    return sorted({path.parent for name in ROW_FILES for path in cells.glob(f"*/*/*/{name}")})


def read_manifest(cell_path: Path) -> dict[str, Any]:
    """Raises UsageError for a folder that is not a cell's, or whose manifest is damaged."""
    path = cell_path / "manifest.json"
    if not os.path.exists(path):
        raise UsageError(f"{cell_path} has rows but no manifest.json; move the folder away")
    manifest = read_json(path)
    if not isinstance(manifest, dict) or not _is_manifest(manifest):
        raise UsageError(f"{path} is damaged; move the folder away")
    return manifest


def _is_manifest(value: Mapping[str, Any]) -> bool:  # Any: JSON values
    """Whether it has an identity, and its provenance, as far as there is any, has its shape."""
    kinds = {"argv": list, "git": dict, "machine": dict, "packages": dict}
    if not all(isinstance(value.get(name, kind()), kind) for name, kind in kinds.items()):
        return False
    git = value.get("git")
    return _is_identity(value.get("identity")) and (not git or isinstance(git.get("commit"), str))


def _is_identity(value: Any) -> bool:  # Any: a JSON value
    """Whether it says what every version of kvarena says of a cell."""
    if not isinstance(value, dict):
        return False
    named = [value.get(kind) for kind in ("task", "model", "policy", "budget")]
    return isinstance(value.get("content", {}), dict) and all(
        isinstance(one, dict) and isinstance(one.get("name"), str)
        for one in [*named, value.get("codec", {"name": "none"})]
    )


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name."""
    result: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            result |= flat(value, f"{prefix}{key}.")
        else:
            result[f"{prefix}{key}"] = value
    return result
