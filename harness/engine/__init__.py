"""The engine: token ids in, token ids out, under a budget. The door is ``Engine``."""

from kvarena.harness.engine.engine import ENGINE_VERSION, Engine
from kvarena.harness.engine.sequence import Generation, KeptTokens

__all__ = ["ENGINE_VERSION", "Engine", "Generation", "KeptTokens"]
