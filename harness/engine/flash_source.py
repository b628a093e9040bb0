"""Where FlashAttention 2 comes from: the package flash-attn, or a compiled build from the hub.

flash-attn is built from source against a CUDA toolkit, which takes an hour or fails. The package
``kernels`` of Hugging Face fetches the same kernels ready made for the installed torch and CUDA.
"""

import importlib.util
from collections.abc import Callable
from functools import cache

from torch import Tensor

from kvarena.harness.errors import UsageError

PACKAGES = ("flash_attn", "kernels")  # the first that is there counts
_HUB_NAME = "kernels-community/flash-attn2"
_HUB_VERSION = 4  # which transformers 5.23 takes with torch 2.10 and later


@cache
def flash_attn_func() -> Callable[..., Tensor]:
    """The function of that name. Raises UsageError where there is none, or none can be fetched."""
    found = next((name for name in PACKAGES if importlib.util.find_spec(name)), None)
    if found is None:
        raise UsageError(
            "attention=flash needs the package kernels, which fetches it compiled, or flash-attn, "
            "which is built (make setup EXTRAS=kernels or EXTRAS=flash, CUDA only); or use "
            "attention=sdpa"
        )
    if found == "flash_attn":
        from flash_attn import flash_attn_func as function

        return function
    from kernels import get_kernel

    try:
        return get_kernel(_HUB_NAME, version=_HUB_VERSION).flash_attn_func
    except Exception as error:  # of the hub, the network, or a machine without a build
        reason = str(error).partition("\n")[0]
        raise UsageError(
            f"attention=flash: package kernels has no {_HUB_NAME} for this machine ({reason}); "
            "make setup EXTRAS=flash builds flash-attn here, or use attention=sdpa"
        ) from error
