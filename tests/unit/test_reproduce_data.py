"""The text of the experiments: found on this machine, distinct, and held out cleanly."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from reproduce import corpus
from reproduce.data import TRAIN_BYTES

VALID_BYTES = 16_385


@pytest.fixture(scope="module")
def domains() -> dict[str, corpus.Domain]:
    return {name: corpus.find_domain(name, train_bytes=TRAIN_BYTES, valid_bytes=VALID_BYTES) for name in corpus.FINDERS}


def _byte_histogram(blocks: list[bytes]) -> list[float]:
    text = b"".join(blocks)
    return [text.count(byte) / len(text) for byte in range(256)]


def test_every_domain_is_found_with_enough_text(domains):
    assert len(domains) >= 5
    for domain in domains.values():
        assert sum(map(len, domain.train)) > 100_000, domain.name
        assert sum(map(len, domain.valid)) >= VALID_BYTES, domain.name
        assert max(map(len, domain.train + domain.valid)) <= corpus.BLOCK_BYTES


def test_no_block_is_in_two_places(domains):
    """Training and validation of all domains together: a block, by its hash, is in one of them only."""
    blocks = [block for domain in domains.values() for block in domain.train + domain.valid]
    assert len({hashlib.sha256(block).digest() for block in blocks}) == len(blocks)


def test_domains_are_clearly_different(domains):
    """Each held-out text is nearest to its own domain's training text, by nothing but the frequencies of its bytes."""
    trained = {name: _byte_histogram(domain.train) for name, domain in domains.items()}
    for name, domain in domains.items():
        held_out = _byte_histogram(domain.valid)
        distance = {other: sum(abs(x - y) for x, y in zip(held_out, histogram)) for other, histogram in trained.items()}
        assert min(distance, key=distance.__getitem__) == name, distance


def test_a_second_search_finds_the_same(domains):
    again = corpus.find_domain("python", train_bytes=TRAIN_BYTES, valid_bytes=VALID_BYTES)
    assert again == domains["python"]


def test_too_little_text_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(corpus, "PACKAGES", Path("/nonexistent"))
    with pytest.raises(SystemExit, match="russian.*language pack.*/nonexistent"):
        corpus.find_domain("russian", train_bytes=TRAIN_BYTES, valid_bytes=VALID_BYTES)
