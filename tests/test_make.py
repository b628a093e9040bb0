"""The front door hands on what was typed, and says what to do where it cannot."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from kvarena.harness.command.overrides import prepare_arguments
from kvarena.harness.registry import choices, options, ready_policies
from kvarena.harness.settings import RunSettings
from kvarena.harness.studies.reference import REPOSITORY

# Prints its arguments in place of doing anything.
ECHO = f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n"
FILES = ("Makefile", "pyproject.toml", "constraints.txt", ".ci/install.py", ".ci/help.py")


def copy_files(folder: Path) -> None:
    """What the Makefile needs, and itself."""
    (folder / ".ci").mkdir()
    for name in FILES:
        shutil.copy(REPOSITORY / name, folder / name)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """The Makefile, with a .venv that counts as set up and whose commands print their arguments."""
    copy_files(tmp_path)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name in ("kvarena", "python"):
        path = tmp_path / ".venv" / "bin" / name
        path.write_text(ECHO)
        path.chmod(0o755)
    (tmp_path / ".venv" / ".stamp").touch()
    return tmp_path


def make(
    folder: Path, *arguments: str, output: int = subprocess.PIPE, **variables: str
) -> subprocess.CompletedProcess[str]:
    """make's own variables of a make that may have started these tests are left out."""
    own = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS", "PIP_"))}
    return subprocess.run(
        ["make", "-s", *arguments],
        cwd=folder,
        env=own | variables,
        stdout=output,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )


def handed_on(folder: Path, *arguments: str) -> list[str]:
    """What the first command gets."""
    done = make(folder, *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[0])


def value_of(key: str, arguments: Sequence[str]) -> object:
    """As Hydra reads it after kvarena has prepared it."""
    read = OverridesParser.create().parse_overrides(
        [argument for argument in prepare_arguments(arguments) if "=" in argument]
    )
    (override,) = (one for one in read if one.get_key_element() == key)
    assert not override.is_sweep_override()
    return override.value()


NAMES = (
    *("a~b", "a=b", "a,b", "a$b", "a$$b", "a$(b)", "a(b", "[a]b", 'a"b', 'a" b "c', '"a"', "a b"),
    *("a  b", "VALUE"),
    *("a#b", "a:b", "a{b}", "a%b", "a\\b", "a\\", "a;b&c|d", "`a`", "été 汉", "7", "true", "null"),
)


PATHS = {
    "RESULTS": "results_dir",
    "DATA": "task.data",
    "HAYSTACK": "task.haystack",
    "QA_FILE": "task.qa_file",
}


@pytest.mark.parametrize("name", NAMES)
def test_a_path_of_any_signs_arrives_as_typed(name: str, checkout: Path) -> None:
    arguments = handed_on(checkout, "ruler", *(f"{variable}=x/{name}" for variable in PATHS))
    for key in PATHS.values():
        assert value_of(key, arguments) == f"x/{name}"
    arguments = handed_on(checkout, "reference-math500", f"DATA={name}")
    assert value_of("task.data", arguments) == name


def test_a_home_folder_may_be_written_as_a_tilde(
    checkout: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    arguments = handed_on(checkout, "needle", "RESULTS=~/a,b")
    assert value_of("results_dir", arguments) == "/home/me/a,b"


def test_both_files_of_ruler_are_a_list(checkout: Path) -> None:
    arguments = handed_on(checkout, "ruler", "QA_FILE=[/a/b.json,/c.json]")
    assert value_of("task.qa_file", arguments) == ["/a/b.json", "/c.json"]


def test_a_model_folder_of_any_signs_is_that_folder(checkout: Path) -> None:
    folder = checkout / 'm,o=d(e)l~ $[]"x'
    folder.mkdir()
    arguments = handed_on(checkout, "needle", f"MODEL={folder}")
    assert value_of("model.source", arguments) == str(folder)
    assert value_of("model.name", arguments) == folder.name


def test_commas_sweep_what_is_compared(checkout: Path) -> None:
    arguments = handed_on(checkout, "needle", "POLICY=keydiff,snapkv", "BUDGET=64,128")
    assert arguments[-2:] == ["policy=keydiff,snapkv", "budget=64,128"]
    assert handed_on(checkout, "needle", "POLICY=all")[-1] == "policy=all"


def test_the_front_door_knows_no_policy_by_name(checkout: Path) -> None:
    """What reads a file has a target of its own that makes it; all else asks the registry."""
    text = (checkout / "Makefile").read_text().partition("##@ Recorded runs")[0]
    text += (REPOSITORY / "conf" / "config.yaml").read_text()
    trained = set(choices("policy")) - set(ready_policies())
    assert not [name for name in trained if re.search(rf"(?<!train-)(?<!calibrate-){name}", text)]


# ---- what is refused ----


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("needle BUGDET=8k", "unknown variable BUGDET (did you mean BUDGET?); known: POLICY "),
        ("needle budget=8k", "unknown variable budget (did you mean BUDGET?); known: POLICY "),
        ("test POLICY=h2o", "POLICY: only for demo needle longbench"),
        ("status DATA=x", "DATA: only for demo needle longbench"),
        ("reference DATA=x", "DATA: only for demo needle longbench"),
        ("reference-math500 BUDGET=8k", "BUDGET: only for demo needle longbench"),
        ("train-locret POLICY=h2o", "POLICY: only for demo needle longbench"),
        ("calibrate-triattention BUDGET=8k", "BUDGET: only for demo needle longbench"),
        ("setup EXTRAS=fish", "unknown EXTRAS: ['fish']; known: ['dev', 'flash', "),
        ("setup PYTHON=false", "kvarena needs Python 3.11 or newer, and PYTHON=false is not that"),
        ("clean-results", "If you mean it: make clean-results CONFIRM=1"),
    ],
)
def test_what_would_be_ignored_or_misread_is_refused(
    arguments: str, expected: str, checkout: Path
) -> None:
    done = make(checkout, *arguments.split())
    assert done.returncode == 2
    assert expected in done.stderr
    assert done.stdout == ""


