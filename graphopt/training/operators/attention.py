"""Attention, and the rotary embedding of positions.

Scaled dot products: Vaswani et al., arXiv 1706.03762; groups of queries that share keys: Ainslie et
al., arXiv 2305.13245; rotation: Su et al., arXiv 2104.09864.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from graphopt.training.operators.element_types import torch_type
from graphopt.training.operators.operator_types import Table


def heads_of(x: Tensor, count: int) -> Tensor:
    """From [batch, steps, heads * size] to [batch, heads, steps, size]."""
    return x.reshape(*x.shape[:-1], count, x.shape[-1] // count).transpose(1, 2)


def joined(x: Tensor) -> Tensor:
    """From [batch, heads, steps, size] to [batch, steps, heads * size]."""
    return x.transpose(1, 2).flatten(2)


def mask_of(is_allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to products: 0 where attention may go, and minus infinity elsewhere."""
    zero = torch.zeros((), dtype=dtype, device=is_allowed.device)
    return torch.where(is_allowed, zero, float("-inf"))


def within(
    queries: int, keys: int, offset: int | Tensor, left: int, right: int, device: torch.device
) -> Tensor:
    """Whether a query, at its place plus the offset, may look at a key: bool [..., queries, keys].

    Args:
        queries: how many.
        keys: how many.
        offset: of the first query; or one for each of a batch, of shape [batch, 1, 1, 1].
        left: how far back it may look; below 0 without end.
        right: how far ahead; below 0 without end.
        device: where the result is made.
    """
    places = torch.arange(queries, device=device)[:, None] + offset
    ahead = torch.arange(keys, device=device) - places
    allowed = torch.ones_like(ahead, dtype=torch.bool)
    if left >= 0:
        allowed = allowed & (ahead >= -left)
    if right >= 0:
        allowed = allowed & (ahead <= right)
    return allowed


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float = 0.0,
    precision: torch.dtype | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Attention over heads.

    Args:
        q: queries, of shape [batch, heads, steps, size].
        k: keys; may have fewer heads, each of which serves as many queries.
        v: values, with the heads of the keys.
        bias: is added to the products; broadcasts to [batch, heads, steps, keys]. A query that it
            keeps from all keys gives zeros.
        scale: of the products.
        softcap: products are bent so as to stay below it; 0 for none.
        precision: of the softmax.

    Returns:
        What is attended to, and the products: scaled, bent, with the bias, and after the softmax.
    """
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    # Each operand gets its half, so that products of halves do not overflow.
    half = math.sqrt(abs(scale))
    products = (q * half) @ (k * math.copysign(half, scale)).transpose(-1, -2)
    bent = softcap * torch.tanh(products / softcap) if softcap else products
    scores = bent if bias is None else bent + bias
    if bias is None:
        shares = functional.softmax(scores, -1, dtype=precision)
    else:
        # Of a query that looks at nothing there is no softmax, and no gradient.
        is_shut = (bias == float("-inf")).all(-1, keepdim=True)
        shares = functional.softmax(scores.masked_fill(is_shut, 0), -1, dtype=precision)
        shares = shares.masked_fill(is_shut, 0)
    shares = shares.to(q.dtype)
    return shares @ v, (products, bent, scores, shares)


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    lengths: Tensor | None = None,
    *,
    output_count: int,
    is_causal: int = 0,
    kv_num_heads: int | None = None,
    left_window_size: int = -1,
    q_num_heads: int | None = None,
    qk_matmul_output_mode: int = 0,
    right_window_size: int = -1,
    scale: float | None = None,
    softcap: float = 0.0,
    softmax_precision: int | None = None,
) -> Tensor | tuple[Tensor, ...]:
    is_flat = q.ndim == 3
    if is_flat:
        assert q_num_heads is not None and kv_num_heads is not None
        q, k, v = heads_of(q, q_num_heads), heads_of(k, kv_num_heads), heads_of(v, kv_num_heads)
    offset: int | Tensor = 0
    if past_key is not None and past_value is not None:
        k, v = torch.cat((past_key, k), 2), torch.cat((past_value, v), 2)
        offset = past_key.shape[2]
    elif lengths is not None:
        offset = (lengths - q.shape[2]).reshape(-1, 1, 1, 1)
    queries, keys = q.shape[2], k.shape[2]
    terms = []
    if mask is not None:
        terms.append(_widened(mask, keys, q.dtype))
    if is_causal:
        right_window_size = 0 if right_window_size < 0 else min(right_window_size, 0)
    if left_window_size >= 0 or right_window_size >= 0:
        allowed = within(queries, keys, offset, left_window_size, right_window_size, q.device)
        terms.append(mask_of(allowed, q.dtype))
    if lengths is not None:
        is_there = torch.arange(keys, device=q.device) < lengths.reshape(-1, 1, 1, 1)
        terms.append(mask_of(is_there, q.dtype))
    y, products = attend(
        q,
        k,
        v,
        sum(terms[1:], terms[0]) if terms else None,
        1 / math.sqrt(q.shape[-1]) if scale is None else scale,
        softcap,
        None if softmax_precision is None else torch_type(softmax_precision),
    )
    y = joined(y) if is_flat else y
    return (y, k, v, products[qk_matmul_output_mode]) if output_count > 1 else y


def _widened(mask: Tensor, keys: int, dtype: torch.dtype) -> Tensor:
    """A mask as what is added to products; keys that it says nothing of are shut out."""
    bias = mask_of(mask, dtype) if mask.dtype == torch.bool else mask
    missing = keys - bias.shape[-1]
    return functional.pad(bias, (0, missing), value=float("-inf")) if missing > 0 else bias


def rotated(
    x: Tensor, cosines: Tensor, sines: Tensor, is_interleaved: bool, size: int = 0
) -> Tensor:
    """Numbers in pairs turned by angles.

    Args:
        x: of shape [batch, heads, steps, size of a head].
        cosines: of the angles; broadcasts to [batch, 1, steps, pairs].
        sines: likewise.
        is_interleaved: a pair is two neighbours; else one of each half.
        size: how many of a head are turned; 0 stands for all.
    """
    turned, kept = (x[..., :size], x[..., size:]) if size else (x, x[..., :0])
    if is_interleaved:
        first, second = turned[..., 0::2], turned[..., 1::2]
    else:
        first, second = turned.chunk(2, -1)
    parts = cosines * first - sines * second, sines * first + cosines * second
    both = torch.stack(parts, -1).flatten(-2) if is_interleaved else torch.cat(parts, -1)
    return torch.cat((both, kept), -1) if size else both


def _rotary_embedding(
    x: Tensor,
    cosines: Tensor,
    sines: Tensor,
    positions: Tensor | None = None,
    *,
    interleaved: int = 0,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
) -> Tensor:
    if positions is not None:
        cosines, sines = cosines[positions], sines[positions]
    cosines, sines = cosines.unsqueeze(1), sines.unsqueeze(1)
    heads = heads_of(x, num_heads) if x.ndim == 3 else x
    y = rotated(heads, cosines, sines, bool(interleaved), rotary_embedding_dim)
    return joined(y) if x.ndim == 3 else y


OPERATORS: Table = {"Attention": _attention, "RotaryEmbedding": _rotary_embedding}
"""Of the standard domain."""
