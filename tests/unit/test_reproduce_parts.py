"""`examples/reproduce`: the runs and their arguments, what is not trained again, tables and pictures from results."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as functional

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

from reproduce import data, experiments, figures, results, trainings
from reproduce.counting import Counting, excess, groups, hinge, quantiles
from reproduce.experiments import EXPERIMENTS, GLOBAL, GPU_EXPERIMENTS, MICRO
from reproduce.experts import _Products
from reproduce.run import RESULTS, queue_of, seeds_of
from reproduce.settings import Run, Setting, arguments, plugin_flags
from reproduce.tables import TABLES, fill, write

from megatron_global_lbl.settings import Settings

INDEX = {"sequence_length": 128, "digest": "d", "domains": [{"name": "c++", "stem": "cpp"}]}


def test_runs_have_names_of_their_own_and_come_once():
    runs = queue_of(list(EXPERIMENTS), seeds=[3, 5])
    names = [run.name for run in runs]
    assert len(set(names)) == len(names) and all(re.fullmatch(r"[\w.,=-]+", name) for name in names)
    assert [run.seed for run in runs[:12]] == [3] * 6 + [5] * 6  # all settings of a seed before the next seed


def test_seeds_are_named():
    assert [seeds_of(text) for text in ("0-2", "3,5", "100-101,7")] == [[0, 1, 2], [3, 5], [100, 101, 7]]


@pytest.mark.parametrize("name", [*EXPERIMENTS, *GPU_EXPERIMENTS])
def test_arguments_say_what_a_setting_says(name, tmp_path):
    for setting in (EXPERIMENTS | GPU_EXPERIMENTS)[name]():
        flags = plugin_flags(setting)
        values = {flag[len("--moe-lbl-") :].replace("-", "_"): value for flag, value in zip(flags[::2], flags[1::2])}
        assert Settings.create(**values).scope.value == setting.scope
        words = arguments(
            Run(setting, 2), size="cpu" if name in EXPERIMENTS else "gpu", data=tmp_path, index=INDEX, out=tmp_path
        )
        given = dict(zip(words, words[1:]))
        assert given["--seed"] == "1236" and float(given["--moe-aux-loss-coeff"]) == setting.alpha
        assert int(given["--micro-batch-size"]) * setting.ranks <= int(given["--global-batch-size"]) == setting.batch
        assert given.get("--reproduce-count") == setting.over
        balanced = setting.alpha or setting.loss == "quantile_balancing"
        assert given["--moe-router-load-balancing-type"] == (setting.loss if balanced else "none")


def test_a_run_with_a_result_is_not_trained_again(tmp_path, capsys):
    run = Run(Setting(), 0)
    path = trainings.result_path(tmp_path, run)
    path.parent.mkdir()
    path.write_text("kept")
    assert trainings.train_all([run], size="cpu", data=tmp_path, out=tmp_path, jobs=1, limit=None) == 0
    assert path.read_text() == "kept" and "1 of 1 runs" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="no data in"):  # without it, it would have been started
        trainings.train_all([Run(Setting(), 1)], size="cpu", data=tmp_path, out=tmp_path, jobs=1, limit=None)


def _result(setting: Setting, seed: int, loss: float, digest: str = "d", version: str = "1") -> dict:
    """What a run of two domains, two layers and four experts leaves."""
    return {
        "setting": setting.__dict__,
        "seed": seed,
        "data": digest,
        "seconds": 1.0,
        "domains": ["a", "b"],
        "machine": {"processor": "p", "cores": 1},
        "versions": {"torch": version},
        "valid_loss": {"a": loss, "b": loss + 1},
        "frequencies": [[[0.7, 0.1, 0.1, 0.1]] * 2, [[0.1, 0.1, 0.1, 0.7]] * 2],
        "contrast": 0.5,
        "lbl_within_sequences": 1.2,
        "starved_experts": 0.25,
        "max_vio": [2.0] * 5,
        "max_vio_first": [3.0] * 160,
    }


def test_tables_and_pictures_come_from_the_results(tmp_path):
    kept, out = tmp_path / "kept", tmp_path / "out"
    out.mkdir()
    for seed in (0, 1):
        for setting, loss in ((MICRO, 2.0), (GLOBAL, 1.9 - seed / 10)):
            (out / f"{setting.name}{seed}.json").write_text(json.dumps(_result(setting, seed, loss)))
    other = _result(GLOBAL, 0, 1.0, version="2")  # without a partner on its machine
    (out / "other.json").write_text(json.dumps(other))
    single = experiments.balance_bsz()[2]  # 4 sequences: a row of one seed would take seed 1 from every row
    (out / "single.json").write_text(json.dumps(_result(single, 0, 1.0)))
    assert results.gather(out, kept) == 6 == results.gather(out, kept)  # the second time adds nothing
    document = tmp_path / "document.md"
    document.write_text("before\n<!-- begin balance-bsz -->\nold\n<!-- end balance-bsz -->\nafter\n")
    figures.make(kept, tmp_path / "images", document)
    text = document.read_text()
    # Of seeds 0 and 1: losses 2.5 and 2.4, 2.3, so -0.1 and -0.2; the run without a partner is not in the mean.
    assert "| 32 | 2.350 ± 0.071 | -0.150 ± 0.071 (2 of 2) |" in text and "old" not in text
    assert text.startswith("before") and text.endswith("after\n") and "Not run: 2; 8; 16.\n\nOnly one seed: 4." in text
    assert {path.name for path in (tmp_path / "images").iterdir()} == {"reproduce-bsz.png", "reproduce-specialisation.png"}
    every = (kept / "TABLES.md").read_text()
    assert "-0.150 ± 0.071 (2 of 2)" in every and all(f"## {name}\n" in every for name in TABLES)


def test_the_sample_is_the_seeds():
    runs = [
        _result(setting, seed, loss + machine / 100, version=str(machine))
        for machine in (0, 1, 2)
        for seed in (0, 1)
        for setting, loss in ((MICRO, 2.0), (GLOBAL, 1.9 - seed / 10 - machine / 10))
    ]
    found = results.difference(results.Results(runs), GLOBAL, MICRO)
    assert found == pytest.approx([-0.2, -0.3])  # of three machines each
    assert results.signed(found) == "-0.250 ± 0.071 (2 of 2)"
    assert results.signed([0.1, -0.3, 0.0, 0.1]) == "-0.025 ± 0.189 (1 of 4)" and results.signed([0.1]) == "+0.100 (one seed)"


def test_results_of_other_data_are_not_compared():
    runs = [_result(MICRO, 0, 2.0), _result(GLOBAL, 0, 1.0, digest="other")]
    both = results.Results(runs)
    assert results.difference(both, GLOBAL, MICRO) == [] and not results.common(both, [MICRO, GLOBAL])


def test_steps_until_even():
    blocks = {"max_vio": [5.0, 0.9, 1.2, 0.8, 0.7]}
    assert results.steps_until_even(blocks) == 30 and results.steps_until_even({"max_vio": [0.9, 1.0]}) is None


def test_stand_ins_train_as_the_flags_do():
    """In the results that are kept: `check`, pair by pair."""
    kept, settings = results.read(RESULTS), experiments.check()
    for stand_in, flags in zip(settings[::2], settings[1::2]):
        assert len(kept[stand_in]) >= 3 and kept[stand_in].keys() == kept[flags].keys()
        for pair, result in kept[stand_in].items():
            for name in ("train_loss", "valid_loss", "max_vio_first"):
                assert result[name] == kept[flags][pair][name], (stand_in.name, flags.name, pair)


def test_rows_of_the_former_window_are_read_as_the_stand_in():
    """Where both were trained they are equal in every number that is stored."""
    stored = results.lines(RESULTS)
    windows = [result for result in stored if result["setting"]["scope"] == "window"]
    of = {(Setting.stored(r["setting"]).name, results.pair(r)): r for r in stored if r["setting"]["scope"] != "window"}
    pairs = [(result, of.get((Setting.stored(result["setting"]).name, results.pair(result)))) for result in windows]
    same = [(ours, theirs) for ours, theirs in pairs if theirs is not None]
    assert len(windows) == 24 and len(same) == 9  # W = 1: alpha 0.1, 0.01, and `check`
    for ours, theirs in same:
        assert all(
            ours[name] == theirs[name] for name in ("train_loss", "valid_loss", "max_vio", "frequencies") if name in ours
        )
    late = Setting.stored({"scope": "window", "window_steps": 4, "start_iter": 160, "steps": 800})
    assert late == Setting(over="delayed:1:4:160", steps=800)
    assert all(results.read(RESULTS)[setting] for setting in experiments.window())


def test_numbers_of_the_page_are_those_of_the_tables():
    """Every "x ± y" of the page, but one that was measured elsewhere and says so."""
    page, kept = figures.DOCUMENT.read_text(encoding="utf-8"), RESULTS / figures.TABLES
    tables = kept.read_text(encoding="utf-8")
    numbers = set(re.findall(r"[+-]?[\d.]+ ± \d+(?:\.\d+)?", page)) - {"-0.0035 ± 0.0068"}
    assert len(numbers) > 20 and not [number for number in numbers if number.lstrip("+") not in tables]
    assert len(page.split()) <= 2000


def test_the_tables_are_those_of_the_results(tmp_path):
    kept = results.read(RESULTS)
    write(kept, tmp_path / "TABLES.md")
    assert (tmp_path / "TABLES.md").read_text("utf-8") == (RESULTS / figures.TABLES).read_text("utf-8")
    page = tmp_path / "page.md"
    page.write_text(figures.DOCUMENT.read_text("utf-8"), "utf-8")
    fill(kept, page)
    assert page.read_text("utf-8") == figures.DOCUMENT.read_text("utf-8")


def test_the_products_of_stacked_experts_are_linear_layers_bit_by_bit():
    generator = torch.Generator().manual_seed(0)
    sizes = [3, 0, 5]
    rows = torch.randn(8, 6, generator=generator, requires_grad=True)
    weight = torch.randn(3, 4, 6, generator=generator, requires_grad=True)
    output = torch.cat([functional.linear(part, w) for part, w in zip(rows.split(sizes), weight)])
    of_output = torch.randn(8, 4, generator=generator)
    expected = torch.autograd.grad(output, (rows, weight), of_output)
    ours = _Products.apply(rows, weight, sizes)
    assert torch.equal(ours, output)
    assert all(map(torch.equal, torch.autograd.grad(ours, (rows, weight), of_output), expected))


def _formula(scores_TE, map_TE, counts_E):
    """E * sum_i f_i p_i in float64."""
    f_E = counts_E.double() / counts_E.sum()
    return (scores_TE.double().mean(0) * f_E).sum().item() * len(counts_E)


def test_balance_losses_of_the_experiments_count_what_they_say():
    generator = torch.Generator().manual_seed(0)
    scores_TBE = torch.rand(4, 3, 5, generator=generator)  # 3 sequences of 4 tokens
    map_TBE = torch.zeros(4, 3, 5, dtype=torch.bool).scatter_(2, scores_TBE.topk(2).indices, True)
    scores, maps = scores_TBE.view(12, 5), map_TBE.view(12, 5)
    of_sequences = [_formula(scores_TBE[:, b], map_TBE[:, b], map_TBE[:, b].sum(0)) for b in range(3)]
    ours = Counting("sequences:1").loss(0, scores, maps, 1.0, sequence_length=4)
    assert ours.item() == pytest.approx(sum(of_sequences) / 3)
    # As many tokens as three sequences have are all of them, in any order.
    whole = _formula(scores, maps, maps.sum(0))
    assert Counting("shuffled:3").loss(0, scores, maps, 1.0, sequence_length=4).item() == pytest.approx(whole)
    assert Counting("shuffled:1").loss(0, scores, maps, 1.0, sequence_length=4).item() != pytest.approx(sum(of_sequences) / 3)
    short = torch.relu(0.064 / 5 - maps.sum(0) / maps.sum())
    assert hinge(scores, maps).item() == pytest.approx(_spread_of(scores) * short.sum().item())
    late = Counting("delayed:2:2")
    steps = [torch.roll(maps, shift, dims=1) for shift in range(5)]
    found = [late.loss(0, scores, step, 1.0, sequence_length=4).item() for step in steps]
    due = [None, None, steps[0].sum(0), steps[0].sum(0) + steps[1].sum(0), steps[1].sum(0) + steps[2].sum(0)]
    assert found == pytest.approx([0 if counts is None else _formula(scores, maps, counts) for counts in due])
    own = Counting("delayed:1:2:2")  # the first two steps by themselves, then the two before
    found = [own.loss(0, scores, step, 1.0, sequence_length=4).item() for step in steps]
    due = [steps[0], steps[1], steps[0] + steps[1].int(), steps[1] + steps[2].int(), steps[2] + steps[3].int()]
    assert found == pytest.approx([_formula(scores, maps, counts.sum(0)) for counts in due])
    for wrong in ("delayed:1", "hinge:a", "sequences:1.5"):
        with pytest.raises(SystemExit, match=f"--reproduce-count {wrong}: unknown"):
            Counting(wrong)


def _spread_of(scores_TE):
    p_E = scores_TE.mean(0)
    return 1.5 + (p_E * p_E.log()).sum().item() / math.log(len(p_E))


def test_the_hinge_raises_the_scores_of_starved_experts_only():
    scores = torch.full((8, 4), 0.25, requires_grad=True)
    maps = torch.tensor([[True, True, False, False]] * 7 + [[True, False, False, True]])  # loads 8, 7, 0, 1 of 16
    hinge(scores, maps).backward()
    assert (scores.grad[:, 2] < 0).all() and not scores.grad[:, [0, 1, 3]].any()


def test_groups_of_the_bias_and_of_quantiles_are_sequences():
    maps_TBE = torch.zeros(2, 3, 2, dtype=torch.bool)  # 3 sequences of 2 tokens; the first two take expert 0
    maps_TBE[:, :2, 0], maps_TBE[:, 2, 1] = True, True
    maps = maps_TBE.view(6, 2)
    assert excess(maps, groups(6, 1, 2)).tolist() == pytest.approx([1 / 3, -1 / 3])
    assert excess(maps, groups(6, 3, 2)).tolist() == [1, -1]
    scores = torch.randn(2, 3, 2, generator=torch.Generator().manual_seed(0))

    def update(scores_TE, topk, beta_E, update_beta=True):
        return scores_TE.topk(topk, dim=1).indices, scores_TE.median(0).values if update_beta else beta_E

    selected, beta = quantiles(update, groups(6, 1, 2), scores.view(6, 2), 1, torch.zeros(2))
    assert torch.equal(selected, scores.view(6, 2).topk(1, dim=1).indices)
    assert torch.equal(beta, torch.stack([scores[:, b].median(0).values for b in range(3)]).mean(0))


def test_a_folder_without_data_is_named(tmp_path: Path):
    with pytest.raises(SystemExit, match="no data in"):
        data.index_of(tmp_path)
