"""What there is to choose from: a directory is the registry, one yaml per choice.

``python -m kvarena.harness.registry`` lists policies, shapes, codecs, tasks and models.
"""

import difflib
import importlib
import importlib.resources
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import yaml

from kvarena.harness.entry import one_line_errors
from kvarena.harness.errors import UsageError


def choices(group: str) -> list[str]:
    """Names of the configurations in ``conf/<group>/``."""
    folder = importlib.resources.files("kvarena.conf") / group
    return sorted(
        entry.name.removesuffix(".yaml")
        for entry in folder.iterdir()
        if entry.name.endswith(".yaml")
    )


def options() -> dict[str, list[str]]:
    """Every option of a task, policy, shape or codec (task.data), and the choices that have it."""
    found: dict[str, list[str]] = {}
    for group in ("task", "policy", "shape", "codec"):
        for name in choices(group):
            for option in load_choice(group, name).keys() - {"_target_"}:
                found.setdefault(f"{group}.{option}", []).append(name)
    return found


def ready_policies() -> list[str]:
    """Names of the methods that run anywhere: not those of which an option names a trained file.

    References, which look at the whole text first, are no methods.

    These are ``policy=all``. Raises UsageError for one whose file does not import.
    """
    targets = {name: load_choice("policy", name)["_target_"] for name in choices("policy")}
    found = {name: named_class(target) for name, target in targets.items()}
    return [
        name
        for name, kind in found.items()
        if getattr(kind, "bounded", True) and not getattr(kind, "file_options", ())
    ]


def unknown(
    kind: str, name: str, known: Sequence[str], aliases: Mapping[str, str] | None = None
) -> str:
    """One line for a name that does not exist: a guess, and what does.

    aliases: what else may have been meant, and what to write for it.
    """
    aliases = aliases or {}
    near = difflib.get_close_matches(name, [*known, *aliases], n=1)
    guess = f" Did you mean {aliases.get(near[0], near[0])}?" if near else ""
    return f"unknown {kind} {name!r}.{guess} Available: {', '.join(known) or 'none'}"


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


def choice_label(group: str, settings: Mapping[str, Any], more: Sequence[str] = ()) -> str:
    """The choice's name, and the options that differ from its yaml: keydiff(anchor=median).

    more: what is said behind the options, as shape=ada.
    """
    name = settings["_target_"].split(".")[-2]
    defaults = load_choice(group, name)
    changed = [f"{key}={value}" for key, value in settings.items() if value != defaults.get(key)]
    told = [*changed, *more]
    return f"{name}({','.join(told)})" if told else name


def build(settings: Mapping[str, Any]) -> Any:  # Any: whatever class _target_ names
    """Make the object that ``_target_`` names from the other settings.

    Raises UsageError for a setting that the class refuses. Only kvarena's own classes can be named.
    """
    given = dict(settings)
    factory = _class(given.pop("_target_"), object)
    known = [option.name for option in fields(factory) if option.init]
    for name in given:
        one_of(f"{factory.__name__} option", name, known)
    try:
        return factory(**given)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{factory.__name__}: {error}") from error


def named_class(target: Any, base: type = object) -> type:  # Any: what a user may have typed
    """The class that ``_target_`` names. Raises UsageError unless it is kvarena's and a ``base``.

    What its file raises when it is imported is one line too, with the place in the file.
    """
    try:
        return _class(target, base)
    except UsageError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)
        places = [(frame.filename, frame.lineno) for frame in frames if frame.filename[0] != "<"]
        what = str(error)
        if isinstance(error, SyntaxError):  # its text ends with the file's name and the line
            what = error.msg
            places.append((str(error.filename), error.lineno))
        file, line = places[-1]
        raise UsageError(
            f"{target} cannot be imported: {type(error).__name__}: {what} ({file}, line {line})"
        ) from error


def _class(target: Any, base: type) -> type:  # Any: what a user may have typed
    module_name, _, class_name = str(target).rpartition(".")
    if not module_name.startswith("kvarena."):
        raise UsageError(f"_target_ must name a class in kvarena, got {target!r}")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise  # it is there, and imports what is not
        raise UsageError(f"no module {module_name}; leave _target_ as its yaml has it") from None
    found = getattr(module, class_name, None)
    if not isinstance(found, type) or not issubclass(found, base) or not is_dataclass(found):
        kind = "class" if base is object else base.__name__
        raise UsageError(f"_target_={target} names no {kind}; leave _target_ as its yaml has it")
    return found


def check_location(source: str) -> None:
    """Raise UsageError for a model's source that can only be a folder (a hub id is org/name)."""
    path = Path(source)
    is_path = source.startswith(("/", "./", "../")) or source.count("/") > 1
    if path.is_file():
        raise UsageError(f"model {source} is a file; give the folder that it lies in")
    if is_path and not path.is_dir():
        raise UsageError(f"model {source}: there is no such folder; a hub id would be org/name")


def main() -> None:
    """Print every choice of the four groups with the first line of its module's docstring."""
    with one_line_errors():
        for group in ("policy", "shape", "codec", "task", "model"):
            print(f"{group}=")
            for name in choices(group):
                print(f"  {name:<32} {_about(load_choice(group, name))}")


def _about(settings: Mapping[str, Any]) -> str:
    if "_target_" not in settings:
        return str(settings["source"] or "any hub id or folder: model=org/name")
    module = sys.modules[named_class(settings["_target_"]).__module__]
    return (module.__doc__ or "").strip().partition("\n")[0]


if __name__ == "__main__":
    main()
