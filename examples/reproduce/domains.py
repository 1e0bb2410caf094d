"""Sixteen domains of text: the demo's six and ten more, from the files of the same installed packages.

Many domains are what makes a global batch differ from a micro-batch. Nothing is downloaded; other versions of the packages
give other bytes, so a data folder carries the digest of its own (`data.py`), and results say which they were trained on.
"""

from __future__ import annotations

import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from reproduce.corpus import FILE_BYTES, FINDERS, PACKAGES, _files, _first_block, _read


def _whole(folder: str, pattern: str) -> Iterator[str]:
    for path in _files(PACKAGES / folder, pattern):
        yield _read(path)[:FILE_BYTES]


def mathematics() -> Iterator[str]:
    """Symbolic mathematics: SymPy's tests, one block each, without their imports."""
    for path in _files(PACKAGES / "sympy", "test_*.py"):
        yield _first_block(re.sub(r"(?s)^.*?\ndef ", "def ", _read(path), count=1))


def type_stubs() -> Iterator[str]:
    """Type stubs of Python's standard library (typeshed, in mypy)."""
    for path in _files(PACKAGES / "mypy" / "typeshed" / "stdlib", "*.pyi"):
        yield _first_block(_read(path))


def cmake_scripts() -> Iterator[str]:
    """CMake scripts of PyTorch."""
    return _whole("torch/share", "*.cmake")


def font_metrics() -> Iterator[str]:
    """Adobe font metrics in matplotlib: tables of numbers and glyph names."""
    return _whole("matplotlib/mpl-data", "*.afm")


def operator_yaml() -> Iterator[str]:
    """YAML: PyTorch's declarations of operators and their derivatives."""
    return _whole("torchgen", "*.yaml")


def random_numbers() -> Iterator[str]:
    """Columns of hexadecimal random numbers, from NumPy's tests."""
    return _whole("numpy/random", "*.csv")


def unicode_tables() -> Iterator[str]:
    """Tables of Unicode ranges in fontTools."""
    return _whole("fontTools/unicodedata", "*.py")


def c_headers() -> Iterator[str]:
    """C: the headers of Python."""
    for path in _files(Path(sysconfig.get_path("include")), "*.h"):
        yield _first_block(_read(path))


def word_lists() -> Iterator[str]:
    """Lists of built-in names of programming languages, in Pygments."""
    return _whole("pygments/lexers", "_*.py")


def package_records() -> Iterator[str]:
    """File lists with digests of installed packages."""
    for path in _files(PACKAGES, "*.dist-info/RECORD", recursive=False):
        yield _read(path)[:FILE_BYTES]


ALL: dict[str, Callable[[], Iterable[str]]] = {
    **FINDERS,
    "mathematics": mathematics,
    "stubs": type_stubs,
    "cmake": cmake_scripts,
    "fonts": font_metrics,
    "yaml": operator_yaml,
    "numbers": random_numbers,
    "unicode": unicode_tables,
    "c": c_headers,
    "words": word_lists,
    "records": package_records,
}
