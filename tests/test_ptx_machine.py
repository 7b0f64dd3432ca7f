"""The interpreter of tests/ptx itself, on PTX written by hand: numbers, divergence, and what it must not let pass."""

from __future__ import annotations

import re

import numpy as np
import pytest
from numpy.typing import DTypeLike
from ptx.errors import PtxError
from ptx.launch import Program
from ptx.memory import DeviceMemory
from ptx.numbers import Array, directed, fused

HEADER = ".version 9.0\n.target sm_90\n.address_size 64\n"
THREAD = "mov.u32 %r0, %tid.x; mul.wide.u32 %rd1, %r0, {size}; add.s64 %rd2, %rd0, %rd1;"


def kernel(body: str, size: int = 4) -> str:
    """A kernel with one pointer; %r0 is the thread, %rd0 the pointer and %rd2 its element of the thread."""
    return f"""{HEADER}
.visible .entry k(.param .u64 p)
{{
    .reg .pred %p<8>; .reg .b16 %h<8>; .reg .b32 %r<32>; .reg .f32 %f<16>; .reg .b64 %rd<16>;
    .shared .align 16 .b8 s[256];
    ld.param.u64 %rd0, [p];
    {THREAD.format(size=size)}
    {body}
    ret;
}}
"""


def run(
    body: str, data: Array, *, threads: int = 32, grid: int = 1, seed: int | None = None
) -> Array:
    """Runs a body on a copy of `data`; what is there then."""
    memory = DeviceMemory()
    place = memory.put(data)
    program = Program(kernel(body, data.itemsize), memory)
    program.launch("k", (grid,), (threads,), [place], seed=seed)
    return memory.get(place, data.dtype, data.shape)


def mapped(body: str, x: Array, dtype: DTypeLike = np.uint32) -> Array:
    """%r1 = f(%r1) for every element of x."""
    loaded = f"ld.global.u32 %r1, [%rd2]; {body} st.global.u32 [%rd2], %r1;"
    return run(loaded, x.astype(np.uint32), threads=len(x)).view(dtype)


WORDS = np.random.default_rng(3).integers(0, 1 << 32, 64, dtype=np.uint64).astype(np.uint32)
WORDS[:4] = 0, 1, 0x80000000, 0xFFFFFFFF


def signed(x: Array) -> list[int]:
    return [int(v) for v in x.view(np.int32)]


INTEGER = {
    "brev.b32 %r1, %r1;": lambda v: int(f"{v:032b}"[::-1], 2),
    "clz.b32 %r1, %r1;": lambda v: 32 - v.bit_length(),
    "popc.b32 %r1, %r1;": lambda v: v.bit_count(),
    "bfe.u32 %r1, %r1, 5, 9;": lambda v: v >> 5 & 511,
    "bfi.b32 %r1, %r1, 0, 12, 7;": lambda v: (v & 127) << 12,
    "mul.hi.u32 %r1, %r1, 0xCCCCCCCD;": lambda v: v * 0xCCCCCCCD >> 32,
    "mad.lo.s32 %r1, %r1, 77, 5;": lambda v: v * 77 + 5,
    "shf.l.wrap.b32 %r1, %r1, %r1, 37;": lambda v: v << 5 | v >> 27,
    "shf.r.clamp.b32 %r1, 0, %r1, 40;": lambda v: v,
    "shl.b32 %r1, %r1, 33;": lambda v: 0,
    "lop3.b32 %r1, %r1, 0xF0F0F0F0, 0x33333333, 0x96;": lambda v: v ^ 0xF0F0F0F0 ^ 0x33333333,
    "prmt.b32 %r1, %r1, 0, 0x8123;": lambda v: (
        v >> 24 | (v >> 16 & 255) << 8 | (v >> 8 & 255) << 16 | (255 if v & 128 else 0) << 24
    ),
    "div.u32 %r1, %r1, 7;": lambda v: v // 7,
    "dp4a.u32.u32 %r1, %r1, 0x01020304, 9;": lambda v: (
        (v & 255) * 4 + (v >> 8 & 255) * 3 + (v >> 16 & 255) * 2 + (v >> 24) + 9
    ),
    "dp2a.hi.u32.u32 %r1, %r1, 0x01020304, 0;": lambda v: (v & 65535) * 2 + (v >> 16),
}


@pytest.mark.parametrize("body", INTEGER)
def test_integers(body: str) -> None:
    """Against Python's integers."""
    want = [INTEGER[body](int(v)) % (1 << 32) for v in WORDS]
    assert mapped(body, WORDS).tolist() == want


