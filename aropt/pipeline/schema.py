"""The schema of report.json, as models that refuse an unknown key. Nothing here imports torch."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
# JSON has no NaN, and an error may well be one: it is stored as null and shown as "not finite".
Number = Annotated[float | None, AfterValidator(lambda x: x if x is not None and math.isfinite(x) else None)]
Image = list[list[Annotated[int, Field(ge=0)]]]


class Strict(BaseModel):
    """Base: an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Tool(Strict):
    name: str
    version: str


class Env(Strict):
    python: str
    torch: str
    onnxruntime: str | None = None  # None: not installed
    transformers: str | None = None
    platform: str
    cpu: str
    gpu: str | None = None
    threads: PositiveInt


class Model(Strict):
    name: str
    source: str
    modality: Literal["image", "text", "tokens"]
    parameters: NonNegativeInt
    bytes: NonNegativeInt
    vocab: PositiveInt
    capacity: PositiveInt
    heldout: dict[str, Any] | None = None


class Change(Strict):
    before: NonNegativeInt
    after: NonNegativeInt


class Pass(Strict):
    """One pass. `bytes` are those touched by a decode step; of a reverted pass, `after` is what it would have been."""

    name: str
    status: Literal["applied", "skipped", "reverted"]
    reason: str = ""
    level: Literal["bitwise", "rounding", "distribution", "lossy", "retrained"]
    options: dict[str, Any] = {}
    seconds: NonNegative
    nodes: Change
    bytes: Change
    verify: dict[str, Number] = {}
    matches: list[str] = []
    rejected: list[tuple[str, str]] = []
    memory: dict[str, NonNegativeInt] = {}  # bytes of a sequence besides state, by what they are for


class Case(Strict):
    """One validated input. `ratio` is error over noise floor, `ties` the differing tokens below the floor."""

    name: str
    kind: Literal["greedy", "sampled", "ragged", "boundary", "stop"]
    prompt: NonNegativeInt
    tokens: NonNegativeInt
    error: Number
    floor: Number
    ratio: Number
    ties: NonNegativeInt
    status: Literal["pass", "fail"]


class Divergence(Strict):
    """The first op whose output is out of tolerance."""

    module: str
    node: str
    op: str
    error: Number
    where: str = ""  # which graph or part, where it is not an op of the model
    repro: str = ""  # a line of Python that shows it


class Coverage(Strict):
    """What the cases vary in: levels of each factor, pairs of levels that can meet and do, why others can't: pairs."""

    factors: dict[str, list[str]]
    requests: NonNegativeInt
    pairs: NonNegativeInt
    covered: NonNegativeInt
    excluded: dict[str, PositiveInt] = {}
    seed: int = 0


class Verification(Strict):
    status: Literal["pass", "fail"]
    coverage: Coverage | None = None
    metrics: dict[str, Number] = {}
    cases: list[Case] = []
    diverges: Divergence | None = None

    @model_validator(mode="after")
    def _has_evidence(self) -> Verification:
        failed = self.diverges or any(case.status == "fail" for case in self.cases)
        if self.status == "pass" and (failed or not (self.cases or self.metrics)):
            raise ValueError("status is pass, but a case failed, or diverges is set, or nothing was verified")
        return self


class Measurement(Strict):
    """Quantiles over n runs of one variant: the program as given, a peer, or aropt's."""

    variant: str
    phase: Literal["generate", "prefill", "decode"]
    median: NonNegative
    p10: NonNegative
    p90: NonNegative
    n: PositiveInt
    unit: Literal["s", "ms", "us", "tok/s"]


class Roofline(Strict):
    """`share`: the least time that the bytes of a step can take at that bandwidth, over the time measured."""

    variant: str = "aropt"
    bytes_per_step: NonNegativeInt
    bandwidth_gb_s: Positive
    share: NonNegative


