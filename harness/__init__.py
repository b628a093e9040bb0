"""Part of kvarena; import it as ``kvarena.harness``, before torch: see ``openmp.py``."""

if not __name__.startswith("kvarena."):
    raise ImportError("import kvarena.harness, not harness (install with: pip install -e .)")

# Here, for this module comes before all others of the harness, in workers of other machines too.
from kvarena.harness.openmp import spin_briefly

spin_briefly()
