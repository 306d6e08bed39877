"""Functions of models that mix a sequence, replaced by aropt's ops while a forward is captured.

The models of transformers, and much remote code, call the kernels of mamba_ssm, causal_conv1d and fla by these names
and arguments, as globals of their modules. What stands there is a loop over rows or chunks, which has no graph for all
lengths. `faithful.check` compares the captured graph with the module as it is.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from aropt.errors import Unsupported
from aropt.ir import ops

EPS = 1e-6  # in the length of queries and keys, as fla has it


def op(name: str, *args: Any) -> Any:
    """The op's results: while a forward is captured a node, else computed by its definition, which has gradients."""
    found = ops.load(name)
    return found.overload(*args) if torch.compiler.is_exporting() else found.reference(*args)


def fresh(name: str, **given: Any) -> None:
    """Raises Unsupported where a call goes on from other rows, or asks for what a plain forward doesn't need."""
    for argument, value in given.items():
        if value is not None and value is not False:
            raise Unsupported(
                what=f"{name} is called with {argument}",
                where=name,
                why="a plain forward starts from no state, and leaves none",
                hint="call the model as forward(ids): without a cache, and without packed sequences",
            )


def stepped(dt: Tensor, bias: Tensor | None, softplus: bool) -> Tensor:
    """The size of each step; `bias` broadcasts to it."""
    dt = dt if bias is None else dt + bias.to(dt.dtype)
    return functional.softplus(dt) if softplus else dt


def causal_conv1d_fn(
    hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None, **rest: Any
) -> Tensor:
    """[B, C, T] and [C, K]."""
    fresh("causal_conv1d_fn", **{n: rest.get(n) for n in ("seq_idx", "initial_states", "return_final_states")})
    y: Tensor = op("causal_conv1d", hidden_states.to(weight.dtype), weight, bias, None, None)[0]
    if activation is not None:
        from transformers.activations import ACT2FN

        y = ACT2FN[activation](y)
    return y.to(hidden_states.dtype)


def chunk_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    z: Tensor | None = None,
    **rest: Any,
) -> Tensor:
    """[B, T, H, P], [B, T, H], [H], [B, T, G, N] twice, [H]."""
    fresh("mamba2_chunk_scan", initial_states=initial_states, return_final_states=return_final_states, z=z,
          seq_idx=rest.get("seq_idx"))  # fmt: skip
    dt = stepped(dt, dt_bias, dt_softplus).clamp(*dt_limit)
    given = (x.float() for x in (hidden_states, dt, A, B, C))
    y: Tensor = op("ssd_scan", *given, None if D is None else D.float(), None, None)[0]
    return y


def selective_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    **rest: Any,
) -> Tensor:
    """[B, D, T] twice, [D, N], [B, N, T] twice, [D]."""
    fresh("mamba_selective_scan", return_last_state=return_last_state)
    dt = stepped(dt, None if delta_bias is None else delta_bias.unsqueeze(1), delta_softplus)
    given = (x.float() for x in (hidden_states, dt, A, B, C))
    y: Tensor = op("selective_scan", *given, None if D is None else D.float(), None, None)[0]
    return y if z is None else y * functional.silu(z)


