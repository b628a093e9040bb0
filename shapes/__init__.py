"""Part of kvarena; import it as ``kvarena.shapes``."""

if not __name__.startswith("kvarena."):
    raise ImportError("import kvarena.shapes, not shapes (install with: pip install -e .)")
