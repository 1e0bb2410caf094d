"""Stage 1: tests/gpu, each test's result written when it is known."""

from __future__ import annotations

from stage import ROOT, Stage, last_lines, paths


class Recorder:
    """A plugin of pytest: hands every result to the stage."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def pytest_runtest_logreport(self, report) -> None:
        # Set-up and tear-down count only when they fail or skip.
        if report.when != "call" and report.passed:
            return
        name = report.nodeid.removeprefix("tests/gpu/")
        if report.skipped:
            why = report.longrepr[-1] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self._stage.skip(name, why)
            return
        detail = "" if report.passed else last_lines(f"{report.longreprtext}\n{report.capstdout}{report.capstderr}")
        entry = {"name": name, "passed": report.passed, "detail": detail, "seconds": round(report.duration, 2)}
        self._stage.checks.append(entry)
        self._stage.save()

    def pytest_collectreport(self, report) -> None:
        if report.failed:
            self._stage.checks.append({"name": report.nodeid, "passed": False, "detail": last_lines(report.longreprtext)})
            self._stage.save()


def main() -> None:
    stage = Stage("tests")
    paths()
    import pytest

    options = ["-m", "gpu", "-p", "no:cacheprovider", "-q", "--rootdir", str(ROOT), "-c", str(ROOT / "pyproject.toml")]
    result = pytest.main([*options, str(ROOT / "tests" / "gpu")], plugins=[Recorder(stage)])
    stage.data["exit code of pytest"] = int(result)
    # Failures are checks; anything but them and success is one of its own.
    with stage.check("pytest ran"):
        assert int(result) in (0, 1), f"pytest ended with {result!r}"


if __name__ == "__main__":
    main()
