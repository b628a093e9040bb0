"""A setting is declared once: it arrives, and tells cells apart unless it says that it does not."""

import json
from dataclasses import FrozenInstanceError, fields
from pathlib import Path
from typing import Any

import pytest
import yaml

from faulty import Kvarena
from kvarena.harness.cells.cell import Cell
from kvarena.harness.errors import UsageError
from kvarena.harness.sampling import Sampling
from kvarena.harness.settings import CellSettings, RunSettings
from kvarena.harness.studies.reference import REPOSITORY
from toy_folder import save_haystack, save_model_folder, toy_cell, toy_overrides

SAME_ROWS = {"limit", "shard", "slots", "graphs"}
GROUPS = {"task", "policy", "shape", "codec", "model"}
# Another value of every plain setting, as it would be typed.
OTHERS = {
    "budget": "96",
    "question": "after",
    "protect": "4+8",
    "evict_every": "4",
    "turns": "dialogue",
    "limit": "1",
    "shard": "1/1",
    "seed": "3",
    "slots": "3",
    "graphs": "false",  # a CPU has none
    "chunk": "64",
    "attention": "reference",
    "device": "cpu:0",
    "dtype": "bfloat16",
    "kv_dtype": "bfloat16",
    "sampling": "{temperature: 0.5}",
    "results_dir": "elsewhere",
    "repair": "true",
    "tracker": "none",
    "mode": "run",
    "allow_partial": "true",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_model_folder(tmp_path / "toy")
    save_haystack(tmp_path / "hay")
    return tmp_path


def test_every_setting_that_is_typed_arrives_in_the_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    two_turns = ["task.questions_per_context=2", "task.num_needles=2"]
    kvarena = Kvarena(monkeypatch, capsys, tmp_path, [*toy_overrides(tmp_path), *two_turns])
    typed = {setting.name for setting in fields(RunSettings)} - GROUPS - {"sweeps"}
    assert OTHERS.keys() == typed  # sweeps stand in the yaml of an experiment
    arguments = [f"{name}={value}" for name, value in OTHERS.items() if name != "sampling"]
    assert kvarena(*arguments, "sampling.temperature=0.5").code == 0
    (path,) = (tmp_path / "elsewhere").glob("runs/*/*/*/manifest.json")
    config = json.loads(path.read_text())["config"]
    assert config.keys() == {setting.name for setting in fields(RunSettings)}
    for name, value in OTHERS.items():
        expected = yaml.safe_load(value)
        found = config[name]
        assert expected.items() <= found.items() if name == "sampling" else found == expected


def test_the_configuration_of_hydra_repeats_no_setting() -> None:
    told = yaml.safe_load((REPOSITORY / "conf" / "config.yaml").read_text())
    assert told.keys() == {"defaults", "hydra"}


def test_a_cell_is_known_by_every_setting_that_can_change_its_rows(folder: Path) -> None:
    """So a setting that is added tells cells apart without being named anywhere else."""
    known = {setting.name for setting in fields(CellSettings)} - SAME_ROWS
    assert toy_cell(folder).identity.keys() == known | {"engine", "content"}


@pytest.mark.parametrize("name", sorted(OTHERS.keys() & {s.name for s in fields(CellSettings)}))
def test_another_value_is_another_cell_unless_rows_stay_the_same(name: str, folder: Path) -> None:
    value: Any = yaml.safe_load(OTHERS[name])
    changed = {name: Sampling(**value) if name == "sampling" else value}
    other = toy_cell(folder, **{"dtype": "float32"} | changed)
    same_rows = name in SAME_ROWS or name == "device"  # cpu:0 is the cpu
    assert (other.identity == toy_cell(folder).identity) == same_rows


def test_the_settings_of_a_cell_stay_as_they_are(folder: Path) -> None:
    cell = toy_cell(folder)
    with pytest.raises(FrozenInstanceError):
        cell.settings.seed = 1  # type: ignore[misc]


@pytest.mark.parametrize("group", sorted(GROUPS))
def test_a_group_without_a_choice_is_told_with_what_there_is(group: str, folder: Path) -> None:
    settings = {**vars(toy_cell(folder).settings), group: None}
    with pytest.raises(UsageError, match=f"{group} must name a choice: "):
        Cell(settings=CellSettings(**settings))
