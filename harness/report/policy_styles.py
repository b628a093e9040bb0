"""How a policy looks in every picture: a colour and a marker that depend on its name alone.

A label may carry options, a codec or a version, as in ``keydiff(anchor=median)+kivi``: colour
and marker are those of the bare name, and the rest chooses a dash pattern and a half-filled marker.
"""

import re
import zlib
from collections.abc import Iterable, Mapping
from itertools import product
from types import MappingProxyType
from typing import NamedTuple


class PolicyStyle(NamedTuple):
    """Colour as "#rrggbb"; marker, line style and fill style in matplotlib's terms."""

    colour: str
    marker: str
    line: str = "-"
    fill: str = "full"


# Okabe and Ito's colours for colour-blind readers (https://jfly.uni-koeln.de/color/); their yellow
# is left out, it is too faint for a line on white.
POLICY_STYLES: Mapping[str, PolicyStyle] = MappingProxyType(
    {
        "full": PolicyStyle("#000000", "o"),
        "keydiff": PolicyStyle("#D55E00", "s"),
        "snapkv": PolicyStyle("#0072B2", "^"),
        "h2o": PolicyStyle("#009E73", "D"),
        "tova": PolicyStyle("#CC79A7", "v"),
        "streaming_llm": PolicyStyle("#E69F00", "<"),
        "l2norm": PolicyStyle("#56B4E9", ">"),
        # Okabe and Ito have no more; these are Paul Tol's (https://sronpersonalpages.nl/~pault/).
        "locret": PolicyStyle("#882255", "H"),
        "caote": PolicyStyle("#332288", "^"),
        "corm": PolicyStyle("#AA4499", "v"),
        "curdkv": PolicyStyle("#999933", "s"),
        "critical": PolicyStyle("#DDCC77", "s"),
        "expected_attention": PolicyStyle("#661100", "v"),
        "lagkv": PolicyStyle("#44AA99", "D"),
        "nacl": PolicyStyle("#117733", "<"),
        "r_kv": PolicyStyle("#CC6677", "D"),
        "triattention": PolicyStyle("#88CCEE", "^"),
        "random": PolicyStyle("#777777", "o"),
        # References are drawn apart: dotted, hollow.
        "oracle": PolicyStyle("#555500", "o", ":", "none"),
        "kvzip": PolicyStyle("#004488", "s", ":", "none"),
    }
)
SPARE_MARKERS = "PX*hpd8"
OPTION_STYLES = tuple(product(("--", ":", "-."), ("none", "left", "right", "top", "bottom")))


def policy_style(label: str) -> PolicyStyle:
    """The style of `label`, the same in every process and whatever else is in the picture.

    A policy without an entry gets one of the spare pairs; two of them may share a pair.
    """
    return policy_styles([label])[label]


def policy_styles(labels: Iterable[str]) -> dict[str, PolicyStyle]:
    """The styles of one picture, where the options of one policy all differ (15 sets of them).

    Each label has the style that policy_style gives, unless another label took it before.
    """
    styles: dict[str, PolicyStyle] = {}
    for label in sorted(set(labels)):
        name = re.split(r"[(@+]", label)[0]
        style = POLICY_STYLES.get(name) or _spare_style(name)
        if options := label.removeprefix(name):
            first = zlib.crc32(options.encode()) % len(OPTION_STYLES)
            variants = [
                style._replace(line=line, fill=fill)
                for line, fill in OPTION_STYLES[first:] + OPTION_STYLES[:first]
            ]
            free = [variant for variant in variants if variant not in styles.values()]
            style = (free or variants)[0]
        styles[label] = style
    return styles


def _spare_style(name: str) -> PolicyStyle:
    # Only these: a spare style must not change when the project gets one more policy.
    colours = [style.colour for style in POLICY_STYLES.values()][1:7]
    marker, colour = divmod(zlib.crc32(name.encode()), len(colours))
    return PolicyStyle(colours[colour], SPARE_MARKERS[marker % len(SPARE_MARKERS)])
