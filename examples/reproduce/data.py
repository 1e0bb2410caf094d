"""The text of the experiments in Megatron's indexed datasets, in a folder that can be carried to another machine.

    python examples/reproduce/run.py data --data DIR

`data.json` names the domains and carries a digest of all bytes: runs of two machines are compared only if it is the same.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from reproduce import domains
from reproduce.corpus import find_domain

from demo.prepare import write_indexed_dataset

SEQUENCE_LENGTH = 128
GPU_SEQUENCE_LENGTH = 1024
VALID_SEQUENCES = 128  # per domain
TRAIN_BYTES = 256_000  # per domain; a run of 1000 steps of 32 sequences reads 4.1 million
INDEX = "data.json"


def prepare(folder: Path, texts: dict[str, Path] | None = None, say: Callable[[str], object] = print) -> None:
    """Writes what is not there yet.

    Args:
        folder: where to.
        texts: a file of text per domain, all of it, in sequences of GPU_SEQUENCE_LENGTH; None: the domains of the installation.
        say: gets a line per domain.
    """
    if (folder / INDEX).exists():
        return
    length, train_bytes = (SEQUENCE_LENGTH, TRAIN_BYTES) if texts is None else (GPU_SEQUENCE_LENGTH, sys.maxsize)
    finders = domains.ALL if texts is None else {name: partial(_lines, path) for name, path in texts.items()}
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    valid_tokens = VALID_SEQUENCES * length + 1  # the labels are the tokens shifted by one
    digest, found = hashlib.sha256(), []
    for name, finder in finders.items():
        domain = find_domain(name, train_bytes=train_bytes, valid_bytes=valid_tokens, finder=finder)
        stem = name.replace("+", "p")
        sizes = {
            "train": write_indexed_dataset(str(folder / f"{stem}_train"), domain.train),
            "valid": write_indexed_dataset(str(folder / f"{stem}_valid"), domain.valid, most=valid_tokens),
        }
        for split in ("train", "valid"):
            digest.update((folder / f"{stem}_{split}.bin").read_bytes())
        say(f"    {name:<12} {sizes['train']:>7,} tokens to train, {sizes['valid']:>6,} held out: {domain.source}")
        found.append({"name": name, "stem": stem, "source": domain.source, **sizes})
    index = {"sequence_length": length, "digest": digest.hexdigest()[:16], "domains": found}
    (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _lines(path: Path) -> Iterator[str]:
    """Text of a file."""
    yield path.read_text(encoding="utf-8")


def index_of(folder: Path) -> dict:
    """The digest and the domains.

    Raises:
        SystemExit: there is no data in the folder.
    """
    path = folder / INDEX
    if not path.is_file():
        raise SystemExit(f"no data in {folder}: `run.py data --data {folder}` makes it")
    return json.loads(path.read_text(encoding="utf-8"))
