"""What a layer of the packed cache must answer, from the plain PyTorch reference."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from devices import CPU, Device
from torch import Tensor

from skvq_ext import ops
from skvq_ext.cache import SkvqCache
from skvq_ext.door import token_share
from skvq_ext.geometry import Geometry
from skvq_ext.layer_cache import LayerCache
from skvq_ext.plan import Plan
from skvq_ext.reference import ReferenceSequence
from skvq_ext.scheme import Scheme

HEADS, QUERY_HEADS, DIM = 2, 4, 64
SCHEME = "k2-v1.5-g32-w16-sink3-fp8"
# Outputs against the reference: the order of float32 sums, or two roundings of the dtype.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def rows(
    *shape: int, seed: int = 0, dtype: torch.dtype | None = None, device: Device = CPU
) -> Tensor:
    """Random rows [..., DIM] with channels of very different spread."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.linspace(0.3, 2.0, DIM)
    random = torch.randn(*shape, DIM, generator=generator) * spread
    return random.to(device.name, dtype or device.dtype)


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


def make_layer(
    scheme: str = SCHEME, batch_size: int = 1, device: Device = CPU, **options: Any
) -> LayerCache:
    """One layer; option centre goes to its plan. Skips where the device has no kernel for it."""
    centre = options.pop("centre", 0.3)
    dtype = options.pop("dtype", device.dtype)
    options.setdefault("exact", True)
    device.needs_decode(Scheme.parse(scheme).record_format(DIM, device.name), dtype)
    plan = make_plan(scheme, centre)
    return LayerCache(
        plan.layers[0],
        Scheme.parse(scheme),
        num_q_heads=QUERY_HEADS,
        batch_size=batch_size,
        dtype=dtype,
        device=device.name,
        **options,
    )


def make_cache(device: Device = CPU, **options: Any) -> SkvqCache:
    """Two layers with the default plan."""
    options = {"scheme": SCHEME, "dtype": device.dtype, **options}
    return SkvqCache(2, QUERY_HEADS, HEADS, DIM, device=device.name, **options)


@dataclass
class Sequence:
    """All rows one sequence was ever given, in the model's space, and how to attend over them.

    Everything is float32 on the CPU, whatever the layer's dtype and device.
    """

    k: Tensor = field(default_factory=lambda: torch.empty(0, HEADS, DIM))
    v: Tensor = field(default_factory=lambda: torch.empty(0, HEADS, DIM))

    def add(self, k: Tensor, v: Tensor) -> None:
        self.k = torch.cat([self.k, k.float().cpu()])
        self.v = torch.cat([self.v, v.float().cpu()])

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
        t, scale = ops.CacheTensors(*(x.cpu() for x in layer.tensors)), DIM**-0.5
        door, dtype, q = layer.door.to("cpu"), t.ring_k.dtype, q.cpu()
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
        if learned_sinks is not None:
            learned_sinks = learned_sinks.cpu()
        out, lse = reference.attend(
            door.map_q(q.to(dtype)).float(),
            len(self.k) - len(q) if first_position is None else first_position,
            softmax_scale=scale,
            sliding_window=layer.sliding_window,
            softcap=softcap,
            learned_sinks=learned_sinks,
            logit_shift=door.logit_shift(q.float(), scale),
        )
        share = None if learned_sinks is None else token_share(lse.float(), learned_sinks)
        return door.unmap_o(out.float(), lse.float(), share), lse


def feed(
    layer: LayerCache, sequences: list[Sequence], counts: list[int], seed: int
) -> tuple[Tensor, Tensor]:
    """Appends counts[b] random rows to sequence b of the layer and of the oracle."""
    ring = layer.tensors.ring_k
    k, v = (rows(sum(counts), HEADS, seed=seed + i, dtype=ring.dtype) for i in (0, 1000))
    k, v = k.to(ring.device), v.to(ring.device)
    layer.append(k, v, starts(counts).to(ring.device))
    parts = zip(k.split(counts), v.split(counts), strict=True)
    for sequence, (own_k, own_v) in zip(sequences, parts, strict=True):
        sequence.add(own_k, own_v)
    return k, v


def starts(counts: list[int]) -> Tensor:
    """counts as cu_seqlens."""
    return torch.tensor([0, *counts]).cumsum(0).int()


def assert_agrees(layer: LayerCache, sequences: list[Sequence], q_len: int = 1) -> None:
    """The layer's newest q_len queries of every sequence against the oracle."""
    ring = layer.tensors.ring_k
    q = rows(len(sequences) * q_len, QUERY_HEADS, seed=7, dtype=ring.dtype)
    out, lse = layer.attend(q.to(ring.device))
    for b, sequence in enumerate(sequences):
        own = slice(b * q_len, (b + 1) * q_len)
        assert_close(out[own], lse[own], *sequence.attend(layer, q[own]))


def assert_close(out: Tensor, lse: Tensor, expected: Tensor, expected_lse: Tensor) -> None:
    """An output within what its dtype rounds, and its lse, which is float32."""
    tolerance = TOLERANCE[out.dtype]
    torch.testing.assert_close(out.float().cpu(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.double().cpu(), expected_lse, atol=2e-5, rtol=2e-5)


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
