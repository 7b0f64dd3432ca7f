"""The packed cache as a model of the lm-evaluation-harness; `python -m skvq_ext.lm_eval` runs it.

Importing this room registers the model "skvq"; it needs lm-eval: pip install 'skvq_ext[lm-eval]'.
"""

from skvq_ext.lm_eval.model import SkvqLM

__all__ = ["SkvqLM"]
