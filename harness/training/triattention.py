"""Measure a model's queries: ``python -m kvarena.harness.training.triattention --help``.

Per layer and query head, the mean query before rotary positions and the mean norm of each
frequency's part of it, over all tokens of texts that are made on the spot (locret_texts.py).

Differs from the paper: there, means are over what the model itself wrote with its full cache to
problems of a benchmark other than the one evaluated, and the released script takes the first
32 768 tokens of any file; here it is English prose with questions and answers, in several
short texts; float32, not bfloat16.

Shape letters: H query heads, K KV heads, G = H/K, Q tokens of a text, D head dim, F = D / 2.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from kvarena.harness.engine.attention import AttentionSpec, attend_reference, attend_sdpa
from kvarena.harness.engine.rotary import KeyRotator
from kvarena.harness.entry import one_line_errors
from kvarena.harness.errors import UsageError
from kvarena.harness.files import replacing
from kvarena.harness.models import find_model
from kvarena.harness.models.loading import load_tokenizer, load_weights
from kvarena.harness.progress import TokenProgress
from kvarena.harness.training.locret_texts import TrainingTexts
from kvarena.harness.training.watched_pass import attend_whole, positions_of, watch_pass

NUM_TEXTS, PROMPT_TOKENS = 8, 1000


@dataclass
class LayerSums:
    """Over the tokens read so far, in float64.

    queries: [K, G, D]; norms: [K, G, F]; frequencies: [F], of the layer itself.
    """

    queries: Tensor
    norms: Tensor
    frequencies: Tensor


@dataclass
class Calibration:
    """Watches the queries of one model."""

    model: PreTrainedModel
    num_tokens: int = 0
    layers: dict[int, LayerSums] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Raise UsageError for a model without rotary embedding."""
        self._rotator = KeyRotator(self.model)

    def read(self, token_ids: Sequence[int]) -> None:
        """Raise UsageError for a model whose rotary embedding the policy cannot follow."""
        watch_pass(self.model, token_ids, self)
        self.num_tokens += len(token_ids)

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, spec: AttentionSpec
    ) -> Tensor:
        """As ``Watcher.attend``."""
        positions = positions_of(query.shape[2], query.device)
        unturned = self._rotator.unrotate(module, query, positions)[0].double()  # [H, Q, D]
        grouped = unturned.unflatten(0, (key.shape[1], -1))
        queries = grouped.sum(dim=-2)
        norms = grouped.unflatten(-1, (2, -1)).norm(dim=-2).sum(dim=-2)
        layer = module.layer_idx
        assert isinstance(layer, int)
        if layer in self.layers:
            self.layers[layer].queries += queries
            self.layers[layer].norms += norms
        else:
            frequencies = frequencies_of(self.model, self._rotator, module, key.shape[-1])
            self.layers[layer] = LayerSums(queries, norms, frequencies)
        kernel = attend_sdpa if spec.is_plain else attend_reference
        return attend_whole(kernel, query, key, value, spec)

    def tensors(self) -> dict[str, Tensor]:
        """Means and frequencies by the names that the policy reads, float32."""
        found = {}
        for layer, sums in self.layers.items():
            found[f"layers.{layer}.mean_queries"] = sums.queries / self.num_tokens
            found[f"layers.{layer}.mean_norms"] = sums.norms / self.num_tokens
            found[f"layers.{layer}.frequencies"] = sums.frequencies
        return {name: tensor.float().cpu().contiguous() for name, tensor in found.items()}


def frequencies_of(
    model: PreTrainedModel, rotator: KeyRotator, attention: nn.Module, head_dim: int
) -> Tensor:
    """[F] radians per position of one layer, those of its embedding; 0 in one without positions.

    Raises UsageError unless dimension i turns with i + F, by this and no other angle, also far
    beyond the model's context (dynamic scaling and longrope change theirs there).
    """
    device = model.device
    if not getattr(attention, "use_rope", True):
        return torch.zeros(head_dim // 2, device=device)
    rotary = model.base_model.rotary_emb
    of_type = f"{getattr(attention, 'layer_type', '')}_inv_freq"
    frequencies = getattr(rotary, of_type, getattr(rotary, "inv_freq", None))
    if frequencies is not None and frequencies.shape == (head_dim // 2,):
        # A copy, for a model may change its own when it sees the positions below.
        frequencies = frequencies.to(device, torch.float32, copy=True)
        beyond = 4 * model.config.get_text_config().max_position_embeddings
        positions = torch.tensor([1, 10, beyond], device=device)
        ones = torch.ones(len(positions), 1, 1, head_dim, device=device)
        angles = positions[:, None] * frequencies
        cos, sin = angles.cos(), angles.sin()
        expected = torch.cat([cos - sin, cos + sin], dim=-1)  # 1 + i, turned
        turned = rotator.rotate(attention, ones, positions)[:, 0, 0]
        if torch.allclose(turned, expected, atol=1e-3):
            return frequencies
    raise UsageError(
        f"{type(model).__name__}: its rotary embedding does not turn every dimension i with "
        f"i + {head_dim // 2} by one frequency at all lengths, as triattention needs"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="smollm2-135m", help="preset, hub id or folder")
    parser.add_argument(
        "--out", type=Path, help="default: results/triattention/<model>.safetensors"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    with one_line_errors():
        given = parser.parse_args()
        spec = find_model(given.model)
        out = given.out or Path("results") / "triattention" / f"{spec.name}.safetensors"
        calibration = Calibration(load_weights(spec, device=given.device, dtype="float32"))
        texts = TrainingTexts(load_tokenizer(spec), prompt_tokens=PROMPT_TOKENS, seed=0)
        with TokenProgress(out.stem, NUM_TEXTS) as progress:
            for number in range(NUM_TEXTS):
                calibration.read(texts[number].token_ids)
                progress.advance(1)
        with replacing(out) as temporary:
            save_file(calibration.tensors(), temporary)
        print(
            f"{out}: written, {len(calibration.layers)} layers, "
            f"{calibration.num_tokens} tokens of {NUM_TEXTS} texts"
        )


if __name__ == "__main__":
    main()
