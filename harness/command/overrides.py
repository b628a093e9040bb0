"""What is typed after ``kvarena``: checked and completed before Hydra reads it.

A mistake in a sweep is told here, before its first cell and without waiting for torch.
"""

import os
import shlex
from collections.abc import Sequence
from dataclasses import fields
from datetime import datetime
from itertools import chain
from pathlib import Path

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Glob, Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import OmegaConf

from kvarena.harness.budget import parse_budget
from kvarena.harness.command.launchers import check_launcher
from kvarena.harness.errors import UsageError
from kvarena.harness.registry import (
    check_location,
    choices,
    load_choice,
    one_of,
    options,
    ready_policies,
    unknown,
)
from kvarena.harness.sampling import Sampling
from kvarena.harness.settings import RunSettings
from kvarena.harness.store.shards import parse_shard

GROUPS = ("task", "policy", "shape", "codec", "model", "experiment", "launcher")
_ALL = "all"  # of policies: those that need no trained file
_SHELLS = ("bash", "fish", "zsh")
SETTINGS = (
    *(setting.name for setting in fields(RunSettings) if setting.name != "sweeps"),
    *("experiment", "launcher", "hydra"),
)


def prepare_commands(arguments: Sequence[str]) -> list[list[str]]:
    """What Hydra is to run, one after the other: each experiment by itself, in all its sweeps.

    What is typed counts more than what an experiment's sweeps say. Raises UsageError before
    anything runs.
    """
    given = get_args_parser().parse_intermixed_args(arguments)
    named = [argument for argument in given.overrides if argument.startswith("experiment=")]
    if not named:
        return [prepare_arguments(arguments)]
    experiment = _parsed(named[-1])
    _check_choices(experiment, in_sweep=given.multirun)
    listed = {name: load_choice("experiment", name).get("sweeps") for name in _values(experiment)}
    if not given.multirun:
        if any(listed.values()) and not (given.cfg or given.info or given.help):
            raise UsageError(f"{named[-1]} is a sweep; add --multirun")
        return [prepare_arguments(arguments)]
    others = [argument for argument in arguments if argument not in named]
    typed = {argument.partition("=")[0] for argument in given.overrides}
    return [
        prepare_arguments(
            [
                *others,
                f"experiment={name}",
                *(word for word in shlex.split(sweep) if word.partition("=")[0] not in typed),
            ]
        )
        for name, sweeps in listed.items()
        for sweep in sweeps or [""]
    ]


def prepare_arguments(arguments: Sequence[str]) -> list[str]:
    """The arguments as Hydra is to see them: names and budgets checked, text quoted.

    A value that Hydra's grammar cannot read is text, as it was typed, and ``~`` at its beginning
    is the home folder. ``model=<hub id or folder>`` becomes the overrides that say so. Raises
    UsageError.
    """
    given = get_args_parser().parse_intermixed_args(arguments)
    kinds = (given.run, given.multirun, given.cfg, given.info, given.shell_completion)
    if sum(map(bool, kinds)) > 1:
        raise UsageError("of --run, --multirun (-m), --cfg (-c), --info (-i) and -sc give only one")
    if given.experimental_rerun:
        raise UsageError(
            "--experimental-rerun reads a pickle, which can run any code; kvarena writes none; "
            "the same command, given again, goes on where it stopped"
        )
    if given.shell_completion:
        _check_completion(given.overrides)
        return list(arguments)
    # argparse takes overrides in one block only: `kvarena budget=64 -m policy=a,b` would fail.
    flags = [argument for argument in arguments if argument not in given.overrides]
    prepared: list[str] = []
    for argument in given.overrides:
        prepared += _prepared(argument, in_sweep=given.multirun)
    prepared = [_with_all(argument) for argument in prepared]
    return [*flags, *_first_choices(prepared), *prepared]


def is_sweep(arguments: Sequence[str]) -> bool:
    """Whether Hydra runs all combinations of comma-separated values."""
    return get_args_parser().parse_args(arguments).multirun


