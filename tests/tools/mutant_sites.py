"""The places of a file that tests/tools/mutants.py changes. tree-sitter reads the C++, ast the Python."""

from __future__ import annotations

import ast
import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass

OPERATORS = {
    "<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==", "+": "-", "-": "+", "*": "+", "/": "*",
    "//": "*", "%": "+", "&&": "||", "||": "&&", "and": "or", "or": "and", "<<": ">>", ">>": "<<", "&": "|", "|": "&",
    "+=": "-=", "-=": "+=", "*=": "+=", "is": "is not", "is not": "is", "in": "not in", "not in": "in",
}  # fmt: skip


@dataclass(frozen=True)
class Site:
    file: str
    begin: int  # bytes
    end: int
    line: int
    last_line: int
    what: str
    edits: tuple[tuple[int, int, str], ...]  # begin, end, new text, in order
    statement: bool = False  # a statement of C++ that goes
    first_line: int = 0  # of the statement of Python

    @property
    def python(self) -> bool:
        return self.file.endswith(".py")

    def changed(self, source: bytes) -> bytes:
        """The text of the place with the change."""
        parts, at = [], self.begin
        for begin, end, text in self.edits:
            parts += [source[at:begin], text.encode()]
            at = end
        return b"".join([*parts, source[at : self.end]])

    def applied(self, source: bytes) -> bytes:
        return source[: self.begin] + self.changed(source) + source[self.end :]


def sites(file: str, source: bytes) -> list[Site]:
    if file.endswith(".py"):
        return list(_Python(file, source).sites())
    if file.endswith((".h", ".cpp", ".cu", ".cuh")):
        return list(_cpp_sites(file, source))
    return []


def switched(source: bytes, mutants: list[tuple[int, Site]]) -> bytes:
    """C++ with all of these mutants, each behind the switch of its number. The lines keep their numbers."""
    ordered = sorted(mutants, key=lambda m: (m[1].begin, -m[1].end))

    def text(begin: int, end: int, inside: list[tuple[int, Site]]) -> bytes:
        parts, at = [], begin
        while inside:
            number, site = inside.pop(0)
            within = []
            while inside and inside[0][1].end <= site.end:
                within.append(inside.pop(0))
            original = text(site.begin, site.end, within)
            switch = f"LSTM_EXT_MUTANT({number})".encode()
            if site.statement:
                new = b"{ if (!" + switch + b") " + original + b" }"
            elif site.what.startswith("condition "):  # which may be a pointer
                new = b"(" + switch + b" != static_cast<bool>(" + original + b"))"
            else:
                other = site.changed(source).replace(b"\n", b" ")
                new = b"(" + switch + b" ? (" + other + b") : (" + original + b"))"
            parts += [source[at : site.begin], new]
            at = site.end
        return b"".join([*parts, source[at:end]])

    return text(0, len(source), ordered)


# ---- C++

# Where a switch cannot stand: types, constants of the compiler, the preprocessor, text.
SKIPPED = {
    "preproc_include", "preproc_def", "preproc_function_def", "preproc_call", "template_argument_list",
    "template_parameter_list", "static_assert_declaration", "enumerator_list", "attribute_specifier",
    "attribute_declaration", "comment", "string_literal", "raw_string_literal", "char_literal", "array_declarator",
    "type_descriptor", "decltype", "sizeof_expression", "alignof_expression", "bitfield_clause", "using_declaration",
    "alias_declaration", "gnu_asm_expression", "preproc_defined", "parameter_list", "noexcept", "concatenated_string",
}  # fmt: skip


@functools.cache
def _parser():
    import tree_sitter
    import tree_sitter_cpp

    return tree_sitter.Parser(tree_sitter.Language(tree_sitter_cpp.language()))


def _is_constant(node) -> bool:
    return any(child.text == b"constexpr" for child in node.children[:4])


