"""Set the line numbers of quoted lines in the docs, [`text`](../script.py#L12), to where the text is now.

    python tools/renumber_links.py

A text has to stand on one line only; tests/test_docs.py fails where a number is out of date.
"""

import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent


def renumber(page: pathlib.Path) -> str:
    def place(match: re.Match) -> str:
        text, path = match[1], match[2]
        lines = (page.parent / path).resolve().read_text(encoding="utf-8").splitlines()
        found = [i for i, line in enumerate(lines, start=1) if text in line]
        if len(found) != 1:
            sys.exit(f"{page.name}: `{text}` is on the lines {found} of {path}, must be on one: quote another part")
        return f"[`{text}`]({path}#L{found[0]})"

    return re.sub(r"\[`([^`]+)`\]\(([^)#\s]+\.py)#L\d+\)", place, page.read_text(encoding="utf-8"))


def main() -> None:
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        page.write_text(renumber(page), encoding="utf-8")


if __name__ == "__main__":
    main()
