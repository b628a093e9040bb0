"""Codecs: stated error bounds, bytes really held, rows taken from codes, and each one's rule."""

import gc
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvarena.codecs.base import Block, Codec, Probes
from kvarena.codecs.bits import pack, power_of_two, unpack
from kvarena.codecs.kivi import KIVI, KIVIBlock
from kvarena.codecs.kvcomp import KVComp, deflate, inflate
from kvarena.codecs.zipcache import ZipCache, ZipCacheBlock
from kvarena.harness.engine import Engine
from kvarena.harness.registry import build, choices, load_choice
from kvarena.policies.full import Full
from toys import toy_model, toy_prompt

GROUP = 4  # channels of a value that share a scale in KIVI
CODECS = {
    "kivi 2 bit": KIVI(bits=2, group=GROUP),
    "kivi 4 bit": KIVI(bits=4, group=GROUP),
    "zipcache": ZipCache(),
    "zipcache per head": ZipCache(unit="head"),
    "zipcache all salient": ZipCache(salient=1.0),
    "zipcache none salient": ZipCache(salient=0.0),
    "zipcache swapped": ZipCache(salient=0.3, salient_bits=2, regular_bits=4),
    "kvcomp": KVComp(),
    "kvcomp per head": KVComp(unit="head"),
    "kvcomp finest": KVComp(rel_k=0.004, rel_v=0.004),
    "kvcomp coarsest": KVComp(rel_k=0.5, rel_v=0.5),
}
each_codec = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS.keys())
M, R, D = 3, 32, 16


def tokens(seed: int = 0, rows: int = R, dim: int = D) -> tuple[Tensor, Tensor, Tensor]:
    """Random keys and values [M, R, D] and saliency [M, R]."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.randn(M, rows, dim, generator=generator)
    values = torch.randn(M, rows, dim, generator=generator)
    return keys, values, torch.rand(M, rows, generator=generator)


def decoded(codec: Codec, block: Block) -> tuple[Tensor, Tensor]:
    """Keys and values [M, R, D]."""
    keys, values = codec.decode([block])
    return keys.unflatten(0, (block.num_heads, -1)), values.unflatten(0, (block.num_heads, -1))


def gathered(numbers: Tensor, rows: Tensor) -> Tensor:
    return numbers.gather(1, rows[..., None].expand(*rows.shape, numbers.shape[-1]))


# ---- the stated error ----


def spread(numbers: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Range and largest magnitude over ``dims``."""
    low, high = numbers.amin(dims, keepdim=True), numbers.amax(dims, keepdim=True)
    return high - low, numbers.abs().amax(dims, keepdim=True)


def bits_bound(numbers: Tensor, dims: tuple[int, ...], bits: int | Tensor) -> Tensor:
    """What bits.py states, without the term of the whole tensor."""
    range_, largest = spread(numbers, dims)
    return range_ / (2 * (2**bits - 1)) + largest / 1000


def of_tensor(numbers: Tensor) -> float:
    return max(float(numbers.abs().max()), 2.0**-90) / 2**20


