"""PTX text as Python objects. Knows PTX's syntax; what an instruction means is others' to know."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple


class PtxError(Exception):
    """PTX that is not understood. Nothing is ever left out or guessed."""

    def __init__(self, line: int, text: str, reason: str) -> None:
        super().__init__(f"PTX line {line}: {reason}: {text}")


class Token(NamedTuple):
    text: str
    line: int


# What an operand can be.
@dataclass(frozen=True)
class Name:
    """A register, a special register, a variable or a label, by its name in C++ where one was declared."""

    text: str


@dataclass(frozen=True)
class Immediate:
    text: str


@dataclass(frozen=True)
class Vector:
    parts: tuple[Operand, ...]


@dataclass(frozen=True)
class Address:
    """[base + offset]; the base is a register, a variable or a number."""

    base: Name | Immediate
    offset: int


@dataclass(frozen=True)
class Pair:
    """p|q, two results."""

    first: Name
    second: Name


@dataclass(frozen=True)
class Not:
    operand: Name


Operand = Name | Immediate | Vector | Address | Pair | Not


class Location(NamedTuple):
    """A line of the CUDA source, from nvcc's -lineinfo."""

    file: int  # in Module.files: the names come after the code
    line: int
    caller: Location | None  # where the function that the line belongs to was inlined


@dataclass(frozen=True)
class Guard:
    predicate: Name
    negated: bool


@dataclass(frozen=True)
class Instruction:
    line: int
    text: str
    opcode: str
    operands: tuple[Operand, ...]
    guard: Guard | None
    location: Location | None

    def error(self, reason: str) -> PtxError:
        return PtxError(self.line, self.text, reason)


@dataclass(frozen=True)
class Label:
    name: str


@dataclass(frozen=True)
class Variable:
    """An array of bytes. `space` is shared, global or const; no size: dynamic shared memory."""

    name: str  # in C++
    symbol: str  # in PTX
    space: str
    alignment: int
    size: int | None
    data: bytes = b""


@dataclass
class Function:
    name: str
    parameters: dict[str, int]  # offset of each in the block of parameters
    parameter_size: int
    registers: list[tuple[str, str]] = field(default_factory=list)  # name in C++, PTX type
    variables: list[Variable] = field(default_factory=list)
    body: list[Instruction | Label] = field(default_factory=list)


@dataclass
class Module:
    target: str = ""
    functions: list[Function] = field(default_factory=list)
    variables: list[Variable] = field(default_factory=list)
    files: dict[int, str] = field(default_factory=dict)


# Bits of a value of each type.
WIDTHS = {f"{kind}{bits}": bits for kind in "bus" for bits in (8, 16, 32, 64)}
WIDTHS |= {"pred": 1, "f16": 16, "bf16": 16, "tf32": 32, "f32": 32, "f64": 64}

_TOKEN = re.compile(
    r"""
    (?P<blank>\s+|//[^\n]*|/\*.*?\*/)
    | (?P<word>[%$.\w]+(?:::[%$.\w]+)*)
    | (?P<string>"[^"\n]*")
    | (?P<sign>[-+{}\[\]()<>,;:|!@=])
    """,
    re.VERBOSE | re.DOTALL,
)
_NUMBER = re.compile(r"0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}|0[xX][0-9a-fA-F]+U?|\d+U?")


def tokens(text: str) -> Iterator[Token]:
    position, line = 0, 1
    while position < len(text):
        match = _TOKEN.match(text, position)
        if match is None:
            raise PtxError(line, text[position : position + 20], "not a token of PTX")
        if match.lastgroup != "blank":
            yield Token(match[0], line)
        line += match[0].count("\n")
        position = match.end()


def integer(text: str) -> int:
    """A literal's value. A leading 0 would make it octal, which nvcc does not write."""
    return int(text.rstrip("U"), 16 if text[:2] in ("0x", "0X") else 10)


class _Scope:
    """Names declared between a pair of braces: an inline asm block may declare them once per copy."""

    def __init__(self, parent: _Scope | None, prefix: str) -> None:
        self.parent, self.prefix = parent, prefix
        self.names: dict[str, str] = {}

    def declare(self, name: str) -> str:
        # The prefix keeps %f32 apart from the type f32.
        self.names[name] = f"r_{self.prefix}" + re.sub(r"\W", "_", name.lstrip("%"))
        return self.names[name]

    def find(self, name: str) -> str | None:
        if name in self.names:
            return self.names[name]
        return self.parent.find(name) if self.parent else None