SIGNED = {
    "shr.s32 %r1, %r1, 40;": lambda v: -1 if v < 0 else 0,
    "div.s32 %r1, %r1, 7;": lambda v: abs(v) // 7 * (1 if v >= 0 else -1),
    "rem.s32 %r1, %r1, 7;": lambda v: abs(v) % 7 * (1 if v >= 0 else -1),
    "bfe.s32 %r1, %r1, 28, 8;": lambda v: v >> 28,
    "max.s32 %r1, %r1, -3;": lambda v: max(v, -3),
    "cvt.s32.s8 %r1, %r1;": lambda v: (v & 255) - 2 * (v & 128),
    "mul.hi.s32 %r1, %r1, -5;": lambda v: v * -5 >> 32,
}


@pytest.mark.parametrize("body", SIGNED)
def test_signed_integers(body: str) -> None:
    assert signed(mapped(body, WORDS)) == [SIGNED[body](v) for v in signed(WORDS)]


def test_float_to_integer_saturates_and_knows_nan() -> None:
    x = np.array([1.5, 2.5, -0.5, 3e9, -3e9, np.nan, np.inf, 2147483520.0], np.float32)
    x = np.resize(x, 32)
    body = "mov.b32 %f1, %r1; cvt.{}.s32.f32 %r1, %f1;"
    limits = [2147483647, -2147483648, 0, 2147483647, 2147483520]
    assert signed(mapped(body.format("rni"), x.view(np.uint32)))[:8] == [2, 2, 0, *limits]
    assert signed(mapped(body.format("rmi"), x.view(np.uint32)))[:8] == [1, 2, -1, *limits]


def test_a_sum_of_a_product_is_rounded_once() -> None:
    """1 + 2^-24 + 2^-53 lies just above a tie of float32, and float64 cannot hold it."""
    x, y = np.float32(1 + 2.0**-12), np.float32(2.0**-41)
    exact = fused(np.array([x]), np.array([y]), np.array([np.float32(1 + 2.0**-23)]))
    assert directed(exact, "rp")[0] == np.float32(1 + 2.0**-22)
    tie = fused(
        np.array([np.float32(2.0**-24)]),
        np.array([np.float32(1 + 2.0**-23)]),
        np.ones(1, np.float32),
    )
    assert tie.astype(np.float32)[0] == np.float32(1 + 2.0**-23)
    small = np.array([np.float32(2.0**-30)])
    above = fused(small, small, np.array([np.float64(1 + 2.0**-24)]))
    assert above.astype(np.float32)[0] == np.float32(1 + 2.0**-23)


