"""The packed cache in Hugging Face transformers (5.x).

model = AutoModelForCausalLM.from_pretrained(name)
cache = SkvqHFCache(model, scheme="k2-v1.5-g128-w128-sink5-fp8")
model.generate(**inputs, past_key_values=cache)
"""

from skvq_ext.hf.attention import enable
from skvq_ext.hf.cache import SkvqHFCache

__all__ = ["SkvqHFCache", "enable"]