def test_what_the_shell_exports_changes_no_run(checkout: Path) -> None:
    done = make(checkout, "needle", MODEL="other", DEVICE="cuda", ARGS="seed=1")
    assert json.loads(done.stdout) == ["--multirun", "task=needle"]


def test_every_variable_becomes_a_setting_that_there_is(checkout: Path) -> None:
    lines = re.findall(r"^#= (\w+) +([\w.]+)=", (checkout / "Makefile").read_text(), re.MULTILINE)
    assert len(lines) > 20
    plain = {setting.name for setting in fields(RunSettings)} | {"launcher"}
    for name, key in lines:
        assert key in plain or key in options(), name
        (argument,) = handed_on(checkout, "plan", f"{name}=7")[2:]
        assert argument.startswith(f"{key}=")


def test_the_settings_that_have_a_variable_are_handed_on_together(checkout: Path) -> None:
    arguments = handed_on(checkout, "needle", "KV_DTYPE=float16", "SEED=0,1", "ARGS=a.b=1 c=2")
    assert arguments[2:] == ["seed=0,1", "kv_dtype=float16", "a.b=1", "c=2"]


@pytest.mark.parametrize(
    "target", ["demo", "reference", "reference-longbench", "reference-ruler", "equal-bytes"]
)
def test_a_recorded_run_is_an_experiment_by_name(target: str, checkout: Path) -> None:
    done = make(checkout, target)
    commands = [json.loads(line) for line in done.stdout.splitlines()]
    kvarena = [command for command in commands if command[0] == "--multirun"]
    assert 1 <= len(kvarena) <= 2
    for command in kvarena:
        assert command[1].startswith("experiment=")
        assert {word.partition("=")[0] for word in command[2:]} <= {"results_dir"}


def test_a_setup_that_is_up_to_date_does_nothing(checkout: Path) -> None:
    (checkout / ".venv" / ".stamp").write_text("triton\n")
    done = make(checkout, "setup", "EXTRAS=triton")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "kvarena is installed in .venv; now try: make demo\n"


def test_a_single_quote_is_refused_in_one_line(checkout: Path) -> None:
    done = make(checkout, "needle", "RESULTS=it's")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "RESULTS holds a single quote" in done.stderr


@pytest.mark.parametrize("target", ["help", "list", "status"])
def test_output_that_nobody_reads_is_no_error(target: str, checkout: Path) -> None:
    program = checkout / ".venv" / "bin" / "python"
    program.write_text(f"#!/bin/sh\nexec {sys.executable} -m kvarena.harness.registry\n")
    reader, writer = os.pipe()
    os.close(reader)
    done = make(checkout, target, output=writer)
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.slow
def test_a_package_index_that_does_not_answer_is_told_with_what_to_do(tmp_path: Path) -> None:
    copy_files(tmp_path)
    done = make(
        tmp_path,
        "setup",
        PIP_INDEX_URL="http://127.0.0.1:9/simple",
        PIP_CONFIG_FILE=os.devnull,
    )
    assert done.returncode == 2
    log = (tmp_path / ".venv" / "setup.log").read_text()
    assert log.count("connection broken by") == 1  # tried twice, not six times
    *_, tail_of_log, told, advice, _ = done.stderr.splitlines()
    assert tail_of_log == log.splitlines()[-1]
    assert told == "The install failed; above are the last lines of .venv/setup.log."
    assert advice == (
        "error: pip could not reach its package index; go online, or name one that answers: "
        "PIP_INDEX_URL=https://... make setup"
    )
    assert not (tmp_path / ".venv" / ".stamp").exists()
