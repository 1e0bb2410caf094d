"""The measurement in a few lines of text."""

from __future__ import annotations

from megatron_global_lbl.specialise.result import Specialisation


def lines(result: Specialisation) -> list[str]:
    """A table of the domains, then the layers' experts."""
    width = max(len("domain"), *(len(name) for name in result.names))
    found = [
        f"experts of iteration {result.iteration}: {len(result.layers)} MoE layers, {result.num_experts} experts, "
        f"top-{result.topk}; even share {1 / result.num_experts:.3f}, most possible {1 / result.topk:.3f}",
        f"{'domain':<{width}}  {'tokens':>9}  {'top share':>9}  {'score sum':>9}  nearest domain (shared routing)",
    ]
    overlap = result.overlap_DD
    for d, domain in enumerate(result.domains):
        others = [other for other in range(len(result.domains)) if other != d]
        nearest = max(others, key=lambda other, d=d: overlap[d, other], default=None)  # type: ignore[misc]
        near = f"{result.names[nearest]} ({overlap[d, nearest]:.2f})" if nearest is not None else "-"
        scores = result.score_sums[d]
        found.append(
            f"{domain.name:<{width}}  {domain.tokens:>9,}  {result.specialisation_DL[d].mean():>9.3f}  "
            f"{sum(scores) / len(scores):>9.3f}  {near}"
        )
    found.append(f"contrast of domains (0: all routed alike), mean over layers: {result.contrast_L.mean():.3f}")
    for what, of_layers in (
        ("weights", [layer.weights for layer in result.experts]),
        ("outputs", [layer.outputs for layer in result.experts]),
        ("gates", [layer.gates for layer in result.experts]),
    ):
        means = [layer["mean"] for layer in of_layers if layer is not None]
        if means:
            found.append(f"similarity of {what}, first to last layer: {means[0]:.3f} to {means[-1]:.3f}")
    for reason in dict.fromkeys(reason for layer in result.experts for reason in layer.not_measured):
        found.append(f"not measured: {reason}")
    return found
