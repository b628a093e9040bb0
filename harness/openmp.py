"""How long torch's threads spin when they wait for each other, set before torch is imported.

On Linux torch computes with GNU OpenMP, whose threads spin at a barrier for so long that a single
other busy process makes every matrix product several times slower. GOMP_SPINCOUNT says how often a
thread looks before it sleeps (https://gcc.gnu.org/onlinedocs/libgomp/GOMP_005fSPINCOUNT.html). It
is read when torch is imported, and child processes inherit it.
"""

import os

# Of passes of SmolLM2 on two cores (results/bench, section neighbour): sleeping at once
# (OMP_WAIT_POLICY=PASSIVE) costs the most on a quiet machine, ten times as many looks help little
# beside a busy process.
SPIN_COUNT = "1000"


def spin_briefly() -> None:
    """Unless the user has chosen, threads look a thousand times and then sleep."""
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_COUNT)


def waiting() -> str:
    """What this process was started with, as OpenMP's own settings name it."""
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    return " ".join(f"{name}={os.environ[name]}" for name in names if name in os.environ)
