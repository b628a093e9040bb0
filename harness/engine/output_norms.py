"""How much a token's value can add to a layer's output: the norm of its projection.

Shape letters: S sequences, H query heads, K KV heads, G = H/K, Q tokens, D head dim of values, C
hidden size.
"""

import torch
from torch import Tensor, nn

from kvarena.harness.errors import UsageError

# Name of the column that keeps them; no policy's own column can be called that.
OUTPUT_NORMS = "norm1(W_O v)"

# What transformers' models call the linear map from all heads' outputs to the hidden state.
_NAMES = ("o_proj", "out_proj", "dense", "c_proj", "wo")


def output_norms(attention: nn.Module, values: Tensor, num_heads: int) -> Tensor:
    """norm1(W_O v) of each value in its head, mean over the group's query heads: [S, K, Q] float32.

    values: [S, K, Q, D]. Raises UsageError for a layer whose output projection is not found.
    """
    num_kv_heads, head_dim = values.shape[1], values.shape[3]
    weight = _output_weight(attention, num_heads * head_dim)  # [C, H * D]
    group = num_heads // num_kv_heads
    norms = torch.zeros(values.shape[:3], dtype=torch.float32, device=values.device)
    # Head by head: all at once would be H / 2 times the size of a layer's hidden states.
    for head in range(num_heads):
        own = weight[:, head * head_dim : (head + 1) * head_dim]
        projected = values[:, head // group] @ own.T.to(values.dtype)  # [S, Q, C]
        norms[:, head // group] += projected.abs().sum(dim=-1, dtype=torch.float32) / group
    return norms


def _output_weight(attention: nn.Module, width: int) -> Tensor:
    for name in _NAMES:
        weight = getattr(getattr(attention, name, None), "weight", None)
        if (
            isinstance(weight, Tensor)
            and weight.is_floating_point()
            and weight.shape[1:] == (width,)
        ):
            return weight
    raise UsageError(
        f"{type(attention).__name__} has no output projection that is known ({', '.join(_NAMES)}) "
        "and not quantised, so no policy that weighs values by it can be used with this model"
    )
