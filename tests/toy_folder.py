"""What the command line needs to run offline in a second: a model folder and a haystack."""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kvarena.harness.cells.cell import Cell
from kvarena.harness.registry import load_choice
from kvarena.harness.settings import CellSettings
from toys import toy_model

SPECIAL_TOKENS = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>"}
CONTEXT_TOKENS = 1024


def save_model_folder(folder: Path) -> Path:
    """A tiny random Llama and a tokenizer with one token per byte; returns ``folder``."""
    symbols = [*SPECIAL_TOKENS.values(), *sorted(pre_tokenizers.ByteLevel.alphabet())]
    ids = {symbol: index for index, symbol in enumerate(symbols)}
    backend = Tokenizer(models.BPE(vocab=ids, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL_TOKENS).save_pretrained(folder)
    model = toy_model(
        "llama",
        vocab_size=len(symbols),
        max_position_embeddings=CONTEXT_TOKENS,
        **{f"{name}_id": ids[symbol] for name, symbol in SPECIAL_TOKENS.items()},
    )
    model.save_pretrained(folder)
    return folder


def save_haystack(folder: Path) -> Path:
    """One text file of 60 short sentences."""
    folder.mkdir(parents=True, exist_ok=True)
    text = "\n".join(f"Line {number} says that all is well." for number in range(60))
    (folder / "lines.txt").write_text(text, encoding="utf-8")
    return folder


def toy_overrides(folder: Path) -> list[str]:
    """Overrides for two needles of 400 tokens; makes model and haystack below ``folder``."""
    return [
        f"model={save_model_folder(folder / 'toy')}",
        f"task.haystack={save_haystack(folder / 'hay')}",
        "task.lengths=[400]",
        "task.depths=[0,100]",
        "task.max_new_tokens=6",
        "budget=64",
    ]


Choice = str | dict[str, Any]  # a name, or the settings themselves


def toy_cell(
    folder: Path,
    policy: Choice = "keydiff",
    codec: Choice = "none",
    shape: Choice = "uniform",
    **changes: Any,
) -> Cell:
    """Two needles for the model and haystack saved below ``folder`` as "toy" and "hay".

    changes: of any other setting.
    """
    task = {"haystack": str(folder / "hay"), "lengths": [300, 400], "depths": [50]}
    settings: dict[str, Any] = {
        "task": load_choice("task", "needle") | task | {"max_new_tokens": 6},
        "policy": load_choice("policy", policy) if isinstance(policy, str) else policy,
        "codec": load_choice("codec", codec) if isinstance(codec, str) else codec,
        "shape": load_choice("shape", shape) if isinstance(shape, str) else shape,
        "model": {"name": "toy", "source": str(folder / "toy")},
        "budget": "64",
        "slots": 2,
        "chunk": 32,
    }
    return Cell(settings=CellSettings(**settings | changes))