# The build of tests/tools/mutants.py has the kernels of AVX2, and those of CUDA on the emulator.
ELSEWHERE = (b"AVX512", b"AMX", b"CUDACC", b"CUDA_ARCH", b"NVCC", b"__aarch64__")


def _is_elsewhere(node) -> bool:
    """Whether the first branch is compiled for other processors only."""
    first_line = node.text.partition(b"\n")[0]
    if b"SIMT" in first_line:
        return False
    return (
        any(name in first_line for name in ELSEWHERE)
        and b"!" not in first_line
        and not first_line.startswith(b"#ifndef")
    )


def _cpp_sites(file: str, source: bytes) -> Iterator[Site]:
    def site(node, what: str, *edits: tuple[int, int, str], statement: bool = False) -> Iterator[Site]:
        text = source[node.start_byte : node.end_byte]
        if b"//" in text or b"\n#" in text or (b'"' in text and not statement):
            return
        yield Site(
            file, node.start_byte, node.end_byte, node.start_point[0] + 1, node.end_point[0] + 1, what, edits, statement
        )  # fmt: skip

    def negated(node) -> Iterator[Site]:
        yield from site(
            node,
            f"condition {node.text.decode()!r} negated",
            (node.start_byte, node.start_byte, "!("),
            (node.end_byte, node.end_byte, ")"),
        )

    def walk(node) -> Iterator[Site]:
        kind = node.type
        if kind in SKIPPED or kind == "ERROR":
            return
        if kind in ("declaration", "field_declaration") and _is_constant(node):
            return
        if kind in ("preproc_if", "preproc_ifdef", "preproc_elif") and _is_elsewhere(node):
            if (other := node.child_by_field_name("alternative")) is not None:
                yield from walk(other)
            return
        skip = None
        if kind in ("binary_expression", "assignment_expression"):
            operator = node.child_by_field_name("operator")
            if operator is not None and (other := OPERATORS.get(operator.text.decode())):
                what = f"{operator.text.decode()!r} is {other!r} in {node.text.decode()!r}"
                yield from site(node, what, (operator.start_byte, operator.end_byte, other))
        elif kind == "number_literal":
            yield from site(node, f"{node.text.decode()} + 1", (node.end_byte, node.end_byte, " + 1"))
        elif kind in ("true", "false"):
            other = "false" if kind == "true" else "true"
            yield from site(node, f"{kind} is {other}", (node.start_byte, node.end_byte, other))
        elif kind == "unary_expression":
            operator = node.child_by_field_name("operator")
            if operator.text in (b"!", b"-"):
                yield from site(
                    node, f"{node.text.decode()!r} without {operator.text.decode()!r}",
                    (operator.start_byte, operator.end_byte, " "),
                )  # fmt: skip
        elif kind in ("if_statement", "while_statement"):
            condition = node.child_by_field_name("condition")
            if _is_constant(node):
                skip = condition
            else:
                value = condition.child_by_field_name("value")
                if value is not None and value.type not in ("declaration", "condition_declaration"):
                    yield from negated(value)
        elif kind == "conditional_expression":
            yield from negated(node.child_by_field_name("condition"))
        elif kind == "case_statement":
            skip = node.child_by_field_name("value")
        elif kind == "expression_statement" and node.named_child_count:
            inner = node.named_children[0]
            if inner.type in ("call_expression", "assignment_expression"):
                yield from site(node, f"{node.text.decode()!r} is gone", statement=True)
        for child in node.children:
            if child != skip:
                yield from walk(child)

    yield from walk(_parser().parse(source).root_node)


# ---- Python


