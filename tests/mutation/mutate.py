"""Puts small faults into the library, one at a time, and counts those that the tests notice.

    python tests/mutation/mutate.py attacks --sample 40     # or: make mutate PART=attacks SAMPLE=40
    python tests/mutation/mutate.py --table                 # what the runs so far found, by folder

The faults are mutmut's: an operator or a number changed, an argument left out or set to None, a condition turned
round. mutmut's own runner wraps every function, which torch.compile cannot trace, skips most decorated functions, and
finds no tests for a package in a second source folder (`kernels/`). So a fault is written into a copy of the source
tree here, and the tests run in a process forked from one that has imported torch. A first run without a fault records
which tests reach which lines, and how long each takes; a fault is then tried on the tests that reach its statement,
the shortest of each kind first, until one fails. Text inside `raise` and `warnings.warn` and triton kernels are left
alone.

The parts are in pyproject.toml. A fault that no test notices is a gap, or it changes nothing that a caller can see:
those are in equivalents.toml, each with its reason.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ["CUDA_VISIBLE_DEVICES"] = ""

import coverage
import pytest
from faults import ROOT, Fault, sample

RESULTS = ROOT / "mutants"
EQUIVALENTS = Path(__file__).with_name("equivalents.toml")
PRELOADED = (
    "torch torch._dynamo torch.utils.flop_counter triton numpy hypothesis sklearn.datasets PIL.Image safetensors"
)
OPTIONS = [
    *("-q", "-x", "-m", "not gpu", "-o", "addopts=", "--import-mode=importlib", "--tb=line", "-rfE"),
    *("-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning", "--hypothesis-seed=0"),
]


class Recorder:
    """A pytest plugin that notes how long each test takes and which lines of the sources it reaches."""

    def __init__(self, sources: list[str], out: Path) -> None:
        self.out, self.seconds, self.sources = out, {}, [str(Path(source).resolve()) for source in sources]
        self.coverage = coverage.Coverage(data_file=None, include=self.sources)
        self.coverage.start()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        """Record one test."""
        self.coverage.switch_context(item.nodeid)
        start = time.monotonic()
        result = yield
        if item.nodeid in self.seconds:
            self.seconds[item.nodeid] = time.monotonic() - start
        self.coverage.switch_context("")
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Keep the tests that pass: their time, once known."""
        if report.when == "call" and report.passed:
            self.seconds[report.nodeid] = 0.0

    def pytest_sessionfinish(self) -> None:
        """Write `{"seconds": {test: s}, "reached": {source: {line: [test]}}}`."""
        self.coverage.stop()
        data = self.coverage.get_data()
        root = Path.cwd()
        reached = {
            str(Path(source).relative_to(root)): {
                line: [test for test in tests if test in self.seconds]
                for line, tests in data.contexts_by_lineno(source).items()
            }
            for source in self.sources
        }
        self.out.write_text(json.dumps({"seconds": self.seconds, "reached": reached}))


