"""Threads wait as the harness says, unless the user has said something else."""

import os
import subprocess
import sys

import pytest

from kvarena.harness.openmp import SPIN_COUNT, waiting

NAMES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ({}, f"GOMP_SPINCOUNT={SPIN_COUNT}"),
        ({"GOMP_SPINCOUNT": "7"}, "GOMP_SPINCOUNT=7"),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, "OMP_WAIT_POLICY=PASSIVE"),
    ],
)
@pytest.mark.parametrize("first", ["kvarena.harness.engine", "kvarena.harness.command.run"])
def test_threads_wait_as_told_before_torch_is_there(first, chosen, expected):
    code = f"""
import sys
class Watch:
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            from kvarena.harness.openmp import waiting
            print(waiting())
sys.meta_path.insert(0, Watch())
import {first}, torch
"""
    env = {name: value for name, value in os.environ.items() if name not in NAMES}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env | chosen, capture_output=True, text=True, check=True
    )
    assert done.stdout.split("\n")[0] == expected


def test_nothing_set_is_nothing_said(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    assert waiting() == ""
