"""The tables of the experiments, from the results: all of them in results/TABLES.md, a few in docs/reproduction.md.

Every table is over the runs that all of its rows have in common, so that rows subtract. "±" is the standard deviation over
seeds.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from inspect import cleandoc
from pathlib import Path
from statistics import mean

from reproduce import experiments
from reproduce.experiments import ALPHAS, BUFFER, FEW, GLOBAL, MICRO, TUNED, balanced, changed
from reproduce.results import (
    Measure,
    Pair,
    Result,
    Results,
    by_seed,
    common,
    difference,
    early_max_vio,
    loss,
    machine,
    max_vio,
    signed,
    spread,
    steps_until_even,
)
from reproduce.settings import Setting

Named = list[tuple[str, Setting]]

HEADING = """# Tables of the reproduction

Made by `python examples/reproduce/run.py figure` from `results.jsonl`; do not edit. What the columns mean and how the
runs were made is in [docs/reproduction.md](../../../docs/reproduction.md). Every row of a table is the mean over the same
runs. "±" is the standard deviation over seeds; "(n of m)" is how many of m seeds have the sign of the mean difference.
"""


def write(results: Results, path: Path) -> None:
    """Write every table."""
    sections = []
    for name, make in TABLES.items():
        description = cleandoc(experiments.EXPERIMENTS.get(name, make).__doc__ or "")
        sections.append(f"## {name}\n\n{description}\n\n{make(results)}")
    path.write_text(HEADING + "\n" + "\n".join(sections), encoding="utf-8")


def fill(results: Results, document: Path) -> None:
    """Replace the short tables of the document, which are between `<!-- begin NAME -->` and its end.

    Raises:
        KeyError: the document names a table that is not here.
    """
    text = document.read_text(encoding="utf-8")

    def replaced(found: re.Match[str]) -> str:
        name = found[1]
        return f"<!-- begin {name} -->\n\n{SHORT[name](results)}\n<!-- end {name} -->"

    text = re.sub(r"<!-- begin (\S+) -->.*?<!-- end \1 -->", replaced, text, flags=re.DOTALL)
    document.write_text(text, encoding="utf-8")


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + "|".join(["---"] + ["---:"] * (len(head) - 1)) + "|"]
    return "".join(line + "\n" for line in lines + ["| " + " | ".join(row) + " |" for row in rows])


def _sample(pairs: list[Pair]) -> str:
    """What a table's rows are means over."""
    seeds = sorted({seed for seed, *_ in pairs})
    machines = sorted({name.split(";")[0] for _, name, _ in pairs})
    data = sorted({digest[:4] for *_, digest in pairs})
    return f"Seeds {', '.join(map(str, seeds))}; {' and '.join(machines)}; data {', '.join(data)}."


Cell = Callable[[list[tuple[Pair, Result]]], str]


def _of(key: str | Measure, digits: int = 2, percent: bool = False) -> Cell:
    measure: Measure = key if callable(key) else lambda run: run[key]

    def cell(runs: list[tuple[Pair, Result]]) -> str:
        if not callable(key) and not all(key in run for _, run in runs):
            return ""
        values = by_seed({pair: measure(run) for pair, run in runs})
        if percent:
            return spread([100 * value for value in values], 0) + " %"
        return spread(values, digits)

    return cell


def _until_even(runs: list[tuple[Pair, Result]]) -> str:
    steps = [steps_until_even(run) for _, run in runs]
    reached = [step for step in steps if step is not None]
    if len(reached) < len(steps):
        return f"{len(steps) - len(reached)} of {len(steps)} runs never"
    return spread(by_seed({pair: step for (pair, _), step in zip(runs, reached)}), 0)


LATE: dict[str, Cell] = {
    "contrast": _of("contrast"),
    "LBL within sequences": _of("lbl_within_sequences"),
    "MaxVio": _of(max_vio),
    "starved": _of("starved_experts", percent=True),
}
EARLY = {"MaxVio, most of steps 40 to 80": _of(early_max_vio, 1), "MaxVio": _of(max_vio)}
METHODS = {
    "contrast": _of("contrast"),
    "MaxVio within sequences": _of("max_vio_within_sequences"),
    "MaxVio": _of(max_vio),
    "starved": _of("starved_experts", percent=True),
    "steps until even": _until_even,
}


