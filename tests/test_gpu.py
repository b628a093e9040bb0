"""What only a CUDA device can show: the same tokens as the CPU, bounded memory, no host waits.

The kernels' own tests are in test_triton.py; on a CUDA device they run there.
"""

import importlib.util

import pytest
import torch
from torch import Tensor

from kvarena.harness.engine import Engine
from kvarena.harness.engine.flash_source import PACKAGES
from kvarena.harness.engine.forward_pass import ForwardPass
from kvarena.harness.registry import build, choices, load_choice
from kvarena.policies.base import Policy
from kvarena.policies.h2o import H2O
from kvarena.policies.keydiff import KeyDiff
from toys import VOCAB, toy_model, toy_prompt

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("toy_heads"),
]
OPTIONS = {"budget_tokens": 48, "chunk_tokens": 16, "slots": 2}
# No token twice: to Locret equal tokens of the first layer are equal but for the rounding of their
# positions, and which of them goes would be up to the device.
PROMPTS = [
    (torch.randperm(VOCAB - 3, generator=torch.Generator().manual_seed(seed))[:length] + 3).tolist()
    for seed, length in enumerate((120, 75, 33))
]


def policy_named(name: str) -> Policy:
    return build(load_choice("policy", name))


@pytest.mark.parametrize("attention", ["sdpa", "reference"])
@pytest.mark.parametrize("name", choices("policy"))
def test_float32_gives_the_same_tokens_on_cuda_as_on_the_cpu(name: str, attention: str) -> None:
    """On the CPU these tokens are also those of float64, so no near tie decides any of them."""

    def answers(device: str) -> list[list[int]]:
        model = toy_model().to(device)
        engine = Engine(model, policy_named(name), attention=attention, **OPTIONS)
        return [answer.token_ids for answer in engine.generate(PROMPTS, max_new_tokens=24)]

    assert answers("cuda") == answers("cpu")


@pytest.mark.parametrize("attention", ["sdpa", "flash"])
@pytest.mark.parametrize("name", ["full", "h2o", "keydiff"])
def test_bfloat16_stays_near_the_written_out_attention(name: str, attention: str) -> None:
    if attention == "flash" and not any(map(importlib.util.find_spec, PACKAGES)):
        pytest.skip("needs the extra flash or kernels")
    model = toy_model(dtype=torch.bfloat16, initializer_range=0.05).cuda()

    def logits(attention: str) -> Tensor:
        # Under the budget, so that rounding cannot lead to other kept tokens.
        options = OPTIONS | {"budget_tokens": 120, "attention": attention}
        engine = Engine(model, policy_named(name), **options)
        answer = next(engine.generate([toy_prompt(110)], max_new_tokens=8, record_logits="all"))
        assert answer.logits is not None
        return answer.logits[:110].float()

    expected = logits("reference")
    assert (logits(attention) - expected).abs().amax() < 0.05 * expected.std()


@pytest.mark.parametrize("policy", [KeyDiff(), H2O()], ids=["keydiff", "h2o"])
def test_a_longer_prompt_takes_no_more_memory(policy: Policy) -> None:
    model = toy_model(dtype=torch.bfloat16).cuda()

    def peak_bytes(prompt_tokens: int) -> int:
        torch.cuda.reset_peak_memory_stats()
        engine = Engine(model, policy, budget_tokens=256, chunk_tokens=128)
        next(engine.generate([toy_prompt(prompt_tokens)], max_new_tokens=4))
        return torch.cuda.max_memory_allocated()

    peak_bytes(1000)  # workspaces of libraries, and Triton's compiler
    # A full cache would grow by 3 layers x 2 heads x 32 numbers x 2 bytes = 384 bytes a token.
    assert peak_bytes(20_000) - peak_bytes(1000) < 0.05 * 384 * 19_000


@pytest.mark.parametrize("attention", ["sdpa", "reference"])
@pytest.mark.parametrize("name", choices("policy"))
def test_no_layer_makes_the_host_wait(
    name: str, attention: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From appending to eviction: CUDA refuses whatever would need a number on the host."""
    attend, calls = ForwardPass.attend, []

    def strict(arena: ForwardPass, *args: object) -> Tensor:
        torch.cuda.set_sync_debug_mode("error" if len(calls) >= 3 else "default")
        try:
            calls.append(arena)
            return attend(arena, *args)  # type: ignore[arg-type]
        finally:
            torch.cuda.set_sync_debug_mode("default")

    model = toy_model(dtype=torch.bfloat16).cuda()
    monkeypatch.setattr(ForwardPass, "attend", strict)
    engine = Engine(model, policy_named(name), attention=attention, **OPTIONS)
    list(engine.generate(PROMPTS, max_new_tokens=4))
    # The first pass through the 3 layers sets up: buffers, trained heads, compiled kernels.
    assert len(calls) > 6
