"""Writes the demo's text into Megatron's indexed datasets (.bin and .idx): one for training, one held out, per domain.

A token is a byte, plus one end-of-document token after every block. Megatron's `NullTokenizer` with a vocabulary of 257
describes exactly that (its end of document is the last id), so that no tokenizer file is needed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy

from demo.corpus import FINDERS, find_domain

END_OF_DOCUMENT = 256
VOCAB_SIZE = 257
TRAIN_BYTES = 400_000


def prepare(
    folder: Path, *, sequence_length: int, valid_sequences: int, say: Callable[[str], object] = lambda _: None
) -> dict[str, dict[str, str]]:
    """Prepares every domain under `folder` and returns, by domain, the prefixes that Megatron's data arguments take.

    `valid_sequences` is exact: the evaluation of Megatron starts again from the front where a rank has too few.
    """
    # Megatron caches the order of the samples beside the data and would reuse it for other data of the same name.
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    valid_tokens = valid_sequences * sequence_length + 1  # the labels are the tokens shifted by one
    paths = dataset_paths(folder)
    facts = {}
    for name in FINDERS:
        domain = find_domain(name, train_bytes=TRAIN_BYTES, valid_bytes=valid_tokens)
        trained = write_indexed_dataset(paths[name]["train"], domain.train)
        held_out = write_indexed_dataset(paths[name]["valid"], domain.valid, most=valid_tokens)
        say(f"    {name:<10} {trained:>7,} bytes to train, {held_out:>6,} held out: {domain.source}")
        facts[name] = {"source": domain.source, "train_tokens": trained, "valid_tokens": held_out}
    (folder / "domains.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    return paths


def dataset_paths(folder: Path) -> dict[str, dict[str, str]]:
    """By domain, then split ("train", "valid"): the prefix of its dataset under `folder`."""
    stems = {name: name.replace("+", "p") for name in FINDERS}  # a file name that needs no quoting anywhere
    return {name: {split: str(folder / f"{stem}_{split}") for split in ("train", "valid")} for name, stem in stems.items()}


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


def detokenize(tokens: numpy.ndarray) -> bytes:
    """What `tokenize` was given, from one or more documents."""
    return bytes(tokens[tokens != END_OF_DOCUMENT].astype(numpy.uint8))