def rows(results: Results, named: Named, columns: dict[str, Cell] = LATE) -> str:
    """A row per setting: the loss, its difference from the first row, specialisation and balance."""
    seeds = {name: len({seed for seed, *_ in results[setting]}) for name, setting in named}
    least = min(2, max(seeds.values()))  # a row with one seed would take the other seeds from every row
    there = [(name, setting) for name, setting in named if seeds[name] >= max(1, least)]
    absent = [name for name in seeds if not seeds[name]]
    single = [name for name in seeds if 0 < seeds[name] < least]
    missing = f"\nNot run: {'; '.join(absent)}.\n" if absent else ""
    missing += f"\nOnly one seed: {'; '.join(single)}.\n" if single else ""
    pairs = common(results, [setting for _, setting in there])
    if not there or not pairs:
        return "Not run.\n" if not there else "The rows have no run in common.\n"
    base = there[0][0], [loss(results[there[0][1]][pair]) for pair in pairs]
    lines = []
    for number, (name, setting) in enumerate(there):
        runs = [(pair, results[setting][pair]) for pair in pairs]
        less = by_seed({pair: loss(run) - other for (pair, run), other in zip(runs, base[1])})
        own = "" if number == 0 else signed(less)
        lines.append([name, _of(loss, 3)(runs), own, *(cell(runs) for cell in columns.values())])
    return f"{_sample(pairs)}\n\n" + _table(["", "validation loss", f"less {base[0]}", *columns], lines) + missing


def _differences(results: Results, named: list[tuple[str, Setting, Setting]], head: str = "") -> str:
    """A row per pair of settings, over every run that both have."""
    measures: list[tuple[Measure, int]] = [(loss, 3), (lambda run: run["contrast"], 2), (max_vio, 2)]
    lines, absent = [], []
    for name, setting, base in named:
        if not (results[setting] and results[base] and common(results, [setting, base])):
            absent.append(name)
            continue
        cells = [signed(difference(results, setting, base, measure), digits) for measure, digits in measures]
        pairs = common(results, [setting, base])
        lines.append([name, *cells, f"{len({seed for seed, *_ in pairs})} ({len(pairs)})"])
    missing = f"\nNot run: {'; '.join(absent)}.\n" if absent else ""
    table = _table([head, "validation loss", "contrast", "MaxVio", "seeds (pairs of runs)"], lines) if lines else ""
    return table + missing.lstrip("\n" if not lines else "")


def _joined(parts: dict[str, str]) -> str:
    return "\n".join(f"{title}:\n\n{table}" for title, table in parts.items())


def _both(make: Callable[[float], Named], results: Results, columns: dict[str, Cell] = LATE) -> str:
    """A table per coefficient."""
    return _joined({f"alpha {alpha}": rows(results, make(alpha), columns) for alpha in ALPHAS})


def curve(alpha: float) -> Named:
    """Groups of 1 to 16 sequences, and the step."""
    named = [(f"{n}", changed(MICRO, over=f"sequences:{n}", alpha=alpha)) for n in (1, 2, 4, 8, 16)]
    return [*named, ("32", changed(GLOBAL, alpha=alpha))]


def shuffled(results: Results) -> str:
    def named(alpha: float) -> Named:
        parts = {"128 tokens of one sequence": MICRO, "4096 tokens": GLOBAL, "128 random tokens": Setting(over="shuffled:1")}
        return [(name, changed(setting, alpha=alpha)) for name, setting in parts.items()]

    return _both(named, results)


def switching(results: Results) -> str:
    _, _, tenth, third, half, back = experiments.switching()
    named = [("micro throughout", MICRO), ("global from 50 %", half), ("global from 30 %", third), ("global from 10 %", tenth)]
    return rows(results, [*named, ("global throughout", GLOBAL), ("global until 50 %, then micro", back)])


def coefficients(results: Results) -> str:
    alphas = (0.1, 0.03, 0.01, 0.001)
    named = [(f"{n}, alpha {a}", changed(s, alpha=a)) for n, s in (("micro", MICRO), ("global", GLOBAL)) for a in alphas]
    return rows(results, named)


def mixed(results: Results) -> str:
    names = ("micro over 4 sequences", "global", "global + 1 % micro", "global + 10 % micro")
    return rows(results, list(zip(names, experiments.mixed())))


