"""The report's page in a real browser: on a screen, on a phone, on paper."""

from __future__ import annotations

import re

import matplotlib.colors
import matplotlib.image
import numpy
import pytest

from megatron_global_lbl.metrics.writer import Writer
from megatron_global_lbl.report.chart import COLOURS
from megatron_global_lbl.report.page import write_report
from megatron_global_lbl.specialise import result


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Two runs of two layers, one with a long name and an alarm, with what their experts specialise in: 16 domains."""
    folder = tmp_path_factory.mktemp("report")
    random = numpy.random.default_rng(0)
    directories = [folder / "_<b>a", folder / ("a_name_of_a_run_without_a_place_to_break_it_" * 4)]
    for directory, sequences in zip(directories, (256, 4)):
        about = {"scope": "global", "topk": 2, "settings": {"scope": "global"}, "versions": {"torch": "2.13.0"}}
        writer = Writer(directory, layers=["1", "mtp.1"], num_experts=8, about=about)
        for iteration in range(1, 31):
            load = random.uniform(0.5, 1.5, (2, 8))
            values = dict.fromkeys(("lbl_global", "lbl_micro", "max_vio", "entropy", "cv", "uncertainty"), load[:, 0])
            writer.append(
                iteration=iteration, steps=1, values=values | {"dead": load[:, 0] * 0}, load=load, sequences=sequences
            )
        counts = random.integers(1, 100, (16, 2, 8)).tolist()
        domains = [result.MeasuredDomain(f"domain-{d}", ["data"], 8, 1024, {"lm loss": 2.0}) for d in range(16)]
        alike = {"mean": 0.1, "p10": 0.0, "p90": 0.2, "max": 0.3, "pair": [0, 1]}
        experts = result.LayerExperts(alike, alike, alike, random.uniform(0.5, 1.5, 8).tolist(), 0.5, 64)
        measured = result.Specialisation(30, 8, 2, ["1", "mtp.1"], domains, counts, [[0.6, 0.4]] * 16, [experts] * 2)
        result.write(measured, directory)
    return write_report(directories, folder / "out")


@pytest.mark.parametrize("width", [1280, 390, 320])
def test_nothing_is_wider_than_the_screen(browser, page, width):
    found = browser.measure(page, width)
    assert found["drawn"] == "yes" and found["inner"] == width
    assert found["scroll"] <= width
    assert found["smallest"] >= 12
    assert len(found["plots"]) >= 6 + 2 * (3 + 1 + 1) + 2 * (16 + 2 + 3)
    for shown, traces in found["plots"]:
        assert shown > 0.6 * min(width, 420) and traces > 0
    assert all(len(told) > 40 for told in found["told"])
    assert [len(legend) for legend in found["legends"]].count(16) == 2  # a name per domain, and two of runs
    assert found["legends"][0][0] == "_<b>a"
    assert found["asked"] == []
    if width == 1280:
        assert len(found["first"]) == 6 and max(found["first"]) < 900  # the answers are one screen


def test_the_pointer_is_told(browser, page):
    """Layer, expert, value and iterations in a heatmap; run, measure and iteration on a curve."""
    found = browser.measure(page, 1280, '[data-chart="loads"] .plot, figure:first-child [data-chart="curves"] .plot')
    curve, load, *_, vio, _, one, _ = found["hovered"]
    assert re.fullmatch(r"_<b>a sequences 256 iteration (29|30)", curve)
    assert re.fullmatch(r"layer 1, expert \d 1\.\d+ times an even share iterations 1 to 3", load)
    assert re.fullmatch(r"layer 1 MaxVio [\d.]+ iteration 30", vio)
    assert re.fullmatch(r"expert \d [\d.]+ times an even share iteration 30 layer \S+", one)


@pytest.mark.parametrize("dark", [False, True])
def test_screen_shows_the_charts(browser, page, tmp_path, dark):
    """Pixels, not only the layout: the first curves, in their colours; by day and at night."""
    browser.screenshot(page, tmp_path / "page.png", 1280, 1600, dark=dark)
    pixels = matplotlib.image.imread(tmp_path / "page.png")[..., :3]
    assert pixels.shape == (1600, 1280, 3)
    blue = numpy.abs(pixels - matplotlib.colors.to_rgb(COLOURS[0])).max(axis=-1) < 0.02
    assert blue.sum() > 500
    ground = pixels.max(axis=-1) < 0.2 if dark else pixels.min(axis=-1) > 0.93
    assert 0.5 < ground.mean() < 0.98  # a page with something on it


def test_paper(browser, page, tmp_path):
    """Few pages, also with 16 domains; on a white ground."""
    browser.print(page, tmp_path / "page.pdf")
    content = (tmp_path / "page.pdf").read_bytes()
    assert content.startswith(b"%PDF")
    assert 3 <= len(re.findall(rb"/Type\s*/Page\b", content)) <= 9
