"""C++ for operands, variables and whole kernels. What an instruction becomes: arithmetic.py and memory.py."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from simt.ptx.parse import (
    WIDTHS,
    Address,
    Function,
    Immediate,
    Instruction,
    Label,
    Location,
    Module,
    Name,
    Not,
    Operand,
    Pair,
    PtxError,
    Variable,
    Vector,
    integer,
)

# Special registers. runtime.h has functions of the same names.
_THREE = ["tid", "ntid", "ctaid", "nctaid"]
_ONE = ["laneid", "globaltimer"]
_SPECIAL = {f"%{name}.{axis}": f"{name}().{axis}" for name in _THREE for axis in "xyz"}
_SPECIAL |= {f"%{name}": f"{name}()" for name in _ONE}

# Whose lines say nothing about what a kernel does: the wrappers of PTX, and CUDA's inline functions.
_WRAPPERS = re.compile(r"(/cuda/ptx\.h|/cuda/platform\.h|\.hpp)$")


class Modifiers:
    """What follows an opcode's name. Each has to be taken by whoever translates it: a modifier that nobody knows
    changes what the instruction does."""

    def __init__(self, instruction: Instruction) -> None:
        self._instruction = instruction
        self.name, *self._left = instruction.opcode.split(".")

    def take(self, *options: str, default: str = "") -> str:
        """The first of the options that is there."""
        for modifier in self._left:
            if modifier in options:
                self._left.remove(modifier)
                return modifier
        return default

    def need(self, *options: str) -> str:
        found = self.take(*options)
        if not found:
            raise self._instruction.error(f"one of {', '.join(options)} is missing")
        return found

    def type(self) -> str:
        """The last one: an instruction with two types, such as cvt, ends in that of its source."""
        if not self._left or self._left[-1] not in WIDTHS:
            raise self._instruction.error("it does not end in a type")
        return self._left.pop()

    def finish(self) -> None:
        if self._left:
            raise self._instruction.error(f"not supported with .{'.'.join(self._left)}")


Handler = Callable[["Emitter", Modifiers, Instruction], str]
HANDLERS: dict[str, Handler] = {}


def handles(*names: str) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        for name in names:
            assert name not in HANDLERS, name
            HANDLERS[name] = handler
        return handler

    return register


def identifier(name: str) -> str:
    return re.sub(r"\W", "_", name)


def is_float(kind: str) -> bool:
    return kind in ("f16", "bf16", "f32", "f64")


class Emitter:
    """One kernel."""

    def __init__(self, function: Function, module: Module) -> None:
        self.function, self.files = function, module.files
        self.registers = dict(function.registers)
        self.variables = {v.name: v for v in (*module.variables, *function.variables)}
        self.instruction: Instruction | None = None  # the one at work, for messages

    def error(self, reason: str) -> PtxError:
        return self.instruction.error(reason)

    # Operands.

    def value(self, operand: Operand, kind: str) -> str:
        """As a value of the C++ type that is called `kind` in runtime.h."""
        if isinstance(operand, Not):
            if kind != "pred":
                raise self.error("! of something else than a predicate")
            return f"!{self.value(operand.operand, kind)}"
        if isinstance(operand, Immediate):
            return self._literal(operand.text, kind)
        if not isinstance(operand, Name):
            raise self.error("not an operand with one value")
        if operand.text in self.registers:
            return f"as<{kind}>({operand.text})"
        if operand.text in _SPECIAL:
            return f"{kind}({_SPECIAL[operand.text]})"
        return f"{kind}({self._symbol(operand.text)})"

    def values(self, operands: Sequence[Operand], kind: str) -> str:
        return ", ".join(self.value(operand, kind) for operand in operands)

    def _literal(self, text: str, kind: str) -> str:
        if text[:2] in ("0f", "0F"):
            return f"as<{kind}>(b32(0x{text[2:]}u))"
        if text[:2] in ("0d", "0D"):
            return f"as<{kind}>(b64(0x{text[2:]}ull))"
        if is_float(kind):
            raise self.error("an integer literal as a floating-point operand")
        if kind == "pred":
            return "true" if integer(text) else "false"
        negative = text.startswith("-")
        number = f"{integer(text.removeprefix('-')):#x}ull"
        return f"{kind}(-{number})" if negative else f"{kind}({number})"

    def _symbol(self, name: str) -> str:
        """The address of a variable or a parameter: in the shared window for shared memory, else the host's."""
        if name in self.variables:
            return identifier(name)
        if name in self.function.parameters:
            return f"parameters + {self.function.parameters[name]}"
        raise self.error(f"{name} is not declared")

    def assign(self, operand: Operand, kind: str, expression: str) -> str:
        """To a register, which may be wider than the value."""
        if isinstance(operand, Name) and operand.text == "_":
            return f"(void)({expression});"
        if not isinstance(operand, Name) or operand.text not in self.registers:
            raise self.error("not a register to write to")
        return f"set<{kind}>({operand.text}, {expression});"

    def assign_each(self, operand: Operand, kind: str, array: str) -> str:
        return " ".join(
            self.assign(part, kind, f"{array}[{i}]")
            for i, part in enumerate(self.parts(operand))
            if part != Name("_")
        )

    def parts(self, operand: Operand) -> tuple[Operand, ...]:
        return operand.parts if isinstance(operand, Vector) else (operand,)

    def pair(self, operand: Operand) -> tuple[Operand, Operand | None]:
        return (operand.first, operand.second) if isinstance(operand, Pair) else (operand, None)

    def address(self, operand: Operand, space: str) -> str:
        """A host pointer, as char*. `space` is a name without its leading dot; "" is a generic address."""
        if not isinstance(operand, Address):
            raise self.error("not an address")
        base, offset = operand.base, operand.offset
        if space.startswith("shared"):
            return f"in_shared({self.value(base, 'b32')} + b32({offset}), PTX_HERE)"
        if space not in ("", "global", "local", "const", "param"):
            raise self.error(f"the state space {space}")
        variable = self.variables.get(base.text)
        if variable is not None and variable.space == "shared":
            raise self.error("a shared variable by a generic address")
        return f"pointer({self.value(base, 'b64')}, {offset})"

    # Code.

    def statement(self, instruction: Instruction) -> str:
        self.instruction = instruction
        modifiers = Modifiers(instruction)
        handler = HANDLERS.get(modifiers.name)
        if handler is None:
            raise instruction.error("not supported")
        try:
            code = handler(self, modifiers, instruction)
        except (IndexError, ValueError) as error:
            raise instruction.error(f"operands that do not fit ({error})") from error
        modifiers.finish()
        guard = instruction.guard
        if guard is not None:
            condition = self.value(guard.predicate, "pred")
            code = f"if ({'!' if guard.negated else ''}{condition}) {{ {code} }}"
        return code

    def declarations(self) -> list[str]:
        """Of what is used. nvcc declares more, and g++ warns of that."""
        used = {name for item in self.function.body if isinstance(item, Instruction) for name in _names(item)}
        by_type: dict[str, list[str]] = {}
        for name, kind in self.function.registers:
            if name in used:
                storage = "pred" if kind == "pred" else f"b{max(WIDTHS[kind], 16)}"
                by_type.setdefault(storage, []).append(name)
        # Some are written and never read.
        lines = [f"  [[maybe_unused]] {storage} {', '.join(names)};" for storage, names in by_type.items()]
        for variable in self.variables.values():
            name = identifier(variable.name)
            if variable.space == "shared" and variable.name in used:
                lines.append(f"  const b32 {name} = {_shared(variable)};")
        return lines

    def source_line(self, location: Location) -> Location:
        """The line that a message should name: that of the kernel, or of a function of its own."""
        while location.caller is not None and _WRAPPERS.search(self.files[location.file]):
            location = location.caller
        return location

    def definition(self) -> str:
        """A function of the block of parameters, as a host would pass it to the launch."""
        name = f"kernel_{identifier(self.function.name)}"
        lines = [f"static void {name}([[maybe_unused]] const char* parameters) {{"]
        lines += self.declarations()
        file = None
        for item in self.function.body:
            if isinstance(item, Label):
                lines.append(f"{item.name}:;")
                continue
            if item.location is not None:
                number, line, _ = self.source_line(item.location)
                lines.append(f"#line {line}" if number == file else f'#line {line} "{self.files[number]}"')
                file = number
            lines.append(f"  {self.statement(item)}  // {item.text}")
        return "\n".join([*lines, "}"])


def _names(item: Instruction | Operand) -> list[str]:
    match item:
        case Instruction():
            guard = [item.guard.predicate.text] if item.guard else []
            return guard + [name for operand in item.operands for name in _names(operand)]
        case Name():
            return [item.text]
        case Address():
            return _names(item.base)
        case Vector():
            return [name for part in item.parts for name in _names(part)]
        case Pair():
            return [item.first.text, item.second.text]
        case Not():
            return [item.operand.text]
    return []


def _shared(variable: Variable) -> str:
    if variable.size is None:
        return "dynamic_shared()"
    return f'shared_variable("{variable.symbol}", {variable.size}, {variable.alignment})'
