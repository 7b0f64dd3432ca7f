"""What a layer of the packed cache must answer, from the plain PyTorch reference."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from skvq_ext.cache import SkvqCache
from skvq_ext.door import token_share
from skvq_ext.geometry import Geometry
from skvq_ext.layer_cache import LayerCache
from skvq_ext.plan import Plan
from skvq_ext.reference import ReferenceSequence
from skvq_ext.scheme import Scheme

HEADS, QUERY_HEADS, DIM = 2, 4, 64
SCHEME = "k2-v1.5-g32-w16-sink3-fp8"


def rows(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Random rows [..., DIM] with channels of very different spread."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.linspace(0.3, 2.0, DIM)
    return (torch.randn(*shape, DIM, generator=generator) * spread).to(dtype)


def make_plan(scheme: str = SCHEME, centre: float = 0.0) -> Plan:
    """A plan with every step in use: permutation, shift, scale, Hadamard, clip."""
    parsed = Scheme.parse(scheme)
    plan = Plan.default(Geometry(1, QUERY_HEADS, HEADS, DIM), parsed)
    layer = plan.layers[0]
    for i, tensor in enumerate((layer.k, layer.v)):
        generator = torch.Generator().manual_seed(i)
        order = [torch.randperm(DIM, generator=generator) for _ in range(HEADS)]
        tensor.permutation = torch.stack(order).int()
        tensor.shift = torch.randn(HEADS, DIM, generator=generator) * centre
        tensor.rotation = "hadamard"
        tensor.scale = torch.rand(HEADS, DIM, generator=generator) + 0.5
    return plan


def make_layer(scheme: str = SCHEME, batch_size: int = 1, **options: Any) -> LayerCache:
    """One layer; option centre goes to its plan."""
    centre = options.pop("centre", 0.3)
    plan = make_plan(scheme, centre)
    return LayerCache(
        plan.layers[0],
        Scheme.parse(scheme),
        num_q_heads=QUERY_HEADS,
        batch_size=batch_size,
        **options,
    )


def make_cache(**options: Any) -> SkvqCache:
    """Two layers with the default plan."""
    options.setdefault("scheme", SCHEME)
    return SkvqCache(2, QUERY_HEADS, HEADS, DIM, **options)


@dataclass
class Sequence:
    """All rows one sequence was ever given, in the model's space, and how to attend over them."""

    k: Tensor = field(default_factory=lambda: torch.empty(0, HEADS, DIM))
    v: Tensor = field(default_factory=lambda: torch.empty(0, HEADS, DIM))

    def add(self, k: Tensor, v: Tensor) -> None:
        self.k, self.v = torch.cat([self.k, k]), torch.cat([self.v, v])

    def attend(
        self,
        layer: LayerCache,
        q: Tensor,
        *,
        first_position: int | None = None,
        softcap: float = 0.0,
        learned_sinks: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """float64 attention through the layer's door; q [n, QUERY_HEADS, DIM] of the model."""
        door, t, scale = layer.door, layer.tensors, DIM**-0.5
        dtype = t.ring_k.dtype
        reference = ReferenceSequence.make(
            door.map_k(self.k.to(dtype)),
            door.map_v(self.v.to(dtype)),
            layer.format,
            layer.scheme.sinks,
            layer.scheme.window,
            t.ring_k.shape[1],
            (t.k_clip, t.v_clip),
            t.exponents,
        )
        out, lse = reference.attend(
            door.map_q(q),
            len(self.k) - len(q) if first_position is None else first_position,
            softmax_scale=scale,
            sliding_window=layer.sliding_window,
            softcap=softcap,
            learned_sinks=learned_sinks,
            logit_shift=door.logit_shift(q, scale),
        )
        share = None if learned_sinks is None else token_share(lse.float(), learned_sinks)
        return door.unmap_o(out.float(), lse.float(), share), lse


def feed(
    layer: LayerCache, sequences: list[Sequence], counts: list[int], seed: int
) -> tuple[Tensor, Tensor]:
    """Appends counts[b] random rows to sequence b of the layer and of the oracle."""
    dtype = layer.tensors.ring_k.dtype
    k, v = (rows(sum(counts), HEADS, seed=seed + i, dtype=dtype) for i in (0, 1000))
    layer.append(k, v, starts(counts))
    parts = zip(k.float().split(counts), v.float().split(counts), strict=True)
    for sequence, (own_k, own_v) in zip(sequences, parts, strict=True):
        sequence.add(own_k, own_v)
    return k, v


def starts(counts: list[int]) -> Tensor:
    """counts as cu_seqlens."""
    return torch.tensor([0, *counts]).cumsum(0).int()


def assert_agrees(
    layer: LayerCache, sequences: list[Sequence], q_len: int = 1, tolerance: float = 2e-5
) -> None:
    """The layer's newest q_len queries of every sequence against the oracle."""
    q = rows(len(sequences) * q_len, QUERY_HEADS, seed=7, dtype=layer.tensors.ring_k.dtype)
    out, lse = layer.attend(q)
    for b, sequence in enumerate(sequences):
        own = slice(b * q_len, (b + 1) * q_len)
        expected, expected_lse = sequence.attend(layer, q[own].float())
        torch.testing.assert_close(out[own].float(), expected, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(lse[own].double(), expected_lse, atol=tolerance, rtol=tolerance)


def state_of(layer: LayerCache) -> list[Tensor]:
    """Everything a layer holds, with pages in the order of its tokens."""
    t = layer.tensors
    tiles = [layer._tiles(n) for n in layer.lengths]
    pages = [t.pages[t.page_table[b, :n].long()] for b, n in enumerate(tiles)]
    others = [x for name, x in t._asdict().items() if name not in ("pages", "page_table")]
    return [x.clone() for x in (*pages, *others)]


def assert_same_state(a: list[Tensor], b: list[Tensor]) -> None:
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)
