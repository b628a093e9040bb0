"""Triton kernels against plain torch: compiled on a CUDA device, else in Triton's interpreter."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from kvarena.codecs.kivi import KIVI
from kvarena.harness.engine import attention
from kvarena.harness.engine.attention import (
    AttentionSpec,
    attend_reference,
    attend_sdpa,
    visible_tokens,
)

triton = pytest.importorskip("triton", reason="needs the extra triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# On a GPU these run there, with the others that need one.
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
needs_triton = pytest.mark.skipif(
    DEVICE == "cpu" and not INTERPRETED,
    reason="without a CUDA device, TRITON_INTERPRET=1 must be set before triton is imported",
)
# S, H, K, Q, T, D: most T are no multiple of a tile, two D are no power of two.
SHAPES = [
    (2, 4, 2, 1, 130, 64),
    (2, 6, 2, 37, 100, 80),
    (1, 2, 2, 70, 70, 128),
    (1, 8, 2, 5, 64, 24),
]
if DEVICE == "cuda":
    SHAPES.append((1, 32, 8, 128, 1152, 128))  # a layer of Llama-3.1-8B
HALVES = [torch.bfloat16, torch.float16]


class OnCuda(torch.Tensor):
    """A CPU tensor that takes the branch for CUDA."""

    is_cuda = True  # type: ignore[assignment]


@pytest.fixture(autouse=True)
def _bfloat16_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter multiplies the bits of bfloat16 numbers as integers: widen them first."""
    if not INTERPRETED:
        return
    from triton.language import bfloat16, float32
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def wide(tile: TensorHandle) -> TensorHandle:
        if tile.dtype.scalar != bfloat16:
            return tile
        return TensorHandle((tile.data.astype(np.uint32) << 16).view(np.float32), float32)

    product = InterpreterBuilder.create_dot
    monkeypatch.setattr(
        InterpreterBuilder,
        "create_dot",
        lambda builder, left, right, *rest: product(builder, wide(left), wide(right), *rest),
    )


