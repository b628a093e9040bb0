"""SCBench: several questions about one long context, whose cache they share."""

from kvarena.tasks.scbench.task import SCBench

__all__ = ["SCBench"]
