"""What every stage of `benchmarks/gpu.py` shares: its arguments, its checks, and its JSON, written after every part."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parents[1]
ROOT = BENCHMARKS.parent
TESTS = ROOT / "tests" / "distributed"
DETAIL_LINES = 25


def paths() -> None:
    """Let this process and those it starts import the plugin, the benchmarks and the tests' harness."""
    folders = [str(ROOT), str(BENCHMARKS), str(TESTS)]
    sys.path[:0] = folders
    os.environ["PYTHONPATH"] = os.pathsep.join([*folders, os.environ.get("PYTHONPATH", "")])


class Stage:
    """One stage's results.

    Attributes:
        quick: less of everything.
        cpu: no GPU: the same code with small sizes, to try it out.
        data: what the report shows; JSON.
    """

    def __init__(self, name: str) -> None:
        parser = argparse.ArgumentParser(description=f"stage {name} of gpu.py; started by it")
        parser.add_argument("--json", type=Path, required=True, help="written after every part")
        parser.add_argument("--quick", action="store_true")
        parser.add_argument("--cpu", action="store_true", help="try it out without a GPU")
        parser.add_argument("--seconds", type=float, default=120.0, help="when the stage will be ended")
        args = parser.parse_args()
        self.quick, self.cpu, self._file = args.quick, args.cpu, args.json
        self._began, self._seconds = time.monotonic(), args.seconds
        self.checks: list[dict[str, Any]] = []
        self.data: dict[str, Any] = {}
        self.save()

    @property
    def left(self) -> float:
        """Seconds until the stage will be ended."""
        return self._seconds - (time.monotonic() - self._began)

    def save(self) -> None:
        """Replace the file as a whole: a stage can be ended at any time."""
        unfinished = self._file.with_suffix(".tmp")
        unfinished.write_text(json.dumps({"checks": self.checks, "data": self.data}, indent=1), encoding="utf-8")
        unfinished.replace(self._file)

    @contextmanager
    def check(self, name: str) -> Iterator[dict[str, Any]]:
        """Record whether the block raised, and go on. Gives the entry, to which figures may be added."""
        entry: dict[str, Any] = {"name": name, "passed": False, "detail": "ended before it was over"}
        self.checks.append(entry)
        self.save()
        begin = time.monotonic()
        try:
            yield entry
            entry.update(passed=True, detail="")
            print(f"passed  {name}", flush=True)
        except Exception:
            entry["detail"] = last_lines(traceback.format_exc())
            print(f"FAILED  {name}\n{entry['detail']}", flush=True)
        finally:
            entry["seconds"] = round(time.monotonic() - begin, 2)
            self.save()

    def skip(self, name: str, why: str) -> None:
        """Record that a check was not made."""
        self.checks.append({"name": name, "passed": None, "detail": why})
        print(f"skipped {name}: {why}", flush=True)
        self.save()


def last_lines(text: str, number: int = DETAIL_LINES) -> str:
    """The end of a traceback or a log."""
    return "\n".join(text.rstrip().splitlines()[-number:])
