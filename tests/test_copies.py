"""Scripts stand alone, so they repeat their utilities: every copy must be the same, byte for byte."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = sorted(path for path in ROOT.glob("*.py") if path.name != "sokoban_env.py")
OWN = {"Args", "main", "parse_args"}  # what each script may write its own way


def definitions(text: str) -> dict[str, str]:
    """The source of every top-level function, class and constant of a module, by its name."""
    found = {}
    for node in ast.parse(text).body:
        source = ast.get_source_segment(text, node)
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            lines = [ast.get_source_segment(text, decorator) for decorator in node.decorator_list]
            found[node.name] = "\n".join([*lines, source])
        elif isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found[node.targets[0].id] = source
    return found


def drifted(scripts: dict[str, str]) -> list[str]:
    """The names that stand in several scripts with different texts."""
    seen: dict[str, dict[str, str]] = {}
    for script, text in scripts.items():
        for name, source in definitions(text).items():
            if name not in OWN:
                seen.setdefault(name, {})[script] = source
    return [f"{name} differs in {', '.join(by)}" for name, by in seen.items() if len(set(by.values())) > 1]


def test_copies_are_identical():
    assert drifted({path.name: path.read_text() for path in SCRIPTS}) == []


def test_a_drifted_copy_is_found():
    assert drifted({"a.py": "def f():\n    return 1\n", "b.py": "def f():\n    return 2\n"}) == [
        "f differs in a.py, b.py"
    ]
    assert drifted({"a.py": "class Args:\n    x = 1\n", "b.py": "class Args:\n    x = 2\n"}) == []


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_no_script_imports_a_script(path: pathlib.Path):
    names = {other.stem for other in SCRIPTS}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not names & {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module not in names
