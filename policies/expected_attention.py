"""Expected Attention: keep what later queries are expected to look at, times what it would add.

The later queries of a head are taken for Gaussian, with mean and covariance of its queries so far
(before rotary positions, covariance divided by their number), turned by the mean rotation of the
next ``horizon`` positions. A key then has an expected exp(logit) in closed form,
exp(mean . k + k' covariance k / 2), here as a share of all keys' (softmax) and as the mean over the
query heads of its KV head. Score: (that share + ``epsilon``) * norm2(v).
Paper: "Expected Attention: KV Cache Compression by Estimating Attention from Future Queries
Distribution", https://arxiv.org/abs/2510.00636. Defaults: those of the released code (kvpress),
whose ``n_sink`` is both ``sinks`` and ``skip`` here: 4 first tokens stay, and neither their queries
nor their keys have a part in what is estimated. With budgets shared among heads (shape=ada) the
authors set epsilon to 0.01.

Differs from the paper: there is a choice after each chunk and each decoded token, by the queries
read so far, where the released code sees a whole prompt before it chooses. Logits are scaled as the
model scales them, not always by 1 / sqrt(D); soft-capping, sink logits and sliding windows are left
out. A first token that is not protected (protect=none) has the weight it would have beside the
others. Mean and covariance are held for each query head, 4 * D * (D + 1) bytes, which count as
cache: with D = 128 and 4 query heads to a KV head as much as 512 tokens in 16 bits.
"""

from dataclasses import dataclass

from torch import Tensor

from kvarena.policies.base import LayerView, Needs, Policy

_MOST = 30.0  # logarithm of a first token's weight beside the others, which add up to 1


@dataclass(kw_only=True)
class ExpectedAttention(Policy):
    """skip: first tokens of the text without a part in what is estimated; horizon: next positions;

    covariance: whether queries have one, or are all their mean; epsilon: added to the attention.
    """

    sinks: int = 4
    skip: int = 4
    horizon: int = 512
    covariance: bool = True
    epsilon: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.skip < 0:
            raise ValueError(f"skip must be >= 0 tokens, got {self.skip}")
        if self.horizon < 1:
            raise ValueError(f"horizon must be >= 1 position, got {self.horizon}")
        if self.epsilon < 0:
            raise ValueError(f"epsilon must be >= 0, got {self.epsilon}")

    @property
    def needs(self) -> Needs:
        return Needs(
            future_queries=self.horizon,
            future_covariance=self.covariance,
            skipped_queries=self.skip,
        )

    def score(self, view: LayerView) -> Tensor:
        assert view.future_queries is not None, "the engine hands over what needs asks for"
        keys, future = view.keys, view.future_queries
        S, K, _, D = keys.shape
        logits = future.mean.view(S, K, -1, D) @ keys.transpose(-1, -2)  # [S, K, G, T]
        if future.covariance is not None:
            # One query head at a time: all at once would be G times the size of the keys.
            for g, own in enumerate(future.covariance.view(S, K, -1, D, D).unbind(dim=2)):
                logits[:, :, g] += (keys @ own).mul_(keys).sum(dim=-1) / 2
        is_first = (view.positions < self.skip).unsqueeze(2)
        others = logits.masked_fill(is_first, float("-inf")).logsumexp(dim=-1, keepdim=True)
        weights = logits.sub_(others).clamp_max_(_MOST).exp_().mean(dim=2)
        return (weights + self.epsilon) * view.values.norm(dim=-1)
