"""Needles in a haystack, random ones, scored without a judge."""

from kvarena.tasks.needle.task import Needle

__all__ = ["Needle"]
