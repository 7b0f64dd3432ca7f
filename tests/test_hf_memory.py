"""How much memory a long chunk takes beyond what it is given and gives back: never its length squared, nor
its length times the history's, nor the history in full precision."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

HEADS, DIM = 2, 64
ROW = HEADS * DIM * 4  # bytes of one token's q, k or v
BLOCK = 1 << 19  # bytes of a block of logits, made small so that it hides nothing
NOISE = 2 << 20  # of the allocator and of code that is loaded late

MEASURE = f"""
import torch
import transformers as hf
from skvq_ext.hf import SkvqHFCache, exact
from skvq_ext.hf.attention import attention

exact._BLOCK_LOGITS = {BLOCK} // 4
torch.set_num_threads(1)
sizes = dict(hidden_size={HEADS * DIM}, num_attention_heads={HEADS}, intermediate_size=8, vocab_size=8)
model = hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, num_hidden_layers=1))
module = model.model.layers[0].self_attn


def resident(name):
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


def feed(cache, tokens):
    "Bytes that are resident at most while tokens are fed, above what is before."
    q, k, v = torch.randn(3, 1, {HEADS}, tokens, {DIM})
    open("/proc/self/clear_refs", "w").write("5")  # forget the peak so far
    before = resident("VmRSS")
    attention(module, q, *cache.update(k, v, 0), None, scaling=0.125)
    return resident("VmHWM") - before


with torch.inference_mode():
    feed(warm := SkvqHFCache(model), 300)
    feed(warm, 200)
    print(*(feed(cache, n) for cache, lengths in CASES(SkvqHFCache, model) for n in lengths))
"""


def measure(*lengths: int) -> list[int]:
    """Peak bytes of each of these chunks of one sequence, in a process of its own."""
    code = MEASURE.replace("CASES(SkvqHFCache, model)", f"[(SkvqHFCache(model), {lengths})]")
    # What is freed goes back to the system at once, so that what is resident is what is in use.
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if "clear_refs" in done.stderr:
        pytest.skip("this system does not let a process reset its peak of resident memory")
    assert done.returncode == 0, done.stderr
    return [int(number) for number in done.stdout.split()]


def test_a_prompt_and_a_long_chunk_take_memory_of_their_length() -> None:
    prompt, chunk = 8192, 1024
    first, second = measure(prompt, chunk)
    # Mapped k and v, the output, what PyTorch's attention keeps; and the pages and the window.
    assert first < 5 * prompt * ROW + NOISE < prompt * prompt * HEADS * 4 / 8
    # Attention over the history, over the chunk, both together and merged; one block of logits with its mask.
    bound = 5 * chunk * ROW + 2 * BLOCK + NOISE
    assert second < bound
    assert bound < chunk * chunk * HEADS * 4, "all logits among the chunk would be seen"
    assert bound < 2 * prompt * ROW, "the history in full precision would be seen"
