"""The report's page in a real browser: on a screen, on a phone, on paper."""

from __future__ import annotations

import re

import matplotlib.colors
import matplotlib.image
import numpy
import pytest

from megatron_global_lbl.metrics.writer import Writer
from megatron_global_lbl.report.page import write_report
from megatron_global_lbl.specialise import result


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Two runs of two layers, one with a long name and an alarm, with what their experts specialise in."""
    folder = tmp_path_factory.mktemp("report")
    random = numpy.random.default_rng(0)
    directories = [folder / "a", folder / ("a_name_of_a_run_without_a_place_to_break_it_" * 4)]
    for directory, sequences in zip(directories, (256, 4)):
        about = {"scope": "global", "topk": 2, "settings": {"scope": "global"}, "versions": {"torch": "2.13.0"}}
        writer = Writer(directory, layers=["1", "mtp.1"], num_experts=8, about=about)
        for iteration in range(1, 31):
            load = random.uniform(0.5, 1.5, (2, 8))
            values = dict.fromkeys(("lbl_global", "lbl_micro", "max_vio", "entropy", "cv", "uncertainty"), load[:, 0])
            writer.append(
                iteration=iteration, steps=1, values=values | {"dead": load[:, 0] * 0}, load=load, sequences=sequences
            )
        counts = random.integers(1, 100, (7, 2, 8)).tolist()
        domains = [result.MeasuredDomain(f"domain-{d}", ["data"], 8, 1024, {"lm loss": 2.0}) for d in range(7)]
        alike = {"mean": 0.1, "p10": 0.0, "p90": 0.2, "max": 0.3, "pair": [0, 1]}
        experts = result.LayerExperts(alike, alike, alike, random.uniform(0.5, 1.5, 8).tolist(), 0.5, 64)
        measured = result.Specialisation(30, 8, 2, ["1", "mtp.1"], domains, counts, [[0.6, 0.4]] * 7, [experts] * 2)
        result.write(measured, directory)
    return write_report(directories, folder / "out")


@pytest.mark.parametrize("width", [1280, 390, 320])
def test_nothing_is_wider_than_the_screen(browser, page, width):
    found = browser.measure(page, width)
    assert found["inner"] == width
    assert found["scroll"] <= width
    assert found["smallest"] >= 12
    assert len(found["images"]) >= 2 * (7 + 5)
    for natural, shown, alt in found["images"]:
        assert natural > shown > 0.4 * min(width, 700)  # drawn, and with more pixels than it takes on the screen
        assert len(alt) > 40
    assert found["asked"] == []


def test_screen_shows_the_pictures(browser, page, tmp_path):
    """Pixels, not only the layout: the first curves, in their colours."""
    browser.screenshot(page, tmp_path / "page.png", 1280, 1600)
    pixels = matplotlib.image.imread(tmp_path / "page.png")[..., :3]
    assert pixels.shape == (1600, 1280, 3)
    blue = numpy.abs(pixels - matplotlib.colors.to_rgb("#0072B2")).max(axis=-1) < 0.02
    assert blue.sum() > 500
    assert 0.5 < (pixels > 0.99).all(axis=-1).mean() < 0.98  # a white page with something on it


def test_paper(browser, page, tmp_path):
    browser.print(page, tmp_path / "page.pdf")
    content = (tmp_path / "page.pdf").read_bytes()
    assert content.startswith(b"%PDF")
    assert len(re.findall(rb"/Type\s*/Page\b", content)) >= 3
