"""What an eviction engine promises, as checks: kvarena's own, and any other one.

The doors are ``replay_difference``, ``most_held`` and ``neighbour_difference``.
"""

if not __name__.startswith("kvarena."):
    raise ImportError(
        "import kvarena.harness.testing, not testing (install with: pip install -e .)"
    )

from kvarena.harness.testing.oracle import replay_difference
from kvarena.harness.testing.other_engines import Snapshot, most_held, neighbour_difference

__all__ = ["Snapshot", "most_held", "neighbour_difference", "replay_difference"]
