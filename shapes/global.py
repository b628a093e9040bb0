"""Global: all heads of all layers share one budget by their scores.

The L * K * N best tokens of the whole model stay, once a pass has gone through all layers; but
first every head keeps its own best alpha * N.
Paper: the non-uniform mode of "KVzip: Query-Agnostic KV Cache Compression with Context
Reconstruction", https://arxiv.org/abs/2505.23416, section 3; the floor is Ada-KV's.

Differs from the paper: it goes with every score, so a score must mean the same in every layer;
each chunk of the prompt is settled as it comes, within the bound.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

from kvarena.shapes.ada import Ada


@dataclass(kw_only=True)
class Global(Ada):
    """alpha: share of N that each head keeps whatever the others score; 1 is uniform."""

    scope: ClassVar[Literal["head", "layer", "model"]] = "model"