def kivi_bounds(codec: KIVI, block: Block, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    grouped = values.unflatten(-1, (-1, min(codec.group, values.shape[-1])))
    of_values = bits_bound(grouped, (-1,), codec.bits).expand_as(grouped).flatten(-2)
    of_keys = bits_bound(keys, (1,), codec.bits) + of_tensor(keys)
    return of_keys, of_values + of_tensor(values)


def salient_rows(block: Block) -> Tensor:
    assert isinstance(block, ZipCacheBlock)
    return unpack(block.is_salient, 1, block.num_rows).bool()


def zipcache_bounds(
    codec: ZipCache, block: Block, keys: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    assert isinstance(block, ZipCacheBlock)
    is_salient = salient_rows(block)
    of_keys = torch.zeros_like(keys)
    for head in range(len(keys)):
        for rows, bits in (
            (is_salient[head], codec.salient_bits),
            (~is_salient[head], codec.regular_bits),
        ):
            if rows.any():
                of_keys[head, rows] = bits_bound(keys[head, rows], (0,), bits).expand_as(
                    keys[head, rows]
                )
    unit = power_of_two(block.exponents[1]).double()
    divisors = block.divisors.double() * unit
    row_bits = torch.where(is_salient, codec.salient_bits, codec.regular_bits)[..., None]
    dims = (0, 2) if codec.unit == "layer" else (2,)
    of_values = divisors * bits_bound(values / divisors, dims, row_bits)
    return of_keys + of_tensor(keys), of_values + of_tensor(values)


def kvcomp_bounds(
    codec: KVComp, block: Block, keys: Tensor, values: Tensor
) -> tuple[Tensor, Tensor]:
    heads = (0,) if codec.unit == "layer" else ()
    found = []
    for numbers, rel, dims in (
        (keys, codec.rel_k, (*heads, 1, 2)),
        (values, codec.rel_v, (*heads, 2)),
    ):
        range_, largest = spread(numbers, dims)
        step = torch.maximum(rel * range_, largest * 2.0**-14).clamp_min(2.0**-120)
        found.append(step / 2 + largest * 2.0**-22)
    return found[0], found[1]


BOUNDS: dict[type, Callable[..., tuple[Tensor, Tensor]]] = {
    KIVI: kivi_bounds,
    ZipCache: zipcache_bounds,
    KVComp: kvcomp_bounds,
}


def check_bound(codec: Codec, keys: Tensor, values: Tensor, saliency: Tensor) -> None:
    block = codec.encode(keys, values, saliency)
    exact = keys.double(), values.double()
    bounds = BOUNDS[type(codec)](codec, block, *exact)
    for back, numbers, bound in zip(decoded(codec, block), exact, bounds, strict=True):
        assert back.dtype == torch.float32
        assert back.shape == numbers.shape
        error = (back.double() - numbers).abs()
        assert (error <= bound).all(), f"error over its bound by {(error - bound).max()}"


KINDS = ("normal", "constant", "zero", "outlier token", "outlier channel", "offset", "two scales")


def numbers_of(kind: str, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Numbers of one kind, up to about 1e4."""
    numbers = torch.randn(shape, generator=generator)
    if kind == "constant":
        numbers = numbers.flatten()[0].expand(shape).clone()
    elif kind == "zero":
        numbers = torch.zeros(shape)
    elif kind == "outlier token":
        numbers[:, 0] *= 3000
    elif kind == "outlier channel":
        numbers[..., 0] *= 3000
    elif kind == "offset":
        numbers = 20 + numbers / 100
    elif kind == "two scales":
        numbers[-1] *= 2.0**-18
    return numbers


@each_codec
@settings(max_examples=25, deadline=None)
@given(
    kinds=st.tuples(st.sampled_from(KINDS), st.sampled_from(KINDS)),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 40), st.sampled_from([4, 12, 64])),
    # The exponent of a common factor: float32 holds numbers that float16 cannot.
    kind=st.sampled_from(
        [
            (torch.float32, 0),
            (torch.float32, 110),
            (torch.float32, -110),
            (torch.float16, 2),
            (torch.float16, -20),
            (torch.bfloat16, 0),
            (torch.bfloat16, 100),
        ]
    ),
    seed=st.integers(0, 2**32),
)
def test_numbers_come_back_within_the_stated_error(
    codec: Codec,
    kinds: tuple[str, str],
    shape: tuple[int, int, int],
    kind: tuple[torch.dtype, int],
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    dtype, exponent = kind
    keys, values = (
        (numbers_of(name, shape, generator) * 2.0**exponent).clamp(-(2.0**126), 2.0**126).to(dtype)
        for name in kinds
    )
    keys, values = (
        numbers.nan_to_num(posinf=65504, neginf=-65504) if dtype == torch.float16 else numbers
        for numbers in (keys, values)
    )
    check_bound(codec, keys, values, torch.rand(shape[:2], generator=generator))


any_number = st.one_of(
    st.floats(-(2.0**126), 2.0**126, width=32, allow_nan=False),
    st.floats(-4, 4, width=16),
    st.sampled_from([0.0, 1.0, 65504.0, 2.0**-24, 2.0**-149, -(2.0**126)]),
)


@each_codec
@settings(max_examples=25, deadline=None)
@given(drawn=st.lists(any_number, min_size=48, max_size=48))
def test_any_mixture_of_numbers_comes_back_within_the_stated_error(
    codec: Codec, drawn: list[float]
) -> None:
    keys, values = torch.tensor(drawn).view(2, 2, 3, 4)
    saliency = torch.tensor([[0.1, 0.3, 0.2], [0.5, 0.4, 0.3]])
    check_bound(codec, keys, values, saliency)


@each_codec
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("side", [0, 1], ids=["keys", "values"])
def test_numbers_that_are_not_finite_are_refused(codec: Codec, bad: float, side: int) -> None:
    keys, values, saliency = tokens()
    (keys, values)[side][1, 2, 3] = bad
    with pytest.raises(ValueError, match=f"^{('keys', 'values')[side]} hold a number that cannot"):
        codec.encode(keys, values, saliency)


# ---- rows taken from codes ----


@each_codec
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_taken_rows_decode_to_the_very_same_numbers(codec: Codec, data: st.DataObject) -> None:
    block = codec.encode(*tokens())
    expected = decoded(codec, block)
    for _ in range(2):  # the second time from what was taken
        count = data.draw(st.integers(1, block.num_rows))
        row = st.integers(0, block.num_rows - 1)
        chosen = st.lists(row, min_size=count, max_size=count)
        rows = torch.tensor([data.draw(chosen) for _ in range(M)])
        block = codec.take(block, rows)
        expected = gathered(expected[0], rows), gathered(expected[1], rows)
        assert (block.num_heads, block.num_rows) == rows.shape
        for back, numbers in zip(decoded(codec, block), expected, strict=True):
            assert torch.equal(back, numbers)


@each_codec
def test_half_the_rows_take_fewer_bytes(codec: Codec) -> None:
    block = codec.encode(*tokens())
    half = codec.take(block, torch.arange(0, R, 2).expand(M, -1))
    assert half.nbytes < block.nbytes


@pytest.mark.parametrize("codec", [ZipCache(), KVComp()], ids=["zipcache", "kvcomp"])
def test_what_heads_share_stays_shared_while_they_take_the_same_rows(codec: Codec) -> None:
    block = codec.encode(*tokens())
    same = torch.arange(0, R, 2).expand(M, -1)
    ragged = same + torch.tensor([0, 1, 0])[:, None]
    assert shared_scales(codec.take(block, same)) == (1, R // 2)
    assert shared_scales(codec.take(block, ragged)) == (M, R // 2)


def shared_scales(block: Block) -> tuple[int, ...]:
    held = block.value_bounds[0] if isinstance(block, ZipCacheBlock) else block.value_step  # type: ignore[attr-defined]
    return tuple(held.shape)


# ---- what a block does not depend on ----


@each_codec
def test_blocks_decode_to_the_same_bits_together_and_alone(codec: Codec) -> None:
    blocks = [codec.encode(*tokens(seed)) for seed in range(3)]
    # Blocks of other shapes: one whose rows no longer share anything between heads, of a number
    # that fills no byte, and one of fewer heads.
    rows = torch.stack([torch.randperm(R)[: R - 3] for _ in range(M)])
    keys, values, saliency = tokens(3)
    blocks += [codec.take(blocks[0], rows), codec.encode(keys[:2], values[:2], saliency[:2])]
    together = codec.decode(blocks)
    alone = zip(*(codec.decode([block]) for block in blocks), strict=True)
    for numbers, parts in zip(together, alone, strict=True):
        assert torch.equal(numbers, torch.cat(parts))


@pytest.mark.parametrize(
    "codec",
    [KIVI(group=GROUP), ZipCache(unit="head"), KVComp(unit="head")],
    ids=["kivi", "zipcache", "kvcomp"],
)
def test_a_head_with_units_of_its_own_is_coded_as_if_alone(codec: Codec) -> None:
    keys, values, saliency = tokens()
    for numbers in (keys, values):
        numbers[0, 0, 0] = 9  # all heads share the power of two that the largest number sets
        numbers[1] *= 2
    together = decoded(codec, codec.encode(keys, values, saliency))
    alone = decoded(codec, codec.encode(keys[:1], values[:1], saliency[:1]))
    for one, all_ in zip(alone, together, strict=True):
        assert torch.equal(one[0], all_[0])


@each_codec
def test_encoding_repeats_and_leaves_its_input_alone(codec: Codec) -> None:
    inputs = tokens()
    before = [tensor.clone() for tensor in inputs]
    first, second = codec.encode(*inputs), codec.encode(*inputs)
    for tensor, copy in zip(inputs, before, strict=True):
        assert torch.equal(tensor, copy)
    for name, held in vars(first).items():
        same = getattr(second, name)
        assert torch.equal(held, same) if isinstance(held, Tensor) else held == same, name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@each_codec
def test_a_gpu_decodes_to_the_same_bits_as_a_cpu(codec: Codec) -> None:
    keys, values, saliency = tokens()
    rows = torch.stack([torch.randperm(R)[:10] for _ in range(M)])
    found = []
    for device in ("cpu", "cuda"):
        block = codec.encode(keys.to(device), values.to(device), saliency.to(device))
        found.append(decoded(codec, codec.take(block, rows.to(device))))
    for on_cpu, on_gpu in zip(*found, strict=True):
        assert on_gpu.is_cuda
        assert torch.equal(on_gpu.cpu(), on_cpu)


# ---- bytes ----


def reachable_bytes(block: Block) -> int:
    """Bytes of every storage and buffer that the block keeps alive, found without its fields."""
    seen: dict[int, object] = {}
    waiting: list[object] = [vars(block)]
    while waiting:
        held = waiting.pop()
        if id(held) in seen:
            continue
        seen[id(held)] = held
        if not isinstance(held, Tensor | type):
            waiting.extend(gc.get_referents(held))
    storages = {
        held.untyped_storage().data_ptr(): held.untyped_storage().nbytes()
        for held in seen.values()
        if isinstance(held, Tensor)
    }
    streams = sum(len(held) for held in seen.values() if isinstance(held, bytes))
    assert not any(isinstance(held, list | tuple) and len(held) > 8 for held in seen.values())
    return sum(storages.values()) + streams


@each_codec
def test_the_bytes_counted_are_the_bytes_held(codec: Codec) -> None:
    block = codec.encode(*tokens())
    assert block.nbytes == reachable_bytes(block)
    ragged = torch.stack([torch.randperm(R)[:10] for _ in range(M)])
    for rows in (torch.arange(10).expand(M, -1), ragged):
        taken = codec.take(block, rows)
        assert taken.nbytes == reachable_bytes(taken)


def test_kivi_holds_codes_and_two_float16_per_group() -> None:
    block = KIVI(bits=2).encode(*tokens(dim=64))
    assert isinstance(block, KIVIBlock)
    codes, key_groups, value_groups = 2 * M * R * 64 * 2 // 8, M * 64, M * R * 2
    assert block.nbytes == codes + 4 * (key_groups + value_groups) + 2


def test_kivi_starts_at_its_authors_4_bits_for_shared_heads_and_may_settle_at_2() -> None:
    assert KIVI() == KIVI(bits=4)
    assert KIVI().coarser() == KIVI(bits=2)
    assert KIVI(bits=2).coarser() is None


@pytest.mark.parametrize(
    ("codec", "fewest", "most"), [(KIVI(), 128, 159), (KVComp(), 128, 191), (ZipCache(), 128, 255)]
)
def test_as_many_tokens_stay_exact_as_the_docstring_says(
    codec: Codec, fewest: int, most: int
) -> None:
    engine = Engine(toy_model(), Full(), codec=codec, chunk_tokens=32, slots=1)
    batch = engine.batch([toy_prompt(420)], max_new_tokens=260)
    counts: list[int] = []  # of exact tokens, after every pass
    while batch.has_work:
        batch.step()
        counts.extend(batch.layers[0]._num_exact[0][:1])
    since_coding = counts[420 // 32 :]
    assert (min(since_coding), max(since_coding)) == (fewest, most)


def test_zipcache_holds_two_precisions_and_few_scales() -> None:
    block = ZipCache(salient=0.5).encode(*tokens(dim=64))
    codes = 2 * M * 64 * (R // 2) * (4 + 2) // 8
    bounds, divisors, is_salient = 4 * (2 * M * 64 + R), 2 * M * 64, M * R // 8
    assert block.nbytes == codes + bounds + divisors + is_salient + 2


def test_zipcache_holds_nothing_for_a_class_without_tokens() -> None:
    block = ZipCache(salient=1.0).encode(*tokens(dim=64))
    codes, bounds, divisors = 2 * M * 64 * R * 4 // 8, 4 * (M * 64 + R), 2 * M * 64
    assert block.nbytes == codes + bounds + divisors + M * R // 8 + 2


def test_kvcomp_takes_fewer_bytes_than_fixed_bits_where_codes_are_skewed() -> None:
    keys, values, _ = tokens(rows=64, dim=64)
    keys[..., 0] *= 5  # as in models: few channels of keys set the range
    block = KVComp().encode(keys, values, None)
    fixed = keys.numel() * (5 + 4) / 8  # 21 levels of keys, 11 of values
    assert block.nbytes < 0.75 * fixed


@pytest.mark.parametrize(
    "codec",
    [KIVI(), ZipCache(salient=1.0), KVComp(rel_k=0.02, rel_v=0.02)],
    ids=["kivi", "zipcache", "kvcomp"],
)
def test_each_coarser_step_takes_fewer_bytes_until_there_is_none(codec: Codec) -> None:
    inputs = tokens(rows=128, dim=64)
    num_bytes = [codec.encode(*inputs).nbytes]
    before, after = codec, codec.coarser()
    while after is not None:
        assert (after.window, after.block) == (before.window, before.block)
        num_bytes.append(after.encode(*inputs).nbytes)
        before, after = after, after.coarser()
    assert num_bytes == sorted(set(num_bytes), reverse=True)
    assert len(num_bytes) == {KIVI: 2, ZipCache: 6, KVComp: 10}[type(codec)]


# ---- packing and entropy coding ----


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([1, 2, 4]),
    rows=st.integers(0, 5),
    length=st.integers(1, 70),
    seed=st.integers(0, 2**32),
)
def test_packed_codes_come_back_and_fill_their_bytes(
    bits: int, rows: int, length: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**bits, (rows, 2, length), generator=generator, dtype=torch.uint8)
    packed = pack(codes, bits)
    assert packed.shape == (rows, 2, -(-length * bits // 8))
    assert torch.equal(unpack(packed, bits, length), codes)


def test_the_first_code_is_in_the_lowest_bits() -> None:
    # The kernels for CUDA read the bytes by themselves.
    assert pack(torch.tensor([1, 2, 3, 0], dtype=torch.uint8), 2).tolist() == [0b00_11_10_01]
    assert pack(torch.tensor([1, 15], dtype=torch.uint8), 4).tolist() == [0xF1]


@settings(max_examples=100, deadline=None)
@given(
    st.one_of(
        st.binary(min_size=1, max_size=3000),
        # Few codes over and over, then others: a codebook made from the first would miss these.
        st.tuples(st.binary(min_size=1, max_size=3), st.binary(max_size=300)).map(
            lambda drawn: drawn[0] * 20000 + drawn[1]
        ),
    )
)
def test_every_code_survives_entropy_coding_whatever_the_alphabet(codes: bytes) -> None:
    tensor = torch.frombuffer(bytearray(codes), dtype=torch.uint8)
    assert torch.equal(inflate([deflate(tensor), deflate(tensor)]), torch.cat([tensor, tensor]))


def test_codes_that_no_earlier_block_had_survive() -> None:
    codec = KVComp(rel_k=0.004, rel_v=0.004)
    narrow, wide = torch.zeros(M, R, D), torch.linspace(-1, 1, M * R * D).view(M, R, D)
    codec.encode(narrow, narrow, None)
    keys, values = decoded(codec, codec.encode(wide, wide, None))
    assert keys.unique().numel() >= 250  # a step of 0.4 % of the range
    assert (keys - wide).abs().max() <= 0.002 * 2 + 1e-6
    assert (values - wide).abs().max() <= 0.002 * 2 + 1e-6


# ---- ZipCache's classes ----


@pytest.mark.parametrize(("share", "num_salient"), [(0.6, 19), (0.5, 16), (0.0, 0), (1.0, 32)])
def test_the_salient_share_with_the_most_saliency_gets_more_bits(
    share: float, num_salient: int
) -> None:
    codec, inputs = ZipCache(salient=share), tokens()
    is_salient = salient_rows(codec.encode(*inputs))
    for head in range(M):
        best = inputs[2][head].topk(num_salient).indices
        assert set(is_salient[head].nonzero().flatten().tolist()) == set(best.tolist())


def test_salient_tokens_lose_less() -> None:
    codec, inputs = ZipCache(), tokens(rows=128, dim=64)
    block = codec.encode(*inputs)
    is_salient = salient_rows(block)
    for back, numbers in zip(decoded(codec, block), inputs[:2], strict=True):
        error = (back - numbers).abs().mean(dim=-1)
        assert error[is_salient].mean() < 0.3 * error[~is_salient].mean()


def test_channels_with_large_values_do_not_drown_the_others() -> None:
    keys, values, saliency = tokens()
    values[..., 0] *= 100
    codec = ZipCache(salient=1.0)
    _, back = decoded(codec, codec.encode(keys, values, saliency))
    _, undivided = decoded(KIVI(bits=4, group=D), KIVI(bits=4, group=D).encode(keys, values, None))
    rest = slice(1, None)
    error = (back - values)[..., rest].abs().mean()
    assert error < 0.3 * (undivided - values)[..., rest].abs().mean()


def test_zipcache_asks_for_probes_only_where_there_are_two_classes() -> None:
    asked = ZipCache(salient=0.4, recent=0.1, random=0.2, count="text").probes
    assert asked == Probes(recent=0.1, random=0.2, count="text")
    assert ZipCache(salient=0.0).probes is None
    assert ZipCache(salient=1.0).probes is None
    assert KIVI().probes is None
    assert KVComp().probes is None


# ---- options ----


@pytest.mark.parametrize("name", choices("codec"))
def test_the_yaml_is_what_the_bare_class_is(name: str) -> None:
    built = build(load_choice("codec", name))
    assert built == type(built)()
    assert type(built).__module__ == f"kvarena.codecs.{name}"


@pytest.mark.parametrize(
    ("codec", "options", "message"),
    [
        (KIVI, {"bits": 3}, "^bits must be 2 or 4, got 3$"),
        (KIVI, {"group": 0}, "^group must be >= 1 channel, got 0$"),
        (KIVI, {"window": -1}, "^window must be >= 0 tokens, got -1$"),
        (ZipCache, {"salient": 1.1}, "^salient must be a share from 0 to 1, got 1.1$"),
        (ZipCache, {"recent": -0.1}, "^recent must be a share from 0 to 1, got -0.1$"),
        (ZipCache, {"regular_bits": 8}, "^regular_bits must be 2 or 4, got 8$"),
        (ZipCache, {"count": "all"}, "^count must be one of probes, text, got 'all'$"),
        (ZipCache, {"unit": "block"}, "^unit must be one of layer, head, got 'block'$"),
        (KVComp, {"rel_k": 0.003}, "^rel_k must be from 0.004 to 0.5, got 0.003$"),
        (KVComp, {"rel_v": float("nan")}, "^rel_v must be from 0.004 to 0.5, got nan$"),
        (KVComp, {"unit": "token"}, "^unit must be one of layer, head, got 'token'$"),
    ],
)
def test_an_option_out_of_range_is_refused(codec: type[Codec], options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        codec(**options)


def test_a_group_that_does_not_divide_the_head_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^group=12 must divide the head dimension 16$"):
        KIVI(group=12).encode(*tokens())


def test_a_head_smaller_than_a_group_is_one_group() -> None:
    inputs = tokens()
    small, whole = KIVI(group=64).encode(*inputs), KIVI(group=D).encode(*inputs)
    assert torch.equal(decoded(KIVI(), small)[1], decoded(KIVI(), whole)[1])