def delta_rule(name: str) -> Callable[..., tuple[Tensor, None]]:
    """The function for `aropt::gated_delta` or `aropt::kda`."""

    def chunked(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        g: Tensor,
        beta: Tensor,
        chunk_size: int = 64,
        initial_state: Tensor | None = None,
        output_final_state: bool = False,
        use_qk_l2norm_in_kernel: bool = False,
        **rest: Any,
    ) -> tuple[Tensor, None]:
        """[B, T, H, K] twice, [B, T, H, V]."""
        fresh(name, initial_state=initial_state, output_final_state=output_final_state,
              cu_seqlens=rest.get("cu_seqlens"))  # fmt: skip
        q, k, v, decay, amount = (x.float() for x in (query, key, value, g, beta))
        if use_qk_l2norm_in_kernel:
            q, k = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + EPS) for x in (q, k))
        if k.shape[2] != v.shape[2]:
            q, k = (x.repeat_interleave(v.shape[2] // k.shape[2], 2) for x in (q, k))
        scale = rest.get("scale")
        o: Tensor = op(name, q * (q.shape[-1] ** -0.5 if scale is None else scale), k, v, decay, amount, None, None)[0]
        return o.to(query.dtype), None

    return chunked


def wkv(
    time_decay: Tensor, time_first: Tensor, key: Tensor, value: Tensor, state: Any = None, return_state: bool = False
) -> tuple[Tensor, None]:
    """[D] twice, [B, T, D] twice."""
    fresh("rwkv_linear_attention", state=state, return_state=return_state)
    y: Tensor = op("wkv", key.float(), value, -time_decay.exp(), time_first, None, None, None, None)[0]
    return y.to(key.dtype), None


def rnn_scan(
    self: nn.Module,
    hidden_states: Tensor,
    recurrent_gate: Tensor,
    reset: Tensor,
    recurrent_states: Tensor | None,
    acc_dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, None]:
    """RecurrentGemma's: [B, T, D] twice, [B, T, 1]."""
    fresh("_rnn_scan", recurrent_states=recurrent_states)
    y: Tensor = op("rg_lru", hidden_states.type(acc_dtype), (recurrent_gate * ~reset).type(acc_dtype), None, None)[0]
    return y.type(hidden_states.dtype), None


def lightning(
    self: Any, hidden_states: Tensor, attention_mask: Any = None, past_key_values: Any = None, **rest: Any
) -> tuple[Tensor, None]:
    """MiniMax's forward [B, T, D]: a scan whose decay is a constant of each head, so that each step has size 1."""
    fresh("MiniMaxLightningAttention", attention_mask=attention_mask, past_key_values=past_key_values)
    rows, heads = hidden_states.shape[:2], self.num_attention_heads
    qkv = self.act_fn(self.qkv_proj(hidden_states)).reshape(*rows, heads, 3 * self.head_dim)
    q, k, v = torch.split(qkv, self.head_dim, dim=3)
    y: Tensor = op("ssd_scan", v, torch.ones_like(v[..., 0]), -self.slope_rate.flatten(), k, q, None, None, None)[0]
    y = self.norm(y.reshape(*rows, heads * self.head_dim))
    y = self.out_proj(functional.sigmoid(self.output_gate(hidden_states)) * y)
    return y, None


KNOWN: dict[str, Callable[..., Any]] = {
    "causal_conv1d_fn": causal_conv1d_fn,
    "mamba2_chunk_scan": chunk_scan,
    "mamba_chunk_scan_combined": chunk_scan,
    "mamba_selective_scan": selective_scan,
    "selective_scan_fn": selective_scan,
    "torch_chunk_gated_delta_rule": delta_rule("gated_delta"),
    "chunk_gated_delta_rule": delta_rule("gated_delta"),
    "chunk_kimi_delta_attention": delta_rule("kda"),
    "rwkv_linear_attention": wkv,
}
METHODS: dict[tuple[str, str], Callable[..., Any]] = {  # of classes that loop in a method of their own
    ("RecurrentGemmaRglru", "_rnn_scan"): rnn_scan,
    ("MiniMaxLightningAttention", "forward"): lightning,
}


@contextlib.contextmanager
def known_mixers(model: nn.Module) -> Iterator[None]:
    """Puts ops in the place of functions that the files of a model's modules hold by a known name, and of METHODS."""
    classes = {type(module) for module in model.modules()}
    files: set[Any] = {sys.modules[kind.__module__] for kind in classes if kind.__module__ in sys.modules}
    found: list[tuple[Any, str, Any]] = [(f, n, KNOWN[n]) for f in files for n in KNOWN if callable(vars(f).get(n))]
    found += [
        (c, n, made) for (kind, n), made in METHODS.items() for c in classes if c.__name__ == kind and n in vars(c)
    ]
    before = [(home, name, vars(home)[name]) for home, name, _ in found]
    for home, name, made in found:
        setattr(home, name, made)
    try:
        yield
    finally:
        for home, name, function in before:
            setattr(home, name, function)
