"""The notebooks run on what is committed, show figures with a sentence each, and are up to date."""

import re
import time
from itertools import pairwise
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from matplotlib.image import imread, imsave
from nbformat import NotebookNode

from execute_notebooks import NOTEBOOKS, executed
from kvarena.harness.errors import UsageError
from kvarena.harness.studies.notebook_figures import contact_sheet, difference_figure, notebook_rows

PICTURES = ("image/png", "image/svg+xml")


def outputs(notebook: NotebookNode) -> list[NotebookNode]:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def printed(notebook: NotebookNode) -> str:
    return "".join(output.text for output in outputs(notebook) if output.output_type == "stream")


def num_pictures(notebook: NotebookNode) -> int:
    data = [output.get("data", {}) for output in outputs(notebook)]
    return sum(kind in part for part in data for kind in PICTURES)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_on_committed_results_and_shows_what_is_committed(path: Path) -> None:
    committed, started = nbformat.read(path, as_version=4), time.monotonic()
    fresh = executed(path)
    assert time.monotonic() - started < 60
    assert printed(fresh) == printed(committed), "run `make notebooks` and look at the difference"
    assert num_pictures(fresh) == num_pictures(committed)


def test_there_are_five_notebooks_that_were_run_to_their_end() -> None:
    assert [path.stem for path in NOTEBOOKS] == [
        "keydiff_geometry",
        "needle_heatmaps",
        "policy_comparison",
        "score_protection_shape",
        "what_survives",
    ]
    for path in NOTEBOOKS:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
        code = [cell for cell in notebook.cells if cell.cell_type == "code"]
        assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
        assert not [out for out in outputs(notebook) if out.get("name") == "stderr"]


def test_each_figure_of_a_notebook_comes_with_a_sentence() -> None:
    for path in NOTEBOOKS:
        cells = nbformat.read(path, as_version=4).cells
        for before, cell in pairwise(cells):
            if cell.cell_type == "code" and num_pictures(NotebookNode(cells=[cell])):
                assert before.cell_type == "markdown"
                assert before.source.startswith("## ")
                assert re.search(r"[:.]\n?", printed(NotebookNode(cells=[cell]))), path


def test_no_notebook_names_a_machines_folder_or_loads_a_model() -> None:
    for path in NOTEBOOKS:
        text = path.read_text()
        assert not re.search(r"/(home|tmp|work|root|usr|Users)/", text), path
        assert not re.search(r"import.*(torch|transformers|engine|models)", text), path


# ---- what they share ----


def test_own_runs_come_before_recorded_rows_and_summaries_are_no_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match="no rows in"):
        notebook_rows(tmp_path)
    reference = tmp_path / "reference"
    reference.mkdir()
    pd.DataFrame({"policy": ["a"], "score_mean": [1]}).to_csv(reference / "x-summary.csv")
    with pytest.raises(UsageError, match="no rows in"):
        notebook_rows(tmp_path)
    rows = pd.DataFrame({"sample_id": ["s"], "budget": ["512"], "variant": [""], "score": [0.5]})
    rows.to_csv(reference / "x.csv", index=False)
    found = notebook_rows(tmp_path)
    assert found.to_dict("records") == rows.to_dict("records")

    (tmp_path / "runs" / "task" / "model" / "cell").mkdir(parents=True)
    (tmp_path / "runs" / "task" / "model" / "cell" / "samples.jsonl").touch()
    own = pd.DataFrame({"sample_id": ["mine"]})
    monkeypatch.setattr("kvarena.harness.studies.notebook_figures.read_rows", lambda cells: own)
    assert notebook_rows(tmp_path) is own


def test_a_contact_sheet_shows_every_picture_in_its_place(tmp_path: Path) -> None:
    colours = [(1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0), (0.0, 0.0, 0.0)]
    paths = []
    for place, colour in enumerate(colours):
        paths.append(tmp_path / f"{place}.png")
        imsave(paths[-1], [[colour] * 40] * 40)
    (tmp_path / "sheet.png").write_bytes(contact_sheet(paths, per_line=3))
    sheet = imread(tmp_path / "sheet.png")
    height, width = sheet.shape[:2]
    centres = [(1 / 4, 1 / 6), (1 / 4, 3 / 6), (1 / 4, 5 / 6), (3 / 4, 1 / 6)]
    for (y, x), colour in zip(centres, colours, strict=True):
        assert tuple(sheet[int(y * height), int(x * width), :3].round(1)) == colour
    assert sheet[int(3 / 4 * height), int(5 / 6 * width), :3].min() == 1  # the rest is empty


def test_differences_are_drawn_for_cells_that_have_one() -> None:
    def cell(policy: str, budget: str, difference: float) -> dict[str, object]:
        bounds = {"difference_low": difference - 0.1, "difference_high": difference + 0.1}
        return {"policy": policy, "budget": budget, "difference": difference, **bounds}

    cells = [cell("keydiff", "256", -0.4), cell("h2o", "1k", -0.2)]
    full = cell("full", "full", float("nan"))
    drawn = difference_figure(pd.DataFrame([*cells, full]))
    assert drawn.startswith(b"\x89PNG")
    assert drawn == difference_figure(pd.DataFrame(cells))
    assert drawn != difference_figure(pd.DataFrame([cells[0], cell("h2o", "1k", -0.3)]))
