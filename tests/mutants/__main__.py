"""Runs every mutant against validation, and prints what it missed; `--new`: those that show in a corner alone."""

import sys
import time
from collections import Counter

from tests.mutants import MUTANTS, check
from tests.mutants.corners import SLIPS, answers, problem


def main(new: bool) -> int:
    """Prints a line for each mutant, a table of the corners, and `caught K/N`."""
    start, missed = time.perf_counter(), 0
    caught, total = (0, 0) if new else everywhere()
    found: dict[tuple[str, str], Counter[str]] = {}
    for name in sorted(SLIPS, key=lambda n: SLIPS[n].base):
        one, began = SLIPS[name], time.perf_counter()
        line = problem(name)
        missed += not line
        line = line or ("MISSED" if len(set(map(str, answers(name)))) == 2 else "EQUIVALENT")
        print(f"{one.base:10}{one.family:12}{name:44}{time.perf_counter() - began:5.1f} s  {line}"[:170], flush=True)
        for key in (("base", one.base), ("family", one.family)):
            found.setdefault(key, Counter())[line if line.isupper() else "caught"] += 1
    for (kind, name), counts in sorted(found.items()):
        print(f"{kind:8}{name:14}caught {counts['caught']:3} of {counts.total():3}")
    print(f"{len(SLIPS)} kinds in corners, {time.perf_counter() - start:.0f} s, missed {missed}")
    print(f"caught {caught + len(SLIPS) - missed}/{total + len(SLIPS)}")
    return int(caught < total or missed > 0.02 * len(SLIPS))


def everywhere() -> tuple[int, int]:
    """Which case caught each mutant and where it was found, and what the short list of cases misses -> caught, all."""
    caught, total, only_full = 0, 0, []
    for name, base in ((name, base) for name, one in MUTANTS.items() for base in one.bases):
        seen = check(name, base)
        total, caught = total + 1, caught + (not seen.passed)
        if check(name, base, quick=True, explain=False).passed:
            only_full.append(f"{name} ({base})")
        failed = seen.outcomes[-1]
        found = (seen.diverges or {}).get("module") or "outside"
        line = "MISSED" if seen.passed else f"{failed.case.name:16} {found:8} {failed.problem}"
        print(f"{name:30} {base:14} {line}"[:150], flush=True)
    print(f"only the full list of cases catches: {', '.join(only_full) or 'none'}")
    return caught, total


sys.exit(main("--new" in sys.argv))
