"""Part of kvarena; import it as ``kvarena.harness``."""

if not __name__.startswith("kvarena."):
    raise ImportError("import kvarena.harness, not harness (install with: pip install -e .)")
