"""What a policy or codec is made of: its own file and all that it imports of kvarena."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvarena.codecs.base import Codec
from kvarena.codecs.kivi import KIVI
from kvarena.codecs.none import NoCodec
from kvarena.harness.cells import fingerprints
from kvarena.harness.cells.fingerprints import code_fingerprint
from kvarena.harness.engine import ENGINE_VERSION
from kvarena.policies.base import Policy
from kvarena.policies.h2o import H2O
from kvarena.policies.keydiff import KeyDiff
from toy_folder import save_haystack, save_model_folder, toy_cell


@pytest.fixture
def edited(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Make the import system find an edited copy of a module."""
    find_spec = importlib.util.find_spec

    def edit(module: str) -> None:
        spec = find_spec(module)
        copy = tmp_path / Path(spec.origin).name
        copy.write_bytes(Path(spec.origin).read_bytes().replace(b"2**bits - 1", b"2**bits") + b"#")
        monkeypatch.setattr(
            fingerprints.importlib.util,
            "find_spec",
            lambda name: SimpleNamespace(origin=str(copy)) if name == module else find_spec(name),
        )

    return edit


@pytest.mark.parametrize(
    "module", ["kvarena.codecs.bits", "kvarena.codecs.base", "kvarena.policies.base"]
)
def test_an_edit_of_what_a_codec_imports_changes_its_fingerprint(module: str, edited: Any) -> None:
    kivi = code_fingerprint(KIVI(), Codec)
    edited(module)
    assert code_fingerprint(KIVI(), Codec) != kivi


def test_an_edit_of_another_codecs_arithmetic_changes_nothing(edited: Any) -> None:
    before = code_fingerprint(NoCodec(), Codec), code_fingerprint(H2O(), Policy)
    edited("kvarena.codecs.bits")
    assert (code_fingerprint(NoCodec(), Codec), code_fingerprint(H2O(), Policy)) == before


def test_an_edit_of_the_base_of_all_policies_changes_each(edited: Any) -> None:
    before = code_fingerprint(KeyDiff(), Policy), code_fingerprint(H2O(), Policy)
    edited("kvarena.policies.base")
    after = code_fingerprint(KeyDiff(), Policy), code_fingerprint(H2O(), Policy)
    assert all(old != new for old, new in zip(before, after, strict=True))


def test_the_engines_version_is_part_of_a_cells_identity(tmp_path: Path) -> None:
    save_model_folder(tmp_path / "toy")
    save_haystack(tmp_path / "hay")
    assert toy_cell(tmp_path).identity["engine"] == ENGINE_VERSION
