"""What the harness owns of the configuration; tasks, policies, codecs, models bring their yaml."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class SamplingConfig:
    """temperature 0 is greedy; top_k 0, top_p 1 and min_p 0 are off."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


@dataclass
class RunConfig:
    """Types are checked by Hydra; ranges by the classes that use the values.

    Any: what a task, policy, codec or model holds is defined by its yaml and checked by its class.
    """

    task: Any = None
    policy: Any = None
    codec: Any = None
    model: Any = None
    budget: Any = 512  # 512 | 2k | 25% | 12MB | full
    question: str = (
        "inside"  # inside | after | first: is the context compressed with the question in sight?
    )
    limit: int | None = None  # first so many samples
    shard: Any = None  # 3/8: the third of eight parts of the samples, by sample id
    seed: int = 0
    slots: int = 8  # sequences side by side
    chunk: int = 128  # prompt tokens per pass and sequence
    attention: str = "sdpa"  # sdpa | flash | reference
    device: str = "cpu"
    kv_dtype: str = "model"  # of the cache: model | float16 | bfloat16
    dtype: str = "auto"  # float32 | bfloat16 | float16 | auto (float32 on cpu, else bfloat16)
    results_dir: str = "results"
    mode: str = "run"  # run | plan (what it would take, without loading the model)
    drift: str = "refuse"  # refuse | fork: same settings, but other data, weights or policy code
    repair: bool = False  # keep the good lines of a damaged samples.jsonl and go on
    tracker: str = "none"  # none | mlflow | wandb | trackio: gets a copy of every cell's means
    allow_partial: bool = False  # show scores of cells that lack samples
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
