"""Retaining heads in training: what they read, what they should say, and their file.

The target of a prompt token is the largest attention logit that any query of the answer gives it,
over the query heads of its group: "Locret", https://arxiv.org/abs/2410.01805, section 3.3. Loss and
its constants: appendix A.1 there.

Shape letters: L layers, H query heads, K KV heads, P prompt tokens, A answer tokens, D head dim,
F = (H + 2K) * D features of a token.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvarena.harness.engine.attention import KERNELS, AttentionSpec, Kernel
from kvarena.harness.engine.rotary import KeyRotator
from kvarena.harness.files import replacing
from kvarena.harness.training.locret_texts import TrainingSample
from kvarena.harness.training.watched_pass import attend_whole, positions_of, watch_pass
from kvarena.policies.base import NewTokens
from kvarena.policies.locret import retaining_scores, token_features

SMOOTHNESS = 0.0025  # weight of the difference between neighbours


@dataclass(frozen=True)
class Observation:
    """What one forward pass over prompt and answer shows of the prompt's tokens, in float32.

    features: [L, P, F]; targets: [L, K, P]; keys: [L, K, P, D] post-RoPE.
    """

    features: Tensor
    targets: Tensor
    keys: Tensor | None = None

    def for_learning(self) -> "Observation":
        """A quarter of the memory: no keys, features in float16."""
        return Observation(self.features.half(), self.targets)


class RetainingHeads(nn.Module):
    """The heads of all layers side by side; w1: [L, F, d_R], w2: [L, d_R, K]."""

    def __init__(self, shape: tuple[int, int, int], num_hidden: int, seed: int) -> None:
        """Uniform weights as in torch's linear layers; shape: (L, F, K)."""
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        num_layers, num_features, num_kv_heads = shape

        def weights(num_in: int, num_out: int) -> nn.Parameter:
            drawn = torch.rand(num_layers, num_in, num_out, generator=generator)
            return nn.Parameter((2 * drawn - 1) * num_in**-0.5)

        self.w1, self.w2 = weights(num_features, num_hidden), weights(num_hidden, num_kv_heads)

    def forward(self, features: Tensor) -> Tensor:
        """Scores [L, K, P] of features [L, P, F]."""
        return retaining_scores(features, self.w1, self.w2).transpose(-1, -2)

    def save(self, path: Path, about: Mapping[str, str]) -> None:
        """Write the file that the policy reads, in float16; about: what it was trained on."""
        tensors = {
            f"layers.{layer}.{name}": weight[layer].detach().half().contiguous()
            for name, weight in self.named_parameters()
            for layer in range(len(weight))
        }
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata=dict(about))


def retaining_loss(scores: Tensor, targets: Tensor) -> Tensor:
    """SmoothL1 to the targets [L, K, P] and the smoothness of neighbouring scores, both means.

    The released code sums the smoothness over layers, so that it weighs L times as much there.
    """
    steps = scores[..., 1:] - scores[..., :-1]
    return F.smooth_l1_loss(scores, targets) + SMOOTHNESS * steps.square().mean()


class Observer:
    """Runs the frozen model over samples and records what its layers see."""

    def __init__(self, model: PreTrainedModel, attention: str = "sdpa") -> None:
        """attention: kernel of the engine. UsageError for a model without rotary embedding."""
        self._model = model
        self._rotator = KeyRotator(model)
        self._kernel = KERNELS[attention]

    def observe(self, sample: TrainingSample) -> Observation:
        positions = positions_of(len(sample.token_ids), self._model.device)
        recorder = _Recorder(self._rotator, self._kernel, sample.prompt_tokens, positions)
        watch_pass(self._model, sample.token_ids, recorder)
        return Observation(
            features=torch.stack(recorder.features),
            targets=torch.stack(recorder.targets),
            keys=torch.stack(recorder.keys),
        )


@dataclass
class _Recorder:
    """Keeps of every layer what an Observation holds."""

    rotator: KeyRotator
    kernel: Kernel
    prompt_tokens: int
    positions: Tensor  # [1, P + A]
    features: list[Tensor] = field(default_factory=list)
    targets: list[Tensor] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec
    ) -> Tensor:
        """Output [1, P + A, H, D]; query [1, H, P + A, D], key and value [1, K, P + A, D]."""
        prompt, answer = slice(0, self.prompt_tokens), slice(self.prompt_tokens, None)
        num_kv_heads, _, head_dim = key.shape[1:]
        asking = query[0, :, answer].float().reshape(num_kv_heads, -1, head_dim)  # [K, G * A, D]
        logits = asking @ key[0, :, prompt].float().transpose(-1, -2) * spec.scaling
        self.targets.append(logits.amax(dim=1))
        positions = self.positions[:, prompt]
        new = NewTokens(
            queries=self.rotator.unrotate(module, query[:, :, prompt], positions),
            keys=self.rotator.unrotate(module, key[:, :, prompt], positions),
            values=value[:, :, prompt],
        )
        self.features.append(token_features(new)[0])
        self.keys.append(key[0, :, prompt].float())
        return attend_whole(self.kernel, query, key, value, spec)