def random_qkv(
    S: int, H: int, K: int, Q: int, T: int, D: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """With the strides that the engine's have: tokens before heads, slots wider than T."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(S, Q, H, D, generator=generator).transpose(1, 2) * 1.5
    keys, values = torch.randn(2, S, K, T + 9, D, generator=generator)[..., :T, :]
    return tuple(part.to(DEVICE, dtype) for part in (query, keys, values))


def causal_mask(keys: Tensor, Q: int) -> Tensor | None:
    S, K, T, _ = keys.shape
    positions = torch.zeros(S, K, T, device=keys.device)
    return visible_tokens(torch.zeros(S, Q, device=keys.device), positions, Q, None)


def masked_logits(query: Tensor, keys: Tensor, scaling: float) -> Tensor:
    """[S, H, Q, T] float32."""
    repeated = keys.float().repeat_interleave(query.shape[1] // keys.shape[1], dim=1)
    logits = query.float() @ repeated.mT * scaling
    mask = causal_mask(keys, query.shape[2])
    return logits if mask is None else logits.masked_fill(~mask, float("-inf"))


@needs_triton
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [(shape, torch.float32) for shape in SHAPES] + [(SHAPES[-1], half) for half in HALVES],
)
def test_the_kernels_mass_is_the_explicit_sum(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    from kvarena.harness.engine import triton_mass

    query, keys, values = random_qkv(*shape, dtype)
    spec = AttentionSpec(scaling=shape[-1] ** -0.5)
    *expected, _ = attention.attend_with_mass(
        query, keys, values, causal_mask(keys, shape[3]), spec, may_fuse=False
    )
    output, mass = triton_mass.attend_with_mass(query, keys, values, spec.scaling)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(output, expected[0], atol=tolerance, rtol=tolerance)
    # All sums are in float32, whatever the numbers that go in.
    torch.testing.assert_close(mass, expected[1], atol=1e-4, rtol=1e-4)


@needs_triton
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernels_log_sums_are_those_of_the_masked_logits(shape: tuple[int, ...]) -> None:
    from kvarena.harness.engine import triton_mass

    query, keys, _ = random_qkv(*shape, torch.float32)
    # Far from 0, where an unshifted sum of exponentials would overflow.
    query = query * 40
    sums = triton_mass.log_sum_exp(query, keys, 0.25)
    expected = masked_logits(query, keys, 0.25).logsumexp(dim=-1)
    torch.testing.assert_close(sums, expected, atol=1e-4, rtol=1e-5)


@needs_triton
@pytest.mark.parametrize("num_queries", [1, 7])
def test_torchs_flash_attention_is_asked_for_output_and_log_sums(
    num_queries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its place is taken by one that answers as it does: grouped heads, lower-right mask."""
    from kvarena.harness.engine import triton_mass

    def flash(
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        dropout: float,
        *,
        is_causal: bool,
        scale: float,
    ) -> tuple[Tensor, ...]:
        assert dropout == 0
        logits = masked_logits(query, keys, scale)
        if not is_causal:
            logits = query.float() @ keys.float().mT * scale
        repeated = values.repeat_interleave(query.shape[1] // values.shape[1], dim=1)
        return logits.softmax(dim=-1).to(values) @ repeated, logits.logsumexp(dim=-1), query, query

    query, keys, values = random_qkv(2, 6, 2, num_queries, 40, 64, torch.bfloat16)
    spec = AttentionSpec(scaling=0.125)
    monkeypatch.setattr(torch.backends.cuda, "can_use_flash_attention", lambda _: True)
    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_flash_attention", flash)
    monkeypatch.setattr(triton_mass, "log_sum_exp", None)
    output, mass = triton_mass.attend_with_mass(query, keys, values, spec.scaling)
    *expected, _ = attention.attend_with_mass(
        query, keys, values, causal_mask(keys, num_queries), spec, may_fuse=False
    )
    torch.testing.assert_close(output, expected[0], atol=2e-2, rtol=2e-2)
    torch.testing.assert_close(mass, expected[1], atol=1e-4, rtol=1e-4)


@needs_triton
def test_on_cuda_mass_comes_from_the_kernel_unless_it_cannot_know_the_mask(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from kvarena.harness.engine import triton_mass

    calls = []
    kernel = triton_mass.attend_with_mass
    monkeypatch.setattr(
        triton_mass, "attend_with_mass", lambda *args: calls.append(args) or kernel(*args)
    )

    def calls_kernel(spec: AttentionSpec, dtype: torch.dtype, *, may_fuse: bool = True) -> bool:
        calls.clear()
        query, keys, values = random_qkv(1, 4, 2, 3, 20, 16, dtype)
        mask = causal_mask(keys, 3)
        inputs = (keys, values, mask, spec)
        *expected, written_out = attention.attend_with_mass(query, *inputs, may_fuse=False)
        assert written_out == "reference"
        query = query.as_subclass(OnCuda)
        *got, ran = attention.attend_with_mass(query, *inputs, may_fuse=may_fuse)
        for part, wanted in zip(got, expected, strict=True):
            torch.testing.assert_close(part.as_subclass(Tensor), wanted, atol=1e-4, rtol=1e-4)
        assert ran == ("triton" if calls else "reference")
        return bool(calls)

    plain, dtype = AttentionSpec(scaling=0.25), torch.float32
    assert calls_kernel(plain, dtype)
    assert not calls_kernel(plain, dtype, may_fuse=False)
    assert not calls_kernel(plain, torch.float64)
    assert not calls_kernel(AttentionSpec(scaling=0.25, softcap=5.0), dtype)
    assert not calls_kernel(AttentionSpec(scaling=0.25, sliding_window=8), dtype)
    sinks = AttentionSpec(scaling=0.25, sink_logits=torch.zeros(4, device=DEVICE))
    assert not calls_kernel(sinks, dtype)


@pytest.mark.parametrize(("num_queries", "num_tokens"), [(5, 33), (9, 9)])
def test_sdpa_on_cuda_names_the_causal_mask_instead_of_passing_it(
    num_queries: int, num_tokens: int
) -> None:
    query, keys, values = random_qkv(2, 6, 2, num_queries, num_tokens, 16, torch.float32)
    spec = AttentionSpec(scaling=0.25)
    expected = attend_reference(query, keys, values, causal_mask(keys, num_queries), spec)
    nothing_visible = torch.zeros(1, 1, num_queries, num_tokens, dtype=torch.bool, device=DEVICE)
    output = attend_sdpa(query.as_subclass(OnCuda), keys, values, nothing_visible, spec)
    torch.testing.assert_close(output.as_subclass(Tensor), expected)


# M, G, Q, blocks, rows, D, bits, group
CODED = [(2, 3, 1, 11, 32, 64, 2, 32), (2, 2, 5, 9, 32, 80, 4, 16), (1, 4, 20, 3, 13, 18, 2, 6)]


def coded_heads(
    M: int, G: int, Q: int, C: int, R: int, D: int, bits: int, group: int, dtype: torch.dtype
) -> tuple[Tensor, list, Tensor, Tensor, Tensor]:
    """Query [H', Q, D], blocks, live [C, M, R], and what decodes: keys, values [M, C * R, D]."""
    generator = torch.Generator().manual_seed(0)
    kivi = KIVI(bits=bits, block=R, group=group)
    keys, values = torch.randn(2, C, M, R, D, generator=generator).to(DEVICE)
    blocks = [kivi.encode(k * 3 + 1, v * 1e-4, None) for k, v in zip(keys, values, strict=True)]
    decoded = [
        part.to(dtype).float().unflatten(0, (C, M, R)).transpose(0, 1).flatten(1, 2)
        for part in kivi.decode(blocks)
    ]
    query = torch.randn(M * G, Q, D, generator=generator).to(DEVICE, dtype)
    live = (torch.rand(C, M, R, generator=generator) > 0.4).to(DEVICE)
    return query, blocks, live, *decoded


def attend_decoded(
    query: Tensor, keys: Tensor, values: Tensor, live: Tensor | None, scaling: float
) -> tuple[Tensor, Tensor]:
    """Output [H', Q, D] and log-sum-exp [H', Q] of every row's explicit softmax."""
    rows = query.float().view(len(keys), -1, query.shape[-1])
    logits = rows @ keys.mT * scaling
    if live is not None:
        alive = live.transpose(0, 1).flatten(1)[:, None]
        logits = logits.masked_fill(~alive, float("-inf"))
    output = logits.softmax(dim=-1).nan_to_num() @ values
    return output.view_as(query), logits.logsumexp(dim=-1).view(query.shape[:2])


@needs_triton
@pytest.mark.parametrize(
    ("shape", "has_dead", "dtype"),
    [
        *((shape, True, torch.float32) for shape in CODED),
        (CODED[0], False, torch.float32),
        (CODED[0], True, torch.bfloat16),
    ],
)
def test_attention_over_coded_tokens_is_that_over_decoded_ones(
    shape: tuple[int, ...], has_dead: bool, dtype: torch.dtype
) -> None:
    from kvarena.codecs.kivi_triton import attend_coded

    query, blocks, live, keys, values = coded_heads(*shape, dtype)
    live[0] = False  # a whole block, and the first to be met
    mask = live if has_dead else None
    expected = attend_decoded(query, keys, values, mask, 0.2)
    output, log_sums = attend_coded(query, blocks, shape[6], mask, 0.2)
    # The interpreter cuts bfloat16 numbers off instead of rounding them.
    rtol = 1e-5 if dtype == torch.float32 else 4e-2
    torch.testing.assert_close(log_sums, expected[1], atol=rtol, rtol=rtol)
    torch.testing.assert_close(output, expected[0], atol=rtol * 1e-4, rtol=rtol)


@needs_triton
def test_coded_tokens_merge_with_the_exact_window() -> None:
    """Also for a head whose coded tokens are all evicted: then the window is all there is."""
    from kvarena.codecs.base import merge
    from kvarena.codecs.kivi_triton import attend_coded

    query, blocks, live, keys, values = coded_heads(*CODED[0], torch.float32)
    live[:, 1] = False
    coded = attend_coded(query, blocks, CODED[0][6], live, 0.2)
    assert coded[1][3:].eq(float("-inf")).all()
    assert coded[0][3:].eq(0).all()
    window_keys, window_values = torch.randn(2, *keys[:, :5].shape, device=DEVICE)
    window = attend_decoded(query, window_keys, window_values, None, 0.2)
    output, log_sums = merge(*(torch.stack(parts) for parts in zip(coded, window, strict=True)))
    all_live = torch.cat([live.transpose(0, 1).flatten(1), live.new_ones(2, 5)], dim=1)
    expected = attend_decoded(
        query,
        torch.cat([keys, window_keys], dim=1),
        torch.cat([values, window_values], dim=1),
        all_live[None],
        0.2,
    )
    torch.testing.assert_close(output, expected[0])
    torch.testing.assert_close(log_sums, expected[1])


@needs_triton
def test_on_cuda_kivi_attends_to_its_blocks_as_they_are() -> None:
    query, blocks, live, keys, values = coded_heads(*CODED[0], torch.float32)
    kivi = KIVI(bits=CODED[0][6], block=CODED[0][4], group=CODED[0][7])
    on_cuda = query if DEVICE == "cuda" else query.as_subclass(OnCuda)
    found = kivi.attend(on_cuda, blocks, live, 0.2)
    assert found is not None
    expected = attend_decoded(query, keys, values, live, 0.2)
    for part, wanted in zip(found, expected, strict=True):
        torch.testing.assert_close(part.as_subclass(Tensor), wanted, atol=1e-5, rtol=1e-5)
    assert kivi.attend(on_cuda.double(), blocks, live, 0.2) is None
    assert kivi.attend(query.cpu(), blocks, live, 0.2) is None


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from kvarena.codecs import kivi_triton
from kvarena.harness.engine import triton_mass

POINTERS = {"units": "*fp32", "key_codes": "*u8", "value_codes": "*u8", "live": "*u8",
            "key_bounds": "*fp16", "value_bounds": "*fp16"}
MASS = dict(K=8, D=256, BLOCK_R=64, BLOCK_T=64, BLOCK_D=256)
CODED = dict(HAS_DEAD=True, BITS=2, D=128, GROUPS=4, BLOCK_P=16, BLOCK_R=64, BLOCK_D=128)
for kernel, constants in [(triton_mass._column_mass, MASS), (triton_mass._log_sum_exp, MASS),
                          (kivi_triton._attend_part, CODED)]:
    kinds = {name: "i32" for name in kernel.arg_names}
    kinds |= {name: POINTERS[name] for name in POINTERS if name in kinds}
    kinds |= dict.fromkeys({"log_sums", "mass", "sums", "outputs"} & set(kinds), "*fp32")
    kinds |= dict.fromkeys({"query", "keys"} & set(kinds), "*bf16") | {"scaling": "fp32"}
    kinds |= dict.fromkeys(constants, "constexpr")
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, kinds, places)
    for capability in (80, 90):
        target = GPUTarget("cuda", capability, 32)
        shared = triton.compile(source, target=target, options={"num_stages": 2}).metadata.shared
        assert shared <= 99 * 1024, (kernel, capability, shared)
"""


@pytest.mark.slow
def test_the_kernels_compile_for_ampere_and_hopper(tmp_path: object) -> None:
    """The interpreter accepts what the compiler refuses. Compiling needs no device."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", COMPILE],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
