"""Part of kvarena; import it as ``kvarena.policies``."""

if not __name__.startswith("kvarena."):
    raise ImportError("import kvarena.policies, not policies (install with: pip install -e .)")
