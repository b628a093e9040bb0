"""How a prompt goes through the rooms of harness/: down through a cell into the engine, not back.

Looked at while a cell runs: the call stack below ``run_cell`` at every call into the engine or into
cells/cell.py, without the frames of other packages.
"""

import sys
from functools import cache
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import kvarena.harness
from kvarena.harness.cells.run_cell import run_cell
from kvarena.harness.registry import load_choice
from toy_folder import save_haystack, save_model_folder, toy_cell

ROOT = Path(kvarena.harness.__path__[0]).parent
INSIDE = {"engine": "harness/engine/", "cell": "harness/cells/cell.py"}
Stack = list[tuple[str, str]]  # file below the repository and function, outermost first


@cache
def below_root(file: str) -> str:
    """The file's place in the repository; empty for one of another package."""
    path = Path(file)
    inside = path.is_relative_to(ROOT) and ".venv" not in path.parts
    return path.relative_to(ROOT).as_posix() if inside else ""


def stack_of(frame: FrameType | None) -> Stack:
    """From ``run_cell`` down to the frame; empty outside of it."""
    found: Stack = []
    while frame is not None:
        if file := below_root(frame.f_code.co_filename):
            found.append((file, frame.f_code.co_name))
            if found[-1] == ("harness/cells/run_cell.py", "run_cell"):
                return found[::-1]
        frame = frame.f_back
    return []


def num_entered(stack: Stack, room: str) -> int:
    """How often the calls go from elsewhere into the room."""
    is_inside = [file.startswith(INSIDE[room]) for file, _ in stack]
    return sum(
        now and not before for before, now in zip([False, *is_inside], is_inside, strict=False)
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("toy")
    save_model_folder(folder / "toy")
    save_haystack(folder / "hay")
    return folder


FORCED = {"options": {"lengths": [400], "depths": [50]}, "attention_recall": True}


@pytest.mark.parametrize(
    ("task", "changes"),
    [
        ("needle", {}),
        ("needle", {"codec": "kivi", "question": "after", "budget": "128"}),
        ("needle", {"policy": "h2o", "budget": "100kB"}),
        ("fidelity", FORCED),
    ],
)
def test_a_prompt_enters_engine_and_cell_once_on_its_way_down(
    task: str, changes: dict[str, Any], folder: Path, tmp_path: Path
) -> None:
    if task == "fidelity":
        options = {**changes["options"], "haystack": str(folder / "hay")}
        changes = {"task": load_choice("task", task) | changes | {"options": options}}
    cell = toy_cell(folder, **changes, limit=1)
    stacks: set[tuple[tuple[str, str], ...]] = set()

    def look(frame: FrameType, event: str, _: object) -> None:
        file = below_root(frame.f_code.co_filename) if event == "call" else ""
        if file.startswith(tuple(INSIDE.values())):
            stacks.add(tuple(stack_of(frame)))

    before = sys.getprofile()
    sys.setprofile(look)
    try:
        outcome = run_cell(cell, tmp_path)
    finally:
        sys.setprofile(before)
    assert (outcome.num_new, outcome.num_failed) == (1, 0)
    found = [list(stack) for stack in stacks if stack]
    for stack in found:
        for room in INSIDE:
            assert num_entered(stack, room) <= 1, f"{room} entered again: {stack}"
    # The deepest way is that of a pass, through the model into the layers' caches.
    deepest = max(found, key=len)
    assert num_entered(deepest, "engine") == 1, deepest
    assert {"step", "attend"} <= {function for _, function in deepest}, deepest
    assert any(num_entered(stack, "cell") for stack in found)
