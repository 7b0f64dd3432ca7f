"""Normalised Hadamard matrices: Sylvester doubling of a Paley core."""

import math
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor


def _is_prime(n: int) -> bool:
    return n >= 2 and all(n % divisor for divisor in range(2, int(n**0.5) + 1))


def _jacobsthal(q: int) -> Tensor:
    """Q[i, j] = Legendre symbol of (i - j) modulo the prime q; float64 [q, q]."""
    symbol = torch.full((q,), -1.0, dtype=torch.float64)
    symbol[torch.arange(1, q) ** 2 % q] = 1.0
    symbol[0] = 0.0
    index = torch.arange(q)
    return symbol[(index[:, None] - index[None, :]) % q]


def _bordered(q: int, corner: float) -> Tensor:
    """The conference matrix of Q: first row 1, first column `corner`, zero diagonal."""
    matrix = torch.zeros(q + 1, q + 1, dtype=torch.float64)
    matrix[0, 1:] = 1.0
    matrix[1:, 0] = corner
    matrix[1:, 1:] = _jacobsthal(q)
    return matrix


def _paley_core(order: int) -> Tensor | None:
    """A +-1 Hadamard matrix of this order by Paley I or II over a prime, else None.

    Source: R. Paley, On orthogonal matrices (1933).
    """
    if order == 1:
        return torch.ones(1, 1, dtype=torch.float64)
    q = order - 1
    if q % 4 == 3 and _is_prime(q):
        return torch.eye(order, dtype=torch.float64) + _bordered(q, -1.0)
    q = order // 2 - 1
    if order % 4 == 0 and q % 4 == 1 and _is_prime(q):
        conference = _bordered(q, 1.0)
        plus = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
        minus = torch.tensor([[1.0, -1.0], [-1.0, -1.0]], dtype=torch.float64)
        return torch.kron(conference, plus) + torch.kron(torch.eye(q + 1).double(), minus)
    return None


@lru_cache(maxsize=64)
def _signs(order: int) -> Tensor:
    core_order, doublings = order, 0
    while core_order % 2 == 0:
        core_order, doublings = core_order // 2, doublings + 1
    # The smallest core first: the more doublings, the closer to the plain Walsh-Hadamard matrix.
    for _ in range(doublings + 1):
        core = _paley_core(core_order)
        if core is not None:
            step = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64)
            for _ in range(doublings):
                core = torch.kron(step, core)
            return core
        core_order, doublings = core_order * 2, doublings - 1
    raise ValueError(
        f"no Hadamard matrix of order {order}: neither Sylvester doubling nor Paley I / II over a "
        "prime builds it. Choose bands of another size, or a scheme without 'hadamard'."
    )


def hadamard(order: int) -> Tensor:
    """The orthogonal matrix H / sqrt(order) with entries +-1 in H.

    Args: order, the size of the matrix (channels).
    Returns: float64 [order, order], rows orthonormal.
    Raises: ValueError where Sylvester x Paley I / II does not reach this order.
    """
    if order < 1:
        raise ValueError(f"a Hadamard matrix needs an order of at least 1, got {order}.")
    return _signs(order) / math.sqrt(order)


def block_hadamard(band_edges: tuple[int, ...]) -> Tensor:
    """One Hadamard block per band, zeros between bands.

    Args: band_edges, channel edges (0, ..., head_dim), strictly growing.
    Returns: float64 [head_dim, head_dim], orthogonal.
    """
    matrix = torch.zeros(band_edges[-1], band_edges[-1], dtype=torch.float64)
    for start, stop in pairwise(band_edges):
        matrix[start:stop, start:stop] = hadamard(stop - start)
    return matrix
