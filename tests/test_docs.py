"""README and docs: every command's flags exist, every link leads somewhere, every quoted code is in its file,
and the shipped agents are the files that the page names.

A command is what stands in a bash block or in backticks and starts with `python`; it is parsed by the script's own
parser, not run (each script's tests run it).
"""

import contextlib
import hashlib
import importlib.util
import io
import pathlib
import re
import shlex
import sys
import types

import pytest
import tyro

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
MODULES: dict[str, types.ModuleType] = {}


def commands(page: pathlib.Path) -> list[str]:
    text = page.read_text()
    blocks = [line for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) for line in block.splitlines()]
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    parts = (part.split("#")[0].strip() for line in (*blocks, *inline) for part in re.split(r";|&&|\|", line))
    parts = (re.sub(r"^([A-Z_]+=\S+ )+", "", part) for part in parts)
    parts = (re.sub(r"^torchrun( --\S+ \d+| --standalone)*", "python", part) for part in parts)
    return [part for part in parts if re.match(r"python \S+\.py\b", part)]


def load(script: str) -> types.ModuleType:
    if script not in MODULES:
        path = ROOT / script
        sys.path[:0] = [str(path.parent), str(ROOT)]
        spec = importlib.util.spec_from_file_location(path.stem, path)
        MODULES[script] = sys.modules.setdefault(path.stem, importlib.util.module_from_spec(spec))
        if not hasattr(MODULES[script], "main"):
            spec.loader.exec_module(MODULES[script])
    return MODULES[script]


ALL = sorted({(page.name, command) for page in PAGES for command in commands(page)})


@pytest.mark.parametrize(("page", "command"), ALL, ids=[f"{page}-{command}" for page, command in ALL])
def test_flags_of_a_command_exist(page: str, command: str):
    script, *flags = shlex.split(command)[1:]
    assert (ROOT / script).is_file(), f"{page} names {script}, which isn't there"
    module = load(script)
    if not hasattr(module, "Args"):  # commands with subcommands of their own
        names = set(re.findall(r"--([a-z0-9-]+)", (ROOT / script).read_text().replace("_", "-")))
        fields = set(re.findall(r"^    ([a-z0-9_]+):", (ROOT / script).read_text(), re.MULTILINE))
        known = names | {field.replace("_", "-") for field in fields}
        assert {flag[2:].removeprefix("no-") for flag in flags if flag.startswith("--")} <= known
        return
    message = io.StringIO()
    with contextlib.redirect_stderr(message), contextlib.redirect_stdout(message):
        try:
            tyro.cli(module.Args, args=flags)
        except SystemExit:
            pytest.fail(f"{page}: {command}\n{message.getvalue()}")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: pathlib.Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor and file.suffix == ".md":
            headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{page.name} links to {target}, there are {sorted(slugs)}"


def test_quoted_code_is_in_its_file():
    """[`text`](../script.py): the script holds the text."""
    for page in PAGES:
        for text, path in re.findall(r"\[`([^`]+)`\]\(([^)#\s]+\.py)\)", page.read_text()):
            if not text.endswith(".py"):
                assert text in (page.parent / path).resolve().read_text(), f"{page.name}: {text} is not in {path}"


def test_the_shipped_agents_are_those_of_the_pages():
    agents = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in (ROOT / "checkpoints").glob("*.pt")}
    text = (ROOT / "docs" / "i2a.md").read_text()
    for path, digest in agents.items():
        assert re.search(rf"checkpoints/{re.escape(path.name)}\).*?SHA-256 `{digest}`", text, re.DOTALL), path.name
        assert path.stat().st_size < 5e6
    assert len(agents) == 3


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_nothing_is_left_to_fill_in(page: pathlib.Path):
    prose = re.sub(r"```.*?```|`[^`\n]+`|\]\([^)]*\)|\$[^$]*\$", "", page.read_text(), flags=re.DOTALL)
    assert not re.findall(r"\b[A-Z]{3,}_[A-Z_]+\b|\b(?:TODO|FIXME|XXX|TBD)\b", prose)
