"""Where the jobs of a sweep run: here, in processes of this machine, or on a cluster.

``conf/launcher/`` holds one yaml per launcher, with its settings; Hydra's plugins do the launching.
"""

import shutil
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from kvarena.harness.errors import UsageError

# The distribution that brings each launcher; the extra of the launcher's name installs it.
PLUGINS = {
    "joblib": "hydra-joblib-launcher",
    "slurm": "hydra-submitit-launcher",
    "ray": "hydra-ray-launcher",
}


def check_launcher(name: Any, *, in_sweep: bool) -> None:  # Any: what a user may have typed
    """Raise UsageError for a launcher that cannot run here, or that Hydra would pass over."""
    if name not in PLUGINS:
        return
    if not in_sweep:
        raise UsageError(f"launcher={name} is for sweeps, if only of one cell; add --multirun")
    try:
        version(PLUGINS[name])
    except PackageNotFoundError:
        raise UsageError(
            f"launcher={name} is not installed; get it with: make setup EXTRAS={name}"
        ) from None
    if name == "slurm" and shutil.which("sbatch") is None:
        raise UsageError(
            "launcher=slurm found no sbatch: run it where Slurm's commands are installed (a login "
            "node), or take launcher=joblib for processes of this machine"
        )
