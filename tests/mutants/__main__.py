"""Runs every mutant against the full and the short list of cases."""

import sys
import time

from tests.mutants import MUTANTS, check


def main() -> int:
    """Prints which case caught each mutant and where it was found, what the short list misses, and `caught K/N`."""
    start, caught, total, only_full = time.perf_counter(), 0, 0, []
    for name, base in ((name, base) for name, one in MUTANTS.items() for base in one.bases):
        verdict = check(name, base)
        total, caught = total + 1, caught + (not verdict.passed)
        if check(name, base, quick=True, explain=False).passed:
            only_full.append(f"{name} ({base})")
        failed = verdict.outcomes[-1]
        found = (verdict.diverges or {}).get("module") or "outside"
        line = "MISSED" if verdict.passed else f"{failed.case.name:16} {found:8} {failed.problem}"
        print(f"{name:30} {base:14} {line}"[:150], flush=True)
    print(f"only the full list of cases catches: {', '.join(only_full) or 'none'}")
    print(f"{len(MUTANTS)} kinds, {time.perf_counter() - start:.0f} s")
    print(f"caught {caught}/{total}")
    return int(caught < total)


sys.exit(main())
