"""What was measured, as a file, and what follows from it. Needs neither PyTorch nor Megatron.

`specialisation.json`, format 1 (D domains, L MoE layers, E experts; layers are named as in the balance record, from 0, "mtp.N"
for multi-token prediction):

    format               1
    iteration            of the checkpoint
    num_experts, topk    E, and how many of them a token selects
    layers               [L] names
    domains              [D] name, data (as given), sequences, tokens, loss (Megatron's names, mean over tokens)
    tokens_per_expert    [D][L][E] selections, exact; with padding left out
    score_sums           [D][L] mean over tokens of the sum of the selected experts' scores. A token's scores of all experts sum
                         to 1, so it is between topk / E (the router is undecided) and 1
    experts              [L] of the experts of a layer, over all domains:
        gates, weights, outputs    cosine similarity over pairs of experts: mean, p10, p90, max, pair (the two most alike); null
                                   where it was not measured
        norm_by_score_rank         [E] an expert's output norm over the mean norm for that token, highest score first
        norm_score_correlation     Spearman's, mean over tokens
        sampled_tokens             on which every expert was run
        not_measured               why, for what is null
    derived              what the functions below make of it, for readers in other languages
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy

FILE_NAME = "specialisation.json"
FORMAT = 1
MAIN = 0.5  # a domain's main experts are the fewest that take this part of its selections


class NotASpecialisation(ValueError):
    """A file that is none of ours, or is damaged; the message names it and says what is wrong."""


@dataclass(frozen=True)
class MeasuredDomain:
    """One domain; `tokens` and `sequences` are over all ranks."""

    name: str
    data: list[str]
    sequences: int
    tokens: int
    loss: dict[str, float]


@dataclass(frozen=True)
class LayerExperts:
    """The experts of one layer; see the format above."""

    gates: dict[str, Any] | None
    weights: dict[str, Any] | None
    outputs: dict[str, Any] | None
    norm_by_score_rank: list[float] | None
    norm_score_correlation: float | None
    sampled_tokens: int
    not_measured: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Specialisation:
    """A checkpoint over domains; see the format above."""

    iteration: int
    num_experts: int
    topk: int
    layers: list[str]
    domains: list[MeasuredDomain]
    tokens_per_expert: list[list[list[int]]]
    score_sums: list[list[float]]
    experts: list[LayerExperts]

    @property
    def names(self) -> list[str]:
        return [domain.name for domain in self.domains]

    @property
    def shares_DLE(self) -> numpy.ndarray:
        """[D, L, E] share of the domain's selections that went to each expert; a row sums to 1."""
        counts_DLE = numpy.asarray(self.tokens_per_expert, dtype=numpy.float64)
        return counts_DLE / counts_DLE.sum(axis=2, keepdims=True).clip(min=1)

    @property
    def specialisation_DL(self) -> numpy.ndarray:
        """[D, L] share of the domain's most used expert: 1 / E is none, 1 / topk the most possible."""
        return self.shares_DLE.max(axis=2)

    @property
    def contrast_L(self) -> numpy.ndarray:
        """[L] how differently the domains are routed: total variation distance between a domain's shares and the mean over
        domains, averaged over domains. 0: all alike. Unlike the share of the most used expert, it does not rise where one
        expert serves all domains.
        """
        shares_DLE = self.shares_DLE
        return numpy.abs(shares_DLE - shares_DLE.mean(axis=0)).sum(axis=2).mean(axis=0) / 2

    @property
    def overlap_DD(self) -> numpy.ndarray:
        """[D, D] part of the selections that two domains share: sum over experts of the smaller share, mean over layers.
        1: alike, 0: they have no expert in common.
        """
        shares_DLE = self.shares_DLE
        return numpy.stack([numpy.minimum(shares_LE, shares_DLE).sum(axis=2).mean(axis=1) for shares_LE in shares_DLE])

    @property
    def main_DLE(self) -> numpy.ndarray:
        """[D, L, E] bool, the main experts of each domain: the fewest that take half (`MAIN`) of its selections. With even
        routing half of all experts are, with one that takes half it is that one.
        """
        shares_DLE = self.shares_DLE
        order_DLE = numpy.argsort(-shares_DLE, axis=2, kind="stable")
        sorted_DLE = numpy.take_along_axis(shares_DLE, order_DLE, axis=2)
        before_DLE = numpy.cumsum(sorted_DLE, axis=2) - sorted_DLE  # what the more used ones take
        main_DLE = numpy.zeros_like(shares_DLE, dtype=bool)
        numpy.put_along_axis(main_DLE, order_DLE, before_DLE < MAIN - 1e-9, axis=2)
        return main_DLE

    @property
    def main_overlap_DD(self) -> numpy.ndarray:
        """[D, D] of the main experts (of all layers) of two domains together, the part that both have."""
        main_DLE = self.main_DLE
        both, either = (
            numpy.stack([combine(main_LE, main_DLE).sum(axis=(1, 2)) for main_LE in main_DLE])
            for combine in (numpy.logical_and, numpy.logical_or)
        )
        return both / either

    def as_json(self) -> dict[str, Any]:
        """The format above."""
        derived = {
            "shares": self.shares_DLE.round(6).tolist(),
            "specialisation": self.specialisation_DL.tolist(),
            "contrast": self.contrast_L.tolist(),
            "overlap": self.overlap_DD.tolist(),
            "main_experts": self.main_DLE.sum(axis=2).tolist(),
            "main_overlap": self.main_overlap_DD.tolist(),
        }
        return {"format": FORMAT, **asdict(self), "derived": derived}


