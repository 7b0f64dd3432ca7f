"""Greedy continuation of a prompt through a given cache, timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from skvq_ext.models import LanguageModel
    from skvq_ext.plan import Plan
    from skvq_ext.scheme import Scheme


@dataclass(frozen=True)
class Continuation:
    """What a model wrote. Times in seconds; decode_seconds excludes the prompt and first token."""

    text: str
    ids: list[int]
    prompt_tokens: int
    prefill_seconds: float
    decode_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Decode speed; 0 where fewer than two tokens were written."""
        return (len(self.ids) - 1) / self.decode_seconds if len(self.ids) > 1 else 0.0


def full_cache(model: Any) -> Any:
    """An empty cache of transformers' usual kind."""
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


def packed_cache(model: Any, scheme: Scheme, plan: Plan | None = None, exact: bool = False) -> Any:
    """An empty packed cache; the model is told to attend through it. Args: see `SkvqHFCache`."""
    from skvq_ext.hf import SkvqHFCache

    return SkvqHFCache(model, scheme=scheme, plan=plan, exact=exact)


class _Clock:
    """A transformers streamer that notes when tokens arrive; the first call brings the prompt."""

    def __init__(self, on_token: Callable[[int], None]) -> None:
        self.on_token = on_token
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())
        self.on_token(len(self.times) - 1)

    def end(self) -> None:
        pass


def continue_text(
    loaded: LanguageModel,
    ids: torch.Tensor,
    cache: Any,
    max_new_tokens: int,
    on_token: Callable[[int], None] = lambda count: None,
    repetition_penalty: float = 1.0,
) -> Continuation:
    """Continues a prompt greedily with `model.generate`.

    Args: ids, int64 [1, num_tokens], the prompt; cache, an empty transformers cache;
    on_token, called with the number of new tokens so far; repetition_penalty, as transformers
    defines it: small models run in circles at 1.
    """
    clock = _Clock(on_token)
    started = time.perf_counter()
    with torch.inference_mode():
        written = loaded.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=cache,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            repetition_penalty=repetition_penalty,
            streamer=clock,
            pad_token_id=loaded.tokenizer.eos_token_id,
        )
    new = written[0, ids.shape[1] :]
    first, last = clock.times[1], clock.times[-1]
    return Continuation(
        loaded.decode(new), new.tolist(), ids.shape[1], first - started, last - first
    )
