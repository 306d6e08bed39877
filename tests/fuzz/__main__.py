"""`python -m tests.fuzz [N] [--seed S]`: N mutants over the artifacts in turn; what is not allowed, and a table."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch

from tests.fuzz import ALLOWED, artifacts, read
from tests.fuzz.structure import mutant


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("number", nargs="?", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    counts: dict[str, Counter[str]] = {}
    start = time.time()
    with tempfile.TemporaryDirectory() as folder:
        outs = artifacts(Path(folder))
        expected = {name: read(out, None) for name, out in outs.items()}
        for number in range(arguments.number):
            name = list(outs)[number % len(outs)]
            changed, said = mutant(outs[name], Path(folder) / "mutant", arguments.seed + number)
            found = read(changed, None)
            kind = "same" if found == expected[name] else found.kind
            counts.setdefault(said.partition(":")[0], Counter())[kind] += 1
            if kind not in ALLOWED:
                print(f"{kind}: {name}, seed {arguments.seed + number}, {said}\n    {found.text[:300]}", flush=True)
    kinds = sorted({kind for count in counts.values() for kind in count})
    total = sum(counts.values(), Counter[str]())
    print(f"{'':<10}" + "".join(f"{kind:>10}" for kind in kinds))
    for name, count in [*sorted(counts.items()), ("all", total)]:
        print(f"{name:<10}" + "".join(f"{count[kind]:>10}" for kind in kinds))
    print(f"{total.total()} mutants in {time.time() - start:.0f} s")
    return int(any(kind not in ALLOWED for kind in kinds))


if __name__ == "__main__":
    sys.exit(main())
