"""What MkDocs does besides: the README is the first page, and a file of the repository that a page links to is a page.

So the same relative links work on the site and where the repository is browsed. Docstrings come as they are at run
time, for those of the methods are put together when Python reads the class.
"""

from __future__ import annotations

import inspect
import os
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<=\]\()(?!\w+:|#)([^)#\s]+)")
LANGUAGES = {
    ".py": "python",
    ".sh": "bash",
    ".sbatch": "bash",
    ".yaml": "yaml",
    ".h": "cpp",
    ".ipynb": "json",
}


def on_files(files: Any, config: Any) -> None:
    """Adds the README, and all that is linked to outside docs/."""
    files.append(File.generated(config, "index.md", content=(ROOT / "README.md").read_text()))
    todo = [
        path
        for page in list(files.documentation_pages())
        for path in _outside(page.content_string, _origin(page))
    ]
    done: set[Path] = set()
    while todo:
        path = todo.pop()
        if path not in done:
            done.add(path)
            page = File.generated(config, _page_of(path), content=_content(path))
            files.append(page)
            todo += _outside(page.content_string, path)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links go from page to page."""
    origin = _origin(page.file)

    def link(match: re.Match[str]) -> str:
        path = _target(match[1], origin)
        at = path.relative_to(ROOT / "docs").as_posix() if (ROOT / "docs") in path.parents else _page_of(path)
        return os.path.relpath(at, os.path.dirname(page.file.src_uri) or ".") if path.exists() else match[0]

    return LINK.sub(link, markdown)


def _origin(page: File) -> Path:
    """The file of the repository that a page shows."""
    uri = page.src_uri
    if uri == "index.md":
        return ROOT / "README.md"
    if not uri.startswith("source/"):
        return ROOT / "docs" / uri
    path = ROOT / uri.removeprefix("source/")
    return path if path.exists() else path.with_name(path.name.removesuffix(".md"))


def _page_of(path: Path) -> str:
    if path == ROOT / "README.md":
        return "index.md"
    uri = f"source/{path.relative_to(ROOT).as_posix()}"
    return uri if path.suffix == ".md" else f"{uri}.md"


def _target(link: str, origin: Path) -> Path:
    return Path(os.path.normpath(origin.parent / link))


def _outside(text: str, origin: Path) -> list[Path]:
    found = (
        [_target(match[1], origin) for match in LINK.finditer(text)] if origin.suffix in ("", ".md") else []
    )
    docs = ROOT / "docs"
    return [
        path
        for path in found
        if path.exists() and docs not in (path, *path.parents) and path != ROOT / "README.md"
    ]


def _content(path: Path) -> str:
    if path.suffix == ".md":
        return path.read_text()
    title = f"# {path.relative_to(ROOT).as_posix()}\n\n"
    if path.is_dir():
        inside = sorted(one for one in path.iterdir() if one.is_file() and not one.name.startswith("."))
        return title + "\n".join(f"- [{one.name}]({path.name}/{one.name})" for one in inside)
    return f"{title}````{LANGUAGES.get(path.suffix, 'text')}\n{path.read_text()}\n````\n"


class Runtime(griffe.Extension):
    """Docstrings and arguments of the methods as `help` shows them."""

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        if not cls.path.startswith("mpilsgd.methods.") or cls.docstring is None:
            return
        real: Any = griffe.dynamic_import(cls.path)
        head, arguments, rows = (inspect.getdoc(real) or "").partition("\nArgs:\n")
        rows = rows.replace("\n        ", " ")  # one line an argument, and the default from the signature
        rows = re.sub(r"(?m)^(    \w+) \((.*?)(?:, )?default .*?\):", r"\1 (\2):", rows).replace(" ():", ":")
        cls.docstring.value = head + arguments + rows
        given = [
            griffe.Parameter(
                p.name,
                kind=griffe.ParameterKind[p.kind.name.lower()],
                default=None if p.default is p.empty else repr(p.default),
                annotation=_type(real.fields[p.name].type) if p.name in real.fields else None,
            )
            for p in inspect.signature(real).parameters.values()
        ]
        own = griffe.Parameter("self", kind=griffe.ParameterKind.positional_or_keyword)
        cls.set_member("__init__", griffe.Function("__init__", parameters=griffe.Parameters(own, *given)))


def _type(of: Any) -> str:
    return of.__name__ if isinstance(of, type) else str(of).removeprefix("typing.")
