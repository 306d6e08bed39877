"""Control: walks, folds and rebuilding over random trees, against definitions that a reader can check."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from aropt.ir.control import (
    Call,
    Control,
    If,
    Loop,
    Seq,
    calls,
    conditions,
    fold,
    loops,
    map_parts,
    parts,
    reads,
    rewrite,
    sequence,
    transform,
    walk,
    writes,
)  # fmt: skip

NAMES = st.sampled_from("abcdef")
BOUND = st.dictionaries(NAMES, NAMES, max_size=2)


@dataclass(frozen=True)
class RoleLoop(Loop):
    """A loop with a field more, as later versions have."""

    decides: str = "?"


@dataclass(frozen=True)
class RoleIf(If):
    why: str = "?"


@dataclass(frozen=True)
class RoleSeq(Seq):
    notes: dict[str, str] = field(default_factory=dict)


CALLS = st.builds(Call, NAMES, BOUND, BOUND)
CONTROLS: Any = st.recursive(
    CALLS,
    lambda inner: st.one_of(
        st.builds(Seq, st.lists(inner, max_size=3).map(tuple)),
        st.builds(RoleSeq, st.lists(inner, max_size=3).map(tuple), BOUND),
        st.builds(RoleIf, NAMES, inner, inner, NAMES),
        st.builds(RoleLoop, st.sampled_from(["positions", "draft"]), NAMES, inner, BOUND, BOUND, NAMES),
    ),
    max_leaves=12,
)


def nodes(value: Any) -> Iterator[Control]:
    """All nodes, found by the fields of dataclasses alone."""
    if isinstance(value, tuple):
        for one in value:
            yield from nodes(one)
    elif isinstance(value, Control):
        yield value
        for one in fields(value):
            yield from nodes(getattr(value, one.name))


def flattened(node: Any) -> Any:
    """What `data` gives, with Seqs in Seqs spliced and Seqs of one node replaced by it."""
    name, values, inner = node
    inner = [flattened(one) for one in inner]
    if "Seq" in name:
        inner = [one for part in inner for one in (part[2] if "Seq" in part[0] else [part])]
    return inner[0] if "Seq" in name and len(inner) == 1 else [name, values, inner]


def data(control: Control) -> Any:
    """A node's class, its own fields, and its parts: none of it by the module under test."""
    own = {f.name: getattr(control, f.name) for f in fields(control)}
    inner = [one for v in own.values() for one in (v if isinstance(v, tuple) else [v]) if isinstance(one, Control)]
    values = {k: v for k, v in own.items() if not isinstance(v, (Control, tuple))}
    return [kind(control), json.loads(json.dumps(values)), [data(one) for one in inner]]


def kind(control: Control) -> str:
    return type(control).__name__


@settings(deadline=None)
@given(CONTROLS)
def test_walk_sees_each_node_once_outer_ones_first(control: Control) -> None:
    assert [id(n) for n in walk(control)] == [id(n) for n in nodes(control)]
    assert all(part in walk(node) for node in walk(control) for part in parts(node))


@settings(deadline=None)
@given(CONTROLS)
def test_identity_only_flattens(control: Control) -> None:
    """Fields that the algebra does not know are kept."""
    for same in (transform(control, lambda node: node), rewrite(control, lambda call: [call])):
        assert data(same) == flattened(data(control))
        assert transform(same, lambda node: node) == same
    assert list(calls(control)) == list(calls(transform(control, lambda node: node)))


@settings(deadline=None)
@given(CONTROLS)
def test_transform_visits_each_node_after_its_parts(control: Control) -> None:
    seen: list[Control] = []

    def visit(node: Control) -> Control:
        assert Counter(map(kind, parts(node))) <= Counter(map(kind, seen))
        seen.append(node)
        return node

    result = transform(control, visit)
    assert Counter(map(kind, walk(control))) == Counter(map(kind, seen))
    assert seen[-1] is result or sequence(seen[-1]) == (result,)


@settings(deadline=None)
@given(CONTROLS)
def test_fold_agrees_with_walk(control: Control) -> None:
    def one(*given: Any) -> Counter[str]:
        node, *inner = given
        return Counter([kind(node)]) + sum(inner, Counter())

    counted = fold(control, call=one, seq=lambda found: sum(found, Counter(["Seq"])), if_=one, loop=one)
    assert counted == Counter("Seq" if isinstance(n, Seq) else kind(n) for n in walk(control))


@settings(deadline=None)
@given(CONTROLS)
def test_what_is_read_and_written(control: Control) -> None:
    found = list(nodes(control))
    called = [n for n in found if isinstance(n, Call)]
    tested = {n.cond for n in found if isinstance(n, If)} | {n.until for n in found if isinstance(n, Loop)}
    assert list(calls(control)) == called
    assert loops(control) == [n for n in found if isinstance(n, Loop)]
    assert loops(control, "draft") == [n for n in found if isinstance(n, Loop) and n.kind == "draft"]
    assert conditions(control) == tested
    assert reads(control) == tested | {v for c in called for v in c.reads.values()}
    emitted = {v for n in found if isinstance(n, Loop) for v in n.emits.values()}
    assert writes(control) == emitted | {v for c in called for v in c.writes.values()}


@settings(deadline=None)
@given(CONTROLS)
def test_what_is_written_on_every_path(control: Control) -> None:
    """All paths of up to one round a loop, each with what it writes."""

    def paths(node: Control) -> list[frozenset[str]]:
        match node:
            case Call():
                return [frozenset(node.writes.values())]
            case If(_, then, orelse):
                return list({*paths(then), *paths(orelse)})
            case Loop():
                ended = frozenset(node.emits.values())
                return list({ended, *(ended | path for path in paths(node.body))})
            case Seq(body):
                found = {frozenset[str]()}
                for part in body:
                    found = {a | b for a in found for b in paths(part)}
                return list(found)

    assert writes(control, certain=True) == frozenset.intersection(*paths(control))


@settings(deadline=None)
@given(CONTROLS, st.integers(0, 2))
def test_rewrite_replaces_each_call(control: Control, times: int) -> None:
    want = [call for call in calls(control) for _ in range(times)]
    assert list(calls(rewrite(control, lambda call: [call] * times))) == want
    named = [loop.decides for loop in loops(control) if isinstance(loop, RoleLoop)]
    after = rewrite(control, lambda call: [call] * times)
    assert named == [loop.decides for loop in loops(after) if isinstance(loop, RoleLoop)]


def test_a_change_from_above_sees_a_node_before_its_parts() -> None:
    call = Call("g", {}, {})
    inner = Seq((call, Seq((call, call))))
    assert map_parts(inner, lambda part: part) == Seq((call, call, call))
    assert map_parts(Seq((Seq((call,)),)), lambda part: part) == Seq((call,))
    assert map_parts(Seq((call, call)), lambda part: Seq(())) == Seq(())
