"""The source text that compiled code depends on, by its import statements, whatever else a process has imported."""

from __future__ import annotations

import functools
import hashlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = __name__.rpartition(".runtime")[0]
_ROOT = Path(__file__).parents[1]
_FILES = {
    ".".join((PACKAGE, *file.relative_to(_ROOT).with_suffix("").parts)).removesuffix(".__init__"): file
    for file in _ROOT.rglob("*.py")
}
"""The files of this package by the names of their modules."""

# A kernel may stand in a file that is no Python, such as a notebook or a page with code. So no parser reads it.
_IMPORT = re.compile(r"^[ \t]*(?:from ([\w.]+) )?import (\([^)]*\)|(?:.*\\\n)*.*)", re.MULTILINE)
_FOR_TYPE_CHECKERS = re.compile(r"^if (?:typing\.)?TYPE_CHECKING:\n(?:[ \t].*\n|\n)*", re.MULTILINE)
_ALIAS_OR_COMMENT = re.compile(r"\bas \w+|#.*")


@functools.cache
def text_of(file: Path) -> bytes:
    """The text of a file at the first call, when the file is imported. Later changes of the file do not run here."""
    return file.read_bytes()


for _file in _FILES.values():
    text_of(_file)


def sources_digest(*modules: str) -> str:
    """A digest of the text of modules, by name, and of all modules of this package that they import, in turn.

    A package that is imported for one of its modules does not count: the file of a package here only defines things.
    """
    texts: dict[str, bytes] = {}
    waiting = [*modules]
    while waiting:
        name = waiting.pop()
        if name not in texts:
            texts[name] = text_of(_FILES.get(name) or Path(str(sys.modules[name].__file__)))
            waiting += imported_by(texts[name])
    digest = hashlib.sha256()
    for name in sorted(texts):
        digest.update(hashlib.sha256(texts[name]).digest())
    return digest.hexdigest()


@functools.cache
def imported_by(text: bytes) -> frozenset[str]:
    """The modules of this package that a text imports, in functions too, but not those for type checkers alone."""
    return frozenset(
        module
        for name in _imported_names(_FOR_TYPE_CHECKERS.sub("", text.decode(errors="replace")))
        for module in (name if name in _FILES else name.rpartition(".")[0],)
        if module in _FILES
    )


def _imported_names(text: str) -> Iterator[str]:
    for origin, names in _IMPORT.findall(text):
        for name in re.findall(r"[\w.*]+", _ALIAS_OR_COMMENT.sub("", names)):
            yield f"{origin}.{name}" if origin else name