def spread(similarity_EE: list[list[float]]) -> dict[str, Any] | None:
    """Mean, quantiles and the most alike pair over the pairs of experts; None with fewer than two experts."""
    matrix = numpy.asarray(similarity_EE)
    if len(matrix) < 2:
        return None
    rows, columns = numpy.triu_indices(len(matrix), k=1)
    values = matrix[rows, columns]
    most = int(values.argmax())
    return {
        "mean": float(values.mean()),
        "p10": float(numpy.quantile(values, 0.1)),
        "p90": float(numpy.quantile(values, 0.9)),
        "max": float(values[most]),
        "pair": [int(rows[most]), int(columns[most])],
    }


def write(result: Specialisation, directory: Path) -> Path:
    """Write the file; that of another checkpoint becomes `specialisation-ITERATION.json` (the report compares them)."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / FILE_NAME
    with contextlib.suppress(OSError, NotASpecialisation):
        before = read(path).iteration
        if before != result.iteration:
            path.replace(directory / f"specialisation-{before}.json")
    partial = path.with_suffix(".json.partial")
    partial.write_text(json.dumps(result.as_json()) + "\n", encoding="utf-8")
    partial.replace(path)
    return path


def read(path: Path) -> Specialisation:
    """Read a file, or the file in a directory.

    Raises:
        NotASpecialisation: it is none, or damaged.
        OSError: it cannot be read.
    """
    path = path / FILE_NAME if path.is_dir() else path
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise NotASpecialisation(
            f"{path}: not JSON ({error}); allowed: a file that megatron_global_lbl.specialise wrote"
        ) from None
    if not isinstance(content, dict) or content.get("format") != FORMAT or "tokens_per_expert" not in content:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise NotASpecialisation(f"{path}: format {found!r}; allowed: {FORMAT}, as megatron_global_lbl.specialise writes it")
    try:
        content = {name: content[name] for name in Specialisation.__dataclass_fields__}
        content["domains"] = [MeasuredDomain(**domain) for domain in content["domains"]]
        content["experts"] = [LayerExperts(**layer) for layer in content["experts"]]
        result = Specialisation(**content)
        expected = (len(result.domains), len(result.layers), result.num_experts)
        found = numpy.shape(result.tokens_per_expert)
        if found != expected or numpy.shape(result.score_sums) != expected[:2]:
            raise ValueError(f"tokens_per_expert is {found}, not {expected} (domains, layers, experts)")
    except (KeyError, TypeError, ValueError) as error:
        raise NotASpecialisation(f"{path}: damaged: {error}") from None
    return result
