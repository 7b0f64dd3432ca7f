"""The one exception of the interpreter."""

from __future__ import annotations


class PtxError(Exception):
    """Something a GPU would not do as meant, or an instruction that is not known here."""
