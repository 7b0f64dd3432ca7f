"""The loop over packed tiles in the machine code of a decode kernel, and what a tile costs in it.

Input is `nvdisasm -gi -c` of a cubin that was compiled with -lineinfo: every instruction with the source lines it comes
from, inlined calls included. So rarely executed parts are known by their place in the source, whatever the compiler
made of them.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

SECTION = re.compile(r"^\s*\.section\s+\.text\.(\S+?),")
LABEL = re.compile(r"^(\.L_x_\d+):")
FRAME = re.compile(r'"([^"]+)", line (\d+)')
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*([^;]*);")
TARGET = re.compile(r"`\((\.L_x_\d+)\)")

# Units of a multiprocessor, as the profiler names them. What is in none of them goes under "other".
PIPES = {
    "tensor": "HMMA IMMA",
    "alu": "LOP3 SHF PRMT FMNMX FMNMX3 F2FP IADD3 VIADD IADD ISETP FSETP SEL FSEL LEA IMNMX VIMNMX VIADDMNMX MOV "
    "PLOP3 IABS SGXT BMSK LOP VOTE P2R R2P FSET ISCADD CS2R",
    "fma": "FFMA FMUL FADD HFMA2 HADD2 HMUL2 HMNMX2 FFMA2 FMUL2 FADD2",
    "imad": "IMAD",
    "special": "MUFU I2F F2I F2F I2I POPC FLO BREV FCHK",
    "shared load": "LDS LDSM",
    "transpose": "MOVM",
    "other memory": "STS LDG STG LDGSTS ATOMS SHFL UBLKCP SYNCS LDC ATOMG RED LDL STL LD ST",
    "uniform": "ULOP3 USHF UMOV UIADD3 UISETP ULEA UIMAD USEL UPRMT ULDC R2UR S2UR S2R UPLOP3 UFLO UP2UR UR2UP UVIADD "
    "UIMNMX UFMUL ELECT",
    "control": "BRA BSSY BSYNC WARPSYNC NOP EXIT CALL RET DEPBAR LDGDEPBAR BAR MEMBAR FENCE ENDCOLLECTIVE YIELD "
    "BREAK BRX NANOSLEEP ERRBAR CCTL",
}
PIPE_OF = {opcode: pipe for pipe, opcodes in PIPES.items() for opcode in opcodes.split()}


class NoLoopError(Exception):
    """The machine code does not look as expected."""


@dataclass(frozen=True)
class Instruction:
    address: int
    predicate: str
    name: str  # with its modifiers: LDS.128
    operands: str
    frames: tuple[tuple[str, int], ...]  # (file, line), innermost first

    @property
    def opcode(self) -> str:
        return self.name.split(".")[0]

    @property
    def pipe(self) -> str:
        return PIPE_OF.get(self.opcode, "other")


@dataclass
class Function:
    name: str
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)  # to an index into the code


def parse_listing(text: str) -> list[Function]:
    """Functions of a listing, with their instructions."""
    functions: list[Function] = []
    frames: list[tuple[str, int]] = []
    fresh = False  # whether `frames` belong to instructions that were already read
    for line in text.splitlines():
        if section := SECTION.match(line):
            functions.append(Function(section[1]))
            frames = []
        elif not functions:
            continue
        elif line.lstrip().startswith("//## File"):
            frames = [] if fresh else frames
            fresh = False
            file, number = FRAME.findall(line)[0]
            frames.append((file, int(number)))
        elif label := LABEL.match(line):
            functions[-1].labels[label[1]] = len(functions[-1].code)
        elif found := INSTRUCTION.match(line):
            fresh = True
            address, predicate, name, operands = found.groups()
            made = Instruction(int(address, 16), predicate or "", name, operands, tuple(frames))
            functions[-1].code.append(made)
    return [f for f in functions if f.code]


@dataclass(frozen=True)
class Region:
    """A part of the source: what stands in the braces behind `opening`, from the line after the first of them."""

    name: str
    file: str
    opening: str
    weight: float  # how often it runs a tile
    because: str


@dataclass(frozen=True)
class Lines:
    region: Region
    first: int
    last: int

    def holds(self, instruction: Instruction) -> bool:
        return any(
            file.endswith(self.region.file) and self.first <= line <= self.last
            for file, line in instruction.frames
        )


def locate_region(region: Region, root: Path) -> Lines:
    """The lines of a region in the source as it is now."""
    path = root / region.file
    text = re.sub(r"//[^\n]*", "", path.read_text(encoding="utf-8"))
    opening = re.search(region.opening, text)
    if opening is None:
        raise NoLoopError(
            f"{region.file} has nothing like {region.opening!r} ({region.name}): the weights of "
            "bench/sass_budget.py no longer fit the source; name the place as it is now"
        )
    depth = first = 0
    for brace in re.compile(r"[{}]").finditer(text, opening.start()):
        line = text.count("\n", 0, brace.start()) + 1
        first = first or line + 1
        depth += 1 if brace[0] == "{" else -1
        if depth == 0:
            return Lines(region, first, line)
    raise NoLoopError(f"{region.name} in {region.file} is never closed")


def packed_loop(function: Function) -> list[Instruction]:
    """The loop whose matrix products are all of packed tiles: it has HMMA and no LDSM, which loads full rows."""
    found: list[tuple[int, int]] = []
    for end, instruction in enumerate(function.code):
        target = TARGET.search(instruction.operands)
        if instruction.opcode != "BRA" or target is None:
            continue
        start = function.labels.get(target[1], len(function.code))
        opcodes = {i.opcode for i in function.code[start : end + 1]}
        if start <= end and "HMMA" in opcodes and "LDSM" not in opcodes:
            found.append((start, end))
    outermost = [
        (a, b)
        for a, b in found
        if not any((c, d) != (a, b) and c <= a and b <= d for c, d in found)
    ]
    if len(outermost) != 1:
        raise NoLoopError(
            f"{function.name}: expected one loop with HMMA and without LDSM, found {len(outermost)}"
        )
    start, end = outermost[0]
    return function.code[start : end + 1]


@dataclass(frozen=True)
class TileCost:
    """What a warp issues for one tile."""

    instructions: float
    pipes: dict[str, float]
    parts: dict[str, float]  # by function of the source
    rare: dict[str, int]  # instructions of each rarely executed region, not weighted
    hmma: int
    shared_loads: dict[str, float]  # by bytes a lane
    local: int  # LDL and STL in the whole kernel
    unknown: list[str]


def load_bytes(instruction: Instruction) -> int:
    """Bytes a lane of a load from shared memory."""
    if instruction.opcode == "LDSM":
        return 16
    widths = {"128": 16, "64": 8, "U8": 1, "S8": 1, "U16": 2, "S16": 2}
    return next((b for m, b in widths.items() if m in instruction.name.split(".")[1:]), 4)


def weight_of(instruction: Instruction, rare: Iterable[Lines]) -> float:
    return min([1.0, *(lines.region.weight for lines in rare if lines.holds(instruction))])


def tile_cost(
    function: Function, rare: Sequence[Lines], parts: Sequence[Lines], products: int
) -> TileCost:
    """What one tile costs, which takes `products` matrix products.

    A loop that was unrolled does several tiles a turn.
    """
    loop = packed_loop(function)
    hmma = sum(i.opcode == "HMMA" for i in loop)
    if hmma == 0 or hmma % products:
        raise NoLoopError(f"{function.name}: {hmma} HMMA in the loop, a tile takes {products}")
    tiles = hmma // products
    pipes: Counter[str] = Counter()
    unknown: set[str] = set()
    where: Counter[str] = Counter()
    loads: Counter[str] = Counter()
    for instruction in loop:
        weight = weight_of(instruction, rare) / tiles
        pipes[instruction.pipe] += weight
        if instruction.pipe == "other" and weight:
            unknown.add(instruction.opcode)
        part = next((p.region.name for p in parts if p.holds(instruction)), "rest")
        where[part] += weight
        # A load that is never executed fills a slot of the schedule and moves nothing.
        if instruction.pipe == "shared load" and instruction.predicate != "!PT":
            loads[str(load_bytes(instruction))] += weight
    return TileCost(
        instructions=sum(pipes.values()),
        pipes=dict(pipes),
        parts=dict(where),
        rare={r.region.name: sum(r.holds(i) for i in loop) for r in rare},
        hmma=products,
        shared_loads={width: count for width, count in loads.items() if count},
        local=sum(i.opcode in ("LDL", "STL") for i in function.code),
        unknown=sorted(unknown),
    )
