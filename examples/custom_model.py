"""A small decoder of one's own that generates from a packed cache. Random weights."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from skvq_ext.cache import SkvqCache

LAYERS, HEADS, KV_HEADS, HEAD_DIM, WIDTH, VOCAB = 4, 8, 2, 64, 256, 1000


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(WIDTH, (HEADS + 2 * KV_HEADS) * HEAD_DIM)
        self.out = nn.Linear(HEADS * HEAD_DIM, WIDTH)

    def forward(self, x: Tensor, layer: int, cache: SkvqCache) -> Tensor:
        """x [batch, columns, WIDTH], the new tokens."""
        batch, columns, _ = x.shape
        heads = self.qkv(F.layer_norm(x, (WIDTH,))).view(batch * columns, -1, HEAD_DIM)
        q, k, v = heads.split([HEADS, KV_HEADS, KV_HEADS], dim=1)  # [num_tokens, heads, HEAD_DIM]
        cache.append(layer, k, v)
        if columns > 1:  # the prompt sees itself in full precision
            q, k, v = (y.unflatten(0, (batch, columns)).transpose(1, 2) for y in (q, k, v))
            seen = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
            seen = seen.transpose(1, 2)
        else:
            seen, _ = cache.attend(layer, q)
        return x + self.out(seen.reshape(batch, columns, -1))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))

    def forward(self, ids: Tensor, cache: SkvqCache) -> Tensor:
        """ids [batch, columns] to the likeliest next token, [batch, 1]."""
        x = self.embed(ids)
        for layer, block in enumerate(self.blocks):
            x = block(x, layer, cache)
        return (x[:, -1:] @ self.embed.weight.T).argmax(-1)


@torch.inference_mode()
def main() -> None:
    torch.manual_seed(0)
    cache = SkvqCache(LAYERS, HEADS, KV_HEADS, HEAD_DIM, scheme="k2-v1.5-w128", batch_size=2)
    model, tokens = Model(), [torch.randint(VOCAB, (2, 1000))]
    for _ in range(200):
        tokens.append(model(tokens[-1], cache))
    used = cache.memory()
    print(f"{cache.lengths} tokens in {used['total']:,} bytes, not {used['full_precision']:,}")


main()
