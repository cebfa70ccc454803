"""The shape of the code: sizes, import circles, one assignment a line, and the words of the field."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
from sources import PACKAGES, ROOT, files_of, imports, modules, statements

ROOMS = (*PACKAGES, "benchmarks", "examples", "tests")
MAX_LINES = 400
MAX_METHODS = 20
# Words that the field does not use for what we used them: a distribution, what comes after, a position or a device.
FOREIGN_WORDS = {"law", "laws", "behind"}
FOREIGN_NAMES = {*FOREIGN_WORDS, "place", "places"}
FOREIGN = re.compile(rf"(?<![a-z])({'|'.join(FOREIGN_NAMES)})(?![a-z])")
SCALING_LAWS = "Scaling Laws"  # a title
EXCEPT = {("agents/policies/networks.py", "place")}  # the name of a weight, and so in every checkpoint


def name_of(file: Path) -> str:
    return file.relative_to(ROOT).as_posix()


def by_file(find: Callable[[str], Iterable[str]], *rooms: str) -> list[str]:
    """What a finder finds in every file of some rooms but this one, each as "file:line: what"."""
    files = [file for file in files_of(*rooms) if file != Path(__file__)]
    return [f"{name_of(file)}:{line}" for file in files for line in find(file.read_text(encoding="utf-8"))]


# --- sizes -------------------------------------------------------------------------------------------------------


def big_classes(source: str) -> Iterator[str]:
    for node in statements(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            methods = sum(isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef) for item in node.body)
            if methods > MAX_METHODS:
                yield f"{node.lineno}: {node.name} has {methods} methods"


def test_no_file_is_long() -> None:
    lengths = {name_of(file): len(file.read_text(encoding="utf-8").splitlines()) for file in files_of(*PACKAGES)}
    assert not {name: length for name, length in lengths.items() if length > MAX_LINES}


def test_files_of_tests_have_names_of_their_own() -> None:
    names = [path.name for path in (ROOT / "tests").rglob("*.py") if path.name != "__init__.py"]
    assert sorted(name for name in set(names) if names.count(name) > 1) == []  # pytest imports them by name


def test_no_class_has_many_methods() -> None:
    assert not by_file(big_classes, *PACKAGES)


def test_a_class_with_many_methods_is_seen() -> None:
    methods = "".join(f"    def f{i}(self): ...\n" for i in range(MAX_METHODS + 1))
    assert list(big_classes(f"class Big:\n{methods}")) == [f"1: Big has {MAX_METHODS + 1} methods"]
    assert not list(big_classes(f"class Big:\n{methods.rsplit('    def', 1)[0]}"))


# --- import circles ----------------------------------------------------------------------------------------------


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The sets of modules that reach one another (Tarjan 1972), those of a single module left out."""
    found: list[list[str]] = []
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    waiting: list[str] = []

    def visit(module: str) -> None:
        number[module] = lowest[module] = len(number)
        waiting.append(module)
        for other in graph[module]:
            if other not in number:
                visit(other)
                lowest[module] = min(lowest[module], lowest[other])
            elif other in waiting:
                lowest[module] = min(lowest[module], number[other])
        if lowest[module] == number[module]:
            start = waiting.index(module)
            if len(waiting) - start > 1:
                found.append(sorted(waiting[start:]))
            del waiting[start:]

    for module in graph:
        if module not in number:
            visit(module)
    return found


def import_graph() -> dict[str, set[str]]:
    """Who imports whom, anywhere in its file, but for types."""
    known = modules()
    return {
        module: {
            name
            for name in imports(file.read_text(encoding="utf-8"), module, file.name == "__init__.py", for_types=False)
            if name in known and name != module
        }
        for module, file in known.items()
    }


def test_no_modules_import_each_other() -> None:
    assert not circles(import_graph())


def test_a_circle_is_seen() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]
    assert not circles({"a": {"b", "c"}, "b": {"c"}, "c": set()})


# --- one assignment a line ---------------------------------------------------------------------------------------


def tuple_assignments(source: str) -> Iterator[str]:
    """Assignments of several values to several names, which are not a swap."""
    for node in statements(ast.parse(source)):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
            values = node.value.elts
            targets = [target.elts for target in node.targets if isinstance(target, ast.Tuple)]
            if any(len(names) == len(values) and not is_swap(names, values) for names in targets):
                yield f"{node.lineno}: {ast.unparse(node)}"


def is_swap(targets: list[ast.expr], values: list[ast.expr]) -> bool:
    """Whether a value needs what a target to its left was before: line by line they would come to something else."""
    return any(
        ast.unparse(target) in {ast.unparse(part) for part in ast.walk(value) if isinstance(part, ast.expr)}
        for i, target in enumerate(targets)
        for value in values[i + 1 :]
    )


def test_there_is_one_assignment_a_line() -> None:
    found = by_file(tuple_assignments, *ROOMS)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("source", ["a, b = 1, 2", "self.x, y = f(), g()", "a, b = b, 1"])
def test_a_tuple_assignment_is_seen(source: str) -> None:
    assert len(list(tuple_assignments(source))) == 1


@pytest.mark.parametrize(
    "source", ["a, b = f()", "a, b = b, a", "x[i], x[j] = x[j], x[i]", "a, b = b, a + b", "a = 1, 2"]
)
def test_unpacking_and_swaps_are_fine(source: str) -> None:
    assert not list(tuple_assignments(source))


# --- words -------------------------------------------------------------------------------------------------------


def words_apart(name: str) -> str:
    """`ThisName` as `this_name`."""
    return re.sub(r"([a-z])([A-Z])", r"\1_\2", name).lower()


def foreign_words(source: str) -> Iterator[str]:
    """Names that have a foreign word for a part, and comments and texts with one; a test's name is a sentence."""
    if not any(FOREIGN.search(text) for text in (source.lower(), words_apart(source))):
        return  # as in most files, which need not be cut into tokens
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.NAME:
            forbidden = {"law", "laws"} if token.string.startswith("test_") else FOREIGN_NAMES
            found = forbidden & set(words_apart(token.string).split("_"))
        else:
            text = token.string.replace(SCALING_LAWS, "").lower()
            found = FOREIGN_WORDS & set(re.findall(r"[a-z]+", text))
        for word in sorted(found):
            yield f"{token.start[0]}: {word!r}"


def test_the_words_are_those_of_the_field() -> None:
    found = by_file(foreign_words, *ROOMS)
    found = [line for line in found if (line.split(":")[0], line.split("'")[1]) not in EXCEPT]
    assert not found, "\n".join(found)


@pytest.mark.parametrize("source", ["log_law = 1", "class Law: ...", "def f(behind): ...", "x.place", "# of the law"])
def test_a_foreign_word_is_seen(source: str) -> None:
    assert len(list(foreign_words(source))) == 1


@pytest.mark.parametrize("source", ["claw = 1", "replace(x)", "x.in_order", "# in place of", "'flawed'"])
def test_other_words_are_fine(source: str) -> None:
    assert not list(foreign_words(source))
