"""Which settings tell apart cells that carry the same task, model, policy and budget.

Cells that differ in more than those four (chunk size, data type, question, ...) must never be
averaged. ``variant`` says what differs, for all cells of a task and model alike, so that a policy
is still compared with the full cache under the same settings.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from kvarena.harness.store.cell_files import flat
from kvarena.tasks.base import content_id

_METHOD = ("policy", "shape", "codec")  # what a policy's label stands for
_OWN_COLUMNS = (
    *(f"{kind}." for kind in (*_METHOD, "budget")),
    *(f"content.{kind}" for kind in _METHOD),
    "protect",
    "evict_every",
)
_REPEATS = ("seed",)  # several seeds of a cell are repeats of it
_LONGEST_VALUE = 24


def variants(identities: Sequence[Mapping[str, Any]]) -> list[str]:
    """One text per cell, "" where nothing differs: "chunk=64, question=after"."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    settings = [flat(identity) for identity in identities]
    for cell in settings:
        groups.setdefault((cell["task.name"], cell["model.name"]), []).append(cell)
    varying = {place: _varying(cells) for place, cells in groups.items()}
    return [
        ", ".join(
            f"{_short_name(key, varying[place])}={_short(cell[key])}"
            for key in varying[place]
            if key in cell
        )
        for cell in settings
        for place in [(cell["task.name"], cell["model.name"])]
    ]


def details(identities: Sequence[Mapping[str, Any]]) -> list[str]:
    """What tells apart cells of one variant, policy, codec and budget: "recent=32, seed=1".

    Seeds, and options and contents that labels do not show.
    """
    settings = [flat(identity) for identity in identities]
    places = [
        (cell["task.name"], cell["model.name"], _method(identity, ()), cell["budget.name"])
        for cell, identity in zip(settings, identities, strict=True)
    ]
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for place, cell in zip(places, settings, strict=True):
        groups.setdefault(place, []).append(cell)
    varying = {place: _varying(cells, hidden=True) for place, cells in groups.items()}
    return [
        ", ".join(
            f"{_short_name(key, [*varying[place], *_OWN_COLUMNS])}={_short(cell[key])}"
            for key in varying[place]
            if key in cell
        )
        for place, cell in zip(places, settings, strict=True)
    ]


def policy_labels(
    identities: Sequence[Mapping[str, Any]], codecs_used: Sequence[Collection[str]]
) -> list[str]:
    """Policy and codec, and a hash where one name stands for several codes or default options.

    codecs_used: of each cell, what its rows say; for a budget in bytes, a codec may have become
    coarser than it was asked for, in some samples (then both are named) or in all.
    """
    names = [
        _method(identity, used) for identity, used in zip(identities, codecs_used, strict=True)
    ]
    versions = [
        content_id(*[part for kind in _METHOD for part in _definition(identity, kind)])
        for identity in identities
    ]
    several = {
        name
        for name in names
        if len({version for own, version in zip(names, versions, strict=True) if own == name}) > 1
    }
    return [
        f"{name}@{version[:4]}" if name in several else name
        for name, version in zip(names, versions, strict=True)
    ]


def method_label(policy: str, codec: str) -> str:
    """Policy and codec as they ran: ``full+kivi(window=64,bits=2)``; the policy alone without one.

    policy: ``full``; codec: ``kivi(window=64,bits=4)[bits=2]``, where the brackets hold what a
    budget in bytes settled, in place of what was asked for.
    """
    if codec == "none":
        return policy
    parts = re.fullmatch(r"([^(\[]+)(?:\((.*)\))?(?:\[([^\[\]]*)\])?", codec)
    assert parts, f"a codec's label is name(asked)[settled], got {codec!r}"
    name, asked, settled = parts.groups(default="")
    options = _options(asked) | _options(settled)
    return f"{policy}+{name}" + (f"({','.join(options.values())})" if options else "")


def _options(text: str) -> dict[str, str]:
    """The options in "bits=4,levels=[1, 2]" by name; a comma inside brackets parts nothing."""
    parts = re.split(r",(?![^\[]*\])", text) if text else []
    return {part.partition("=")[0]: part for part in parts}


def _method(identity: Mapping[str, Any], codecs_used: Collection[str]) -> str:
    """The policy's name, and the codec's if there is one."""
    policy, asked = str(identity["policy"]["name"]), identity.get("codec", {}).get("name", "none")
    first, *others = sorted(method_label(policy, codec) for codec in codecs_used or [asked])
    return "/".join([first, *(label.removeprefix(f"{policy}+") for label in others)])


def _definition(identity: Mapping[str, Any], kind: str) -> list[Any]:  # Any: JSON values
    """What a policy or codec is: its options and the hash of its code."""
    return [identity.get(kind), identity.get("content", {}).get(kind)]


def _varying(cells: Sequence[Mapping[str, Any]], *, hidden: bool = False) -> list[str]:
    """Settings with more than one value among the cells; one that a cell lacks differs in none.

    hidden: those that variants leave out, in place of all others.
    """
    keys = sorted({key for cell in cells for key in cell})
    return [
        key
        for key in keys
        if (key.startswith(_OWN_COLUMNS) or key in _REPEATS) == hidden
        and len({str(cell[key]) for cell in cells if key in cell}) > 1
    ]


def _short_name(key: str, keys: Sequence[str]) -> str:
    """The last part of a dotted name, unless another one ends the same way."""
    last = key.rpartition(".")[2]
    return key if sum(other.rpartition(".")[2] == last for other in keys) > 1 else last


def _short(value: Any) -> str:  # Any: a JSON value
    text = str(value)
    if len(text) <= _LONGEST_VALUE:
        return text
    # What is cut off must still tell two values apart, for they are grouped by this text.
    return f"{text[: _LONGEST_VALUE - 3]}...#{content_id(value)[:4]}"
