"""A really packed low-bit KV cache: SKVQ (arXiv 2405.06219) as compiled operators with a small Python layer."""

from skvq_ext import fake  # noqa: F401  registers the fake kernels
from skvq_ext.format import RecordFormat
from skvq_ext.ops import build_info, format_table

__version__: str = build_info()["version"]

__all__ = ["RecordFormat", "__version__", "build_info", "format_table"]