class Sample(Strict):
    """The same prompt before and after: a text, or an image as rows of grey levels."""

    label: str
    before: str | Image
    after: str | Image
    same: bool
    kind: Literal["image", "text"]

    @model_validator(mode="after")
    def _is_of_its_kind(self) -> Sample:
        shapes = [None if isinstance(x, str) else [len(row) for row in x] for x in (self.before, self.after)]
        rows, is_text = shapes[0], self.kind == "text"
        if shapes[0] != shapes[1] or (rows is None) != is_text or (rows is not None and len({0, *rows}) != 2):
            raise ValueError("before and after are not two texts, or not two images of the same size, as kind says")
        if self.same and self.before != self.after:
            raise ValueError("same is true, but before and after differ")
        return self


class Artifact(Strict):
    path: str
    sha256: str
    bytes: NonNegativeInt


class Calls(Strict):
    """Whether the target steps, runs several rounds a call or the whole loop in one, and the milliseconds of each.

    `graphs`: those that run several rounds a call. `reason`: why a way was not to be had.
    """

    picked: str
    graphs: list[str] = []
    reason: str = ""
    verify: dict[str, Any] = {}
    tokens: NonNegativeInt = 0
    n: NonNegativeInt = 0
    ms: dict[str, Positive] = {}


class Drift(Strict):
    """What lossy passes changed, measured on the lowered program (see validate.drift). `steps`: [KL, top-1] a round."""

    kl: Number
    kl_max: Number
    top1: Number
    agreement: Number
    first: int
    measured: NonNegativeInt
    tokens: NonNegativeInt
    forwards: NonNegativeInt
    exact_forwards: NonNegativeInt
    rows: NonNegativeInt
    exact_rows: NonNegativeInt
    steps: list[tuple[Number, Number]]
    budget: dict[str, NonNegative]
    missed: str = ""
    quality: Number = None  # share of the ids of a task that are right; None: the model has no examples
    exact_quality: Number = None
    judged: NonNegativeInt = 0  # how many ids these are
    shift: Number = None  # of the distribution of ids that are drawn; None: they are those of the exact program
    drawn: NonNegativeInt = 0  # how many ids these are


class Memory(Strict):
    """Bytes: of weights; of one sequence's state by kind, with all rows of the capacity; and, measured, of all values
    that are held after a round of an answer of so many tokens.
    """

    weights: NonNegativeInt
    state: dict[str, NonNegativeInt]
    peak: NonNegativeInt = 0
    tokens: NonNegativeInt = 0


class Tried(Strict):
    """Ways of drafting that took turns on the model's prompts: `ms` of a turn, `ids` that a round gives, `rows`: the
    milliseconds of one round over so many rows without drafts, `left`: why others were not timed.
    """

    name: str
    kept: str = ""
    ms: dict[str, Positive] = {}
    ids: dict[str, Positive] = {}
    rows: dict[int, Positive] = {}
    left: dict[str, str] = {}
    prompts: NonNegativeInt = 0
    tokens: NonNegativeInt = 0


class Window(Strict):
    """An image by windows of s x s ids: rounds, and milliseconds (smallest and largest of n runs beside the median)."""

    window: PositiveInt
    rounds: PositiveInt
    median: Positive
    p10: Positive
    p90: Positive
    n: PositiveInt


class Report(Strict):
    """The content of report.json. `speedup` says how many times as fast aropt's variant is as the one named."""

    schema_version: Literal[1]
    tool: Tool
    env: Env
    model: Model
    target: str
    passes: list[Pass]
    verify: Verification
    bench: list[Measurement] = []
    speedup: dict[str, Positive] = {}
    roofline: Roofline | None = None
    calls: Calls | None = None
    memory: Memory | None = None
    tried: list[Tried] = []
    drift: Drift | None = None
    windows: list[Window] = []
    nodes: dict[str, dict[str, PositiveInt]] = {}
    samples: list[Sample] = []
    artifacts: list[Artifact] = []
    uncached: str = ""  # why the program stores no keys and values, if it does not
    notes: list[str] = []


class Timed(BaseModel):
    """The measurements of a report, if there are any, or of a benchmark that made nothing else."""

    bench: list[Measurement] = []
    speedup: dict[str, Positive] = {}
    roofline: Roofline | None = None
    notes: list[str] = []
