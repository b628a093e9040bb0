"""The engine: token ids in, token ids out, under a budget. The doors are Engine and Request."""

from kvarena.harness.engine.batch import Batch
from kvarena.harness.engine.engine import ENGINE_VERSION, Engine
from kvarena.harness.engine.generation import Generation, KeptTokens
from kvarena.harness.engine.request import Request

__all__ = ["ENGINE_VERSION", "Batch", "Engine", "Generation", "KeptTokens", "Request"]
