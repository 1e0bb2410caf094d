"""`metrics_dir`: the record of every model is its own, against the sums of the formula."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from several import Spec, check
from truth import Problem, sums, sums_of_ranks

SCOPES = ["micro", "dp", "global", "window"]


def lines_by_file(directory: Path) -> list[list[dict]]:
    """The steps of each file without its headers, which come first."""
    result = []
    for path in sorted(directory.glob("balance.*.jsonl")):
        entries = [json.loads(line) for line in path.read_text().splitlines()]
        assert "format" in entries[0], f"{path} begins without a header"
        result.append([entry for entry in entries if "format" not in entry])
    return result


def expected_line(problem: Problem, step: int) -> dict:
    """What one step's line must hold; repetitions of multi-token prediction count as more micro-batches of its layer."""
    E = problem.experts
    layers = sums(problem, step)
    lbl_micro = []
    for C_mdi, S_mdi, N_md in sums_of_ranks(problem, step):
        f = C_mdi / C_mdi.sum(-1, keepdim=True).clamp(min=1)
        lbl_micro.append(float((E * (f * S_mdi).sum(-1) / N_md.clamp(min=1)).mean()))
    totals = [(C.sum(0), S.sum(0), N.sum()) for C, S, N in layers]
    return {
        "iteration": step + 1,
        "tokens": int(totals[0][2]),
        "tokens_per_expert": [C.long().tolist() for C, _, _ in totals],
        "lbl_global": [float(E * (C / C.sum() * S).sum() / N) for C, S, N in totals],
        "lbl_micro": lbl_micro,
        "max_vio": [float(C.max() / C.mean() - 1) for C, _, _ in totals],
    }


def assert_line(found: dict, expected: dict) -> None:
    assert found["tokens_per_expert"] == expected["tokens_per_expert"]
    assert (found["iteration"], found["tokens"]) == (expected["iteration"], expected["tokens"])
    for name in ("lbl_global", "lbl_micro", "max_vio"):
        torch.testing.assert_close(torch.tensor(found[name]), torch.tensor(expected[name]), rtol=1e-5, atol=1e-6, msg=name)


def steps(*models_and_pattern, handle):
    *models, pattern = models_and_pattern
    for name in pattern:
        models["AB".index(name)].step()


def arguments(scope: str, directory: Path) -> dict:
    return {"scope": scope, "metrics_dir": str(directory), **({"window_steps": 2} if scope == "window" else {})}


@pytest.mark.parametrize("mtp", [1, 2])
@pytest.mark.parametrize("scope", SCOPES)
def test_multi_token_prediction(workers, tmp_path, scope, mtp):
    """With two predictions its layer is applied twice per micro-batch."""
    problem = Problem(scope, 2, 2, 3, window_steps=2, mtp_applications=mtp)
    check(workers, steps, Spec(problem), register=arguments(scope, tmp_path), args=("AAA",))
    (lines,) = lines_by_file(tmp_path)
    assert len(lines) == 3
    for step, line in enumerate(lines):
        assert_line(line, expected_line(problem, step))


@pytest.mark.parametrize("pattern", ["ABBABA"])
@pytest.mark.parametrize("scope", SCOPES)
def test_two_models(workers, tmp_path, scope, pattern):
    """With numbers of micro-batches of their own; each step of each is on one line of some file."""
    masks = "none" if scope == "micro" else "uneven"
    a = Problem(scope, 2, 2, 3, window_steps=2, masks=masks)
    b = Problem(scope, 2, 3, 3, window_steps=2, masks=masks, seed=99)
    check(workers, steps, a, b, register=arguments(scope, tmp_path), args=(pattern,))
    lines = [line for file in lines_by_file(tmp_path) for line in file]
    assert len(lines) == 6
    for problem in (a, b):
        for step in range(3):
            expected = expected_line(problem, step)
            (found,) = [line for line in lines if line["tokens_per_expert"] == expected["tokens_per_expert"]]
            assert_line(found, expected)


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
    lines = [line for file in lines_by_file(tmp_path) for line in file]
    assert len(lines) == 2
    for problem in (a, b):
        expected = expected_line(problem, 0)
        (found,) = [line for line in lines if line["tokens_per_expert"] == expected["tokens_per_expert"]]
        assert_line(found, expected)


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
    assert "ends before iteration 2: " in said[0][0] and "the training goes on" in said[0][0]
