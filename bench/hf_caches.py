"""Caches of transformers and the packed one, filled with the same keys and values, for bench/end_to_end.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, QuantizedCache

from skvq_ext.hf import SkvqHFCache
from skvq_ext.hf.forward import rows_of

KeysAndValues = Sequence[tuple[Tensor, Tensor]]  # of every layer, [batch, heads, tokens, head_dim]
PLAIN = "DynamicCache"


@dataclass
class Side:
    """One cache of a model, its attention implementation, and the seconds of each decoded token."""

    name: str
    cache: Any
    attention: str
    seconds: list[float] = field(default_factory=list)
    shares: dict[str, float] = field(default_factory=dict)

    @property
    def median(self) -> float:
        """Seconds per token."""
        return median(self.seconds)


@dataclass(frozen=True)
class Peer:
    """A quantized cache of transformers: its backend, the package that it needs and that package's name on PyPI."""

    backend: str
    module: str
    package: str
    nbits: int

    @property
    def name(self) -> str:
        return f"QuantizedCache {self.backend} {self.nbits} bits"

    def fill(self, model: Any, rows: KeysAndValues) -> Side:
        """Raises: ImportError, with what to install."""
        if find_spec(self.module) is None:
            raise ImportError(f"not installed: pip install {self.package}")
        cache = QuantizedCache(backend=self.backend, config=model.config, nbits=self.nbits)
        return fill(self.name, cache, rows)


PEERS = (
    Peer("quanto", "optimum.quanto", "optimum-quanto", 4),
    Peer("quanto", "optimum.quanto", "optimum-quanto", 2),
    Peer("hqq", "hqq", "hqq", 4),
)


def fill(name: str, cache: Any, rows: KeysAndValues) -> Side:
    """A cache of transformers that holds `rows`, as a prefill in one forward leaves it."""
    for index, (keys, values) in enumerate(rows):
        cache.update(keys.clone(), values.clone(), index)
    return Side(name, cache, "sdpa")


def fill_packed(model: Any, scheme: str, rows: KeysAndValues, exact: bool) -> Side:
    """The packed cache that holds `rows`: a prompt is prefilled in full precision and packed afterwards."""
    cache = SkvqHFCache(model, scheme, exact=exact)
    for layer, (keys, values) in zip(cache.layers, rows, strict=True):
        layer.lazy_initialization(keys, values)
        layer.cache.append(rows_of(keys), rows_of(values))
        layer.seen = keys.shape[2]
    return Side(f"skvq {scheme}{' exact' if exact else ''}", cache, "skvq")


def make_sides(
    model: Any, rows: KeysAndValues, schemes: Sequence[str], exact: bool, peers: Sequence[Peer]
) -> tuple[list[Side], dict[str, str]]:
    """All sides, and why others are not among them."""
    builders: dict[str, Callable[[], Side]] = {
        peer.name: lambda peer=peer: peer.fill(model, rows) for peer in peers
    }
    sides = [fill(PLAIN, DynamicCache(config=model.config), rows)]
    sides += [fill_packed(model, scheme, rows, exact) for scheme in schemes]
    skipped = {}
    for name, build in builders.items():
        try:
            sides.append(build())
        except Exception as error:
            skipped[name] = f"{type(error).__name__}: {error}".splitlines()[0]
    return sides, skipped


def cache_bytes(cache: Any) -> int:
    """Bytes of all tensors that a cache can reach, each storage once."""
    if isinstance(cache, SkvqHFCache):
        return cache.memory()["total"]
    return sum(
        {
            x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
            for x in tensors_in(cache.layers)
        }.values()
    )


def tensors_in(item: Any) -> Iterator[Tensor]:
    """Plain tensors in nested containers and objects; a tensor that wraps others stands for those."""
    inner = [x for x in getattr(item, "__dict__", {}).values() if not isinstance(x, type)]
    if isinstance(item, Tensor) and not any(isinstance(x, Tensor) for x in inner):
        yield item
    elif isinstance(item, dict):
        yield from tensors_in(list(item.values()))
    elif isinstance(item, (list, tuple)):
        for part in item:
            yield from tensors_in(part)
    elif isinstance(item, Tensor) or type(item).__module__.startswith("transformers.cache_utils"):
        yield from tensors_in(inner)


@torch.inference_mode()
def prefill(model: Any, ids: Tensor, chunk: int, progress: Callable[[int], None]) -> KeysAndValues:
    """Keys and values of ids int64 [1, n] in full precision, fed in chunks."""
    cache = DynamicCache(config=model.config)
    model.set_attn_implementation("sdpa")
    for part in ids.split(chunk, dim=1):
        model(input_ids=part, past_key_values=cache, use_cache=True, logits_to_keep=1)
        progress(part.shape[1])
    return [(layer.keys, layer.values) for layer in cache.layers]
