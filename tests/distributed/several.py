"""Several toy models in one process, trained by a script: in turn, entangled, or with steps that come to nothing.

A script is a function of a test module that gets the models and trains them, on every rank. What arrived in `main_grad` at the
end of each step is compared with the truth of that model alone: nothing that another model, or a step that was given up, has
done may change it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import harness
import torch
import truth
from compare import compare_exact, register_arguments
from layout import Layout
from truth import Problem, weights

# Inputs and weights of steps that are not to be counted: no step of a truth has them.
LOST = 1000


class Interrupted(Exception):
    """What a script lets a step raise."""


@dataclass(frozen=True)
class Spec:
    """One model.

    Attributes:
        problem: what it computes.
        extra: more fields of TransformerConfig.
        groups: "halves" or "all": process groups of its own, over each half of the ranks or over all, none of Megatron's. The
            halves train models of their own, with other seeds.
        first: the step of the problem with which it begins.
    """

    problem: Problem
    extra: dict[str, Any] = field(default_factory=dict, hash=False)
    groups: str | None = None
    first: int = 0

    def at(self, rank: int) -> Problem:
        """The problem that a rank computes."""
        if self.groups != "halves" or rank < self.problem.dp:
            return self.problem
        return dataclasses.replace(self.problem, seed=self.problem.seed + 1)


class Model:
    """A model of this rank: whole steps by Megatron's schedule, or forward, backward and the step's end one by one."""

    def __init__(self, spec: Spec, layout: Layout) -> None:
        import torch.distributed as dist

        self.problem = spec.at(dist.get_rank())
        self.layout = layout
        self.groups = None if spec.groups is None else _own_groups(self.problem.dp)
        self.config, self.chunks, (self.toy,) = harness.build_model(self.problem, layout, spec.extra, self.groups)
        self.place = harness._place(layout) if self.groups is None else (self.groups.dp.rank(), 0, 1)
        self.step_number = spec.first
        self.grads: list[dict[int, Any]] = []
        self._shards: list[Any] = []

    def load(self, step: int | None = None) -> None:
        """Take the weights and inputs of the next step, or of another one."""
        step = self.step_number if step is None else step
        harness.load(self.toy, self.chunks[0], self.layout, weights(self.problem, step))
        self._shards = harness.shards_at(self.problem, step, *self.place)

    def begin(self, step: int | None = None) -> None:
        """What a training loop does before a step's first forward."""
        self.load(step)
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
            chunk.train()

    def step(self, step: int | None = None) -> None:
        """The next step as Megatron's training loop has it; with a number: one that is not recorded."""
        self.begin(step)
        self._schedule()
        if step is None:
            self.record()

    def _schedule(self, stop_after: int | None = None) -> None:
        from megatron.core.pipeline_parallel import get_forward_backward_func

        forwards: list[Any] = []

        def forward_step(*arguments):
            if len(forwards) == stop_after:
                raise Interrupted
            forwards.append(None)
            return harness._forward_step(self.problem, 0.0, *arguments)

        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(self._shards),
            model=self.chunks[0],
            num_microbatches=len(self._shards),
            seq_length=self.problem.seq,
            micro_batch_size=self.problem.batch,
            forward_only=False,
            **({} if self.groups is None else {"pg_collection": self.groups}),
        )

    def interrupted(self, where: str) -> None:
        """A step that raises in the middle, on all ranks: before its last forward, or within its first forward or backward."""
        self.begin(LOST)
        first_block = self.toy.blocks[0]
        hook = None
        if where == "forward":
            hook = first_block.register_forward_hook(_raise)
        elif where == "backward":
            hook = first_block.register_forward_hook(lambda module, inputs, output: output.register_hook(_raise) and None)
        else:
            assert where == "between"
        try:
            self._schedule(stop_after=self.problem.micro_batches - 1 if where == "between" else None)
        except Interrupted:
            pass
        else:
            raise AssertionError("the step was not interrupted")
        finally:
            if hook is not None:
                hook.remove()

    def forward(self, m: int) -> torch.Tensor:
        return self.chunks[0](*self._shards[m])

    def backward(self, *outputs: torch.Tensor) -> None:
        """One backward of these forwards, with the scale that Megatron's schedule would set."""
        from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

        problem = self.problem
        backwards = problem.micro_batches_at(self.step_number) // problem.together
        MoEAuxLossAutoScaler.set_loss_scale(torch.full((1,), 1.0 if problem.per_token else 1.0 / backwards))
        torch.stack([output.float().sum() * 0 for output in outputs]).sum().backward()

    def micro_batch(self, m: int) -> None:
        self.backward(self.forward(m))

    def end(self) -> None:
        """The step's end in a loop that calls `finalize_model_grads` itself."""
        from megatron.core.distributed.finalize_model_grads import finalize_model_grads

        arguments = {} if self.groups is None else {"pg_collection": self.groups}
        finalize_model_grads(self.chunks, self._tokens() if self.problem.per_token else None, **arguments)
        self.record()

    def end_without_finalize(self, say: Callable[[], None]) -> None:
        """The step's end in a loop that reduces its gradients without `finalize_model_grads`; `say` tells the plugin."""
        for chunk in self.chunks:
            chunk.finish_grad_sync()
        say()
        self.record()

    def _tokens(self) -> torch.Tensor:
        """This rank's valid tokens of the step, as Megatron's schedule counts them."""
        return torch.tensor(sum(int(s[0][..., 0].numel() if s[1] is None else (~s[1]).sum()) for s in self._shards))

    def record(self) -> None:
        """Keep what arrived in `main_grad` as that of the next step."""
        self.grads.append({block.number: harness._main_grads(block, self.layout) for block in self.toy.blocks})
        self.step_number += 1

    def drop(self) -> None:
        """Forget the model, so that it can be collected unless somebody else refers to it; its gradients stay."""
        if self.chunks:
            harness.make_collectable(self.chunks)
        self.chunks, self.toy, self.config = [], None, None