class Tree:
    """A copy of the source tree, in which one fault at a time is tried."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        if folder.exists():
            return
        listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
        for name in subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines():
            if (ROOT / name).is_file():
                (folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, folder / name)

    def start(self, tests: list[str], out: Path, record: tuple[list[str], Path] | None = None) -> int:
        """Run tests in a forked process; return its id."""
        if pid := os.fork():
            return pid
        try:
            os.setsid()
            stream = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(stream, 1), os.dup2(stream, 2)
            os.chdir(self.folder)
            paths = [str(self.folder), str(self.folder / "kernels")]
            # Processes that a test starts see the fault too.
            os.environ |= {"PYTHONPATH": os.pathsep.join(paths), "PYTHONDONTWRITEBYTECODE": "1"}
            sys.dont_write_bytecode = record is None
            ours = (str(ROOT), str(ROOT / "kernels"), str(Path(__file__).parent))
            sys.path[:] = paths + [path for path in sys.path if path not in ours]
            options = [option for option in OPTIONS if record is None or option != "-x"]
            code = pytest.main([*options, *tests], plugins=[Recorder(*record)] if record is not None else [])
            sys.stdout.flush()
            os._exit(int(code))
        except BaseException as error:
            os.write(2, repr(error).encode())
            os._exit(70)

    def put(self, fault: Fault) -> None:
        """Write a fault into its file."""
        shutil.copy2(self.folder / fault.file, self.folder / "without")
        (self.folder / fault.file).write_text(fault.text)

    def restore(self, fault: Fault) -> None:
        """Take it out; with the old time stamp, the compiled file stays valid."""
        shutil.copy2(self.folder / "without", self.folder / fault.file)


def record(tree: Tree, sources: list[str], tests: list[str]) -> dict[str, Any]:
    """Return the tests' times and the lines that each reaches; what has not changed is taken from the last run."""
    digest = hashlib.sha256(b"".join((ROOT / source).read_bytes() for source in sources)).hexdigest()
    seconds: dict[str, float] = {}
    reached: dict[str, dict[str, list[str]]] = {source: defaultdict(list) for source in sources}
    for test in tests:
        kept = RESULTS / "reached" / f"{digest[:12]}-{test.replace('/', '.')}.json"
        fresh = kept.exists() and kept.stat().st_mtime > (ROOT / test).stat().st_mtime
        if not fresh:
            kept.parent.mkdir(parents=True, exist_ok=True)
            out = RESULTS / "reached" / "output.txt"
            os.waitpid(tree.start([test], out, ([*sources], kept)), 0)
            if not kept.exists():
                raise SystemExit(f"{test} did not run without a fault:\n{out.read_text()[-2000:]}")
        found = json.loads(kept.read_text())
        seconds |= found["seconds"]
        for source, lines in found["reached"].items():
            for line, names in lines.items():
                reached[source][line] += names
        print(f"{sum(found['seconds'].values()):6.1f} s for {len(found['seconds']):3d} tests that pass in {test}")
    return {"seconds": seconds, "reached": reached}


def chosen(fault: Fault, known: dict[str, Any], most: float) -> list[str]:
    """Return tests that reach the fault, or its function, the shortest of each kind first: for `most` seconds."""
    lines, seconds = known["reached"][fault.file], known["seconds"]
    for part in (fault.lines, fault.body):
        tests = {test for line in part for test in lines.get(str(line), ())}
        if tests:
            break
    rank: Counter[str] = Counter()
    ranked = []
    for test in sorted(tests, key=seconds.__getitem__):
        ranked.append((rank[kind := test.split("[")[0]], seconds[test], test))
        rank[kind] += 1
    found, total = [], 0.0
    for _, needed, test in sorted(ranked):
        if total + needed <= most or not found:
            found.append(test)
            total += needed
    return found


