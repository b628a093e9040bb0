"""From a model's name to its weights, tokenizer and context length.

A name is a preset (``conf/model/<name>.yaml``), a hub id, or a local folder. A preset's source may
be ``package:<distribution>``: a GGUF file that an installed Python package carries (gguf.py).
"""

import importlib.resources
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import yaml
from huggingface_hub import constants
from huggingface_hub.utils import get_session
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import logging as transformers_logging

from kvarena.harness.errors import UsageError
from kvarena.harness.models.devices import check_device, resolve_dtype
from kvarena.harness.models.gguf import packaged_model
from kvarena.harness.models.packed_linear import pack_linear_layers
from kvarena.harness.registry import check_location, choices, unknown
from kvarena.tasks.base import Tokenizer

_PACKAGE = "package:"


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """name: label in results; source: hub id | folder | package:<distribution>."""

    name: str
    source: str
    revision: str | None = None

    def __post_init__(self) -> None:
        if not self.source:
            raise UsageError(
                f"model {self.name} names no source; give a hub id (model=org/name) or a folder "
                "(model=/path/to/folder)"
            )

    @property
    def is_packaged(self) -> bool:
        return self.source.startswith(_PACKAGE)

    @property
    def is_on_hub(self) -> bool:
        return not self.is_packaged and not Path(self.source).is_dir()


def find_model(name: str) -> ModelSpec:
    """The preset of that name, else the name itself as a hub id or folder."""
    preset = importlib.resources.files("kvarena.conf") / "model" / f"{name}.yaml"
    if "/" not in name and preset.is_file():
        return ModelSpec(**yaml.safe_load(preset.read_text()))
    name = os.path.expanduser(name)
    if "/" not in name and not Path(name).is_dir():
        raise UsageError(unknown("model", name, choices("model")) + " (or a hub id, or a folder)")
    return ModelSpec(name=Path(name).name, source=name)


def load_model(
    name: str, *, device: str = "cpu", dtype: str = "auto", packed: bool = True
) -> tuple[PreTrainedModel, Tokenizer]:
    """Model in eval mode and tokenizer. Raises UsageError for a name that leads nowhere.

    packed: linear layers in bfloat16 on a CPU are laid out for speed (packed_linear.py).
    """
    spec = find_model(name)
    model = load_weights(spec, device=device, dtype=dtype, packed=packed)
    return model, load_tokenizer(spec)


def load_tokenizer(spec: ModelSpec) -> Tokenizer:
    with _loading(spec):
        return AutoTokenizer.from_pretrained(**_source(spec))


def load_config(spec: ModelSpec) -> PreTrainedConfig:
    """The model's configuration, without its weights."""
    with _loading(spec):
        return AutoConfig.from_pretrained(**_source(spec))


def load_weights(
    spec: ModelSpec, *, device: str, dtype: str, packed: bool = True
) -> PreTrainedModel:
    """dtype: float32 | bfloat16 | float16 | auto (float32 on the CPU, bfloat16 elsewhere).

    packed: see ``load_model``.
    """
    check_device(device)
    with _loading(spec):
        model, loaded = AutoModelForCausalLM.from_pretrained(
            **_source(spec),
            dtype=resolve_dtype(dtype, device),
            output_loading_info=True,
        )
    if loaded["missing_keys"]:  # transformers would go on with random numbers in their place
        raise UsageError(
            f"model {spec.name}: {len(loaded['missing_keys'])} weights are missing in "
            f"{spec.source!r}, {min(loaded['missing_keys'])} for one; it is incomplete or of "
            "another architecture than its config.json says"
        )
    model = model.to(device).eval()
    if packed:
        pack_linear_layers(model)
    return model


@contextmanager
def _loading(spec: ModelSpec) -> Iterator[None]:
    """No progress bars; transformers' 'cannot find it' becomes one line that says what to do."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    except UsageError:
        raise
    # ValueError: an unknown architecture, a tokenizer that is not there, or broken JSON.
    # UnpicklingError: a .bin file that holds more than weights, none of which is ever run.
    except (OSError, ValueError, SafetensorError, UnpicklingError) as error:
        reason = str(error).strip().splitlines()[0]
        if spec.is_on_hub and hub_is_out_of_reach():
            why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "the hub does not answer"
            reason = f"no such folder here, no earlier download, and {why}"
        raise UsageError(
            f"model {spec.name}: cannot load {spec.source!r} ({reason}); give a folder that holds "
            "it (model=/path/to/folder), or go online or log in for a hub id"
        ) from error
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


def _source(spec: ModelSpec) -> dict[str, Any]:  # Any: transformers' own options
    """Where transformers looks; of a hub out of reach, at what was downloaded before."""
    return {
        "pretrained_model_name_or_path": locate(spec),
        "revision": spec.revision,
        "local_files_only": spec.is_on_hub and hub_is_out_of_reach(),
    }


@cache
def hub_is_out_of_reach() -> bool:
    """Asked once, with a short wait: the hub's client tries each file for half a minute."""
    try:
        get_session().head(constants.ENDPOINT, timeout=5.0)
    except Exception:  # of the HTTP library, which is another one in each version of the client
        return True
    return False


def locate(spec: ModelSpec) -> str:
    """Folder or hub id; a packaged model is converted first if it has not been.

    Raises UsageError for a folder that is not there.
    """
    if spec.is_packaged:
        return str(packaged_model(spec.name, spec.source.removeprefix(_PACKAGE)))
    check_location(spec.source)
    return spec.source
