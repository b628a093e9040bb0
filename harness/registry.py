"""What there is to choose from: a directory is the registry, one yaml per choice.

``python -m kvarena.harness.registry`` lists policies, codecs, tasks and models.
"""

import difflib
import importlib
import importlib.resources
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from kvarena.harness.errors import UsageError


def choices(group: str) -> list[str]:
    """Names of the configurations in ``conf/<group>/``."""
    folder = importlib.resources.files("kvarena.conf") / group
    return sorted(
        entry.name.removesuffix(".yaml")
        for entry in folder.iterdir()
        if entry.name.endswith(".yaml")
    )


def unknown(kind: str, name: str, known: Sequence[str]) -> str:
    """One line for a name that does not exist: a guess, and what does."""
    near = difflib.get_close_matches(name, known, n=1)
    guess = f" Did you mean {near[0]}?" if near else ""
    return f"unknown {kind} {name!r}.{guess} Available: {', '.join(known)}"


def one_of(kind: str, name: str, known: Sequence[str]) -> str:
    """The name itself if it is known; raises UsageError otherwise."""
    if name not in known:
        raise UsageError(unknown(kind, name, known))
    return name


def load_choice(group: str, name: str) -> dict[str, Any]:
    """The yaml of one choice as a mapping. Raises UsageError for an unknown name."""
    one_of(group, name, choices(group))
    text = (importlib.resources.files("kvarena.conf") / group / f"{name}.yaml").read_text()
    return yaml.safe_load(text)


def choice_label(group: str, settings: Mapping[str, Any]) -> str:
    """The choice's name, and the options that differ from its yaml: keydiff(anchor=median)."""
    name = settings["_target_"].split(".")[-2]
    defaults = load_choice(group, name)
    changed = [f"{key}={value}" for key, value in settings.items() if value != defaults.get(key)]
    return f"{name}({','.join(changed)})" if changed else name


def build(settings: Mapping[str, Any]) -> Any:  # Any: whatever class _target_ names
    """Make the object that ``_target_`` names from the other settings.

    Raises UsageError for a setting that the class refuses. Only kvarena's own classes can be named.
    """
    options = dict(settings)
    target = options.pop("_target_")
    module_name, _, class_name = target.rpartition(".")
    if not module_name.startswith("kvarena."):
        raise UsageError(f"_target_ must name a class in kvarena, got {target!r}")
    factory = getattr(importlib.import_module(module_name), class_name)
    try:
        return factory(**options)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{class_name}: {error}") from error


def main() -> None:
    """Print every choice of the four groups with the first line of its module's docstring."""
    for group in ("policy", "codec", "task", "model"):
        print(f"{group}=")
        for name in choices(group):
            settings = load_choice(group, name)
            target = settings.get("_target_")
            if target:
                module = importlib.import_module(target.rpartition(".")[0])
                about = (module.__doc__ or "").strip().splitlines()[0]
            else:
                about = str(settings["source"] or "any hub id or folder: model=org/name")
            print(f"  {name:<32} {about}")


if __name__ == "__main__":
    main()
