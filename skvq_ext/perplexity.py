"""Teacher-forced loss of a model over a text, in full precision or through the packed cache."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import cross_entropy

from skvq_ext.generation import full_cache, packed_cache
from skvq_ext.report import Step, no_steps

if TYPE_CHECKING:
    from skvq_ext.plan import Plan
    from skvq_ext.scheme import Scheme

FULL_CHUNK = 512  # tokens of a forward in full precision: bounds the memory of the logits
# The first chunk attends in full precision; single steps do so too as long as no tile is packed,
# which takes 64 tokens and at least one in the window.
PACKED_CHUNK = 64


@dataclass(frozen=True)
class Score:
    """What a text cost. losses, f64 [scored], in nats; hits, bool [scored], whether the token was
    the likeliest; seconds of all forwards."""

    losses: torch.Tensor
    hits: torch.Tensor
    seconds: float

    @property
    def scored(self) -> int:
        """Tokens that were scored."""
        return len(self.losses)

    @property
    def nll(self) -> float:
        """Nats per scored token."""
        return float(self.losses.mean())

    @property
    def perplexity(self) -> float:
        """exp(nll)."""
        return math.exp(self.nll)

    def above(self, other: Score) -> tuple[float, float]:
        """Nats per token above `other`'s on the same tokens, and the standard error of that."""
        difference = self.losses - other.losses
        error = float(difference.std()) / math.sqrt(self.scored) if self.scored > 1 else math.nan
        return float(difference.mean()), error


def packed_chunk(rollback: int) -> int:
    """Most tokens of one forward for which packed attention equals single decode steps."""
    return min(PACKED_CHUNK, rollback + 1)


@torch.inference_mode()
def score(
    model: Any,
    ids: torch.Tensor,
    cache: Any,
    skip: int = 0,
    chunk: int = FULL_CHUNK,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Score:
    """Feeds a text to a model chunk by chunk and sums the loss of what comes next.

    Args: model, a transformers causal language model; ids, int64 [1, num_tokens]; cache, an empty
    transformers cache (a packed one needs chunk <= packed_chunk(rollback)); skip, leading tokens
    that are context only (the very first is never scored); chunk, tokens per forward; progress,
    called with the tokens of each forward.
    Raises: ValueError when no token is left to score.
    """
    num_tokens = ids.shape[1]
    first = max(1, skip)
    if first >= num_tokens:
        raise ValueError(f"nothing to score: {num_tokens} tokens, of which {first} are context.")
    losses, hits, read = [], [], 0
    started = time.perf_counter()
    while read < num_tokens - 1:
        stop = min(read + chunk, num_tokens - 1)
        inputs = ids[:, read:stop]
        logits = model(input_ids=inputs, past_key_values=cache, use_cache=True).logits[0]
        start = max(read, first - 1)  # position p predicts token p + 1
        if start < stop:
            following = ids[0, start + 1 : stop + 1]
            scores = logits[start - read :].float()
            losses.append(cross_entropy(scores, following, reduction="none"))
            hits.append(scores.argmax(-1) == following)
        progress(stop - read)
        read = stop
    seconds = time.perf_counter() - started
    return Score(torch.cat(losses).double().cpu(), torch.cat(hits).cpu(), seconds)


def score_full(model: Any, ids: torch.Tensor, skip: int = 0, step: Step = no_steps) -> Score:
    """Loss in full precision. Args: as `score`; step, see `skvq_ext.report`."""
    return _stepped("full precision", step, model, ids, full_cache(model), skip, FULL_CHUNK)


def score_packed(
    model: Any,
    ids: torch.Tensor,
    scheme: Scheme,
    plan: Plan | None = None,
    skip: int = 0,
    step: Step = no_steps,
    name: str = "packed",
    exact: bool = False,
) -> Score:
    """Loss with every token older than the window read from packed bytes, as in single steps.

    Args: as `score_full`; exact, see `SkvqHFCache`.
    """
    cache = packed_cache(model, scheme, plan, exact)
    return _stepped(name, step, model, ids, cache, skip, packed_chunk(scheme.rollback))


def _stepped(
    name: str, step: Step, model: Any, ids: torch.Tensor, cache: Any, skip: int, chunk: int
) -> Score:
    done, total = 0, ids.shape[1] - 1

    def progress(tokens: int) -> None:
        nonlocal done
        done += tokens
        step(name, done, total)

    return score(model, ids, cache, skip, chunk, progress)
