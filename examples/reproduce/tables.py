"""The tables of docs/reproduction.md, from the results: what is between `<!-- begin NAME -->` and its end is replaced."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from reproduce import experiments
from reproduce.experiments import ALPHAS, FEW, GLOBAL, MICRO, changed
from reproduce.results import Results, average, difference, machine, swing
from reproduce.settings import Setting


def write(results: Results, document: Path) -> None:
    """Replace every table of the document.

    Raises:
        KeyError: the document names a table that is not here.
    """
    text = document.read_text(encoding="utf-8")

    def replaced(found: re.Match[str]) -> str:
        name = found[1]
        return f"<!-- begin {name} -->\n\n{TABLES[name](results)}\n<!-- end {name} -->"

    text = re.sub(r"<!-- begin (\S+) -->.*?<!-- end \1 -->", replaced, text, flags=re.DOTALL)
    document.write_text(text, encoding="utf-8")


def _table(head: list[str], rows: list[list[str]]) -> str:
    if all(row[1] == "not run" for row in rows):
        return "Not run yet.\n"
    lines = ["| " + " | ".join(head) + " |", "|" + "|".join(["---"] + ["---:"] * (len(head) - 1)) + "|"]
    return "".join(line + "\n" for line in lines + ["| " + " | ".join(row) + " |" for row in rows])


FIGURES = ["validation loss", "less {base}", "contrast", "LBL within sequences", "MaxVio", "starved experts"]


def rows(results: Results, named: list[tuple[str, Setting]], base: tuple[str, Setting]) -> str:
    """A row per setting: the loss, its paired difference, specialisation and balance."""
    lines = []
    for name, setting in named:
        value = average(results, setting, "loss")
        if value is None:
            lines.append([name, "not run", *[""] * (len(FIGURES) - 1)])
            continue
        own = "" if setting == base[1] else str(difference(results, setting, base[1]))
        others = [average(results, setting, key) for key in ("contrast", "lbl_within_sequences", "max_vio")]
        starved = average(results, setting, "starved_experts")
        label = f"{name} ({len(results[setting])})"
        lines.append([label, f"{value:.3f}", own, *(f"{x:.2f}" for x in others), f"{100 * (starved or 0):.0f} %"])
    return _table(["(runs)", *(head.format(base=base[0]) for head in FIGURES)], lines)


def balance_bsz(results: Results, alpha: float = 0.1) -> str:
    """Loss against the number of sequences that f counts over."""
    curve = [1, 2, 4, 8, 16]
    named = [(f"{n}", changed(MICRO, over=f"sequences:{n}", alpha=alpha)) for n in curve]
    return rows(results, [*named, ("32", changed(GLOBAL, alpha=alpha))], ("1", changed(MICRO, alpha=alpha)))


def shuffled(results: Results) -> str:
    """Micro, global, a random sub-sample."""
    tables = []
    for alpha in ALPHAS:
        micro, whole = changed(MICRO, alpha=alpha), changed(GLOBAL, alpha=alpha)
        random = Setting(over="shuffled:1", alpha=alpha)
        named = [
            ("micro, 128 tokens of one sequence", micro),
            ("global, 4096 tokens", whole),
            ("128 random tokens of the 4096", random),
        ]
        tables.append(f"alpha {alpha}:\n\n" + rows(results, named, ("micro", micro)))
    return "\n".join(tables)


def switching(results: Results) -> str:
    """From micro to global in mid-training, and back."""
    _, _, tenth, third, half, back = experiments.switching()
    named = [("micro throughout", MICRO), ("global from 50 %", half), ("global from 30 %", third), ("global from 10 %", tenth)]
    named += [("global throughout", GLOBAL), ("global until 50 %, then micro", back)]
    return rows(results, named, ("micro", MICRO))


def coefficients(results: Results) -> str:
    """Every coefficient, micro and global."""
    alphas = (0.1, 0.03, 0.01, 0.001)
    named = [(f"{n}, alpha {a}", changed(s, alpha=a)) for n, s in (("micro", MICRO), ("global", GLOBAL)) for a in alphas]
    return rows(results, named, ("micro, alpha 0.1", MICRO))


def mixed(results: Results) -> str:
    """A little of micro beside global."""
    micro, buffer, little, more = experiments.mixed()
    named = [
        ("micro over 4 sequences", micro),
        ("global", buffer),
        ("global + 1 % micro", little),
        ("global + 10 % micro", more),
    ]
    return rows(results, named, ("micro", micro))


def megatron(results: Results) -> str:
    """Megatron's own global loss."""
    ours, upstream, stronger, weaker = experiments.megatron()
    named = [("plugin, `global`, alpha 0.1", ours), ("Megatron, `global_aux_loss`, alpha 0.1", upstream)]
    named += [("Megatron, `global_aux_loss`, alpha 0.4", stronger), ("plugin, `global`, alpha 0.025", weaker)]
    return rows(results, named, ("the plugin", ours))