def test_threads_part_and_meet_again() -> None:
    """A loop whose length differs from thread to thread, then a shuffle that needs all lanes."""
    body = """
        mov.u32 %r1, 0; mov.u32 %r2, 0;
    again:
        setp.ge.u32 %p0, %r2, %r0;
        @%p0 bra out;
        add.u32 %r1, %r1, %r2; add.u32 %r2, %r2, 1;
        bra again;
    out:
        shfl.sync.bfly.b32 %r3, %r1, 1, 31, -1;
        st.global.u32 [%rd2], %r3;"""
    thread = np.arange(32) ^ 1
    assert np.array_equal(run(body, np.zeros(32, np.uint32)), thread * (thread - 1) // 2)


def test_names_belong_to_their_braces() -> None:
    """As inline assembly leaves them: the same register and label in two scopes."""
    scope = """
        {{ .reg .pred done; .reg .b32 x;
        mov.u32 x, 0;
    again: add.u32 x, x, {step};
        setp.ge.u32 done, x, 10;
        @!done bra again;
        add.u32 %r1, %r1, x; }}"""
    body = (
        f"mov.u32 %r1, 0; {scope.format(step=3)} {scope.format(step=7)} st.global.u32 [%rd2], %r1;"
    )
    assert (run(body, np.zeros(32, np.uint32)) == 12 + 14).all()


def test_a_table_of_branches() -> None:
    body = """
        and.b32 %r1, %r0, 1;
    table: .branchtargets even, odd;
        brx.idx %r1, table;
    even: mov.u32 %r2, 20; bra out;
    odd: mov.u32 %r2, 10;
    out: st.global.u32 [%rd2], %r2;"""
    assert np.array_equal(run(body, np.zeros(32, np.uint32)), np.where(np.arange(32) % 2, 10, 20))


def test_atomics_count_every_thread() -> None:
    body = "atom.global.add.u32 %r1, [%rd0], 3; red.global.max.u32 [%rd0+4], %r0;"
    assert run(body, np.zeros(2, np.uint32), threads=64, grid=3).tolist() == [576, 63]


EXCHANGE = """
        shl.b32 %r1, %r0, 2; mov.u32 %r2, s; add.u32 %r3, %r2, %r1;
        st.shared.u32 [%r3], %r0;
        {barrier}
        xor.b32 %r1, %r1, 128; add.u32 %r3, %r2, %r1;
        ld.shared.u32 %r4, [%r3];
        st.global.u32 [%rd2], %r4;"""


@pytest.mark.parametrize("seed", range(4))
def test_a_missing_barrier_shows_when_warps_run_one_after_the_other(seed: int) -> None:
    """Two warps exchange through shared memory. In step they may seem right without the barrier."""
    data, want = np.zeros(64, np.uint32), np.arange(64) ^ 32
    right, wrong = EXCHANGE.format(barrier="bar.sync 0;"), EXCHANGE.format(barrier="")
    assert np.array_equal(run(right, data, threads=64, seed=seed), want)
    assert np.array_equal(run(wrong, data, threads=64), want)
    assert not np.array_equal(run(wrong, data, threads=64, seed=seed), want)


MISTAKES = {
    "unknown instruction": ("frobnicate.b32 %r1, %r1;", "does not know the instruction frobnicate"),
    "unknown modifier": ("add.rz.f32 %f1, %f1, %f1;", "does not know .rz of add.rz.f32"),
    "register not declared": ("mov.u32 %r99, 0;", "cannot write to Name.*%r99"),
    "beyond a buffer": (
        "ld.global.u32 %r1, [%rd2+128];",
        "4 bytes of global .* out of bounds: thread 0 of block",
    ),
    "last lane beyond": ("ld.global.u32 %r1, [%rd2+4];", "out of bounds: thread 31 of block"),
    "misaligned": ("ld.global.u16 %h1, [%rd2+1];", "2 bytes of .* not aligned: thread 0 of"),
    "beyond shared memory": (
        "mov.u32 %r1, s; st.shared.u32 [%r1+256], %r1;",
        "shared .* out of bounds",
    ),
    "generic address taken for a shared one": (
        "cvt.u32.u64 %r1, %rd2; ld.shared.u32 %r2, [%r1];",
        "shared .* out of bounds",
    ),
    "pointer into the wrong space": ("cvta.to.shared.u64 %rd3, %rd2;", "is not in shared memory"),
    "barrier that half of a block skips": (
        "setp.lt.u32 %p0, %r0, 7; @%p0 bar.sync 0;",
        "threads wait for others that never come.*\n.*7 threads at PTX line",
    ),
    "shuffle that lanes skip": (
        "setp.lt.u32 %p0, %r0, 7; @%p0 shfl.sync.bfly.b32 %r1, %r0, 1, 31, -1;",
        "threads wait for others that never come",
    ),
    "lane outside of its mask": (
        "shfl.sync.bfly.b32 %r1, %r0, 1, 31, 0xFFFF;",
        "not in its own mask",
    ),
    "matrix product of half a warp": (
        "setp.lt.u32 %p0, %r0, 16; @%p0 movmatrix.sync.aligned.m8n8.trans.b16 %r1, %r0;",
        "wait for others that never come",
    ),
    "copy that nobody waits for": (
        "mov.u32 %r1, s; cp.async.ca.shared.global [%r1], [%rd0], 4;",
        "returned before it waited for its copies",
    ),
    "barrier that was never initialised": (
        "mov.u32 %r1, s; mbarrier.try_wait.parity.shared::cta.b64 %p0, [%r1], 0;",
        "no mbarrier was initialised",
    ),
    "bytes that never come": (
        "mov.u32 %r1, s; setp.eq.u32 %p0, %r0, 0; @%p0 mbarrier.init.shared::cta.b64 [%r1], 1;"
        "@%p0 mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r1], 16;"
        "mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r1], 0;",
        "threads wait for others that never come",
    ),
    "branch beyond its table": (
        "table: .branchtargets out; brx.idx %r0, table; out:",
        "beyond its table",
    ),
    "trap": ("setp.eq.u32 %p0, %r0, 9; @%p0 trap;", "trapped: thread 9 of block"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_errors_that_say_where(mistake: str) -> None:
    body, message = MISTAKES[mistake]
    with pytest.raises(PtxError, match=message) as error:
        run(body, np.zeros(32, np.uint32))
    assert re.search(r"in k, PTX line \d+: ", str(error.value))


def test_what_is_only_read_cannot_be_written() -> None:
    memory = DeviceMemory()
    place = memory.put(np.zeros(32, np.uint32), writable=False)
    program = Program(kernel("st.global.u32 [%rd2], %r0;"), memory)
    with pytest.raises(PtxError, match="out of bounds"):
        program.launch("k", (1,), (32,), [place])


def test_arguments_must_fit() -> None:
    program = Program(kernel(""), DeviceMemory())
    with pytest.raises(PtxError, match="takes 1 arguments, got 2"):
        program.launch("k", (1,), (32,), [1, 2])
    with pytest.raises(PtxError, match="no kernel other in this module; it has k"):
        program.launch("other", (1,), (32,), [1])