class _Python:
    def __init__(self, file: str, source: bytes) -> None:
        self.file, self.source = file, source
        self.first_line = 0
        self.starts = [0]
        for line in source.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))

    def _span(self, node) -> tuple[int, int]:
        # Columns of ast are bytes of UTF-8.
        return (
            self.starts[node.lineno - 1] + node.col_offset,
            self.starts[node.end_lineno - 1] + node.end_col_offset,
        )

    def _text(self, node) -> str:
        begin, end = self._span(node)
        return self.source[begin:end].decode()

    def _site(self, node, what: str, *edits: tuple[int, int, str]) -> Site:
        begin, end = self._span(node)
        return Site(
            self.file, begin, end, node.lineno, node.end_lineno, what, edits, first_line=self.first_line
        )

    def _between(self, node, left, right, names: list[str]) -> Iterator[Site]:
        """The operator between two operands, which may stand in parentheses."""
        begin, end = self._span(left)[1], self._span(right)[0]
        between = self.source[begin:end].decode()
        if "#" in between:
            return
        for name in names:
            if (at := between.find(name)) >= 0 and name in OPERATORS:
                start = begin + len(between[:at].encode())
                what = f"{name!r} is {OPERATORS[name]!r} in {self._text(node)!r}"
                yield self._site(node, what, (start, start + len(name), OPERATORS[name]))
                return

    def _negated(self, node) -> Site:
        begin, end = self._span(node)
        return self._site(
            node, f"condition {self._text(node)!r} negated", (begin, begin, "(not ("), (end, end, "))")
        )

    def sites(self) -> Iterator[Site]:
        yield from self._walk(ast.parse(self.source))

    def _walk(self, node) -> Iterator[Site]:
        names = {
            ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!=", ast.Is: "is",
            ast.IsNot: "is not", ast.In: "in", ast.NotIn: "not in", ast.Add: "+", ast.Sub: "-", ast.Mult: "*",
            ast.Div: "/", ast.FloorDiv: "//", ast.Mod: "%", ast.And: "and", ast.Or: "or", ast.LShift: "<<",
            ast.RShift: ">>", ast.BitAnd: "&", ast.BitOr: "|",
        }  # fmt: skip
        if isinstance(node, ast.stmt):
            self.first_line = node.lineno
        if isinstance(node, (ast.Raise, ast.JoinedStr)) or (
            isinstance(node, ast.Expr) and self._is_text(node)
        ):
            return
        if isinstance(node, ast.If) and "TYPE_CHECKING" in self._text(node.test):
            return
        if isinstance(node, ast.Compare):
            left = node.left
            for operator, right in zip(node.ops, node.comparators, strict=True):
                yield from self._between(node, left, right, [names[type(operator)]])
                left = right
        elif isinstance(node, ast.BinOp) and type(node.op) in names and not self._is_union(node):
            yield from self._between(node, node.left, node.right, [names[type(node.op)]])
        elif isinstance(node, ast.BoolOp):
            for left, right in itertools.pairwise(node.values):
                yield from self._between(node, left, right, [names[type(node.op)]])
        elif isinstance(node, ast.Constant):
            begin, end = self._span(node)
            if isinstance(node.value, bool):
                yield self._site(node, f"{node.value} is {not node.value}", (begin, end, str(not node.value)))
            elif isinstance(node.value, (int, float)):
                yield self._site(node, f"{node.value} + 1", (begin, begin, "("), (end, end, " + 1)"))
        elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
            begin = self._span(node)[0]
            yield self._site(node, f"{self._text(node)!r} without 'not'", (begin, begin + 3, "   "))
        if isinstance(node, (ast.If, ast.While, ast.IfExp)):
            yield self._negated(node.test)
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
            begin, end = self._span(node)
            yield self._site(node, f"{self._text(node)!r} is gone", (begin, end, "pass"))
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns"):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from self._walk(child)

    @staticmethod
    def _is_text(node: ast.Expr) -> bool:
        return isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)

    def _is_union(self, node: ast.BinOp) -> bool:
        """A type such as Tensor | None."""
        return isinstance(node.op, ast.BitOr) and any(
            isinstance(side, ast.Constant) and side.value is None for side in (node.left, node.right)
        )
