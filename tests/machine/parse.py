"""The text of a PTX module as kernels: parameters, variables, registers, instructions (PTX ISA, "Syntax", "Directives")."""

import bisect
import re
import struct
from dataclasses import dataclass, field

WIDTHS = {"pred": 0, "b128": 16, "f16": 2, "bf16": 2, "f16x2": 4, "bf16x2": 4, "f32": 4, "f64": 8}
WIDTHS |= {f"{kind}{8 * size}": size for kind in "bus" for size in (1, 2, 4, 8)}


@dataclass(frozen=True)
class Register:
    name: str
    negated: bool = False  # a predicate's complement


@dataclass(frozen=True)
class Immediate:
    """An integer, or the bits of a floating-point constant of `width` bytes."""

    value: int
    width: int = 0


@dataclass(frozen=True)
class Symbol:
    """A variable, a label, a parameter, a special register."""

    name: str


@dataclass(frozen=True)
class Address:
    """[base + offset], of a register, a symbol or nothing; with the coordinates that a tensor's copy gives."""

    base: Register | Symbol | None
    offset: int = 0
    coordinates: tuple = ()


@dataclass(frozen=True)
class Vector:
    parts: tuple


@dataclass
class Instruction:
    name: str
    operands: list
    guard: Register | None = None
    line: int = 0

    @property
    def parts(self) -> list[str]:
        return self.name.split(".")


@dataclass
class Variable:
    space: str
    name: str
    align: int
    size: int  # bytes; 0 of an array without a length
    content: bytes = b""


@dataclass
class Kernel:
    name: str
    parameters: dict[str, tuple[int, int]] = field(default_factory=dict)  # name: (offset, bytes)
    parameter_types: list[str] = field(default_factory=list)
    variables: list[Variable] = field(default_factory=list)
    widths: dict[str, int] = field(default_factory=dict)  # of registers, in bytes; 0 of a predicate
    prefixes: dict[str, int] = field(default_factory=dict)  # of register families such as %r<9>
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    threads: int | None = None
    cluster: int = 1
    # Triton's compiler moves arithmetic in front of the tcgen05.wait::ld of its operands, and counts on ptxas to wait for them
    loads_at_once: bool = False


def parse(text: str, only: str | None = None) -> dict[str, Kernel]:
    """The kernels of a module by name, or only one of them, each with the module's variables."""
    text = re.sub(r"/\*.*?\*/", lambda m: "\n" * m[0].count("\n"), text, flags=re.S)
    text = re.sub(r"//[^\n]*", "", text)
    kernels, shared = {}, []
    bodies = re.compile(r"\.entry\s+([\w$]+)\s*\(([^)]*)\)([^{]*(?:\.reqnctapercluster[^{]*)?)\{", re.S)
    spans = []
    for found in bodies.finditer(text):
        end = closing(text, found.end() - 1)
        spans.append((found.start(), end))
        if only not in (None, found[1]):
            continue
        kernel = Kernel(found[1])
        declare_parameters(kernel, found[2])
        if threads := re.search(r"\.(?:reqntid|maxntid)\s+(\d+)", found[3]):
            kernel.threads = int(threads[1])
        if cluster := re.search(r"\.reqnctapercluster\s+(\d+)", found[3]):
            kernel.cluster = int(cluster[1])
        Body(kernel, text, found.end(), end).read()
        kernels[kernel.name] = kernel
    outside = text
    for first, last in reversed(spans):
        outside = outside[:first] + outside[last + 1 :]
    for statement in re.split(r";", outside):
        if declared := variable(statement):
            shared.append(declared)
    for kernel in kernels.values():
        kernel.variables = shared + kernel.variables
    return kernels


def closing(text: str, at: int) -> int:
    """Where the brace closes that opens at `at`."""
    depth = 0
    for found in re.compile(r"[{}]").finditer(text, at):
        depth += 1 if found[0] == "{" else -1
        if depth == 0:
            return found.start()
    raise ValueError("unbalanced braces")