def bias(results: Results) -> str:
    """The aux-loss-free bias."""
    micro, whole, slow, fast = experiments.bias()
    named = [("micro", micro), ("global", whole), ("bias, rate 0.001", slow), ("bias, rate 0.01", fast)]
    return rows(results, named, ("micro", micro))


def _early(results: Results, setting: Setting) -> str:
    runs = results[setting].values()
    values = [max(run["max_vio_first"][40:80]) for run in runs]
    return f"{sum(values) / len(values):.1f}" if values else ""


def _swing(results: Results, setting: Setting) -> str:
    """The lowest autocorrelation and its lag."""
    found = []
    for run in results[setting].values():
        if correlation := swing(run):
            lowest = min(correlation)
            found.append((lowest, correlation.index(lowest) + 1))
    if not found:
        return ""
    return ", ".join(f"{value:.2f} at {lag}" for value, lag in found)


def _delays(results: Results, named: list[tuple[str, Setting]], base: Setting) -> str:
    rows = []
    for name, setting in named:
        value = average(results, setting, "loss")
        if value is None:
            rows.append([name, "not run", "", "", "", ""])
            continue
        own = "" if setting == base else str(difference(results, setting, base))
        late = average(results, setting, "max_vio")
        rows.append(
            [
                f"{name} ({len(results[setting])})",
                f"{value:.3f}",
                own,
                _early(results, setting),
                f"{late:.2f}",
                _swing(results, setting),
            ]
        )
    head = [
        "(runs)",
        "validation loss",
        "less global",
        "MaxVio, most of steps 40 to 80",
        "MaxVio, last fifth",
        "autocorrelation of the load, least",
    ]
    return _table(head, rows)


def window(results: Results) -> str:
    """The plugin's window, against global, with few sequences per step."""
    tables = []
    for alpha in ALPHAS:
        micro, whole, *windows = (changed(s, alpha=alpha) for s in experiments.window()[:5])
        named = [("micro", micro), ("global", whole), *((f"window, W = {s.window_steps}", s) for s in windows)]
        if alpha == experiments.window()[5].alpha:
            named.append(("global for the first 160 steps, then window, W = 4", experiments.window()[5]))
        tables.append(f"alpha {alpha}:\n\n" + _delays(results, named, whole))
    return "\n".join(tables)


def delay(results: Results) -> str:
    """f of an earlier step."""
    tables = []
    for alpha, lr, delays in ((0.1, FEW.lr, (0, 1, 2, 4, 8, 16)), (0.01, FEW.lr, (0, 1, 2, 4, 8, 16)), (0.1, 1e-3, (0, 4, 16))):
        named = [(f"d = {d}", changed(FEW, over=f"delayed:{d}:1", alpha=alpha, lr=lr)) for d in delays]
        tables.append(f"alpha {alpha}, learning rate {lr:g}:\n\n" + _delays(results, named, named[0][1]))
    return "\n".join(tables)


def runs(results: Results) -> str:
    """What the runs were made with, and how long they took; without `check`, whose trainings are of 6 steps."""
    by_machine: dict[tuple[str, str], list[float]] = {}
    short = {setting.name for setting in experiments.check()}
    for result in results:
        if Setting(**result["setting"]).name in short:
            continue
        seconds = result.get("processor_seconds", result["seconds"])
        by_machine.setdefault((machine(result), result["data"]), []).append(seconds)
    rows = [[*key, str(len(s)), f"{sum(s) / len(s):.0f}"] for key, s in by_machine.items()]
    return _table(["machine and versions", "data", "runs", "mean seconds of a run"], rows)


TABLES: dict[str, Callable[[Results], str]] = {
    "balance-bsz": balance_bsz,
    "balance-bsz-small-alpha": lambda results: balance_bsz(results, alpha=0.01),
    "shuffled": shuffled,
    "switching": switching,
    "coefficients": coefficients,
    "mixed": mixed,
    "megatron": megatron,
    "bias": bias,
    "window": window,
    "delay": delay,
    "runs": runs,
}
