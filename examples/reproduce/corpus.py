"""Real text of six clearly different domains, from the files that the installation itself has put on the machine.

Nothing is downloaded. Every domain is a list of blocks (at most `BLOCK_BYTES` of text, cut at a line end), and every
eighth block is held out for validation, so no byte serves both. Duplicates (licences, vendored copies) count once.
The order is by a hash of the text: the same on every machine with the same versions, unrelated to file names.
"""

from __future__ import annotations

import ast
import gettext
import hashlib
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

BLOCK_BYTES = 8 * 1024
HOLD_OUT_EVERY = 8
FILE_BYTES = 256 * 1024  # of one file, so that a single generated file does not become its domain

STDLIB = Path(sysconfig.get_path("stdlib"))
PACKAGES = Path(sysconfig.get_path("purelib"))


@dataclass(frozen=True)
class Domain:
    """The blocks of one domain; `source` is what a reader of the table should know about it."""

    name: str
    source: str
    train: list[bytes]
    valid: list[bytes]


def python_sources() -> Iterator[str]:
    """Modules of Python's standard library, one block each: whole files are held out, not parts of them."""
    packages = "asyncio collections concurrent email html http importlib json logging multiprocessing re unittest urllib"
    for folder in ("", *packages.split(), "wsgiref", "xml", "xmlrpc", "zipfile"):
        for path in _files(STDLIB / folder, "*.py", recursive=bool(folder)):
            yield _first_block(_read(path))


def cpp_sources() -> Iterator[str]:
    """Headers of PyTorch, one block each. `ATen/ops` is left out: thousands of generated, nearly equal files."""
    include = PACKAGES / "torch" / "include"
    for folder in ("c10", "ATen/core", "ATen/cpu", "ATen/native", "torch/csrc/autograd", "torch/csrc/jit"):
        for path in _files(include / folder, "*.h"):
            yield _first_block(_read(path))


def javascript_sources() -> Iterator[str]:
    """TensorBoard's and matplotlib's programs for the browser, mostly minified."""
    for package in ("tensorboard", "matplotlib", "werkzeug"):
        for path in _files(PACKAGES / package, "*.js"):
            yield _read(path)[: 4 * FILE_BYTES]


def english_prose() -> Iterator[str]:
    """Python's reference manual (the text of `help()`), licences, and the running text of NetworkX's docstrings."""
    from pydoc_data.topics import topics

    yield _prose("\n\n".join(topics[name] for name in sorted(topics)))
    for pattern in ("*LICENSE*", "*License*", "METADATA"):
        for path in _files(PACKAGES, f"*.dist-info/**/{pattern}", recursive=False):
            yield _prose(_read(path))
    docstrings: list[str] = []
    for path in _files(PACKAGES / "networkx", "*.py"):
        if "tests" not in path.parts:
            docstrings += _docstrings(_read(path))
    yield _prose("\n\n".join(docstrings))


def russian_messages() -> Iterator[str]:
    """The translated side of the message catalogues of JupyterLab's Russian language pack."""
    messages: dict[str, None] = {}  # ordered set
    for path in _files(PACKAGES / "jupyterlab_language_pack_ru_RU", "*.mo"):
        with path.open("rb") as catalogue:
            translations = gettext.GNUTranslations(catalogue)._catalog  # type: ignore[attr-defined]
        for original, message in translations.items():
            if original and message != original and re.search("[а-яё]", message):
                messages[message.strip()] = None
    yield "\n".join(messages)


def structured_data() -> Iterator[str]:
    """JSON of the installed packages: bills of materials, registries, schemas."""
    for path in _files(PACKAGES, "*.json"):
        yield _read(path)[:FILE_BYTES]


FINDERS: dict[str, Callable[[], Iterable[str]]] = {
    "python": python_sources,
    "c++": cpp_sources,
    "javascript": javascript_sources,
    "english": english_prose,
    "russian": russian_messages,
    "json": structured_data,
}


def find_domain(name: str, *, train_bytes: int, valid_bytes: int, finder: Callable[[], Iterable[str]] | None = None) -> Domain:
    """Collects one domain: about `train_bytes` (less where there is less) and at least `valid_bytes` of text."""
    finder = finder or FINDERS[name]
    blocks: dict[bytes, bytes] = {}
    for text in finder():
        for block in _blocks(text):
            blocks[hashlib.sha256(block).digest()] = block
    ordered = [blocks[key] for key in sorted(blocks)]
    valid = _up_to(ordered[::HOLD_OUT_EVERY], valid_bytes)
    train = _up_to([block for i, block in enumerate(ordered) if i % HOLD_OUT_EVERY], train_bytes)
    if sum(map(len, valid)) < valid_bytes or sum(map(len, train)) < 2 * valid_bytes:
        raise SystemExit(
            f"demo: too little text for the domain '{name}' ({finder.__doc__}): found {sum(map(len, ordered))} bytes "
            f"under {STDLIB} and {PACKAGES}. `make demo` installs the packages that carry it (constraints.txt)."
        )
    return Domain(name, (finder.__doc__ or "").split("\n")[0], train, valid)


def _files(folder: Path, pattern: str, recursive: bool = True) -> list[Path]:
    found = folder.rglob(pattern) if recursive else folder.glob(pattern)
    return sorted(path for path in found if path.is_file())


def _read(path: Path) -> str:
    return path.read_bytes().decode("utf-8", errors="ignore")


def _first_block(text: str) -> str:
    return text[: BLOCK_BYTES // 2]  # characters; well below BLOCK_BYTES bytes for source code


def _blocks(text: str) -> Iterator[bytes]:
    """Cuts at line ends (at BLOCK_BYTES where a line is longer); crumbs below a tenth of a block are dropped."""
    block = b""
    for line in text.encode().splitlines(keepends=True):
        for start in range(0, len(line), BLOCK_BYTES):
            piece = line[start : start + BLOCK_BYTES]
            if len(block) + len(piece) > BLOCK_BYTES:
                yield block
                block = b""
            block += piece
    if len(block) >= BLOCK_BYTES // 10:
        yield block


def _up_to(blocks: Iterable[bytes], size: int) -> list[bytes]:
    """The first blocks, until they hold at least `size` bytes."""
    taken: list[bytes] = []
    total = 0
    for block in blocks:
        if total >= size:
            break
        taken.append(block)
        total += len(block)
    return taken


def _prose(text: str) -> str:
    """The paragraphs of running text: not indented (code is), long, nearly all letters, more than one sentence part."""
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n", text):
        letters = sum(c.isalpha() or c in " \n,.'" for c in paragraph)
        if len(paragraph) > 100 and not paragraph[0].isspace() and letters > 0.93 * len(paragraph):
            paragraphs.append(paragraph.strip())
    return "\n\n".join(dict.fromkeys(paragraphs))


def _docstrings(source: str) -> Iterator[str]:
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    try:
        tree = ast.parse(source)
    except SyntaxError:  # a template, or a newer Python's syntax
        return
    for node in ast.walk(tree):
        if isinstance(node, documented) and (docstring := ast.get_docstring(node)):
            yield docstring