def sweep_dir(arguments: Sequence[str]) -> Path:
    """A folder of this command's own; absolute, since jobs may start in other folders."""
    given = [_parsed(a) for a in get_args_parser().parse_args(arguments).overrides]
    folders = [one.value() for one in given if one.key_or_group == "results_dir"]
    last = folders[-1] if folders else RunSettings.results_dir
    results_dir = OmegaConf.create([last])[0]  # with its interpolations resolved
    name = datetime.now().strftime("%Y-%m-%d_%H-%M-%S.%f")
    return Path(str(results_dir)).absolute() / "sweeps" / name


def quoted(text: object) -> str:
    """As a value that Hydra reads as this text."""
    return QuotedString(str(text), Quote.single).with_quotes()


def _check_completion(commands: Sequence[str]) -> None:
    """What follows -sc is a command for Hydra, no override."""
    known = [f"{do}={sh}" for do in ("install", "uninstall", "query") for sh in _SHELLS]
    if len(commands) != 1 or commands[0] not in known:
        raise UsageError(
            f"kvarena -sc {' '.join(commands)}: write install=SHELL or uninstall=SHELL; SHELL "
            f"is {', '.join(_SHELLS)}"
        )


def _prepared(argument: str, *, in_sweep: bool) -> list[str]:
    """One override as Hydra is to see it; two where a model is no preset."""
    if argument.startswith("~"):
        raise UsageError(f"{argument}: settings can be changed but not removed")
    if "=" not in argument:
        raise UsageError(_not_a_setting(argument))
    name, _, text = argument.partition("=")
    place = os.path.expanduser(text)
    if name == "model" and _is_location(place) and Path(place).is_dir():  # with whatever signs
        return _model_at(place)
    override = _parsed(argument)
    key = override.key_or_group
    _check_key(key)
    if key == "results_dir":
        _check_results_dir(override)
    elif key == "model" and any(map(_is_location, _values(override))):
        if override.is_sweep_override():
            raise UsageError(
                "of several models, each must be a name from the list (python -m "
                f"kvarena.harness.registry), got {text}; run one command for each folder or hub id"
            )
        return _model_at(str(override.value()))
    elif key == "launcher":
        _check_choices(override, in_sweep=in_sweep)
        if override.is_sweep_override():
            raise UsageError("launcher takes one value, for all jobs of the sweep")
        check_launcher(override.value(), in_sweep=in_sweep)
    elif key in GROUPS:
        _check_choices(override, in_sweep=in_sweep)
    elif key == "budget":
        for value in _values(override):
            parse_budget(value)
    elif key == "shard":
        for value in _values(override):
            parse_shard(None if value in ("None", "null") else value)
    assert override.input_line is not None, "Hydra notes what it parsed"
    return [override.input_line]


def _with_all(argument: str) -> str:
    """The same; ``policy=all`` names the policies that need no trained file."""
    if not argument.startswith("policy=") or _ALL not in _values(_parsed(argument)):
        return argument
    # Last of all checks, for it asks the classes, and they import torch.
    names = [ready_policies() if name == _ALL else [name] for name in _values(_parsed(argument))]
    return f"policy={','.join(dict.fromkeys(chain(*names)))}"


def _first_choices(arguments: Sequence[str]) -> list[str]:
    """``codec=kivi`` for ``codec=kivi,kvcomp codec.window=32``: the first of a swept group.

    Hydra composes once without what is swept, and would not know the option. For its jobs, the
    sweep counts, which is given after this.
    """
    given = [_parsed(argument) for argument in arguments]
    with_options = {one.key_or_group.partition(".")[0] for one in given if "." in one.key_or_group}
    swept = [one for one in given if one.is_sweep_override() and one.key_or_group in with_options]
    return [f"{one.key_or_group}={next(iter(_values(one)))}" for one in swept]


