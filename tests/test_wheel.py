"""A wheel of kvarena is whole: every module of it imports, and it runs from another folder."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from toy_folder import toy_overrides

REPOSITORY = Path(__file__).parents[1]
ROOTS = ("harness", "policies", "codecs", "tasks", "conf")
IMPORT_ALL = """
import importlib, json, sys
for name in json.loads(sys.argv[1]):
    module = importlib.import_module(name)
    assert module.__file__.startswith(sys.argv[2]), f"{name} is not the wheel's: {module.__file__}"
"""


def sources() -> set[str]:
    """All modules of the checkout, but for what needs triton: kvarena.harness.engine.batch."""
    found = set()
    for root in ROOTS:
        for path in (REPOSITORY / root).rglob("*.py"):
            parts = path.relative_to(REPOSITORY).with_suffix("").parts
            found.add(".".join(["kvarena", *parts]).removesuffix(".__init__"))
    return found


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds nothing but the wheel's content."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder)]
    subprocess.run([*build, str(REPOSITORY)], check=True)
    (wheel,) = folder.glob("kvarena-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "site")
    return folder / "site"


def run(site: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in another folder, with the wheel before anything that is installed."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_every_module_of_the_checkout_is_in_the_wheel_and_imports(
    site: Path, tmp_path: Path
) -> None:
    needs_triton = {name for name in sources() if "triton" in name}
    names = sorted(sources() - needs_triton - {"kvarena.harness.bench.__main__"})
    assert len(names) > 120
    done = run(site, tmp_path, "-c", IMPORT_ALL, json.dumps(names), str(site))
    assert done.returncode == 0, done.stderr
    for name in needs_triton:
        assert (site / (name.replace(".", "/") + ".py")).exists()


@pytest.mark.slow
def test_the_wheel_runs_a_needle_from_another_folder(site: Path, tmp_path: Path) -> None:
    overrides = [*toy_overrides(tmp_path), "limit=1", f"results_dir={tmp_path / 'results'}"]
    done = run(site, tmp_path, "-m", "kvarena.harness.command.run", "task=needle", *overrides)
    assert done.returncode == 0, done.stderr
    (rows,) = (tmp_path / "results").glob("runs/needle/toy/*/samples.jsonl")
    assert json.loads(rows.read_text())["status"] == "ok"
