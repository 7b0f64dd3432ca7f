"""PTX text to modules. Kernels are parsed when they are asked for: a module may hold many."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from ptx.errors import PtxError
from ptx.numbers import SCALARS
from ptx.operands import Scope, parse_operands
from ptx.program import Instruction, Kernel, Label, Negated, Operand, Variable

COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
ENTRY = re.compile(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)[^{;]*\{")
FILE = re.compile(r'^\s*\.file\s+(\d+)\s+"([^"]*)"', re.M)
VARIABLE = re.compile(
    r"\.(?P<space>param|shared|local|global|const)\s+(?:\.align\s+(?P<align>\d+)\s+)?"
    r"\.(?P<type>\w+)\s+(?P<name>[\w$]+)\s*(?P<array>\[(?P<count>\d*)\])?"
    r"(?:\s*=\s*(?P<init>\{[^}]*\}|[^;,]+))?"
)
REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.*)", re.DOTALL)
STATEMENT = re.compile(
    r"\s*(?:(?P<open>\{)|(?P<close>\})|(?P<label>[\w$]+)\s*:(?!:)"
    r"|\.loc\s+(?P<file>\d+)\s+(?P<loc>\d+)[^\n]*\n|(?P<body>[^;]*);)"
)
INSTRUCTION = re.compile(r"(?:@(!?)([%\w$]+)\s+)?([a-z]\w*)((?:\.[\w:]+)*)\s*(.*)", re.DOTALL)


def parse_variable(match: re.Match[str]) -> Variable:
    size = SCALARS[match["type"]].size
    count = int(match["count"] or 0) if match["array"] else 1
    data = b""
    if match["init"]:
        items = match["init"].strip("{} \n\t").split(",")
        kind = SCALARS[match["type"]].kind
        if kind == "f" or not all(re.fullmatch(r"\s*-?\w+\s*", item) for item in items):
            raise PtxError(
                f"cannot read the initial value of {match['name']}: {match['init'][:60]}"
            )
        mask = (1 << 8 * size) - 1
        data = b"".join(
            (int(i.strip().rstrip("U"), 0) & mask).to_bytes(size, "little") for i in items
        )
    return Variable(match["name"], size * count, int(match["align"] or size), data)


@dataclass
class Module:
    """One PTX file."""

    variables: list[Variable]  # global and constant memory
    constants: frozenset[str]
    dynamic: list[Variable]  # shared memory declared outside kernels
    files: dict[int, str]
    entries: dict[str, tuple[str, str, int]]  # parameters, body, line of the body
    kernels: dict[str, Kernel] = field(default_factory=dict)

    @staticmethod
    def parse(text: str) -> Module:
        # Newlines stay, so that lines can be counted.
        text = COMMENT.sub(lambda m: "\n" * m[0].count("\n"), text)
        entries, outside, at = {}, [], 0
        for match in ENTRY.finditer(text):
            end = closing_brace(text, match.end())
            line = text.count("\n", 0, match.end()) + 1
            entries[match[1]] = (match[2], text[match.end() : end], line)
            outside.append(text[at : match.start()])
            at = end
        rest = " ".join([*outside, text[at:]])
        found = [(m["space"], parse_variable(m)) for m in VARIABLE.finditer(rest)]
        files = {int(m[1]): m[2] for m in FILE.finditer(text)}
        return Module(
            [v for space, v in found if space in ("global", "const") and v.size],
            frozenset(v.name for space, v in found if space == "const"),
            [v for space, v in found if space == "shared"],
            files,
            entries,
        )

    def kernel(self, name: str) -> Kernel:
        """The kernel of that name, mangled as it stands in the text."""
        if name not in self.kernels:
            if name not in self.entries:
                raise PtxError(f"no kernel {name} in this module; it has {', '.join(self.entries)}")
            self.kernels[name] = Body(self, name).kernel
        return self.kernels[name]


def closing_brace(text: str, start: int) -> int:
    depth = 1
    for match in re.compile(r"[{}]").finditer(text, start):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return match.start()
    raise PtxError("a kernel without end: the PTX is cut off")


class Body:
    """Parses the statements of one kernel."""

    def __init__(self, module: Module, name: str) -> None:
        parameters, body, line = module.entries[name]
        self.files = module.files
        self.kernel = Kernel(name, [parse_variable(m) for m in VARIABLE.finditer(parameters)])
        self.kernel.shared += module.dynamic
        self.scope = Scope(None)
        self.source = ""
        # Branches wait for the end of their scope: a label may come after them.
        self.branches: list[tuple[Instruction, Scope, str]] = []
        at = 0
        for match in STATEMENT.finditer(body):
            if body[at : match.start()].strip():
                raise PtxError(f"cannot parse: {body[at : match.start()].strip()[:80]}")
            start = match.start("body") if match["body"] else match.end()
            line += body.count("\n", at, start)
            self.statement(match, line)
            line += body.count("\n", start, match.end())
            at = match.end()
        for instruction, scope, text in self.branches:
            instruction.operands = (*instruction.operands[:-1], scope.label(text))

    def statement(self, match: re.Match[str], line: int) -> None:
        if match["open"]:
            self.scope = Scope(self.scope)
        elif match["close"]:
            if self.scope.parent is None:
                raise PtxError(f"line {line}: a brace closes what was never opened")
            self.scope = self.scope.parent
        elif match["label"]:
            self.scope.labels[match["label"]] = Label((len(self.kernel.code),))
        elif match["loc"]:
            self.source = f"{self.files.get(int(match['file']), '?')}:{match['loc']}"
        elif match["body"].strip():
            self.body(" ".join(match["body"].split()), line)

    def body(self, text: str, line: int) -> None:
        if text.startswith(".reg"):
            self.declare_registers(text)
        elif text.startswith((".shared", ".local")):
            match = VARIABLE.match(text)
            if not match:
                raise PtxError(f"line {line}: cannot parse {text}")
            where = self.kernel.shared if match["space"] == "shared" else self.kernel.local
            where.append(parse_variable(match))
        elif text.startswith(".branchtargets"):
            self.branch_table(text)
        elif not text.startswith(".pragma"):
            self.instruction(text, line)

    def declare_registers(self, text: str) -> None:
        match = REGISTERS.match(text)
        if not match:
            raise PtxError(f"cannot parse {text}")
        for name in (part.strip() for part in match[2].split(",")):
            many = re.fullmatch(r"(.+)<(\d+)>", name)
            names = [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]
            for register in names:
                self.scope.declare(register, len(self.kernel.registers))
                self.kernel.registers.append(SCALARS[match[1]])

    def branch_table(self, text: str) -> None:
        """The label before .branchtargets names the table; its targets may still be to come."""
        name = next(
            n for n, t in self.scope.labels.items() if t.targets == (len(self.kernel.code),)
        )
        targets = [t.strip() for t in text.removeprefix(".branchtargets").split(",")]
        self.scope.tables[name] = targets

    def instruction(self, text: str, line: int) -> None:
        match = INSTRUCTION.fullmatch(text)
        if not match:
            raise PtxError(f"line {line}: cannot parse {text}")
        negated, predicate, opcode, modifiers, rest = match.groups()
        guard = None
        if predicate:
            register = self.scope.register(predicate)
            guard = Negated(register) if negated else register
        names = tuple(modifiers.split(".")[1:])
        branch = opcode in ("bra", "brx")
        operands: tuple[Operand, ...]
        if branch:
            # The last operand is a label, what stands before it an index.
            *before, label = (part.strip() for part in rest.split(","))
            operands = (*parse_operands(", ".join(before), self.scope), None)
        else:
            operands = parse_operands(rest, self.scope)
        scalars = tuple(SCALARS[n] for n in names if n in SCALARS)
        made = Instruction(opcode, names, scalars, operands, guard, text, line, self.source)
        self.kernel.code.append(made)
        if branch:
            self.branches.append((made, self.scope, label))
