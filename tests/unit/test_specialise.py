"""What follows from a measurement, its file, its flags, and its place in the report; the measurement itself is tested in
tests/distributed and tests/megatron."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_global_lbl.command import main
from megatron_global_lbl.settings import ConfigError
from megatron_global_lbl.specialise import arguments
from megatron_global_lbl.specialise.result import LayerExperts, MeasuredDomain, Specialisation, read, spread, write


def measured(iteration: int = 7) -> Specialisation:
    """Two layers of four experts: code and maths share one in the first and none in the second, prose is even."""
    counts = [[[60, 40, 0, 0], [100, 0, 0, 0]], [[0, 40, 60, 0], [0, 100, 0, 0]], [[25, 25, 25, 25], [25, 25, 25, 25]]]
    same = {"mean": 0.2, "p10": 0.1, "p90": 0.3, "max": 0.5, "pair": [0, 1]}
    experts = LayerExperts(same, None, same, [1.4, 1.1, 0.9, 0.6], 0.8, 32, ["the weights of GroupedMLP are not known"])
    domains = [MeasuredDomain(name, [f"/data/{name}"], 4, 50, {"lm loss": 2.0}) for name in ("code", "maths", "prose")]
    return Specialisation(iteration, 4, 2, ["2", "4"], domains, counts, [[0.9, 0.8], [0.7, 0.6], [0.5, 0.5]], [experts] * 2)


def test_what_follows_from_the_counts():
    result = measured()
    assert result.specialisation_DL.tolist() == [[0.6, 1.0], [0.6, 1.0], [0.25, 0.25]]
    np.testing.assert_allclose(result.overlap_DD, [[1, 0.2, 0.375], [0.2, 1, 0.375], [0.375, 0.375, 1]])
    # Half is taken by: code expert 0 and 0, maths 2 and 1, prose (even) 0 and 1 in both layers.
    assert result.main_DLE.sum(axis=2).tolist() == [[1, 1], [1, 1], [2, 2]]
    np.testing.assert_allclose(result.main_overlap_DD, [[1, 0, 2 / 4], [0, 1, 1 / 5], [2 / 4, 1 / 5, 1]])
    means = np.array([[85, 105, 85, 25], [125, 125, 25, 25]]) / 300
    expected = [
        np.mean([np.abs(share_E - means[layer]).sum() / 2 for share_E in result.shares_DLE[:, layer]]) for layer in (0, 1)
    ]
    np.testing.assert_allclose(result.contrast_L, expected)


def test_spread_names_the_most_alike_pair():
    matrix = [[1, 0.1, 0.2], [0.1, 1, 0.9], [0.2, 0.9, 1]]
    found = spread(matrix)
    assert found is not None and found["pair"] == [1, 2] and found["max"] == 0.9 and found["mean"] == pytest.approx(0.4)
    assert spread([[1.0]]) is None


def test_file_comes_back_as_it_was(tmp_path):
    assert read(write(measured(), tmp_path)) == read(tmp_path) == measured()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["specialisation.json"]


def test_the_file_of_another_checkpoint_is_kept(tmp_path):
    for iteration in (7, 7, 8):
        write(measured(iteration), tmp_path)
    assert read(tmp_path) == measured(8) and read(tmp_path / "specialisation-7.json") == measured(7)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["specialisation-7.json", "specialisation.json"]


@pytest.mark.parametrize(
    "content, says",
    [
        ("{", "not JSON"),
        ("[]", "format 'list'"),
        ('{"format": 2, "tokens_per_expert": []}', "format 2; allowed: 1"),
        ({"layers": ["2"]}, "tokens_per_expert is (3, 2, 4), not (3, 1, 4)"),
        ({"experts": None}, "damaged"),
    ],
)
def test_damaged_file_is_named(tmp_path, capsys, content, says):
    file = write(measured(), tmp_path)
    file.write_text(content if isinstance(content, str) else json.dumps({**json.loads(file.read_text()), **content}))
    assert main(["specialise", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert str(file) in error and says in error and error.count("\n") == 1


@pytest.mark.parametrize(
    "given, says",
    [
        (None, "not given"),
        (["code"], "code: not allowed"),
        (["=a"], "=a: not allowed"),
        (["code="], "code=: not allowed"),
        (["code={there}", "code={there}"], "a second domain code"),
        (["code=/nowhere/x"], "there is no /nowhere/x.idx"),
        (["code=0.5,{there},0.5,/nowhere/x"], "there is no /nowhere/x.idx"),
    ],
)
def test_domains_that_cannot_be(tmp_path, given, says):
    (tmp_path / "text.idx").touch()
    given = given and [text.format(there=tmp_path / "text") for text in given]
    with pytest.raises(ConfigError, match="--moe-lbl-domains.*" + says):
        arguments.parse_domains(given)


def test_domains_and_blends(tmp_path):
    (tmp_path / "text.idx").touch()
    path = str(tmp_path / "text")
    code, mixed = arguments.parse_domains([f"code={path}", f"mixed=0.3,{path},0.7,{path}"])
    assert code == ("code", (path,)) and mixed == ("mixed", ("0.3", path, "0.7", path))


def training(tmp_path, **changed) -> argparse.Namespace:
    (tmp_path / "text.idx").touch()
    domains = [f"code={tmp_path / 'text'}"]
    given = {"load": "ckpt", "moe_lbl_metrics_dir": "m", "num_experts": 8, "eval_iters": 10, "moe_lbl_domains": domains}
    given |= {"moe_lbl_sampled_tokens": 256, "save": "ckpt", "train_data_path": ["a"], "cuda_graph_impl": "local"}
    return argparse.Namespace(**given | changed)


def test_a_training_becomes_an_evaluation(tmp_path):
    args = training(tmp_path, skip_train=False, use_megatron_fsdp=False, moe_lbl_scope="global", moe_lbl_group_size="4")
    assert arguments.prepare(args) == Path("m")
    # What a patched Megatron-LM would turn on by itself.
    assert (args.moe_lbl_scope, args.moe_lbl_group_size, args.moe_lbl_metrics_dir) == ("micro", None, None)
    assert args.skip_train and args.save is None and args.train_data_path is None and args.cuda_graph_impl == "none"
    assert args.valid_data_path == [str(tmp_path / "text")] and args.load == "ckpt" and args.eval_iters == 10
    assert not hasattr(args, "enable_cuda_graph")  # this Megatron has no such flag


@pytest.mark.parametrize(
    "changed, says",
    [
        ({"load": None}, "--load: not given"),
        ({"moe_lbl_metrics_dir": None}, "--moe-lbl-metrics-dir: not given"),
        ({"num_experts": None}, "--num-experts: not given"),
        ({"eval_iters": 0}, "--eval-iters 0: not allowed"),
        ({"moe_lbl_sampled_tokens": "few"}, "--moe-lbl-sampled-tokens few: not allowed"),
        ({"full_validation": True}, "--full-validation: not supported"),
        ({"use_megatron_fsdp": True}, "--use-megatron-fsdp: not supported"),
        ({"dataloader_type": "external"}, "--dataloader-type external: not supported"),
    ],
)
def test_a_training_that_cannot(tmp_path, capsys, changed, says):
    with pytest.raises(SystemExit):
        arguments.prepare(training(tmp_path, **changed))
    assert says in capsys.readouterr().err


def test_report_shows_it(tmp_path):
    """In the section of its run, and beside the other's in the comparison."""
    pytest.importorskip("jinja2", reason="needs Jinja2 (extra 'report')")
    from synthetic_record import even
    from synthetic_record import write as write_record

    runs = [write_record(tmp_path / name, even(1)) for name in ("micro", "global")]
    write(measured(), runs[0])
    write(replace(measured(), tokens_per_expert=[[[1, 1, 1, 1]] * 2] * 3, iteration=8), runs[1])
    assert main(["report", *map(str, runs), "--png", "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert page.count("evaluated on code (50 tokens), maths (50 tokens), prose (50 tokens)") == 2
    assert page.count("Not measured: the weights of GroupedMLP are not known.") == 2
    assert f"Contrast of 3 domains {measured().contrast_L.mean():.3f} at iteration 7" in page
    assert "Contrast of 3 domains 0.000 at iteration 8, against micro." in page
    names = ("experts", "overlap", "scores", "similarity", "norms")
    for run in ("micro", "global"):
        assert all((tmp_path / "out" / f"specialisation-{name}-{run}.png").stat().st_size > 5000 for name in names)
