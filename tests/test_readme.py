"""What the README says is what the files say."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from kvarena.harness.command import overrides
from kvarena.harness.studies.reference import REPOSITORY, with_table, without_texts

README = (REPOSITORY / "README.md").read_text()


REFERENCE = REPOSITORY / "results" / "reference"
TASKS = re.findall(r"<!-- (\S+) table: begin -->", README)


@pytest.mark.parametrize("task", TASKS)
def test_the_table_comes_from_the_committed_summary(task: str) -> None:
    folder = REPOSITORY / "results" / task if task == "equal-bytes" else REFERENCE
    assert with_table(README, task, folder / f"{task}-summary.csv") == README
    section = README.split(f"<!-- {task} table: begin -->")[1].split("<!--")[0]
    assert section.count("| keydiff |") >= 1


def test_the_ratios_come_from_the_recorded_bench() -> None:
    recorded = pd.read_csv(REPOSITORY / "results" / "bench" / "default-targets.csv")
    medians = dict(zip(recorded["figure"], recorded["median"], strict=True))
    section = README.split("<!-- bench: begin -->\n")[1].split("<!-- bench: end -->")[0]
    quoted = [line.strip("| ").split(" | ") for line in section.splitlines()[2:]]
    assert len(quoted) >= 5
    for figure, ratio in quoted:
        assert ratio == f"{medians[figure]:.2f}"


def test_no_text_of_a_benchmark_is_in_the_reference_rows() -> None:
    equal_bytes = REPOSITORY / "results" / "equal-bytes"
    for path in [*REFERENCE.glob("*.csv"), *equal_bytes.glob("*.csv")]:
        rows = pd.read_csv(path)
        assert without_texts(rows).columns.tolist() == rows.columns.tolist(), path


def test_every_linked_file_exists() -> None:
    targets = re.findall(r"\]\((?!http)([^)#]+)\)", README)
    assert targets
    for target in targets:
        assert (REPOSITORY / target).exists(), target


COMMANDS = re.findall(r"^(?:kvarena|make) \w.*", README, re.MULTILINE)


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("kvarena ")])
def test_every_kvarena_command_is_one_that_is_accepted(
    line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What it names need not be installed here, nor lie where the README says.
    monkeypatch.setattr(overrides, "check_launcher", lambda name, **_: None)
    monkeypatch.setattr(overrides, "check_location", lambda source: None)
    arguments = [word for word in shlex.split(line, comments=True)[1:] if word != "..."]
    assert overrides.prepare_arguments(arguments)


@pytest.mark.parametrize("line", [line for line in COMMANDS if line.startswith("make ")])
def test_every_make_command_is_one_that_is_accepted(line: str) -> None:
    words = shlex.split(line, comments=True)
    done = subprocess.run(
        [words[0], "--dry-run", *words[1:]], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_the_readmes_policy_works_as_printed(tmp_path: Path) -> None:
    """The ten lines of the README, run as a policy on a toy model."""
    code = re.search(r"`policies/random_keys.py`:\n\n```python\n(.*?)```", README, re.DOTALL)[1]
    (tmp_path / "random_keys.py").write_text(code)
    script = (
        "from random_keys import RandomKeys\n"
        "from toys import toy_model, toy_prompt\n"
        "from kvarena.harness.engine import Engine\n"
        "engine = Engine(toy_model(), RandomKeys(), budget_tokens=32, chunk_tokens=16)\n"
        "(g,) = engine.generate([toy_prompt(90)], max_new_tokens=5, record_kept=True)\n"
        "assert all(p.shape[1] == 32 for p in g.kept_positions)\n"
        "assert g.kept_positions[0].tolist() != g.kept_positions[1].tolist()\n"
        "from kvarena.harness.testing.contract import check_policy\n"
        "assert {finding.verdict for finding in check_policy(RandomKeys)} == {'ok'}\n"
    )
    path = f"{tmp_path}:{Path(__file__).parent}"
    subprocess.run([sys.executable, "-c", script], env={"PYTHONPATH": path}, check=True)
