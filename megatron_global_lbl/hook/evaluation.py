"""Megatron's own evaluation (`--skip-train`), once per domain of text, with somebody looking on (0.14 to 0.19).

Why here: `pretrain` builds the model, loads the checkpoint and evaluates as the user's script says. What it evaluates on it
gets from two functions that it looks up when it runs:

    training.build_train_valid_test_data_iterators  only remembered: whose data it would be is decided per domain
    training.evaluate_and_print_results             runs once per domain, on data that the script's own provider builds
    training.evaluate                               reveals the loss
    TopKRouter.routing                              reveals logits and selection
    router.topk_routing_with_score_function         reveals the selection before token dropping, as in training (router.py)
    MoELayer.forward                                reveals the layer and what comes into it

Untouched: the model, the data pipeline, the schedule, the log lines.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from megatron_global_lbl.hook import compatibility
from megatron_global_lbl.hook.experts import MoeLayer
from megatron_global_lbl.hook.models import layer_key
from megatron_global_lbl.hook.patching import Patches
from megatron_global_lbl.hook.router import ROUTER

TRAINING = "megatron.training.training"
MOE_LAYER = "megatron.core.transformer.moe.moe_layer"


class Domain(NamedTuple):
    """A kind of text: its name, and its data as Megatron's `--valid-data-path` takes it (prefixes, with weights or without)."""

    name: str
    data: tuple[str, ...]


class Observer(Protocol):
    """Records an evaluation."""

    def begin(self, domain: Domain, forwards: int) -> None:
        """The evaluation on a domain begins: so many forwards of each layer on each rank."""

    def route(self, router: Any, *, scores: Tensor, selection: Tensor, padding_mask: Tensor | None) -> None:
        """A router has run: [T, E] scores of the auxiliary loss, [T, E] bool selection, [T] bool padding or None."""

    def enter(self, layer: MoeLayer, hidden: Tensor, padding_mask: Tensor | None) -> None:
        """A MoE layer has run: [T, H] what came into it, [T] bool padding or None. On every rank of its groups alike."""

    def end(self, loss: dict[str, float], sequences: int) -> None:
        """The evaluation on the domain has ended: Megatron's losses (on the last pipeline stage), and its sequences."""

    def finish(self, iteration: int) -> None:
        """All domains have been evaluated, with the model of this iteration."""


def install(patches: Patches, domains: list[Domain], observer: Observer) -> None:
    """Let the `pretrain` of this process, which must run with `--skip-train`, evaluate on the domains."""
    providers: list[Any] = []
    build: list[Any] = []
    losses: list[dict[str, Tensor]] = []

    def wrap_build(original):
        build.append(original)

        def build_train_valid_test_data_iterators(build_train_valid_test_datasets_provider):
            providers.append(build_train_valid_test_datasets_provider)  # one per model chunk
            args = _arguments()
            args.do_train, args.do_valid, args.do_test = False, True, False
            return None, None, None

        return build_train_valid_test_data_iterators

    def wrap_evaluations(original):
        def evaluate_and_print_results(prefix, forward_step_func, data_iterator, model, iteration, *rest, **kwargs):
            args = _arguments()
            for domain in domains:
                args.valid_data_path = list(domain.data)
                iterators = [build[0](provider)[1] for provider in providers]
                args.do_test = False  # a script that builds test data in spite of this wants it evaluated, too
                data_iterator = iterators if isinstance(data_iterator, list) else iterators[0]
                # Batch sizes of an evaluation's own exist since 0.18.
                batch = getattr(args, "eval_global_batch_size", args.global_batch_size)
                micro_batch = getattr(args, "eval_micro_batch_size", args.micro_batch_size)
                observer.begin(domain, args.eval_iters * batch // (micro_batch * args.data_parallel_size))
                losses.clear()
                original(f"{prefix} {domain.name}", forward_step_func, data_iterator, model, iteration, *rest, **kwargs)
                sequences = args.eval_iters * batch
                observer.end({name: float(loss) for name, loss in losses[0].items()}, sequences)
            observer.finish(iteration)

        return evaluate_and_print_results

    def wrap_evaluate(original):
        def evaluate(*args, **kwargs):
            result = original(*args, **kwargs)
            losses.append(result[0])
            return result

        return evaluate

    patches.wrap(TRAINING, "build_train_valid_test_data_iterators", wrap_build)
    patches.wrap(TRAINING, "evaluate_and_print_results", wrap_evaluations)
    patches.wrap(TRAINING, "evaluate", wrap_evaluate)
    install_observers(patches, observer)


def install_observers(patches: Patches, observer: Observer) -> None:
    """Let every router and MoE layer of this process report its forwards to `observer`."""
    selections: list[Tensor] = []

    def wrap_routing(original):
        def routing(self, logits, padding_mask=None, **kwargs):
            if padding_mask is not None:  # a parameter since 0.16
                kwargs["padding_mask"] = padding_mask
            selections.clear()
            probs, routing_map = original(self, logits, **kwargs)
            mask = None if padding_mask is None else padding_mask.reshape(-1)
            scores = scores_of(self, logits.reshape(-1, logits.shape[-1]))
            selection = selections.pop() if selections else routing_map  # other ways of routing drop nothing
            observer.route(self, scores=scores, selection=selection.bool(), padding_mask=mask)
            return probs, routing_map

        return routing

    def wrap_topk(original):
        def topk_routing_with_score_function(*args, **kwargs):
            result = original(*args, **kwargs)
            selections.append(result[1])
            return result

        return topk_routing_with_score_function

    def wrap_layer(original):
        signature = inspect.signature(original)

        def forward(self, hidden_states, *args, **kwargs):
            result = original(self, hidden_states, *args, **kwargs)
            mask = signature.bind(self, hidden_states, *args, **kwargs).arguments.get("padding_mask")  # since 0.16
            if mask is not None:  # [sequences, tokens], the other way round than the hidden states
                mask = mask.transpose(0, 1).reshape(-1).bool()
            observer.enter(MoeLayer(self), hidden_states.reshape(-1, hidden_states.shape[-1]), mask)
            return result

        return forward

    patches.wrap(ROUTER, "TopKRouter.routing", wrap_routing)
    patches.wrap(ROUTER, "topk_routing_with_score_function", wrap_topk)
    patches.wrap(MOE_LAYER, "MoELayer.forward", wrap_layer)


def scores_of(router: Any, logits: Tensor) -> Tensor:
    """[T, E] scores of the auxiliary loss, which sum to 1, from [T, E] logits; by Megatron's own function, not fused."""
    compute = importlib.import_module(ROUTER).compute_routing_scores_for_aux_loss
    return compute(logits, router.topk, router.score_function)[1]


def describe(router: Any) -> tuple[str, int, int]:
    """The layer's name within its model (`layer_key`), E, and top-k."""
    return layer_key(router), router.config.num_moe_experts, router.topk


process_groups = compatibility.process_groups


def _arguments() -> Any:
    return importlib.import_module("megatron.training.global_vars").get_args()
