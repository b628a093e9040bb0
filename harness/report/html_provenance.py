"""What the HTML report says of where its cells come from, read from their manifests."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvarena.harness.store.cell_files import read_manifest

HEADER = (
    "cell",
    "started (UTC)",
    "commit",
    "device",
    "dtype",
    "attention",
    "environment",
    "command",
)


def describe_cells(cell_paths: Sequence[Path]) -> dict[str, Any]:
    """``header`` and ``lines`` of a table with one line per cell, and what its codes stand for.

    ``environments`` and ``commands`` map a text to its code (E1, C1), each text once.
    """
    environments: dict[str, str] = {}
    commands: dict[str, str] = {}
    lines = []
    for path in cell_paths:
        manifest = read_manifest(path)
        identity = manifest.get("identity", {})
        environment, command = environment_of(manifest), command_of(manifest)
        lines.append(
            [
                "/".join(path.parts[-3:]),
                str(manifest.get("started", "")).removesuffix("+00:00"),
                _commit(manifest.get("git", {})),
                *(str(identity.get(name, "")) for name in ("device", "dtype", "attention")),
                environments.setdefault(environment, f"E{len(environments) + 1}"),
                commands.setdefault(command, f"C{len(commands) + 1}"),
            ]
        )
    return {
        "header": HEADER,
        "lines": lines,
        "environments": environments,
        "commands": commands,
    }


def _commit(git: dict[str, Any]) -> str:
    """Twelve digits of the commit; "+ changes" when files differed from it."""
    return git["commit"][:12] + " + changes" * bool(git.get("dirty")) if git else "unknown"


def command_of(manifest: dict[str, Any]) -> str:
    """The command as typed; the program's own path says nothing and differs between machines."""
    return shlex.join(["kvarena", *manifest.get("argv", [])[1:]])


def environment_of(manifest: dict[str, Any]) -> str:
    """Python, packages and machine, as the cell noted them when it began."""
    machine, packages = manifest.get("machine", {}), manifest.get("packages", {})
    versions = [f"{name} {version}" for name, version in packages.items() if version]
    parts = [
        f"Python {manifest.get('python', 'unknown')}",
        *versions,
        str(machine.get("accelerator") or "no accelerator"),
        f"{machine.get('cpus', 'unknown number of')} CPU cores",
        str(machine.get("platform", "unknown platform")),
    ]
    return ", ".join(parts)
