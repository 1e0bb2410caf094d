"""The demo's text: the same bytes everywhere, distinct, held out, and unchanged by Megatron's dataset format."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from demo import prepare, text
from demo.megatron_args import EVALUATED_AT_ONCE, GLOBAL_BATCH, SEQUENCE_LENGTH, Size

VALID_BYTES = Size.valid_sequences * SEQUENCE_LENGTH + 1
TRAIN = {name: text.documents(name, prepare.TRAIN_BYTES) for name in text.GRAMMARS}
VALID = {name: text.documents(name, VALID_BYTES, held_out=True) for name in text.GRAMMARS}


def _byte_histogram(documents: list[bytes]) -> list[float]:
    joined = b"".join(documents)
    return [joined.count(byte) / len(joined) for byte in range(256)]


def test_the_bytes_are_those_of_the_published_numbers():
    """Whoever changes the text measures the demo again (README.md, benchmarks/)."""
    digest = hashlib.sha256(b"".join(b"".join(TRAIN[name] + VALID[name]) for name in TRAIN))
    assert digest.hexdigest()[:16] == "fe34d5c1d2280a9a"


def test_a_training_reads_no_byte_twice_and_the_measurement_whole_batches():
    assert len(TRAIN) == 8
    assert Size.steps * GLOBAL_BATCH * SEQUENCE_LENGTH / len(TRAIN) < 0.6 * prepare.TRAIN_BYTES
    assert Size.valid_sequences % EVALUATED_AT_ONCE == 0


@pytest.mark.parametrize("name", text.GRAMMARS)
def test_no_document_is_in_two_places(name):
    documents = TRAIN[name] + VALID[name]
    assert len(set(documents)) == len(documents)


@pytest.mark.parametrize("name", text.GRAMMARS)
def test_domains_are_clearly_different(name):
    """Held-out text is nearest to its own domain's training text, by nothing but the frequencies of its bytes."""
    held_out = _byte_histogram(VALID[name])
    distance = {other: sum(abs(x - y) for x, y in zip(held_out, _byte_histogram(TRAIN[other]))) for other in TRAIN}
    assert min(distance, key=distance.__getitem__) == name, distance


def test_bytes_survive_megatrons_indexed_dataset(tmp_path):
    pytest.importorskip("megatron.core", reason="needs megatron-core (extra 'megatron')")
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    documents = TRAIN["latex"]
    tokens = prepare.write_indexed_dataset(str(tmp_path / "latex"), documents)
    dataset = IndexedDataset(str(tmp_path / "latex"))
    assert tokens == sum(map(len, documents)) + len(documents)
    assert [bytes(dataset[i][:-1].astype("uint8")) for i in range(len(dataset))] == documents
    assert all(dataset[i][-1] == prepare.END_OF_DOCUMENT for i in range(len(dataset)))


def test_validation_has_exactly_the_tokens_asked_for(tmp_path):
    pytest.importorskip("megatron.core", reason="needs megatron-core (extra 'megatron')")
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    assert prepare.write_indexed_dataset(str(tmp_path / "sql"), VALID["sql"], most=5001) == 5001
    assert sum(IndexedDataset(str(tmp_path / "sql")).sequence_lengths) == 5001
