"""Part of kvarena; import it as ``kvarena.tasks``."""

if not __name__.startswith("kvarena."):
    raise ImportError("import kvarena.tasks, not tasks (install with: pip install -e .)")
