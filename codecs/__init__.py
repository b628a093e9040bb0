"""Part of kvarena; import it as ``kvarena.codecs``."""

if not __name__.startswith("kvarena."):
    raise ImportError("import kvarena.codecs, not codecs (install with: pip install -e .)")
