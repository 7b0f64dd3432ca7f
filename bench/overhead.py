"""What a layer and step costs on the host, with so little in the cache that the kernels have nothing to do.

    OMP_WAIT_POLICY=passive python bench/overhead.py

One token through the layers of a model of one head: `SkvqCache.append` and `attend`; the cache and the attention of
transformers, as a model calls them; and the same with a DynamicCache and "sdpa". The operators that a step calls are
recorded and called again with the same arguments, without what lies around them: the rest is Python.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import torch
import typer
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from skvq_ext import report
from skvq_ext.cache import SkvqCache
from skvq_ext.hf import SkvqHFCache
from skvq_ext.hf.attention import attention
from skvq_ext.layer_cache import LayerCache

HEAD_DIM, LAYERS = 64, 4
HELD, STEPS = 16, 32  # tokens before a round, and of it: nothing is packed
Step = Callable[[], object]


class Recorder(TorchDispatchMode):
    """Notes every call of an operator of this library."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "skvq":
            self.calls.append((func, args, kwargs or {}))
        return func(*args, **(kwargs or {}))


@dataclass
class Side:
    """One way to do a step of all layers; empty, what to do before a round; us, of a layer and step by round."""

    step: Step
    empty: Step
    us: list[float] = field(default_factory=list)

    def round(self) -> None:
        self.empty()
        started = time.perf_counter()
        for _ in range(STEPS):
            self.step()
        self.us.append((time.perf_counter() - started) / STEPS / LAYERS * 1e6)


def rows(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, HEAD_DIM)


def operators(side: Side) -> Side:
    """The operators of a side's step and nothing else."""
    side.empty()
    with Recorder() as recorder:
        side.step()

    def replay() -> None:
        for func, args, kwargs in recorder.calls:
            func(*args, **kwargs)

    return Side(replay, side.empty)


def of_a_cache() -> Side:
    """SkvqCache, as a model of one's own calls it."""
    cache, q, k, v = SkvqCache(LAYERS, 1, 1, HEAD_DIM), rows(1, 1), rows(1, 1), rows(1, 1)
    for layer in range(LAYERS):
        cache.append(layer, rows(HELD, 1), rows(HELD, 1))

    def step() -> None:
        for layer in range(LAYERS):
            cache.append(layer, k, v)
            cache.attend(layer, q)

    return Side(step, lambda: cut(cache.layers))


def cut(layers: Iterable[LayerCache]) -> None:
    """Back to HELD tokens; recorded operators move kv_len behind the layer's back."""
    for layer in layers:
        layer.crop([HELD])
        layer.tensors.kv_len.fill_(HELD)


def of_transformers() -> tuple[Side, Side]:
    """SkvqHFCache with attention "skvq", and DynamicCache with "sdpa"."""
    sizes = {"hidden_size": HEAD_DIM, "num_attention_heads": 1, "intermediate_size": 8}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=LAYERS, vocab_size=8)).eval()
    modules = [layer.self_attn for layer in model.model.layers]
    packed, plain = SkvqHFCache(model), DynamicCache(config=model.config)

    def step(cache: Any, attend: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
        for index, module in enumerate(modules):
            keys, values = cache.update(k, v, index)
            attend(module, q, keys, values, None, scaling=module.scaling, dropout=0.0)

    for cache, attend in ((packed, attention), (plain, sdpa_attention_forward)):
        step(cache, attend, *rows(3, 1, 1, HELD))
    one = rows(3, 1, 1, 1)
    return (
        Side(lambda: step(packed, attention, *one), lambda: cut(x.cache for x in packed.layers)),
        Side(
            lambda: step(plain, sdpa_attention_forward, *one),
            lambda: plain.crop(HELD - plain.get_seq_length()),
        ),
    )


def measure(rounds: int) -> dict[str, Side]:
    """All sides in turn, so that what else the machine does hits all of them."""
    cache, (packed, plain) = of_a_cache(), of_transformers()
    sides = {"SkvqCache": cache, "its operators": operators(cache)}
    sides |= {"SkvqHFCache": packed, "operators of it": operators(packed), "DynamicCache": plain}
    for _ in range(rounds):
        for side in sides.values():
            side.round()
    return sides


def summary(sides: Mapping[str, Side]) -> dict[str, float]:
    """Microseconds per layer and step: of each side the fastest round, which others disturbed least."""
    us = {name: min(side.us) for name, side in sides.items()}
    return {
        "cache": us["SkvqCache"],
        "cache_operators": us["its operators"],
        "cache_python": us["SkvqCache"] - us["its operators"],
        "hf": us["SkvqHFCache"],
        "hf_operators": us["operators of it"],
        "hf_python": us["SkvqHFCache"] - us["operators of it"],
        "hf_dynamic_cache": us["DynamicCache"],
        "hf_more_than_dynamic_cache": us["SkvqHFCache"] - us["DynamicCache"],
    }


def main(
    rounds: Annotated[int, typer.Option(min=1, help="Of 32 steps of each side.")] = 200,
    json_to: Annotated[Path | None, typer.Option("--json", help="Write JSON here.")] = None,
) -> None:
    """Prints microseconds per layer and step."""
    torch.set_num_threads(1)
    with torch.inference_mode():
        sides = measure(rounds)
    found = summary(sides)
    if json_to is not None:
        medians = {name: median(side.us) for name, side in sides.items()}
        json_to.write_text(json.dumps({"us": found, "median_us": medians}, indent=2) + "\n")
    report.table(
        "Microseconds per layer and step, one token and head, 16 to 48 tokens cached, one thread",
        ("", "all", "operators", "Python"),
        [
            (name, *(f"{found[key + part]:.1f}" for part in ("", "_operators", "_python")))
            for name, key in (("SkvqCache.append, attend", "cache"), ("SkvqHFCache", "hf"))
        ]
        + [("DynamicCache, sdpa", f"{found['hf_dynamic_cache']:.1f}", "", "")],
    )


if __name__ == "__main__":
    typer.run(main)
