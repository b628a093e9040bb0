"""Every setting that is no option of a plug-in, declared once: type, default, what it may be.

Hydra composes what is typed into a RunSettings (command/run.py) and checks the types; a Cell takes
its part of it as it is. Ranges are checked by the classes that use the values.
"""

from dataclasses import Field, dataclass, field
from typing import Any

from kvarena.harness.sampling import Sampling

_SAME_ROWS = {"same_rows": True}


def decides_rows(setting: Field) -> bool:
    """Whether what a row says depends on it, so that it is part of a cell's identity."""
    return not setting.metadata.get("same_rows")


@dataclass(frozen=True, kw_only=True)
class CellSettings:
    """Of one cell. Each tells cells apart, a new one too, but for those of _SAME_ROWS.

    task, policy, shape, codec, model: mappings, defined by their yaml and checked by their class;
    Any as well for what may be written in several ways.
    """

    task: Any
    policy: Any
    shape: Any
    codec: Any
    model: Any
    # most tokens of a KV head: 512 | 2k (2048) | 25% of the prompt; 12MB (bytes) | full
    budget: Any = 512
    # inside the compressed prompt | after: the context is compressed alone | first: before it too
    question: str = "inside"
    # of a context with several questions: independent: each after the context alone | dialogue:
    # each after the questions and answers before it
    turns: str = "independent"
    protect: str = "paper"  # paper: as the policy has it | none | 4+64: first and newest tokens
    evict_every: int = 1  # answer tokens between two evictions of a sample
    limit: int | None = field(default=None, metadata=_SAME_ROWS)  # first so many samples; None: all
    # 3/8: the third of eight parts of the samples, for several machines
    shard: Any = field(default=None, metadata=_SAME_ROWS)
    seed: int = 0
    slots: int = field(default=8, metadata=_SAME_ROWS)  # sequences side by side
    # decoding steps as CUDA graphs: faster on a GPU, the same answers
    graphs: bool = field(default=False, metadata=_SAME_ROWS)
    chunk: int = 128  # prompt tokens per pass and sequence
    attention: str = "sdpa"  # sdpa | flash | reference
    device: str = "cpu"  # cpu | cuda | cuda:N
    dtype: str = "auto"  # float32 | bfloat16 | float16 | auto (float32 on cpu, else bfloat16)
    kv_dtype: str = "model"  # of tokens no codec holds: model | float16 | bfloat16
    sampling: Sampling = field(default_factory=Sampling)


@dataclass(frozen=True, kw_only=True)
class RunSettings(CellSettings):
    """Of one command: its cells and what becomes of them."""

    results_dir: str = "results"
    mode: str = "run"  # run | plan: cells, samples, tokens, memory and time, without the model
    repair: bool = False  # true: keep the good lines of a damaged samples.jsonl and go on
    tracker: str = "none"  # none | mlflow | wandb | trackio: gets a copy of every cell's means
    allow_partial: bool = False  # true: show scores of cells that lack samples
    # Of an experiment's yaml alone: what is typed beside its name with -m, a sweep in a line.
    sweeps: list[str] = field(default_factory=list)
