"""Writes the demo's text into Megatron's indexed datasets (.bin and .idx): one for training, one held out, per domain.

A token is a byte, plus one end-of-document token after every block. Megatron's `NullTokenizer` with a vocabulary of 257
describes exactly that (its end of document is the last id), so that no tokenizer file is needed.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy

from demo.text import GRAMMARS, documents

END_OF_DOCUMENT = 256
VOCAB_SIZE = 257
TRAIN_BYTES = 100_000  # of a domain; a training reads less than half of it

Paths = dict[str, dict[str, str]]
"""By domain, then split ("train", "valid"): the prefix of a dataset."""


def prepare(folder: Path, *, sequence_length: int, valid_sequences: int) -> Paths:
    """Write every domain under `folder`; returns the prefixes that Megatron's data arguments take.

    `valid_sequences` is exact: Megatron's evaluation starts again from the front where a rank has too few.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    valid_tokens = valid_sequences * sequence_length + 1  # the labels are the tokens shifted by one
    paths = dataset_paths(folder)
    for name in GRAMMARS:
        write_indexed_dataset(paths[name]["train"], documents(name, TRAIN_BYTES))
        write_indexed_dataset(paths[name]["valid"], documents(name, valid_tokens, held_out=True), most=valid_tokens)
    return paths


def dataset_paths(folder: Path) -> Paths:
    """Where `prepare` writes."""
    return {name: {split: str(folder / f"{name}_{split}") for split in ("train", "valid")} for name in GRAMMARS}


def write_indexed_dataset(prefix: str, blocks: list[bytes], most: int | None = None) -> int:
    """Writes the blocks as documents, `most` tokens in all at the most; returns the number of tokens."""
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder, get_bin_path, get_idx_path

    builder = IndexedDatasetBuilder(get_bin_path(prefix), dtype=DType.optimal_dtype(VOCAB_SIZE))
    left = most if most is not None else sum(map(len, blocks)) + len(blocks)
    written = 0
    for block in blocks:
        document = tokenize(block)[: left - written]
        if len(document):
            builder.add_document(document, [len(document)])
            written += len(document)
    builder.finalize(get_idx_path(prefix))
    return written


def tokenize(block: bytes) -> numpy.ndarray:
    """The bytes, and the end of the document."""
    return numpy.append(numpy.frombuffer(block, dtype=numpy.uint8).astype(numpy.uint16), END_OF_DOCUMENT)