def _raise(*_: Any) -> None:
    raise Interrupted


def _own_groups(data_parallel: int):
    """Data-parallel groups of this size, in the order of ranks, and groups of one rank for everything else."""
    import torch.distributed as dist
    from megatron.core.process_groups_config import ProcessGroupCollection

    mine = {}
    for size in (data_parallel, 1):
        for first in range(0, dist.get_world_size(), size):
            ranks = list(range(first, first + size))
            group = dist.new_group(ranks)
            if dist.get_rank() in ranks:
                mine[size] = group
    whole, alone = mine[data_parallel], mine[1]
    names = ("tp", "cp", "pp", "ep", "tp_cp", "tp_ep", "expt_tp", "embd", "pos_embd")
    of_data = ("dp", "dp_cp", "tp_dp_cp", "expt_dp", "intra_dp_cp", "intra_expt_dp")
    return ProcessGroupCollection(**dict.fromkeys(names, alone), **dict.fromkeys(of_data, whole))


def run(script: Callable, specs: tuple[Spec, ...], layout: Layout, register: dict, initialize: bool, args: tuple):
    """One rank's part.

    Returns:
        {"grads": of each model [step] {layer number: (W, router) main_grad},
         "value": what the script returned,
         "printed": on standard output,
         "refused": the text of the `ConfigError` that ended the script, or None}
    """
    from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator
    from megatron_log import forget_logged_losses

    import megatron_global_lbl as lbl

    unset_num_microbatches_calculator()
    forget_logged_losses()
    if initialize:
        harness.initialize(layout)
    value, refused = None, None
    models: list[Model] = []
    printed = io.StringIO()
    registration = lbl.registered(**register) if register else contextlib.nullcontext()
    with contextlib.redirect_stdout(printed), registration as handle:
        models += [Model(spec, layout) for spec in specs]
        try:
            value = script(*models, *args, **({"handle": handle} if register else {}))
        except ValueError as error:  # a ConfigError is one
            refused = str(error)
    for model in models:
        model.drop()
    grads = [model.grads for model in models]
    return {"grads": grads, "value": value, "printed": printed.getvalue(), "refused": refused}


def check(
    workers,
    script: Callable,
    *problems: Problem | Spec,
    layout: Layout = Layout(),  # noqa: B008  frozen
    register: dict | None = None,
    initialize: bool = True,
    refused: str | None = None,
    args: tuple = (),
) -> list[dict]:
    """What every rank's `run` returned, after every step that was completed has been compared with the truth.

    Args:
        workers: the pool.
        script: script(*models, *args, handle=handle), of a test module.
        problems: of the models, all of one scope.
        layout: of all models that have no groups of their own.
        register: arguments of `lbl.register`; those of the first problem if not given; {}: the script registers.
        initialize: Megatron's own process groups exist.
        refused: what the `ConfigError` that ends the script must match on every rank; None: all steps must be completed.
        args: more arguments of the script.
    """
    specs = tuple(p if isinstance(p, Spec) else Spec(p) for p in problems)
    ranks = max(s.problem.dp * (2 if s.groups == "halves" else 1) for s in specs) * layout.tp * layout.cp * layout.pp
    register = register_arguments(specs[0].problem) if register is None else register
    results = workers.run(run, ranks, script, specs, layout, register, initialize, args)
    for rank, result in enumerate(results):
        found = result["refused"]
        if refused is None:
            assert found is None, f"rank {rank}: {found}"
        else:
            assert found is not None, f"rank {rank}: no ConfigError"
            assert re.search(refused, found), f"rank {rank}: {found}"
        compare(specs, rank, result["grads"], complete=refused is None)
    return results


def compare(specs: tuple[Spec, ...], rank: int, grads: list, *, complete: bool) -> None:
    """One rank's gradients of every model against the truth of that model alone."""
    for name, spec, of_model in zip("ABCDEF", specs, grads):
        problem = spec.at(rank)
        expected = _truth(problem)
        compared = 0
        for step, by_layer in enumerate(of_model, start=spec.first):
            for number, pair in by_layer.items():
                for kind, actual, true in zip(("below", "router"), pair, expected[step][number - 1]):
                    if actual is not None:
                        compare_exact(actual, true, f"model {name} rank {rank} step {step} layer {number} {kind}")
                        compared += int(true.norm() > 0)
        if complete:
            assert len(of_model) == problem.steps - spec.first, f"model {name} has made {len(of_model)} steps"
            with_loss = any(problem.coeff_at(step, 0) for step in range(problem.steps))
            assert compared or not with_loss, "nothing but zero gradients was compared"


def _truth(problem: Problem):
    if problem not in _TRUTHS:
        _TRUTHS[problem] = truth.gradients(problem)
    return _TRUTHS[problem]


_TRUTHS: dict[Problem, Any] = {}
