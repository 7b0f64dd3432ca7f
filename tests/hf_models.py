"""Small models with random weights, and a plain cache that says what the packed one must give."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import Tensor

from skvq_ext.door import Door
from skvq_ext.geometry import Geometry
from skvq_ext.hf.norms import key_scales
from skvq_ext.plan import LayerPlan, Plan, SplitPlan, parts_of
from skvq_ext.reference import fake_quantize_side, packed_len
from skvq_ext.scheme import Scheme

VOCAB = 97
_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}


def _config(kind: str, spread: float) -> hf.PreTrainedConfig:
    hybrid = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
    shared = _SIZES | {"initializer_range": spread}
    if kind == "llama":
        return hf.LlamaConfig(**shared)
    if kind == "qwen3":
        return hf.Qwen3Config(**shared)
    if kind == "mistral":
        return hf.MistralConfig(**shared, sliding_window=48)
    if kind == "gemma2":
        sizes = shared | {"num_hidden_layers": 3}
        return hf.Gemma2Config(
            **sizes,
            **hybrid,
            sliding_window=48,
            attn_logit_softcapping=2.0,
            query_pre_attn_scalar=64,
        )
    if kind == "gemma3":
        sizes = shared | {"num_hidden_layers": 3}
        return hf.Gemma3TextConfig(**sizes, **hybrid, sliding_window=48, query_pre_attn_scalar=64)
    if kind == "gpt_oss":
        return hf.GptOssConfig(
            **shared,
            layer_types=["sliding_attention", "full_attention"],
            sliding_window=48,
            num_local_experts=2,
            num_experts_per_tok=1,
        )
    raise ValueError(kind)


KINDS = ("llama", "qwen3", "mistral", "gemma2", "gemma3", "gpt_oss")


def make_model(kind: str, seed: int = 0, spread: float = 0.06) -> Any:
    """A causal language model of this kind, fp32, in evaluation mode.

    A larger spread of the weights makes small errors grow.
    """
    torch.manual_seed(seed)
    config = _config(kind, spread)
    return hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()


def make_tokens(num_tokens: int, batch_size: int = 1, seed: int = 1) -> torch.Tensor:
    """Random token ids, int64 [batch_size, num_tokens]; none of them is the padding token."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCAB, (batch_size, num_tokens), generator=generator)


class ReferenceLayer(hf.cache_utils.DynamicLayer):
    """Rows of plain tensors; what the packed cache would have packed is quantized and read back."""

    def __init__(
        self, plan: LayerPlan | SplitPlan, scheme: Scheme, num_kv_heads: int, window: int
    ) -> None:
        super().__init__()
        self.scheme, self.parts = scheme, parts_of(plan, scheme, num_kv_heads)
        self.is_sliding = window > 0

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """One new token sees the cache as it then is; a chunk sees what was packed before it."""
        seen = self.get_seq_length()
        rows = super().update(keys, values)
        total = seen + (keys.shape[2] if keys.shape[2] == 1 else 0)
        end = packed_len(total, self.scheme.sinks, self.scheme.window) if seen else 0
        packed = slice(self.scheme.sinks, self.scheme.sinks + end)
        return tuple(self._read_back(x, side, packed) for side, x in zip("kv", rows, strict=True))

    def _read_back(self, x: Tensor, side: str, packed: slice) -> Tensor:
        x = x.clone()
        for part in self.parts:
            tensor, heads = getattr(part.plan, side), list(part.heads)
            door = Door(LayerPlan(tensor, tensor), len(heads))  # x = unmap(map(x))
            exponents = torch.cat([part.plan.k.exponents, part.plan.v.exponents], dim=-1)
            fmt = part.scheme(self.scheme).record_format(x.shape[-1])
            for sequence in x:
                y = door.map_v(sequence[heads, packed].transpose(0, 1))
                y = fake_quantize_side(y, fmt, side, tensor.clip, exponents)
                sequence[heads, packed] = door.unmap_o(y).transpose(0, 1)
        return x


class ReferenceCache(hf.Cache):
    """What `SkvqHFCache` promises, for a model that attends with "sdpa" or "eager".

    Plain rows, no pages, no ring: the truth that packed generation is held against. Equal lengths
    only, and chunks in the sense of long ones.
    """

    def __init__(self, model: Any, scheme: str, plan: Plan | None = None) -> None:
        parsed, geometry = Scheme.parse(scheme), Geometry.from_config(model.config)
        plan = plan or Plan.default(geometry, parsed, key_scales(model, geometry))
        windows = geometry.sliding_windows or ()
        super().__init__(
            layers=[
                ReferenceLayer(layer, parsed, geometry.num_kv_heads, window)
                for layer, window in zip(plan.layers, windows, strict=True)
            ]
        )
