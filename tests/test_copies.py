"""Scripts stand alone, so they repeat their utilities: every copy must be the same, byte for byte."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent
SCRIPTS = sorted(path for path in ROOT.glob("*.py") if "\nclass Args:" in path.read_text())  # not environments
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


def test_copies_are_identical():
    seen: dict[str, dict[str, str]] = {}  # by name and script
    for path in SCRIPTS:
        for name, source in definitions(path.read_text()).items():
            seen.setdefault(name, {})[path.name] = source
    assert len(seen["new_run"]) == len(SCRIPTS)
    for name in seen.keys() - OWN:
        assert len(set(seen[name].values())) == 1, f"{name} differs in {', '.join(seen[name])}"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_no_script_imports_a_script(path: pathlib.Path):
    names = {other.stem for other in SCRIPTS}
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert not names & {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.module not in names
