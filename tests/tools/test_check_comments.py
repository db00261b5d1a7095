"""check_comments.py: a comment that begins as a fragment is refused, a sentence passes."""

from __future__ import annotations

import check_comments
import pytest

REFUSED = {
    "a.h": [
        "// Of a unit, in all steps.",
        "// That of the first row.",
        "// The first row. What comes by mail is read once.",
        "// As in torch.",
        "// Where the rows begin.",
        "int rows;  // of a step",
        "/* Of a unit. */",
        """char quote = '"';  // of a step""",
        "int count = 1'000;  // of a step",
    ],
    "a.py": ["# What is left.", "rows = 1  # of a step", 'def f():\n    """Of a step."""'],
}
ACCEPTED = {
    "a.h": [
        "// The mask of one hidden unit.\n// Of these, a row has one.",
        "// Where a mask is given, it is applied first.",
        "int rows;  // rows of a step",
        'const char* text = "// Of a unit";',
        'const char* text = R"x(// Of a unit)x";',
        "#include <vector>  // std::vector",
    ],
    "a.py": ["text = '# Of a step'", 'def f():\n    """The rows.\n\n    Of a step.\n    """'],
}


@pytest.mark.parametrize(("name", "source"), [(name, text) for name, all in REFUSED.items() for text in all])
def test_fragment_is_refused(name, source):
    line = source.count("\n") + 1
    (problem,) = check_comments.problems(name, source + "\n")
    assert problem.startswith(f"{name}:{line}: ")


@pytest.mark.parametrize(("name", "source"), [(name, text) for name, all in ACCEPTED.items() for text in all])
def test_sentence_passes(name, source):
    assert check_comments.problems(name, source + "\n") == []


def test_trailing_comment_begins_no_block():
    source = "int a;  // rows\n// Of a step.\n"
    assert check_comments.problems("a.h", source) == ["a.h:2: Of a step."]
