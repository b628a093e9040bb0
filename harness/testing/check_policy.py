"""Whether a policy keeps what the engine relies on: ``make check-policy POLICY=mine``.

``python -m kvarena.harness.testing.check_policy mine policy.recent=8`` takes options as the command
kvarena does. One line per check; exit codes: 0 all are well, 1 one failed, 2 bad input.
"""

import argparse
import importlib.resources
import inspect
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from typing import Any

import torch
import yaml

from kvarena.harness.errors import UsageError
from kvarena.harness.registry import build, choices, load_choice, one_of
from kvarena.harness.testing.contract import Finding, check_policy
from kvarena.harness.testing.faults import shortened
from kvarena.policies.base import Policy


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("policy", nargs="?", help="a name from `make list`")
    parser.add_argument("options", nargs="*", metavar="policy.OPTION=VALUE")
    given = parser.parse_args()
    torch.set_num_threads(1)  # the fastest for a tiny model
    counts = {"ok": 0, "FAILED": 0, "not run": 0}
    try:
        for finding in findings(given.policy, given.options):
            counts[finding.verdict] += 1
            print(f"{finding.verdict:<8} {finding.check:<14} {finding.text}", flush=True)
    except UsageError as error:
        parser.exit(2, f"error: {error}\n")
    print(", ".join(f"{num} {verdict}" for verdict, num in counts.items() if num))
    parser.exit(1 if counts["FAILED"] else 0)


def findings(name: str | None, options: Sequence[str]) -> Iterator[Finding]:
    """Of the policy ``conf/policy/<name>.yaml``. Raises UsageError for what cannot be checked."""
    listed = _listed(name)
    settings = {**listed, **_changes(options, listed)}
    try:
        kind = type(build(settings))
    except UsageError:
        raise
    except Exception as error:  # whatever a new file may raise when it is first imported
        yield Finding(check="import", verdict="FAILED", text=_told_import(error, str(name)))
        return
    if Policy not in kind.__mro__:
        raise UsageError(f"{kind.__name__} does not inherit kvarena.policies.base.Policy")
    file = shortened(inspect.getfile(kind))
    yield Finding(check="import", verdict="ok", text=f"{kind.__name__} of {file}")
    yield _options_in(listed, kind, str(name))
    yield from check_policy(lambda **changed: build({**settings, **changed}))


def _listed(name: str | None) -> dict[str, Any]:
    """The yaml of a policy; Any: values of options."""
    known = ", ".join(choices("policy"))
    if not name:
        raise UsageError(f"name a policy: make check-policy POLICY=mine. Available: {known}")
    file = importlib.resources.files("kvarena.policies") / f"{name}.py"
    if name not in choices("policy") and name.isidentifier() and file.is_file():
        raise UsageError(
            f"policies/{name}.py is there, conf/policy/{name}.yaml is not; write it, with "
            f"`_target_: kvarena.policies.{name}.` and the class, sinks, recent and all options"
        )
    try:
        return load_choice("policy", name)
    except yaml.YAMLError as error:
        raise UsageError(f"conf/policy/{name}.yaml: {' '.join(str(error).split())}") from error


def _changes(options: Sequence[str], listed: Mapping[str, Any]) -> dict[str, Any]:
    """``policy.recent=8`` and the like, values as in yaml."""
    changes = {}
    for option in options:
        key, equals, value = option.partition("=")
        group, _, name = key.partition(".")
        if group != "policy" or not name or not equals:
            raise UsageError(f"options have the form policy.recent=8, got {option!r}")
        changes[one_of("option", name, sorted(set(listed) - {"_target_"}))] = yaml.safe_load(value)
    return changes


def _options_in(listed: Mapping[str, Any], kind: type, name: str) -> Finding:
    """Whether the yaml has every option of the class, with the class's own default."""
    file = f"conf/policy/{name}.yaml"
    for option in fields(kind):
        if option.init and option.name not in listed:
            seen = f"{file} lacks {option.name}"
        elif option.init and listed[option.name] != _default_of(option):
            seen = f"{file} has {option.name}: {listed[option.name]!r}"
        else:
            continue
        wanted = f"{option.name}: {_default_of(option)!r}, as in {kind.__name__}"
        text = f"{seen}; wanted: {wanted}; look at {file}"
        return Finding(check="options", verdict="FAILED", text=text)
    return Finding(check="options", verdict="ok", text=f"{file} has all, with their defaults")


def _default_of(option: Field) -> Any:  # Any: as yaml holds it
    default = option.default if option.default_factory is MISSING else option.default_factory()
    return list(default) if isinstance(default, tuple) else default


def _told_import(error: Exception, name: str) -> str:
    """What the file of a policy raised, and where; without a frame of its own, its yaml."""
    place = f"conf/policy/{name}.yaml"
    if isinstance(error, SyntaxError) and error.filename:
        place = f"{shortened(error.filename)}:{error.lineno}"
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename.endswith(f"/policies/{name}.py"):
            place = f"{shortened(frame.filename)}:{frame.lineno}"
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message}; wanted: a file that imports; look at {place}"


if __name__ == "__main__":
    main()
