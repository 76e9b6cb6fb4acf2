"""Adds up the outcomes that conftest.py recorded: python tests/tally.py FOLDER [PART...].

The folder holds `RUN.RANK.jsonl` (an outcome a line) and `RUN.status` (the launcher's exit status). A test
failed in a run if it failed on any rank. An unexpected skip is a failure; so is a run that died, and a test
that no run ran. PART: what tests/run.sh ran; without `mpi` some numbers of ranks were not there.
"""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from pathlib import Path

# The only reasons for which a test may be skipped, as regular expressions searched in pytest's reason. What
# the machine lacks no run can have; another layout of the ranks some run has to have.
MACHINE = (
    r"needs a GPU|needs an emulated device|needs (\d+|several) GPUs|needs a machine without GPU|needs root|"
    r"this CPU has no |needs the package "
)
ONLY_ALL = r"in bash tests/run.sh --all"
LAYOUT = (
    r"needs (exactly |at least )?(\d+ or )*\d+ (ranks|nodes)|needs one node|needs several nodes|needs MPICH"
)

ORDER = ("left out", "skipped", "passed", "failed")  # over the ranks of one run, the last of these counts
Outcome = tuple[str, str]  # one of these, and the reason


def main(folder: Path, parts: list[str]) -> int:
    total: Counter[str] = Counter()
    failures: list[str] = []
    never: dict[str, str] = {}  # tests that have not run so far -> the reason
    ran: set[str] = set()
    for status in sorted(folder.glob("*.status"), key=lambda path: path.stat().st_mtime_ns):
        run, code = status.stem, status.read_text().strip()
        tests = outcomes(folder, run)
        failed = [f"{run}: {test}: {why}" for test, (outcome, why) in tests.items() if outcome == "failed"]
        if code != "0" and not failed:
            limit = " (time limit)" if code == "124" else ""
            failed = [f"{run}: no failed test, but it ended with status {code}{limit}"]
        counts = Counter(outcome for outcome, _ in tests.values())
        print(f"{run}: {counts['passed']} passed, {len(failed)} failed, {counts['skipped']} skipped")
        total += counts
        failures += failed
        for test, (outcome, reason) in tests.items():
            if outcome in ("passed", "failed"):
                ran.add(test)
            else:
                never[test] = reason
    # Parameters that depend on the number of ranks: the function has to have run with some of them.
    ran |= {function(test) for test in ran}
    never = {test: reason for test, reason in never.items() if test not in ran and function(test) not in ran}
    nowhere = f"{MACHINE}|{ONLY_ALL}" if "mpi" in parts or not parts else f"{MACHINE}|{ONLY_ALL}|{LAYOUT}"
    failures += [f"{test}: ran nowhere: {why}" for test, why in never.items() if not re.search(nowhere, why)]
    for reason, count in Counter(never.values()).most_common():
        print(f"ran nowhere: {count}, {reason}")
    if not total["passed"] and not failures:
        failures.append("no test ran")
    for failure in failures:
        print(f"FAILED {failure}")
    print(f"{total['passed']} passed, {len(failures)} failed, {total['skipped']} skipped")
    return 1 if failures else 0


def function(test: str) -> str:
    """The test without its parameters."""
    return test.partition("[")[0]


def outcomes(folder: Path, run: str) -> dict[str, Outcome]:
    """Test -> outcome over all ranks of a run."""
    found: dict[str, Outcome] = {}
    for path in sorted(folder.glob(f"{run}.*.jsonl")):
        for line in path.read_text().splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue  # the rank was ended while it wrote
            outcome, reason = entry["outcome"], entry["reason"].removeprefix("Skipped: ")
            if outcome == "skipped" and not re.search(f"{MACHINE}|{LAYOUT}", reason):
                outcome, reason = "failed", f"skipped, and tests/tally.py does not allow it: {reason}"
            before = found.get(entry["test"], (ORDER[0], ""))[0]
            if ORDER.index(outcome) >= ORDER.index(before):
                found[entry["test"]] = (outcome, reason)
    return found


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