def _parsed(argument: str) -> Override:
    """As Hydra reads it, else with its value as text. Raises HydraException for a bad key."""
    read = OverridesParser.create().parse_overrides
    try:
        (override,) = read([argument])
    except HydraException:
        key, _, text = argument.partition("=")
        read([f"{key}="])
        if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
            text = text[1:-1]
        (override,) = read([f"{key}={quoted(text)}"])
    value = override.value()
    if isinstance(value, str) and value.startswith("~"):
        home = quoted(os.path.expanduser(value))
        (override,) = read([f"{override.get_key_element()}={home}"])
    return override


def _values(override: Override) -> list[str]:
    """The value, or the values of a sweep, as text."""
    value = override.value()
    if isinstance(value, Glob):
        group = override.key_or_group
        return value.filter(choices(group)) if group in GROUPS else []
    if override.is_sweep_override():
        return [str(value).strip("'\"") for value in override.sweep_string_iterator()]
    return [str(override.value())]


def _not_a_setting(argument: str) -> str:
    """One line for an argument without an equals sign."""
    groups = [f"{group}={argument}" for group in GROUPS if argument in choices(group)]
    known = argument in SETTINGS or argument in options()
    guess = " or ".join(groups) or (f"{argument}=VALUE" if known else "")
    hint = f"did you mean {guess}?" if guess else "write budget=512, say; kvarena --help lists them"
    return f"{argument!r} is no setting with a value; {hint}"


def _check_key(key: str) -> None:
    """Raise UsageError for a setting that does not exist, with the full name of an option."""
    first = key.split("/")[0].split(".")[0]
    if first in SETTINGS:
        return
    places: dict[str, list[str]] = {}
    for name, owners in options().items():
        group, _, option = name.partition(".")
        all_have_it = len(owners) == len(choices(group))
        places.setdefault(option, []).append(
            name if all_have_it else f"{name} ({', '.join(owners)})"
        )
    for setting in fields(Sampling):
        places.setdefault(setting.name, []).append(f"sampling.{setting.name}")
    raise UsageError(
        unknown("setting", first, SETTINGS, {name: " or ".join(p) for name, p in places.items()})
    )


def _check_choices(override: Override, *, in_sweep: bool) -> None:
    group = override.key_or_group
    known = choices(group)
    value = override.value()
    if isinstance(value, Glob):
        if not _values(override):
            raise UsageError(
                f"{group}: no match for {value.include}. Available: {', '.join(known)}"
            )
        return
    if isinstance(value, list | dict):
        raise UsageError(f"{group} takes a name; several of them with --multirun: {group}=A,B")
    for name in _values(override):
        if name == _ALL and group == "policy":
            if not in_sweep:
                raise UsageError("policy=all is several policies; add --multirun")
        elif name == _ALL:
            raise UsageError(
                f"{group}=all: only policies have that word; write '{group}=glob(*)' for every "
                f"one, '{group}=glob(*,exclude=[NAME,NAME])' to leave some out"
            )
        else:
            one_of(group, name, known)


def _check_results_dir(override: Override) -> None:
    if override.is_sweep_override():
        raise UsageError(
            "results_dir takes one folder for all cells; where its name holds a comma, put it in "
            f"""double quotes inside single ones: 'results_dir="{override.get_value_string()}"'"""
        )
    if override.value() == "":
        raise UsageError("results_dir= names no folder; results_dir=. is the one you are in")


def _is_location(name: str) -> bool:
    """Whether a model's name is a hub id or a folder, no preset."""
    return name not in ("", *choices("model")) and ("/" in name or Path(name).exists())


def _model_at(location: str) -> list[str]:
    """The overrides of a model in a folder or on the hub."""
    check_location(location)
    if Path(location).is_dir():  # one folder is one model, wherever the command runs
        location = str(Path(location).resolve())
    name = Path(location).name
    return ["model=custom", f"model.name={quoted(name)}", f"model.source={quoted(location)}"]
