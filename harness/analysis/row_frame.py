"""Tidy rows of several cells in one frame, one line per sample."""

from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from kvarena.harness.analysis.cell_labels import policy_labels, variants
from kvarena.harness.store.cell_files import read_manifest, read_status
from kvarena.harness.store.row_files import codecs_used, read_lines, read_sample_ids

_TEXTS = ("budget", "variant", "part")  # empty ones would come back as not-a-number
_OF_BENCHMARKS = ("prediction", "reference", "references", "meta_all_classes")


def read_rows(
    cell_paths: Iterable[Path], only: Mapping[Path, Collection[str]] | None = None
) -> pd.DataFrame:
    """Adds to each row the cell's ``variant`` and ``num_planned``; policies get distinct labels.

    only: ids of the samples wanted from each cell; otherwise all its rows, of as many samples as
    the longest command so far had planned. Raises UsageError for damage.
    """
    paths = list(cell_paths)
    identities = [read_manifest(path)["identity"] for path in paths]
    found = [read_lines(path) for path in paths]
    codecs = [codecs_used(rows) for rows in found]
    labels = policy_labels(identities, codecs)
    frame = []
    for path, rows, policy, variant in zip(paths, found, labels, variants(identities), strict=True):
        planned = read_status(path).get("num_planned", len(read_sample_ids(path) or rows))
        if only is not None:
            rows = [row for row in rows if row["sample_id"] in only[path]]
            planned = len(only[path])
        cell = {"policy": policy, "variant": variant, "num_planned": planned}
        frame += [
            _printable({**row, **cell, "part": row.get("part") or "", "reference": _as_text(row)})
            for row in rows
        ]
    return pd.DataFrame(frame)


def recorded_rows(path: Path) -> pd.DataFrame:
    """Rows from a CSV file that a command wrote; texts that are empty stay texts."""
    rows = pd.read_csv(path, dtype=dict.fromkeys(_TEXTS, str))
    return rows.fillna({name: "" for name in _TEXTS if name in rows})


def without_texts(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows without benchmark texts, model texts and the long lists per token."""
    lists = [name for name in rows.columns if name.endswith(("_per_token", "_by_layer_head"))]
    return rows.drop(columns=[name for name in [*_OF_BENCHMARKS, *lists] if name in rows.columns])


def _printable(value: Any) -> Any:  # Any: JSON values
    """Half a surrogate pair, which JSON can hold and tables cannot, becomes a question mark."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, list):
        return [_printable(item) for item in value]
    if isinstance(value, dict):
        return {_printable(key): _printable(item) for key, item in value.items()}
    return value


def _as_text(row: Mapping[str, Any]) -> str:
    """All right answers in one text, for people who read tables."""
    return " | ".join(row.get("references") or [])
