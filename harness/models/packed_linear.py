"""Linear layers in bfloat16 on a CPU, whose weights lie in the order in which oneDNN reads them.

torch's own linear layer hands its weights to the product as they are, and oneDNN brings them into
its order in every pass. Laid out once, when a model is loaded, the same product takes 0.55 to 0.9
of the time and gives the same numbers to the last bit. In float32 torch computes elsewhere, and
oneDNN's sums, rounded in another order, would move tokens that nearly tie (results/LOG.md).
"""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn

from kvarena.harness.errors import UsageError


class PackedLinear(nn.Module):
    """Stands for an ``nn.Linear`` in inference; its weights are held once, packed."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = linear.bias
        self._packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), None)

    def forward(self, inputs: Tensor) -> Tensor:
        """[..., in_features] to [..., out_features]."""
        return torch.ops.mkldnn._linear_pointwise(inputs, self._packed, self.bias, "none", [], "")

    @property
    def weight(self) -> Tensor:
        """[out_features, in_features], unpacked anew at each call."""
        return self._packed.to_dense()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        raise UsageError("this model was loaded for the CPU; load it again to move or convert it")


def pack_linear_layers(model: nn.Module) -> None:
    """Replace those that can be, one by one, so that at no time all weights are there twice."""
    # A list with the layers in it would keep their weights until all are packed.
    parents = [module for module in model.modules() if not isinstance(module, nn.Linear)]
    for module in parents:
        for name, child in module.named_children():
            if type(child) is nn.Linear and _can_pack(child.weight):
                setattr(module, name, PackedLinear(child))


def _can_pack(weight: Tensor) -> bool:
    """Whether torch computes with it in oneDNN on this processor, packed or not."""
    if weight.device.type != "cpu" or weight.dtype != torch.bfloat16:
        return False
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
