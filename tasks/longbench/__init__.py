"""LongBench: 21 tasks on long texts in English, Chinese and code, and LongBench-E, by the book."""

from kvarena.tasks.longbench.task import LongBench

__all__ = ["LongBench"]
