"""SKVQ as it was published (arXiv 2405.06219), really packed: what everything else is compared with.

Keys before RoPE, channels reordered across all KV heads of a layer into K-Means groups of uneven
size, a clip about zero per group, FP8 scale and zero per token and group, sinks and a window.
"""

from skvq_ext.published.method import Published
from skvq_ext.published.scheme import PublishedScheme, PublishedSchemeError

__all__ = ["Published", "PublishedScheme", "PublishedSchemeError"]
