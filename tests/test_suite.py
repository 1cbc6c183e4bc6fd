"""The tests as a program: they share through helper modules, never through one another."""

import ast
from pathlib import Path

TESTS = Path(__file__).parent


def imported(tree):
    """Names of modules that a file may import, `from package import name` giving both."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "write imports out in full"
            yield from (node.module, *(f"{node.module}.{alias.name}" for alias in node.names))


def test_no_file_imports_a_file_of_tests():
    """What two need lies in a helper: importing another's tests ties the two and drags its fixtures along."""
    for path in TESTS.rglob("*.py"):
        for name in imported(ast.parse(path.read_text())):
            of_tests = name.startswith("tests.") and any(part.startswith("test_") for part in name.split("."))
            assert not of_tests or not (TESTS.parent / f"{name.replace('.', '/')}.py").exists(), f"{path}: {name}"


def test_the_fast_tier_has_tests_of_every_room():
    """Each line of fast.txt leads somewhere, and no room was forgotten but those that need what few machines have."""
    chosen = (TESTS / "fast.txt").read_text().splitlines()
    for line in chosen:
        path, _, function = line.partition("::")
        assert (TESTS.parent / path).exists(), f"tests/fast.txt: {line}"
        assert not function or f"def {function}(" in (TESTS.parent / path).read_text(), f"tests/fast.txt: {line}"
    rooms = {path.parent.name for path in TESTS.glob("*/test_*.py")}
    covered = {line.split("/")[1] for line in chosen}
    assert rooms - covered == {"gpu"}