def megatron(results: Results) -> str:
    names = ("plugin, `global`, alpha 0.1", "Megatron, `global_aux_loss`, alpha 0.1", "Megatron, `global_aux_loss`, alpha 0.4")
    return rows(results, list(zip((*names, "plugin, `global`, alpha 0.025"), experiments.megatron())))


def bias(results: Results) -> str:
    return rows(results, list(zip(("micro", "global", "bias, rate 0.001", "bias, rate 0.01"), experiments.bias())))


def accumulated(alpha: float) -> Named:
    """All at once, then more and more micro-batches."""
    return [(f"M = {m}", changed(GLOBAL, micro_batch=32 // m, alpha=alpha)) for m in (1, 2, 8, 32)]


def accumulation(results: Results) -> str:
    paired = {f"alpha {alpha}, each M with all its seeds": against_all_at_once(results, alpha) for alpha in ALPHAS}
    common_seeds = {f"alpha {alpha}, the seeds that all have": rows(results, accumulated(alpha)) for alpha in ALPHAS}
    return _joined(paired | common_seeds)


def against_all_at_once(results: Results, alpha: float) -> str:
    """Each number of micro-batches less M = 1: the loss, contrast, MaxVio."""
    (_, whole), *more = accumulated(alpha)
    return _differences(results, [(name, setting, whole) for name, setting in more], "less M = 1")


def balancing(results: Results) -> str:
    parts = {}
    for score in ("softmax", "sigmoid"):
        cells = [(cell, value) for cell, value in TUNED.items() if cell[1] == score]
        named = [(f"{cell[0]} over {cell[2]}, {value:g}", balanced(*cell, value)) for cell, value in cells]
        parts[score] = rows(results, named, METHODS)
    return _joined(parts)


def balancing_tuning(results: Results) -> str:
    parts = {}
    for cell in TUNED:
        named = [(f"{value:g}", balanced(*cell, value)) for value in experiments.GRIDS[cell[0]]]
        parts[f"{cell[0]} over {cell[2]}, {cell[1]}"] = rows(results, named, METHODS)
    return _joined(parts) if any(list(results[s]) for s in experiments.balancing_tuning() if s.quantile_ema) else "Not run.\n"


def hinge(results: Results) -> str:
    names = ("global", "hinge, C = 0.1", "hinge, C = 1", "hinge, C = 10")
    return rows(results, list(zip(names, experiments.hinge())))


def window(results: Results) -> str:
    def named(alpha: float) -> Named:
        micro, whole, *windows = (changed(s, alpha=alpha) for s in experiments.window()[:5])
        found = [("global", whole), ("micro", micro), *((f"W = {w}", s) for w, s in zip((1, 4, 16), windows))]
        return [*found, *([("W = 4 after 160 steps", experiments.window()[5])] if alpha == 0.1 else [])]

    return _both(named, results, EARLY)


def delay(results: Results) -> str:
    def named(alpha: float, lr: float = FEW.lr) -> Named:
        delays = (0, 4, 16) if lr != FEW.lr else (0, 1, 4, 16) if alpha != 0.1 else (0, 1, 2, 4, 8, 16)
        return [(f"d = {d}", changed(FEW, over=f"delayed:{d}:1", alpha=alpha, lr=lr)) for d in delays]

    parts = {f"alpha {alpha}, learning rate 0.004": rows(results, named(alpha), EARLY) for alpha in ALPHAS}
    return _joined(parts | {"alpha 0.1, learning rate 0.001": rows(results, named(0.1, 1e-3), EARLY)})


def comparisons(results: Results) -> str:
    """Two settings against each other, over every run that both have; one value per seed, the mean over its machines."""

    def at(setting: Setting, alpha: float) -> Setting:
        return changed(setting, alpha=alpha)

    few = changed(MICRO, over="sequences:4")
    found: list[tuple[str, Setting, Setting]] = [
        *((f"global less micro, alpha {a}", at(GLOBAL, a), at(MICRO, a)) for a in (*ALPHAS, 0.001)),
        *((f"{n} sequences less 32, alpha {a}", at(s, a), at(GLOBAL, a)) for a in ALPHAS for n, s in curve(a)[1:-1]),
        ("global at 0.1 less micro at 0.01", GLOBAL, at(MICRO, 0.01)),
        ("global, 0.01 less 0.1", at(GLOBAL, 0.01), GLOBAL),
        ("global, 0.03 less 0.1", at(GLOBAL, 0.03), GLOBAL),
        ("micro, 0.01 less 0.1", at(MICRO, 0.01), MICRO),
        *((f"random tokens less global, alpha {a}", Setting(over="shuffled:1", alpha=a), at(GLOBAL, a)) for a in ALPHAS),
        ("M = 8 less micro over 4 sequences", BUFFER, few),
        ("1 % micro less none", changed(BUFFER, micro_coeff=0.001), BUFFER),
        ("10 % micro less none", changed(BUFFER, micro_coeff=0.01), BUFFER),
        ("bias 0.01 less global, sigmoid", experiments.bias()[3], experiments.bias()[1]),
    ]
    return _differences(results, found)


def specialisation(results: Results) -> str:
    """Of the 128 experts of both layers, alpha 0.1, seed 0, whose frequencies are stored: the largest share of a domain's
    selections that one has, and how many have more than 0.1 and 0.2 of some domain's."""
    lines = []
    for name, setting in (("micro", MICRO), ("global", GLOBAL)):
        for (_, of, data), run in results[setting].items():
            if "frequencies" in run:
                most = [max(shares) for layer in zip(*run["frequencies"]) for shares in zip(*layer)]
                above = [str(sum(share > least for share in most)) for least in (0.1, 0.2)]
                lines.append([f"{name}, {of.split(';')[0]}, data {data[:4]}", f"{max(most):.2f}", *above])
    return _table(["", "largest share", "above 0.1", "above 0.2"], lines)


def machines(results: Results) -> str:
    """The same seed and data on the two machines: the validation loss of the second less that of the first."""
    lines, order = [], []
    for alpha in ALPHAS:
        for name, setting in (("micro", changed(MICRO, alpha=alpha)), ("global", changed(GLOBAL, alpha=alpha))):
            runs = results[setting]
            counts = Counter((seed, data) for seed, _, data in runs)
            twice = [key for key, count in sorted(counts.items()) if count == 2]
            of = [sorted((key[1], loss(run)) for key, run in runs.items() if (key[0], key[2]) == both) for both in twice]
            if of:
                order = [name.split(";")[0] for name, _ in of[0]]
                values = [second[1] - first[1] for first, second in of]
                each = ", ".join(f"{value:+.3f}" for value in values)
                lines.append([f"{name}, alpha {alpha}", spread(values, 3, "+"), each])
    return (f"First {order[0]}, second {order[1]}.\n\n" if order else "") + _table(["", "difference", "each seed"], lines)


def runs(results: Results) -> str:
    """The processor as it names itself, the versions, and how long a run took; without `check`, whose runs are of 6 steps."""
    by_machine: dict[tuple[str, str, str], list[Result]] = {}
    short = {setting.name for setting in experiments.check()}
    for result in results:
        setting = Setting.stored(result["setting"])
        if setting.name not in short and setting.steps > 10:
            by_machine.setdefault((machine(result), result["machine"].get("model", ""), result["data"]), []).append(result)
    lines = []
    for (name, model, data), found in sorted(by_machine.items()):
        processor, versions = name.split("; ")
        seconds = mean(float(run.get("processor_seconds") or run["seconds"]) for run in found)
        seeds = ", ".join(map(str, sorted({run["seed"] for run in found})))
        named = f"{processor} ({model})" if model else processor
        lines.append([named, versions, data, seeds, str(len(found)), f"{seconds:.0f}"])
    return _table(["processor", "versions", "data", "seeds", "runs", "mean seconds of a run"], lines)


TABLES: dict[str, Callable[[Results], str]] = {
    "runs": runs,
    "comparisons": comparisons,
    "balance-bsz": lambda results: rows(results, curve(0.1)),
    "balance-bsz-small-alpha": lambda results: rows(results, curve(0.01)),
    "specialisation": specialisation,
    "machines": machines,
    "shuffled": shuffled,
    "switching": switching,
    "coefficients": coefficients,
    "mixed": mixed,
    "accumulation": accumulation,
    "megatron": megatron,
    "bias": bias,
    "balancing": balancing,
    "balancing-tuning": balancing_tuning,
    "hinge": hinge,
    "window": window,
    "delay": delay,
}

SHORT: dict[str, Callable[[Results], str]] = {
    "balance-bsz": lambda results: rows(results, curve(0.1), {"contrast": LATE["contrast"]}),
    "accumulation": lambda results: against_all_at_once(results, 0.1),
}
"""Tables of docs/reproduction.md."""
