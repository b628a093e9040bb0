"""What a row says of the commit that made it."""

import subprocess
from pathlib import Path

import pytest

from kvarena.harness import provenance


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("harness/provenance.py", "results/bench/default.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("as it was")
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "-A"], [*identity, "commit", "-qm", "first"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "harness" / "provenance.py"))
    provenance.git_state.cache_clear()
    yield tmp_path
    provenance.git_state.cache_clear()


@pytest.mark.parametrize(
    ("changed", "dirty"),
    [(None, False), ("results/bench/default.md", False), ("results/runs/new", False),
     ("harness/provenance.py", True), ("harness/new.py", True), ("conf/new.yaml", True)],
)  # fmt: skip
def test_a_commit_is_not_clean_where_code_differs_from_it(checkout: Path, changed, dirty):
    if changed:
        (checkout / changed).parent.mkdir(exist_ok=True)
        (checkout / changed).write_text("otherwise")
    assert provenance.git_state()["dirty"] is dirty
    label = provenance.commit_label()
    assert label.endswith("+") is dirty
    assert len(label.removesuffix("+")) == 12
