"""What the bench runs on: a model, and enough text for it.

Shape letters: K KV heads, T tokens, D head dim.
"""

from dataclasses import dataclass, field
from itertools import cycle, islice

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedModel

from kvarena.harness.models import find_model, load_model
from kvarena.harness.models.loading import locate
from kvarena.tasks.base import Tokenizer
from kvarena.tasks.haystack import BUNDLED, load_sentences
from kvarena.tasks.needle import Needle

BUNDLED_MODEL = "smollm2-135m"  # what an installed package carries
_TOY = LlamaConfig(
    vocab_size=128,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=2048,
    initializer_range=0.3,  # sharp attention, so that a wrong cache shows
)
_LONG = LlamaConfig(
    vocab_size=1024,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=65536,
)
# Shape of Llama-3.1-8B as its config.json states it (huggingface.co/meta-llama/Llama-3.1-8B).
_LLAMA_8B = LlamaConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    max_position_embeddings=131072,
    rms_norm_eps=1e-5,
    rope_parameters={
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
)
_QUESTION_TOKENS = 16  # of a random prompt
_VERSES = 400  # about 12000 tokens, more than the small model's context


@dataclass(kw_only=True)
class Subject:
    """text: token ids; tokenizer: None for random weights, whose text is random as well.

    folder: where another interpreter can read the same weights; None if nowhere.
    stock: for the peers: the same model as transformers loads it, where ours differs.
    """

    name: str
    model: PreTrainedModel
    stock: PreTrainedModel
    text: list[int]
    tokenizer: Tokenizer | None = None
    folder: str | None = None
    _cached: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> str:
        """As the setting ``dtype`` names it."""
        return str(self.model.dtype).removeprefix("torch.")

    def needle_prompts(self, lengths: tuple[int, ...], number: int) -> list[tuple[list[int], int]]:
        """Prompts of the lengths by turns, each with its number of question tokens at the end."""
        if self.tokenizer is None:
            starts = range(0, 7 * number, 7)
            return [
                (self.text[start : start + length], _QUESTION_TOKENS)
                for start, length in zip(starts, cycle(lengths), strict=False)
            ]
        task = Needle(
            lengths=lengths, depths=(0, 25, 50, 75, 100), num_seeds=-(-number // len(lengths))
        )
        by_length: dict[int, list[tuple[list[int], int]]] = {length: [] for length in lengths}
        for sample in task.samples(self.tokenizer, seed=0):
            prompt = (list(sample.prompt_token_ids), sample.question_tokens)
            by_length[sample.meta["length_target"]].append(prompt)
        mixed = zip(*by_length.values(), strict=True)
        return list(islice((prompt for group in mixed for prompt in group), number))

    def short_prompts(self, number: int) -> list[list[int]]:
        """Texts of 64 to 192 tokens, as long as mathematics problems with their template are."""
        sizes = cycle((64, 128, 192, 96, 160))
        return [
            self.text[97 * n : 97 * n + size] for n, size in zip(range(number), sizes, strict=False)
        ]

    @torch.inference_mode()
    def keys_and_values(self, num_tokens: int) -> list[tuple[Tensor, Tensor]]:
        """Per layer keys and values [1, K, T, D] of the text's first tokens, full attention."""
        if not self._cached or self._cached[0][0].shape[2] < num_tokens:
            cache = DynamicCache(config=self.model.config)
            input_ids = torch.tensor([self.text[:num_tokens]], device=self.device)
            self.model(input_ids=input_ids, past_key_values=cache, logits_to_keep=1)
            self._cached = [(layer.keys, layer.values) for layer in cache.layers]
        return [
            (keys[:, :, :num_tokens], values[:, :, :num_tokens]) for keys, values in self._cached
        ]


def bundled_model(dtype: str = "float32", name: str = BUNDLED_MODEL) -> Subject:
    """A real model on the CPU, and the King James Bible in its tokens."""
    model, tokenizer = load_model(name, dtype=dtype)
    stock, _ = load_model(name, dtype=dtype, packed=False)
    verses = " ".join(load_sentences(BUNDLED)[:_VERSES])
    return Subject(
        name=name,
        model=model,
        stock=stock,
        text=tokenizer.encode(verses),
        tokenizer=tokenizer,
        folder=locate(find_model(name)),
    )


def of_name(name: str, dtype: str) -> Subject:
    """The subject of that name on the CPU, for another process to run on the same."""
    if name == "toy":
        return toy(dtype=getattr(torch, dtype))
    return bundled_model(dtype, name)


def toy(device: str = "cpu", dtype: torch.dtype = torch.float32) -> Subject:
    """Three tiny random layers: everything runs in seconds and no figure means anything."""
    return _random_weights("toy", _TOY, device, dtype)


def long_context() -> Subject:
    """Four layers with random weights, whose full cache of 64k tokens a CPU can do in minutes."""
    return _random_weights("random-4-layers", _LONG, "cpu", torch.float32)


def llama_8b(device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> Subject:
    """Llama-3.1-8B's shape with random weights, for speed alone."""
    return _random_weights("llama-3.1-8b-shape", _LLAMA_8B, device, dtype)


def _random_weights(name: str, config: LlamaConfig, device: str, dtype: torch.dtype) -> Subject:
    with torch.random.fork_rng(), torch.device(device):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.generation_config.eos_token_id = None  # random text must not end by chance
    model.generation_config.pad_token_id = 0
    generator = torch.Generator().manual_seed(0)
    size = (config.max_position_embeddings,)
    text = torch.randint(3, config.vocab_size, size, generator=generator).tolist()
    return Subject(name=name, model=model, stock=model, text=text)
