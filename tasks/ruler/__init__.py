"""RULER: 13 synthetic tasks at any length; is the whole context still in use there?"""

from kvarena.tasks.ruler.task import Ruler

__all__ = ["Ruler"]
