"""Part of kvarena; import it as ``kvarena.harness.testing``."""

if not __name__.startswith("kvarena."):
    raise ImportError(
        "import kvarena.harness.testing, not testing (install with: pip install -e .)"
    )
