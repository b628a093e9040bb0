"""What the process keeps of its free memory: settled once, and not where the user has."""

from types import SimpleNamespace

import pytest

from kvarena.harness.engine import free_memory

MB = 2**20


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int]]:
    """What the C library was asked for."""
    calls: list[tuple[int, int]] = []
    library = SimpleNamespace(mallopt=lambda *pair: calls.append(pair))
    monkeypatch.setattr(free_memory, "_c_library", lambda: library)
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_ARENA_MAX", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    free_memory.keep_free_memory.cache_clear()
    return calls


def test_free_memory_is_kept_for_the_next_layer(asked: list[tuple[int, int]]) -> None:
    free_memory.keep_free_memory()
    free_memory.keep_free_memory()
    assert asked == [(-3, 32 * MB), (-1, 64 * MB)]


@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"])
def test_the_users_own_settings_stand(
    name: str, asked: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, "1")
    free_memory.keep_free_memory()
    assert asked == []


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(free_memory, "_c_library", lambda: None)
    free_memory.keep_free_memory.cache_clear()
    free_memory.keep_free_memory()
    free_memory.give_back_free_memory()
