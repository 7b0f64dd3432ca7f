"""The error of one head's attention, against a plain loop over queries in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from skvq_ext.calibrate.objective import HeadErrors, Softmax

BATCH, GROUP, TOKENS, DIM = 2, 3, 60, 16
WINDOW, SINKS = 12, 4
SINK_LOGITS = torch.tensor([-1.0, 0.5, 3.0])


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


Q = random(BATCH, GROUP, TOKENS, DIM, seed=0)
K, V = (random(BATCH, TOKENS, DIM, seed=seed) for seed in (1, 2))
POSITIONS = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(9))[:25].sort().values
ROOT = random(GROUP, DIM, DIM, seed=5).double()
FISHER = ROOT @ ROOT.mT


def errors(how: Softmax, positions: Tensor = POSITIONS) -> HeadErrors:
    rows = Q[:, :, positions].contiguous(), K, V
    return HeadErrors(rows, positions, how, FISHER, window=WINDOW, sinks=SINKS)


def output(q: Tensor, position: int, k: Tensor, v: Tensor, how: Softmax, head: int) -> Tensor:
    """Attention of one query over the tokens it may see, one by one."""
    first = max(0, position - how.sliding_window + 1) if how.sliding_window else 0
    weights, seen = [], range(first, position + 1)
    for token in seen:
        logit = float(q @ k[token]) * how.scale
        logit = how.softcap * math.tanh(logit / how.softcap) if how.softcap else logit
        weights.append(math.exp(logit))
    total = sum(weights)
    if how.sink_logits is not None:
        total += math.exp(float(how.sink_logits[head]))
    return sum(w * v[t] for w, t in zip(weights, seen, strict=True)) / total


def expected(how: Softmax, k: Tensor, v: Tensor) -> tuple[float, float, float]:
    """fit, held and nats where k and v are read instead of K and V outside sinks and window."""
    squares, nats = torch.zeros(len(POSITIONS), dtype=torch.float64), 0.0
    for b in range(BATCH):
        for head in range(GROUP):
            for i, position in enumerate(POSITIONS.tolist()):
                q = Q[b, head, position].double()
                mixed = [x[b].double().clone() for x in (K, V)]
                old = slice(SINKS, max(SINKS, position + 1 - WINDOW))
                mixed[0][old], mixed[1][old] = k[b, old].double(), v[b, old].double()
                off = output(q, position, *mixed, how, head)
                off = off - output(q, position, K[b].double(), V[b].double(), how, head)
                squares[i] += off.square().mean() / BATCH / GROUP
                nats += float(off @ FISHER[head] @ off) / 2 / BATCH / len(POSITIONS)
    held = torch.arange(len(POSITIONS)) % 4 == 3
    return float(squares[~held].mean()), float(squares[held].mean()), nats


@pytest.mark.parametrize(
    "how",
    [
        Softmax(0.25),
        Softmax(0.4, softcap=2.0),
        Softmax(0.25, sliding_window=20),
        Softmax(0.25, sink_logits=SINK_LOGITS),
        Softmax(0.3, 3.0, 25, SINK_LOGITS),
    ],
    ids=["plain", "softcap", "sliding window", "learned sinks", "all"],
)
@pytest.mark.parametrize("side", ["k", "v"])
def test_it_is_what_a_loop_over_queries_gives(how: Softmax, side: str) -> None:
    found = errors(how)
    if side == "k":
        changed = (K + 0.3 * random(*K.shape, seed=7), V)
        error = found.of_keys(changed[0])
    else:
        changed = (K, V + 0.3 * random(*V.shape, seed=8))
        error = found.of_values(changed[1])
    got = (error.fit, error.held, error.nats)
    assert got == pytest.approx(expected(how, *changed), rel=1e-3)
    assert min(got) > 1e-6


@pytest.mark.parametrize("sliding_window", [0, 20])
def test_what_is_read_exactly_does_not_count(sliding_window: int) -> None:
    """The same rows, and any rows in the sinks, in the window and in the future."""
    found = errors(Softmax(0.25, sliding_window=sliding_window))
    zero = (0.0, 0.0, 0.0)
    for side, x in (("of_keys", K), ("of_values", V)):
        error = getattr(found, side)(x.clone())
        assert (error.fit, error.held, error.nats) == zero
        changed = x + 100.0
        old = slice(SINKS, int(POSITIONS.max()) - WINDOW + 1)
        changed[:, old] = x[:, old]
        error = getattr(found, side)(changed)
        assert (error.fit, error.held, error.nats) == zero


def test_a_window_that_hides_all_old_tokens_leaves_nothing_to_err() -> None:
    found = errors(Softmax(0.25, sliding_window=WINDOW))
    error = found.of_keys(K + 1)
    assert (error.fit, error.held, error.nats) == (0.0, 0.0, 0.0)


def test_few_queries_are_all_used_for_both() -> None:
    error = errors(Softmax(0.25), torch.tensor([40, 59])).of_values(V + 1)
    assert error.fit == error.held > 0
