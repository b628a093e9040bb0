"""Runs a notebook on the committed results alone, so that no run of one's own decides its outputs.

``python tests/execute_notebooks.py`` (``make notebooks``) runs all of them and keeps the outputs.
"""

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

from kvarena.harness.studies.reference import REPOSITORY

NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.ipynb"))


def executed(path: Path) -> NotebookNode:
    """The notebook with fresh outputs; raises what a cell raises."""
    notebook = nbformat.read(path, as_version=4)
    with TemporaryDirectory() as folder:
        for name in ("reference", "anatomy", "score-protection-shape"):
            shutil.copytree(REPOSITORY / "results" / name, Path(folder) / "results" / name)
        place = Path(folder) / "notebooks"
        place.mkdir()
        resources = {"metadata": {"path": str(place)}}
        # Times would change the file whenever it is run.
        NotebookClient(notebook, timeout=120, resources=resources, record_timing=False).execute()
    return notebook


if __name__ == "__main__":
    for path in NOTEBOOKS:
        nbformat.write(executed(path), path)
        print(f"{path.relative_to(REPOSITORY)} is up to date")