def declare_parameters(kernel: Kernel, text: str) -> None:
    at = 0
    for declaration in filter(None, (part.strip() for part in text.split(","))):
        m = re.match(
            r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr[\s.\w]*?\s)?([\w$]+)(?:\[(\d+)\])?$", declaration
        )
        if not m:
            raise ValueError(f"a parameter that is not understood: {declaration}")
        width = WIDTHS[m[2]]
        align = int(m[1] or width)
        at = -(-at // align) * align
        size = width * int(m[4] or 1)
        kernel.parameters[m[3]] = (at, size)
        kernel.parameter_types.append(m[2])
        at += size


def variable(statement: str) -> Variable | None:
    m = re.search(
        r"\.(shared|global|const|local)\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)((?:\[\d*\])*)\s*(?:=\s*(.*))?$",
        statement.strip(),
        re.S,
    )
    if not m:
        return None
    width = WIDTHS[m[3]]
    count = 1
    for length in re.findall(r"\[(\d*)\]", m[5]):
        count *= int(length or 0)
    content = b""
    if m[6]:
        values = [int(v[2:], 16) if v[:2].lower() == "0f" else int(v, 0) for v in re.findall(r"-?\w+", m[6])]
        content = b"".join(struct.pack("<Q", v & (1 << 64) - 1)[:width] for v in values).ljust(width * count, b"\0")
    return Variable(m[1], m[4], int(m[2] or width), width * count, content)


class Body:
    """One kernel's statements, in scopes whose names are their own."""

    LABEL = re.compile(r"([\w$]+):(?!:)")

    def __init__(self, kernel, text, start, end):
        self.kernel, self.text, self.at, self.end = kernel, text, start, end
        self.scopes = [("", set())]  # (suffix, the names declared there)
        self.opened = 0
        self.lines = [m.start() for m in re.finditer("\n", text)]

    def read(self):
        text = self.text
        while True:
            while self.at < self.end and text[self.at].isspace():
                self.at += 1
            if self.at >= self.end:
                break
            first = text[self.at]
            if first == "{":
                self.opened += 1
                inner = text[self.at : closing(text, self.at)]
                names = set(self.LABEL.findall(inner))
                self.scopes.append((f"@{self.opened}", names))
                self.at += 1
            elif first == "}":
                self.scopes.pop()
                self.at += 1
            elif first == ";":
                self.at += 1
            elif text.startswith((".loc", ".file"), self.at):
                self.at = text.index("\n", self.at)
            elif label := self.LABEL.match(text, self.at):
                self.kernel.labels[self.own(label[1])] = len(self.kernel.instructions)
                self.at = label.end()
            else:
                stop = text.index(";", self.at)
                self.statement(text[self.at : stop].strip(), 1 + bisect.bisect_left(self.lines, self.at))
                self.at = stop + 1
        for instruction in self.kernel.instructions:  # labels may stand before they are declared
            instruction.operands = [
                Symbol(operand.name)
                if isinstance(operand, Register) and operand.name in self.kernel.labels
                else operand
                for operand in instruction.operands
            ]

    def own(self, name):
        """The name as it is known outside of its scope."""
        for suffix, names in reversed(self.scopes):
            if name in names:
                return name + suffix
        return name

    def statement(self, text, line):
        if text.startswith(".reg"):
            m = re.match(r"\.reg\s+\.(\w+)\s+(.*)$", text, re.S)
            width = WIDTHS[m[1]]
            for name in (part.strip() for part in m[2].split(",")):
                family = re.match(r"([%\w$]+)<(\d+)>$", name)
                if family and len(self.scopes) == 1:
                    self.kernel.prefixes[family[1]] = width
                    continue
                for own in [f"{family[1]}{n}" for n in range(int(family[2]))] if family else [name]:
                    self.scopes[-1][1].add(own)
                    self.kernel.widths[self.own(own)] = width
            return
        if text.startswith(".pragma"):
            return
        if text.startswith("."):
            declared = variable(text)
            if declared is None:
                raise ValueError(f"line {line}: a directive that is not understood: {text}")
            self.kernel.variables.append(declared)
            return
        guard = None
        if text.startswith("@"):
            condition, text = re.match(r"@(!?[%\w$]+)\s+(.*)$", text, re.S).groups()
            guard = self.operand(condition)
        name, rest = re.match(r"([\w.:]+)\s*(.*)$", text, re.S).groups()
        operands = [self.operand(part) for part in split(rest)]
        self.kernel.instructions.append(Instruction(name, operands, guard, line))

    def operand(self, text):
        text = text.strip()
        if text.startswith("{"):
            return Vector(tuple(self.operand(part) for part in split(text[1:-1])))
        if text.startswith("["):
            return self.address(text[1:-1])
        if "|" in text:
            return Vector(tuple(self.operand(part) for part in text.split("|")))
        if text.startswith("!"):
            return Register(self.own(text[1:]), negated=True)
        if m := re.match(r"0[fF]([0-9a-fA-F]{8})$", text):
            return Immediate(int(m[1], 16), 4)
        if m := re.match(r"0[dD]([0-9a-fA-F]{16})$", text):
            return Immediate(int(m[1], 16), 8)
        if re.match(r"-?\d", text):
            return Immediate(int(text.rstrip("U"), 0))
        if "." in text or (text.startswith("%") and not self.known(text)):
            return Symbol(text)
        return Register(self.own(text)) if self.known(self.own(text)) else Symbol(self.own(text))

    def known(self, name):
        return name in self.kernel.widths or re.sub(r"\d+$", "", name) in self.kernel.prefixes and name[-1].isdigit()

    def address(self, text):
        parts = split(text)
        coordinates = ()
        if len(parts) > 1:
            coordinates = tuple(self.operand(part) for part in split(parts[1].strip()[1:-1]))
        m = re.match(r"\s*([%\w$]+)\s*(?:\+\s*(-?\w+)|(-\s*\w+))?\s*$", parts[0])
        base = self.operand(m[1])
        offset = int((m[2] or m[3] or "0").replace(" ", ""), 0)
        if isinstance(base, Immediate):
            return Address(None, base.value + offset, coordinates)
        return Address(base, offset, coordinates)


def split(text: str) -> list[str]:
    """At the commas that stand in no bracket."""
    parts, depth, last = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "[{(") - (c in "]})")
        if c == "," and depth == 0:
            parts.append(text[last:i])
            last = i + 1
    parts.append(text[last:])
    return [part.strip() for part in parts if part.strip()]
