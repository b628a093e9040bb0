"""Part of kvarena; import it as ``kvarena.harness.bench``."""

if not __name__.startswith("kvarena."):
    raise ImportError("import kvarena.harness.bench, not bench (install with: pip install -e .)")
