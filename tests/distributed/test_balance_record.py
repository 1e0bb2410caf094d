"""`metrics_dir`: the record of every model is its own, against the sums of the formula."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from several import Spec, check
from truth import Problem, sums, sums_of_ranks

from megatron_global_lbl.metrics import read

SCOPES = ["micro", "dp", "global"]


def steps_by_run(directory: Path) -> list[list[dict]]:
    """What each run's intervals hold."""
    result = []
    for run in read(directory):
        assert run.notes == []
        loads = run.load(range(len(run.iterations)))
        result.append(
            [
                {
                    "layers": run.layers,
                    "iteration": run.iterations[index],
                    "balance": (run.sequences[index], run.tokens[index]),
                    "load": loads[index],
                    **{name: values[index] for name, values in run.metrics.items()},
                }
                for index in range(len(run.iterations))
            ]
        )
    return result


def balance_batch(problem: Problem, step: int, scope: str) -> tuple[float, float]:
    """Sequences and tokens over which f is counted: means over the step's micro-batches and the layers."""
    M, ranks = problem.micro_batches, problem.dp
    (_, _, tokens_M), *_ = sums(problem, step)
    if scope != "global":
        parts = 1 if scope == "dp" else 1 / ranks
        return problem.batch * ranks * parts, float(tokens_M[:M].sum()) / M * parts
    of_layers = [problem.seen(step, number) for number in range(1, problem.blocks + 1) if number not in problem.dense]
    sequences = [len(seen) * problem.batch * ranks for of_layer in of_layers for seen in of_layer]
    tokens = [float(tokens_M[list(seen)].sum()) for of_layer in of_layers for seen in of_layer]
    return float(np.mean(sequences)), float(np.mean(tokens))


def expected(problem: Problem, step: int, scope: str) -> dict:
    """What one step's interval must hold; repetitions of multi-token prediction count as more micro-batches of its layer."""
    E = problem.experts
    lbl_micro = []
    for C_mdi, S_mdi, N_md in sums_of_ranks(problem, step):
        f = C_mdi / C_mdi.sum(-1, keepdim=True).clamp(min=1)
        lbl_md = E * (f * S_mdi).sum(-1) / N_md.clamp(min=1)
        lbl_micro.append(float(lbl_md.sum() / (N_md > 0).sum()))
    totals = [(C.sum(0), S.sum(0), N.sum()) for C, S, N in sums(problem, step)]
    f_LE = torch.stack([C / C.sum() for C, _, _ in totals])
    return {
        "iteration": step + 1,
        "balance": balance_batch(problem, step, scope),
        "load": f_LE * E,
        "lbl_global": [float(E * (C / C.sum() * S).sum() / N) for C, S, N in totals],
        "lbl_micro": lbl_micro,
        "max_vio": f_LE.amax(1) * E - 1,
        "entropy": torch.special.entr(f_LE).sum(1) / math.log(E),
        "dead": (f_LE == 0).sum(1),
        "cv": f_LE.std(1, unbiased=False) / f_LE.mean(1),
    }


def assert_step(found: dict, expected: dict) -> None:
    assert found["iteration"] == expected["iteration"] and found["balance"] == pytest.approx(expected["balance"])
    for name, values in expected.items():
        tolerance = 1e-3 if name == "load" else 1e-5  # float16
        np.testing.assert_allclose(found[name], np.asarray(values), rtol=tolerance, atol=1e-6, err_msg=name)


def is_of(found: dict, expected: dict) -> bool:
    return np.allclose(found["load"], np.asarray(expected["load"]), rtol=1e-3)


def steps(*models_and_pattern, handle):
    *models, pattern = models_and_pattern
    for name in pattern:
        models["AB".index(name)].step()


def arguments(scope: str, directory: Path) -> dict:
    return {"scope": scope, "metrics_dir": str(directory)}


@pytest.mark.parametrize("mtp", [1, 2])
@pytest.mark.parametrize("scope", SCOPES)
def test_multi_token_prediction(workers, tmp_path, scope, mtp):
    """With two predictions its layer is applied twice per micro-batch."""
    problem = Problem(scope, 2, 2, 3, mtp_applications=mtp)
    check(workers, steps, Spec(problem), register=arguments(scope, tmp_path), args=("AAA",))
    (found,) = steps_by_run(tmp_path)
    assert len(found) == 3 and found[0]["layers"] == ["0", "1", "mtp.0"]
    for step, line in enumerate(found):
        assert_step(line, expected(problem, step, scope))


@pytest.mark.parametrize("pattern", ["ABBABA"])
@pytest.mark.parametrize("scope", SCOPES)
def test_two_models(workers, tmp_path, scope, pattern):
    """With numbers of micro-batches of their own; each step of each is on one line of some file."""
    masks = "none" if scope == "micro" else "uneven"
    a = Problem(scope, 2, 2, 3, masks=masks)
    b = Problem(scope, 2, 3, 3, masks=masks, seed=99)
    check(workers, steps, a, b, register=arguments(scope, tmp_path), args=(pattern,))
    found = [line for run in steps_by_run(tmp_path) for line in run]
    assert len(found) == 6
    for problem in (a, b):
        for step in range(3):
            truth = expected(problem, step, scope)
            (line,) = [line for line in found if is_of(line, truth)]
            assert_step(line, truth)


def one_by_hand(a, b, handle):
    a.begin()
    b.begin()
    for m in range(3):
        if m < 2:
            a.micro_batch(m)
        b.micro_batch(m)
    a.end()
    b.end()


@pytest.mark.parametrize("scope", ["micro", "dp", "global"])
def test_two_models_at_once(workers, tmp_path, scope):
    """Their micro-batches alternate."""
    a = Problem(scope, 2, 2, 1)
    b = Problem(scope, 2, 3, 1, seed=99)
    check(workers, one_by_hand, a, b, register=arguments(scope, tmp_path))
    found = [line for run in steps_by_run(tmp_path) for line in run]
    assert len(found) == 2
    for problem in (a, b):
        truth = expected(problem, 0, scope)
        (line,) = [line for line in found if is_of(line, truth)]
        assert_step(line, truth)


def on_a_disk_that_fails(a, directory, handle):
    import shutil

    import torch.distributed as dist

    a.step()
    if dist.get_rank() == 0:  # the only one that writes; nothing can be written below a file
        shutil.rmtree(directory)
        Path(directory).write_text("")
    for _ in range(2):
        a.step()


def test_training_goes_on_without_its_record(workers, tmp_path):
    directory = tmp_path / "record"
    ranks = check(
        workers,
        on_a_disk_that_fails,
        Spec(Problem("global", 2, 2, 3)),
        register=arguments("global", directory),
        args=(str(directory),),
    )
    said = [[line for line in rank["printed"].splitlines() if "balance record" in line] for rank in ranks]
    assert [len(lines) for lines in said] == [1, 0]
    assert "lacks the interval that ends with iteration " in said[0][0] and "the training goes on" in said[0][0]
