"""Models with recurrent state: plain decoding beside transformers', and what drafts and trees of them are worth.

    python -m perf.recurrent [--models DIR] [--prompts 16] [--runs 9] [--threads 1] [--only SECTION]

    plain       aropt without drafts beside transformers' generate with its own cache
    speculated  drafts of several kinds beside plain decoding
    packed      one call for 16 nodes, beside 16 steps, each on its parent's state, and beside a batch of all paths

Models are text-ar, text-mamba2, text-hybrid, text-deltanet and their drafts, of DIR or of the reference models' folder.
Prompts are windows of 64 bytes of held-out documents, answers 200 bytes, greedy, one sequence. The ways of a section
take turns in one process, and must give the same ids but for ties. Times are medians of the runs on each prompt; of all
prompts their sums are compared, and p10 and p90 are of the prompts. Writes perf/results/recurrent.json, prints tables.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch

from aropt.bench.drafted import TIE, difference, rounds, unchecked
from aropt.bench.ratios import over
from aropt.errors import UsageError
from aropt.ir.program import Program
from aropt.loops.trees import Shape
from aropt.models import CHECKPOINTS, text
from aropt.targets.ort.threads import own_process
from perf.canvas import ROOT, environment
from perf.drafts import NEW, PROMPT, prompts
from perf.packed import COPIED, ONE, PATHS, SETTLED, STEPS, Nodes
from perf.turns import Row, faster, in_turns, markdown, mean, told

RESULTS = ROOT / "perf" / "results" / "recurrent.json"
RECURRENT = ("text-mamba2", "text-hybrid", "text-deltanet")
REPEATS = 20  # calls of a run of the section packed
MODEL = "tree-draft:draft={draft},shape="
WAYS = {
    "text, chain:4": "tree-draft:draft=text,shape=chain:4",
    **{
        f"draft model, {shape}": MODEL + shape
        for shape in ("chain:3", "chain:5", "2x1x1", "grown:3x2:4", "grown:5x2:7")
    },
    "self, chain:4": "tree-draft:draft=self,shape=chain:4",
    "ngram-draft, 4": "ngram-draft:drafts=4",
}
SMALLEST = {"text-hybrid": "text-mamba2-draft", "text-deltanet": "text-mamba2-draft"}  # all read the same bytes
PACKED = {"1x2x2x2": "1x2x2x2", "the likeliest paths": "0-0-0-1-1-2-4-4-5-6-7-8-9-10-11"}


@dataclass(frozen=True)
class Work:
    """Where models are, and how much is measured."""

    models: Path
    prompts: int
    runs: int
    threads: int

    def folder(self, name: str) -> Path:
        homes = (self.models, CHECKPOINTS)
        return next((h / name for h in homes if (h / name / "model.safetensors").is_file()), self.models / name)

    def missing(self, name: str, drafted: bool) -> list[str]:
        wanted = [name, self.draft(name)] if drafted else [name]
        return [one for one in wanted if not self.folder(one).is_dir()]

    def draft(self, name: str) -> str:
        """The model that drafts for another: where its own takes half as long as itself, a smaller one."""
        return SMALLEST.get(name, f"{name}-draft")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, default=CHECKPOINTS, help="folder of Hugging Face directories")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--runs", type=int, default=9, help="of each way and prompt; medians")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", choices=SECTIONS, metavar="SECTION", help=", ".join(SECTIONS))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    own_process()
    work = Work(args.models, args.prompts, args.runs, args.threads)
    about = {"env": environment(args.threads), "prompt": PROMPT, "new": NEW, "prompts": args.prompts, "runs": args.runs}
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.is_file() else {}
    for section in [args.only] if args.only else SECTIONS:
        models, measure, table, drafted = SECTIONS[section]
        for name in models:
            if missing := work.missing(name, drafted):
                print(f"{section}: {name} is not measured, {' and '.join(missing)} missing", flush=True)
                continue
            found.setdefault(section, {})[name] = about | measure(work, name)
            RESULTS.write_text(json.dumps(found, indent=1) + "\n")
        if section in found:
            print(f"\n### {section}\n\n{table(found[section])}\n", flush=True)


@lru_cache(maxsize=1)
def captured(folder: Path) -> Program:
    import aropt

    return aropt.capture(str(folder), capacity=text.CAPACITY)


@lru_cache(maxsize=1)
def module(folder: Path) -> Any:
    return text.load(folder).eval()


def optimized(work: Work, name: str, chosen: str = "") -> Any:
    """The model with the default passes and perhaps one more. Raises UsageError where that one does not apply."""
    passes = [chosen.format(draft=work.folder(work.draft(name)))] if chosen else []
    return unchecked(captured(work.folder(name)), passes, work.threads)


def answered(program: Any, prompt: list[int], **options: Any) -> list[int]:
    ids: list[int] = program.generate([prompt], NEW, plain=True, **options)[0]
    return ids


def generated(folder: Path, prompt: list[int]) -> list[int]:
    """By transformers' generate, with its own cache."""
    ids, options = torch.tensor([prompt]), {"eos_token_id": None, "pad_token_id": 0, "use_cache": True}
    mask = torch.ones_like(ids)
    with torch.inference_mode():
        out = module(folder).generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=NEW, **options)
    return list(out[0, len(prompt) :].tolist())