def wait(running: dict[int, Any]) -> tuple[int, str]:
    """Wait for one of the running processes; return its id and how it ended."""
    while True:
        for pid, (_, _, _, deadline) in running.items():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                return pid, "left" if status == 0 else "noticed"
            if time.monotonic() > deadline:
                os.killpg(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
                return pid, "too slow"
        time.sleep(0.02)


def try_all(
    trees: list[Tree],
    faults: list[Fault],
    known: dict[str, Any],
    most: float,
    say: Callable[[Fault, str, str], None],
) -> None:
    """Try each fault on `most` seconds of tests, as many at a time as there are trees; `say(fault, verdict, test)`."""
    free, running, waiting = list(trees), {}, list(faults)
    while waiting or running:
        if waiting and free:
            fault = waiting.pop(0)
            tests = chosen(fault, known, most)
            if not tests:
                say(fault, "left", "no test reaches it")
                continue
            tree = free.pop()
            tree.put(fault)
            out = tree.folder / "output.txt"
            allowed = 5 * sum(known["seconds"][test] for test in tests) + 30
            running[tree.start(tests, out)] = (tree, fault, out, time.monotonic() + allowed)
            continue
        pid, verdict = wait(running)
        tree, fault, out, _ = running.pop(pid)
        tree.restore(fault)
        free.append(tree)
        ends = [line for line in out.read_text(errors="replace").splitlines() if line.startswith(("FAILED", "ERROR"))]
        say(fault, verdict, ends[0].split(" - ")[0] if ends else "")


def equivalents() -> Callable[[str], str | None]:
    """Return what gives the reason why the fault of a name changes nothing, or None."""
    listed = tomllib.loads(EQUIVALENTS.read_text())
    reasons = {
        f"{entry['file']} {entry['function']}: {change}": str(entry["reason"])
        for entry in listed["equivalent"]
        for change in entry["changes"]
    }

    def reason(name: str) -> str | None:
        for rule in listed["rule"]:
            before, after = (re.sub(rule["without"], "", side) for side in name.split(": ", 1)[1].split(" -> ", 1))
            if before == after:
                return str(rule["reason"])
        return reasons.get(name)

    return reason


def table() -> str:
    """Return what the last runs of all parts found, a row a part."""
    harmless = equivalents()
    rows = [
        "| part | tried | noticed | equivalent | left | noticed, of those that are not equivalent |",
        "| --- " * 6 + "|",
    ]
    total: Counter[str] = Counter()
    parts = [(path.stem, path) for path in sorted(RESULTS.glob("*.jsonl"))]
    for part, path in [*parts, ("all", None)]:
        if path is not None:
            verdicts = [json.loads(line) for line in path.read_text().splitlines()]
            found = Counter(
                "equivalent" if harmless(v["name"]) else v["verdict"].replace("too slow", "noticed") for v in verdicts
            )
            total += found
        else:
            found = total
        real = found["noticed"] + found["left"]
        share = f"{found['noticed'] / real:.1%}" if real else ""
        rows.append(
            f"| {part} | {found.total()} | {found['noticed']} | {found['equivalent']} | {found['left']} | {share} |"
        )
    return "\n".join(rows)


def run(part: dict[str, list[str]], results: Path, size: int | None, options: argparse.Namespace) -> None:
    """Try the faults of one part and write the verdicts, one a line."""
    sources, tests = (
        sorted({str(path.relative_to(ROOT)) for pattern in part[kind] for path in ROOT.glob(pattern)})
        for kind in ("sources", "tests")
    )
    tests = options.tests or tests
    drawn = [fault for source in sources for fault in sample(source, size, options.seed)]
    found: dict[str, dict[str, str]] = {}
    if options.again:
        names = {fault.name for fault in drawn}
        verdicts = map(json.loads, results.read_text().splitlines())
        found = {verdict["name"]: verdict for verdict in verdicts if verdict["name"] in names}
    harmless, faults = equivalents(), []
    for fault in drawn:
        if reason := harmless(fault.name):
            found[fault.name] = {"name": fault.name, "verdict": "equivalent", "by": reason}
        elif found.get(fault.name, {}).get("verdict", "left") == "left":
            faults.append(fault)

    def say(fault: Fault, verdict: str, by: str) -> None:
        found[fault.name] = {"name": fault.name, "verdict": verdict, "by": by}
        print(f"{verdict:8s} {fault.file}:{fault.lines.start} {fault.function}: {fault.change}  {by}", flush=True)

    with tempfile.TemporaryDirectory() as folder:
        trees = [Tree(Path(folder) / "0")]
        known = record(trees[0], sources, tests)
        for job in range(1, options.jobs):
            shutil.copytree(trees[0].folder, Path(folder) / str(job))
            trees.append(Tree(Path(folder) / str(job)))
        start = time.monotonic()
        try_all(trees, faults, known, options.seconds, say)
    results.write_text("".join(json.dumps(verdict) + "\n" for verdict in found.values()))
    print(f"{len(faults)} faults in {time.monotonic() - start:.0f} s")


def main() -> None:
    """Run the parts that are named, and print the table."""
    parts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mutate"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="*", help=f"any of {', '.join(parts)}; all of them if none is named")
    parser.add_argument("--sample", default="12", help="faults for each file, drawn with --seed, or 'all'")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--seconds", type=float, default=20, help="of tests for each fault, at most")
    parser.add_argument("--again", action="store_true", help="try only what the last run left or did not try")
    parser.add_argument("--tests", nargs="+", help="files to take in place of the part's")
    parser.add_argument("--table", action="store_true", help="only print what the runs so far found")
    options = parser.parse_args()
    size = None if options.sample == "all" else int(options.sample)
    if not options.table:
        for name in PRELOADED.split():
            __import__(name)
        for part in options.part or parts:
            run(parts[part], RESULTS / f"{part}.jsonl", size, options)
    print(table())


if __name__ == "__main__":
    main()
