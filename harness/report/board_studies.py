"""Which rows a results folder holds, study by study, and the command that makes each again.

A study is a folder ``runs/`` with cells, whose manifests have the commands, or a file of recorded
rows: NAME.csv with NAME-summary.csv beside it, whose command stands in ``recorded.yaml``. Rows that
are in both are taken from the cells.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import yaml

from kvarena.harness.analysis.row_frame import read_rows, recorded_rows
from kvarena.harness.errors import UsageError
from kvarena.harness.files import read_bytes
from kvarena.harness.report.html_provenance import command_of, environment_of
from kvarena.harness.report.text_tables import counted
from kvarena.harness.store.cell_files import find_cells, read_manifest

UNKNOWN_COMMAND = "not recorded"


@dataclass(frozen=True, kw_only=True)
class Study:
    """name: of the folder or file that the rows are in; about: what they are, in words.

    commands, environments: of each run_id in the rows, as far as they are known.
    """

    name: str
    about: str
    rows: pd.DataFrame
    commands: dict[str, str]
    environments: dict[str, str]

    def command(self, run_id: str) -> str:
        """What makes the rows of that run again."""
        return self.commands.get(run_id, UNKNOWN_COMMAND)


def find_studies(results_dir: Path) -> list[Study]:
    """All of a folder, cells first. Raises UsageError for damage, and where there are no rows."""
    seen: set[str] = set()
    found = []
    for study in [*_cells(results_dir), *_recorded(results_dir)]:
        rows = study.rows[~study.rows["run_id"].isin(seen)]
        seen |= set(rows["run_id"])
        if len(rows):
            found.append(replace(study, rows=rows.reset_index(drop=True)))
    if not found:
        raise UsageError(f"{results_dir} has no rows; run something first (make demo)")
    return found


def without_rows(results_dir: Path) -> list[str]:
    """Summaries and begun cells whose rows are not in the folder, so that nothing can be shown."""
    summaries = [path for path in _summaries(results_dir) if not _rows_beside(path).exists()]
    begun: set[Path] = set()
    for runs in _runs(results_dir):
        manifests = runs.glob("*/*/*/manifest.json")
        begun |= {path.parent for path in manifests} - set(find_cells(runs.parent))
    return [str(path.relative_to(results_dir)) for path in [*summaries, *sorted(begun)]]


def _summaries(results_dir: Path) -> list[Path]:
    return sorted([*results_dir.glob("*-summary.csv"), *results_dir.glob("*/*-summary.csv")])


def _runs(results_dir: Path) -> list[Path]:
    return sorted([*results_dir.glob("runs"), *results_dir.glob("*/runs")])


def _rows_beside(summary: Path) -> Path:
    return summary.with_name(summary.name.replace("-summary.csv", ".csv"))


def _cells(results_dir: Path) -> Iterator[Study]:
    for runs in _runs(results_dir):
        paths = find_cells(runs.parent)
        rows = read_rows(paths)
        if rows.empty:
            continue
        manifests = {str(found["run_id"]): found for found in map(read_manifest, paths)}
        yield Study(
            name=str(runs.relative_to(results_dir)),
            about=f"{counted(len(paths), 'cell')} as the commands left them",
            rows=rows,
            commands={name: command_of(found) for name, found in manifests.items()},
            environments={name: environment_of(found) for name, found in manifests.items()},
        )


def _recorded(results_dir: Path) -> Iterator[Study]:
    commands = _commands(results_dir)
    for path in map(_rows_beside, _summaries(results_dir)):
        if not path.exists():
            continue
        rows, file = recorded_rows(path), path.relative_to(results_dir)
        if not {"sample_id", "run_id", "policy", "status"} <= set(rows.columns):
            continue
        command = commands.get(str(file), UNKNOWN_COMMAND)
        yield Study(
            name=file.stem if file.stem == file.parent.name else str(file.with_suffix("")),
            about=f"recorded in {file}, without texts of benchmarks and answers",
            rows=rows,
            commands=dict.fromkeys(rows["run_id"].unique(), command),
            environments={},
        )


def _commands(results_dir: Path) -> dict[str, str]:
    path = results_dir / "recorded.yaml"
    if not path.exists():
        return {}
    try:
        found = yaml.safe_load(read_bytes(path))
    except yaml.YAMLError:
        found = None
    if not isinstance(found, dict):
        raise UsageError(f"{path} is damaged; it maps files of rows to commands, a line each")
    return {str(name): str(command) for name, command in found.items()}
