"""The command line in this process, and a file of models for it."""

from __future__ import annotations

import contextlib
import io
import subprocess
import sys
from unittest import mock

from aropt.cli import main as cli

MODEL = """
import torch
from torch import nn
from torch.nn import functional as F

class Model(nn.Module):
    capacity = 20

    def __init__(self, kind="causal"):
        super().__init__()
        torch.manual_seed(0)
        self.kind = kind
        self.embed, self.qkv, self.out = nn.Embedding(11, 8), nn.Linear(8, 24), nn.Linear(8, 11)

    def forward(self, ids):
        x = self.embed(ids)
        if self.kind == "branch" and x.sum() > 0:
            x = x * 2
        if self.kind == "cumsum":
            x = x.cumsum(1)
        q, k, v = (y[:, None] for y in self.qkv(x).chunk(3, -1))
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=self.kind != "bidirectional")[:, 0]
        return self.out(x)

def good(): return Model()
def branch(): return Model("branch")
def bidirectional(): return Model("bidirectional")
def cumsum(): return Model("cumsum")
def broken():
    model = Model()
    model.qkv.weight.data[0, 0] = float("nan")
    return model
def number(): return 3
"""
QUICK = ["--runs", "0", "--target", "eager"]


def aropt(*args: object) -> subprocess.CompletedProcess[str]:
    """Runs the command line in this process: what a process of its own would print and exit with."""
    out, err = io.StringIO(), io.StringIO()
    argv = mock.patch.object(sys, "argv", ["aropt", *map(str, args)])
    with argv, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            cli.main()
            code = 0
        except SystemExit as done:
            code = int(done.code or 0)
    return subprocess.CompletedProcess(args, code, out.getvalue(), err.getvalue())


def refused(done: subprocess.CompletedProcess[str], code: int, *words: str) -> None:
    """One message with these words, this exit status, no traceback."""
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    for word in words:
        assert word in done.stderr, f"{word!r} not in:\n{done.stderr}"
