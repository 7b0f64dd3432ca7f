"""What is measured, a model and methods, and how a method reads tokens with that model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from skvq_ext.evaluate.method import Method
from skvq_ext.evaluate.result import STRETCHES
from skvq_ext.models import LanguageModel
from skvq_ext.report import Step, no_steps

# What every measurement that is teacher forced says of itself.
READING = (
    "Teacher forced, every token reads what single decode steps would read: the window and sinks "
    "named beside each method in full precision, every older token as the method stores it. "
    "Nothing is prefilled in full precision."
)

Count = Callable[[int], None]  # is called with the tokens of each forward


class EvaluationError(ValueError):
    """An evaluation that cannot be made as it was asked for."""


@dataclass(frozen=True)
class Passage:
    """A text as the model reads it: ids int64 [1, num_tokens]."""

    name: str
    ids: Tensor


@dataclass
class Subject:
    """A model and the methods that are compared on it; the first of them is full precision.

    step: see `skvq_ext.report`. times: seconds by "measurement: method", filled on the way.
    """

    loaded: LanguageModel
    methods: Sequence[Method]
    step: Step = no_steps
    times: dict[str, float] = field(default_factory=dict)

    @property
    def model(self) -> Any:
        """The transformers model."""
        return self.loaded.model

    @contextmanager
    def timed(self, measure: str, method: Method) -> Iterator[None]:
        """Adds the seconds spent inside to `times`."""
        started = time.perf_counter()
        yield
        key = f"{measure}: {method.name}"
        self.times[key] = self.times.get(key, 0.0) + time.perf_counter() - started

    def counter(self, measure: str, total: int) -> Count:
        """Tells how far a measurement is: one progress bar for all its methods and texts."""
        done = 0

        def add(tokens: int) -> None:
            nonlocal done
            done += tokens
            self.step(measure, done, total)

        return add

    def check_room(self, tokens: int, what: str) -> None:
        """Raises EvaluationError where the model was not made for so many tokens."""
        config = self.model.config.get_text_config(decoder=True)
        limit = getattr(config, "max_position_embeddings", None)
        if isinstance(limit, int) and tokens > limit:
            raise EvaluationError(
                f"{what} takes {tokens} tokens; {self.loaded.name} was made for {limit} at most. "
                "Ask for fewer."
            )


@contextmanager
def opened(model: Any, method: Method) -> Iterator[Any]:
    """A new cache of a method. Inside, the model attends as that cache needs it, afterwards as it
    did before: full precision is then always what the model itself computes."""
    with _restored(model):
        yield method.cache(model)


@contextmanager
def _restored(model: Any) -> Iterator[Any]:
    """Yields the configuration that names the attention; afterwards it names the same again."""
    config = model.config.get_text_config(decoder=True)
    usual = config._attn_implementation
    try:
        yield config
    finally:
        config._attn_implementation = usual


class Reader:
    """One method that reads one sequence; several may take turns on the same model."""

    def __init__(self, model: Any, method: Method) -> None:
        """Makes the cache."""
        self._model, self._method = model, method
        with _restored(model) as config:
            self.cache = method.cache(model)
            self._attention = config._attn_implementation

    @torch.inference_mode()
    def read(self, ids: Tensor) -> Tensor:
        """Reads the next tokens in one forward, int64 [1, n]; more than the method's chunk is not
        what single steps would read. Returns: logits f32 [n, vocab_size].

        Raises: EvaluationError where they hold NaN.
        """
        with _restored(self._model) as config:
            config._attn_implementation = self._attention
            out = self._model(input_ids=ids, past_key_values=self.cache, use_cache=True)
        logits: Tensor = out.logits[0].float()
        if logits.isnan().any():
            raise EvaluationError(
                f"{self._method.name}: the logits hold NaN. Run the model in float32 or bfloat16; "
                "if full precision is fine with the same text, this method overflows."
            )
        return logits


def chunks(num_tokens: int, chunk: int) -> Iterator[slice]:
    """Cuts num_tokens tokens into forwards of `chunk` at most."""
    for start in range(0, num_tokens, chunk):
        yield slice(start, min(start + chunk, num_tokens))


def stretch_means(x: Tensor) -> Tensor:
    """Means of STRETCHES consecutive parts of x [n], as equal as can be: f64 [STRETCHES]."""
    return torch.stack([part.mean() for part in x.double().tensor_split(STRETCHES)])


def standard_error(stretches: Tensor) -> float:
    """Of the mean of consecutive stretches [n]. Errors of neighbouring tokens go together, those of
    long stretches hardly: the method of batch means."""
    return float(stretches.std() / len(stretches) ** 0.5)