def same(rows: list[Row], way: str) -> str:
    """On how many prompts a way gave the ids of the others, and where ties made a difference."""
    ties = [str(found["at"]) for row in rows if (found := row["differs"].get(way))]
    return f"{len(rows) - len(ties)} of {len(rows)}" + (f" (ties at {', '.join(ties)})" if ties else "")


def plain(work: Work, name: str) -> dict[str, Any]:
    program, folder, rows = optimized(work, name), work.folder(name), []
    for prompt in prompts(work.prompts):
        calls = {"transformers": partial(generated, folder, prompt), "aropt": partial(answered, program, prompt)}
        ms, ids = in_turns(calls, work.runs)
        differs = difference(module(folder), prompt, ids["transformers"], ids["aropt"])
        rows.append({"ms": ms, "differs": {"aropt": differs}})
    return {"rows": rows, "faster": faster(rows, "transformers", "aropt")}


def plain_table(found: dict[str, Any]) -> str:
    head = ["model", "same ids", "transformers", "aropt", "as fast", "p10 to p90", "prompts", "runs of each"]
    lines = []
    for name, f in found.items():
        ms = [mean(f["rows"], way) for way in ("transformers", "aropt")]
        lines.append([name, same(f["rows"], "aropt"), *ms, *told(f["faster"]), f["prompts"], f["runs"]])
    return markdown(head, lines)


def speculated(work: Work, name: str) -> dict[str, Any]:
    """`round`: how many times as long as a plain step a round takes; ids a round divided by it is the speed."""
    programs, rows = {"plain": optimized(work, name)}, list[Row]()
    for way, chosen in WAYS.items():
        with contextlib.suppress(UsageError):  # not every pass takes recurrent state
            programs[way] = optimized(work, name, chosen)
    tried = [way for way in WAYS if way in programs]
    for prompt in prompts(work.prompts):
        counts = {way: rounds(program, prompt, NEW)[1] for way, program in programs.items()}
        ms, ids = in_turns({way: partial(answered, p, prompt) for way, p in programs.items()}, work.runs)
        differs = {way: difference(module(work.folder(name)), prompt, ids["plain"], ids[way]) for way in tried}
        rows.append({"ms": ms, "rounds": counts, "differs": differs})
    ways = {}
    for way in tried:
        ids, speed = over([(NEW, row["rounds"][way]) for row in rows]), faster(rows, "plain", way)
        ways[way] = {"ids": ids, "faster": speed, "round": ids["all"] / speed["all"]}
    return {"rows": rows, "ways": ways}


def speculated_table(found: dict[str, Any]) -> str:
    head = ["model", "drafts", "200 ids", "ids a round", "p10 to p90", "a round costs", "as fast as plain",
            "p10 to p90", "same ids", "prompts", "runs of each"]  # fmt: skip
    lines = []
    for name, f in found.items():
        rows, count = f["rows"], (f["prompts"], f["runs"])
        lines.append([name, "none", mean(rows, "plain"), "1.00", "", "1.00x", "1.00x", "", "", *count])
        for way, w in f["ways"].items():
            lines.append([name, way, mean(rows, way), *told(w["ids"], ""), f"{w['round']:.2f}x", *told(w["faster"]),
                          same(rows, way), *count])  # fmt: skip
    return markdown(head, lines)


def packed(work: Work, name: str) -> dict[str, Any]:
    """{trees: {tree: {rows, error: the largest difference of a logit, slower: {way: than one call}}}}."""
    found: dict[str, Any] = {}
    for tree, written in PACKED.items():
        shape, rows = Shape.parse(written), list[Row]()
        nodes = Nodes(captured(work.folder(name)), shape, -(-(PROMPT + NEW) // 64) * 64, work.threads)
        for prompt in prompts(work.prompts):
            calls, error = nodes.ways(prompt, prompt[: shape.nodes])
            rows.append({"ms": in_turns(calls, work.runs, REPEATS)[0], "error": error()})
        furthest = max(float(row["error"]) for row in rows)
        if furthest > TIE:
            raise SystemExit(f"{name}, {tree}: logits differ by {furthest:.2g}")
        slower = {way: faster(rows, way, ONE) for way in (SETTLED, STEPS, PATHS, COPIED)}
        sizes = {"nodes": shape.nodes, "depth": shape.deepest, "paths": len(nodes.leaves())}
        found[tree] = {"shape": written, **sizes, "rows": rows, "error": furthest, "slower": slower}
    return {"trees": found}


def packed_table(found: dict[str, Any]) -> str:
    head = ["model", "tree", "way", "a tree", "times one call", "p10 to p90", "logits differ by", "prompts",
            "runs of each"]  # fmt: skip
    lines = []
    for name, f in found.items():
        for tree, t in f["trees"].items():
            title = f"{tree}: {t['nodes']} nodes, {t['depth']} deep, {t['paths']} paths"
            for way in (ONE, SETTLED, STEPS, PATHS, COPIED):
                ratio = told(t["slower"][way]) if way != ONE else ("", "")
                lines.append([name, title, way, mean(t["rows"], way), *ratio, f"{t['error']:.1g}", f["prompts"],
                              f"{f['runs']} of {REPEATS}"])  # fmt: skip
    return markdown(head, lines)


# models, what is measured, its table, whether that needs the models' drafts
SECTIONS = {
    "plain": (RECURRENT, plain, plain_table, False),
    "speculated": (("text-ar", *RECURRENT), speculated, speculated_table, True),
    "packed": (RECURRENT[:2], packed, packed_table, False),
}

if __name__ == "__main__":
    main()