class Parser:
    def __init__(self, text: str) -> None:
        self._tokens = [*tokens(text), Token("", text.count("\n") + 1)]
        self._position = 0
        self._location: Location | None = None
        self._locations: dict[tuple[str, ...], Location] = {}  # by file, line and column as they are written

    # Tokens.

    def _peek(self) -> str:
        return self._tokens[self._position].text

    def _line(self) -> int:
        return self._tokens[self._position].line

    def _next(self) -> str:
        text = self._peek()
        if not text:
            raise self._error("the text ends too early")
        self._position += 1
        return text

    def _expect(self, text: str) -> None:
        if self._peek() != text:
            raise self._error(f"expected {text!r}")
        self._position += 1

    def _accept(self, text: str) -> bool:
        if self._peek() != text:
            return False
        self._position += 1
        return True

    def _integer(self) -> int:
        if not _NUMBER.fullmatch(self._peek()):
            raise self._error("a number expected")
        return integer(self._next())

    def _error(self, reason: str) -> PtxError:
        line = self._line()
        return PtxError(line, " ".join(t.text for t in self._tokens if t.line == line), reason)

    def _rest_of_line(self) -> list[str]:
        line, rest = self._line(), []
        while self._line() == line and self._peek():
            rest.append(self._next())
        return rest

    def _skip_braces(self) -> None:
        self._expect("{")
        depth = 1
        while depth:
            depth += {"{": 1, "}": -1}.get(self._next(), 0)

    # The module.

    def module(self) -> Module:
        module = Module()
        while self._peek():
            directive = self._peek()
            if directive in (".version", ".address_size"):
                self._rest_of_line()
            elif directive == ".target":
                module.target = self._rest_of_line()[1]
            elif directive == ".file":
                _, number, name, *_ = self._rest_of_line()
                module.files[int(number)] = name.strip('"')
            elif directive == ".section":
                self._next(), self._next(), self._skip_braces()
            elif directive in (".visible", ".weak", ".extern"):
                self._next()
                if directive == ".extern" and self._peek() != ".shared":
                    raise self._error("not defined in this module")
            elif directive == ".entry":
                module.functions.append(self._entry())
            elif directive in (".shared", ".global", ".const"):
                module.variables.append(self._variable(str))
            else:
                raise self._error("not supported")
        return module

    def _variable(self, declare) -> Variable:
        """.space .align n .type name[count] = {values};"""
        space = self._next()[1:]
        alignment = None
        if self._accept(".align"):
            alignment = self._integer()
        kind = self._next()[1:]
        if kind not in WIDTHS:
            raise self._error("a variable of an unknown type")
        size = WIDTHS[kind] // 8
        symbol = self._next()
        count: int | None = 1
        while self._accept("["):
            if self._accept("]"):
                count = None
                continue
            count *= self._integer()
            self._expect("]")
        data = b""
        if self._accept("="):
            data = self._initializer(size)
        self._expect(";")
        total = None if count is None else count * size
        return Variable(declare(symbol), symbol, space, alignment or size, total, data)

    def _initializer(self, size: int) -> bytes:
        values = []
        braces = self._accept("{")
        while not (braces and self._accept("}")):
            negative = self._accept("-")
            text = self._next()
            if not _NUMBER.fullmatch(text):
                raise self._error("an initial value that is not a number")
            number = int(text[2:], 16) if text[1:2] in ("f", "F", "d", "D") else integer(text)
            values.append((-number if negative else number) % (1 << 8 * size))
            if not self._accept(",") and not braces:
                break
        return b"".join(value.to_bytes(size, "little") for value in values)

    # A kernel.

    def _entry(self) -> Function:
        self._expect(".entry")
        name = self._next()
        parameters, size = self._parameters()
        while self._peek() != "{":
            # .maxntid, .minnctapersm, .reqnctapercluster and so on: limits that ptxas needs and we do not.
            if not (self._peek() == "," or self._peek().startswith(".") or _NUMBER.fullmatch(self._peek())):
                raise self._error("not supported before a kernel's body")
            self._next()
        function = Function(name, parameters, size)
        self._location = None
        self._body(function, _Scope(None, ""))
        return function

    def _parameters(self) -> tuple[dict[str, int], int]:
        parameters: dict[str, int] = {}
        end = 0
        if not self._accept("("):
            return parameters, end
        while not self._accept(")"):
            self._expect(".param")
            alignment = self._integer() if self._accept(".align") else None
            kind = self._next()[1:]
            while self._peek() in (".ptr", ".global", ".shared", ".const"):
                self._next()
                if self._accept(".align"):
                    self._next()
            name, size = self._next(), WIDTHS[kind] // 8
            alignment = alignment or size
            if self._accept("["):
                size *= self._integer()
                self._expect("]")
            parameters[name] = (end + alignment - 1) // alignment * alignment
            end = parameters[name] + size
            self._accept(",")
        return parameters, end

    def _labels(self) -> list[str]:
        """Those of the scope that begins here: a branch may come before its label."""
        depth, position, found = 0, self._position, []
        while depth >= 0:
            text = self._tokens[position].text
            depth += {"{": 1, "}": -1}.get(text, 0)
            if depth == 0 and text == ":":
                found.append(self._tokens[position - 1].text)
            position += 1
        return found

    def _body(self, function: Function, scope: _Scope) -> None:
        self._expect("{")
        for label in self._labels():
            scope.declare(label)
        while not self._accept("}"):
            text = self._peek()
            if text == "{":
                self._body(function, _Scope(scope, f"s{self._position}_"))
            elif text == ";":
                self._next()
            elif text == ".reg":
                self._registers(function, scope)
            elif text == ".shared":
                function.variables.append(self._variable(scope.declare))
            elif text == ".loc":
                self._loc()
            elif text == ".pragma":
                while self._next() != ";":
                    pass
            elif self._tokens[self._position + 1].text == ":":
                self._label(function, scope)
            else:
                function.body.append(self._instruction(scope))

    def _loc(self) -> None:
        """.loc file line column[, function_name label, inlined_at file line column]"""
        _, *place = self._rest_of_line()
        caller = None
        if "inlined_at" in place:
            caller = self._locations.get(tuple(place[place.index("inlined_at") + 1 :]))
        file, line = int(place[0]), int(place[1])
        # Line 0: code that belongs to no line.
        if line:
            self._location = self._locations[tuple(place[:3])] = Location(file, line, caller)

    def _label(self, function: Function, scope: _Scope) -> None:
        name = scope.find(self._next())
        self._expect(":")
        function.body.append(Label(name))

    def _registers(self, function: Function, scope: _Scope) -> None:
        self._expect(".reg")
        kind = self._next()[1:]
        if kind not in WIDTHS:
            raise self._error("registers of an unknown type")
        while True:
            name = self._next()
            if self._accept("<"):
                names = [f"{name}{i}" for i in range(self._integer())]
                self._expect(">")
            else:
                names = [name]
            function.registers += [(scope.declare(n), kind) for n in names]
            if self._accept(";"):
                return
            self._expect(",")

    def _instruction(self, scope: _Scope) -> Instruction:
        line, begin = self._line(), self._position
        guard = None
        if self._accept("@"):
            negated = self._accept("!")
            guard = Guard(self._name(scope), negated)
        opcode = self._next()
        operands = []
        while not self._accept(";"):
            operands.append(self._operand(scope))
            if self._peek() != ";":
                self._expect(",")
        text = " ".join(t.text for t in self._tokens[begin : self._position - 1])
        return Instruction(line, text, opcode, tuple(operands), guard, self._location)

    def _name(self, scope: _Scope) -> Name:
        text = self._next()
        return Name(scope.find(text) or text)

    def _operand(self, scope: _Scope) -> Operand:
        text = self._peek()
        if text == "{":
            return self._vector(scope)
        if text == "[":
            return self._address(scope)
        if self._accept("!"):
            return Not(self._name(scope))
        if self._accept("-"):
            return Immediate("-" + self._next())
        if _NUMBER.fullmatch(text):
            return Immediate(self._next())
        name = self._name(scope)
        return Pair(name, self._name(scope)) if self._accept("|") else name

    def _vector(self, scope: _Scope) -> Vector:
        self._expect("{")
        parts = []
        while not self._accept("}"):
            parts.append(self._operand(scope))
            self._accept(",")
        return Vector(tuple(parts))

    def _address(self, scope: _Scope) -> Address:
        self._expect("[")
        base = Immediate(self._next()) if _NUMBER.fullmatch(self._peek()) else self._name(scope)
        offset = 0
        while not self._accept("]"):
            # Both [a+-4] and [a-4] are PTX.
            sign = 1
            while self._peek() in ("+", "-"):
                sign *= -1 if self._next() == "-" else 1
            offset += sign * self._integer()
        return Address(base, offset)


def parse(path: Path) -> Module:
    return Parser(path.read_text()).module()
