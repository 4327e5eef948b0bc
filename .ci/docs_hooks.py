"""What the documentation site does to pages before it renders them; mkdocs.yml names this file."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parent.parent
# Pages of the site that lie at the top of the repository, where people and forges look for them.
_AT_THE_TOP = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
_LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)#:]+)(#[^)]*)?\)")


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The page's text, with links as the site has them.

    A link to a file of the repository that is no page becomes the file's path: the site has no such file.
    """
    here = page.file.src_uri
    source = _AT_THE_TOP.get(here)
    if source is not None:
        markdown = (_ROOT / source).read_text(encoding="utf-8")
    folder = posixpath.dirname(f"docs/{here}") if source is None else ""
    pages = {original: f"docs/{name}" for name, original in _AT_THE_TOP.items()}

    def follow(link: re.Match[str]) -> str:
        text, target, anchor = link[1], link[2], link[3] or ""
        path = posixpath.normpath(posixpath.join(folder, target))
        path = pages.get(path, path)
        if not (_ROOT / path).exists():
            return link[0]  # broken: the strict build says so
        if path.startswith("docs/") and not path.startswith("docs/results/data"):
            return f"[{text}]({posixpath.relpath(path, posixpath.dirname(f'docs/{here}'))}{anchor})"
        return text if path in text else f"{text} (`{path}`)"

    return _LINK.sub(follow, markdown)
