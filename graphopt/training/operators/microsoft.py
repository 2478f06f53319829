"""Operators of onnxruntime's own that its fusions of transformers write.

By the text of `docs/ContribOperators.md` of onnxruntime.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from graphopt.errors import ModelError
from graphopt.training.operators.arguments import integer
from graphopt.training.operators.attention import attend, heads_of, joined, mask_of, rotated, within
from graphopt.training.operators.elementwise import gelu, swish
from graphopt.training.operators.normalization import layer, root_mean_square
from graphopt.training.operators.operator_types import Table

_EPSILON = 1e-12
_MASKED = -10_000.0


def _bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    return gelu(x + bias)


def _fast_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    return gelu(x if bias is None else x + bias, approximate="tanh")


def _quick_gelu(x: Tensor, *, alpha: float = 1.702) -> Tensor:
    return swish(x, alpha=alpha)


def _fused_matmul(
    a: Tensor,
    b: Tensor,
    *,
    alpha: float = 1.0,
    transA: int = 0,  # noqa: N803
    transB: int = 0,  # noqa: N803
    transBatchA: int = 0,  # noqa: N803
    transBatchB: int = 0,  # noqa: N803
) -> Tensor:
    product = torch.matmul(_turned(a, transA, transBatchA), _turned(b, transB, transBatchB))
    return product if alpha == 1 else product * alpha


def _turned(x: Tensor, is_transposed: int, is_batch_second: int) -> Tensor:
    """With its batch axes in front and its matrices as they are multiplied."""
    if is_batch_second:
        x = x.movedim(0, -2)
    return x.transpose(-1, -2) if is_transposed and x.ndim > 1 else x


def _skip_layer(
    x: Tensor,
    skip: Tensor,
    scale: Tensor,
    shift: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    output_count: int,
    epsilon: float = _EPSILON,
) -> Tensor | tuple[Tensor, ...]:
    total = x + skip if bias is None else x + skip + bias
    results = layer(total, scale, shift, output_count=min(output_count, 3), epsilon=epsilon)
    return (*results, total) if isinstance(results, tuple) else results


def _skip_root_mean_square(
    x: Tensor,
    skip: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    output_count: int,
    epsilon: float = _EPSILON,
) -> Tensor | tuple[Tensor, ...]:
    total = x + skip if bias is None else x + skip + bias
    y = root_mean_square(total, scale, epsilon=epsilon)
    # The outputs between are never filled.
    return (y, y.new_zeros(0), y.new_zeros(0), total) if output_count > 1 else y


def _embed_layer(
    words: Tensor,
    segments: Tensor | None,
    word_table: Tensor,
    position_table: Tensor,
    segment_table: Tensor | None,
    scale: Tensor,
    shift: Tensor,
    mask: Tensor | None = None,
    positions: Tensor | None = None,
    *,
    epsilon: float = _EPSILON,
    mask_index_type: int = 0,
) -> tuple[Tensor, ...]:
    if positions is None:
        positions = torch.arange(words.shape[1], device=words.device)
    total = functional.embedding(words, word_table) + functional.embedding(
        positions, position_table
    )
    if segments is not None and segment_table is not None:
        total = total + functional.embedding(segments, segment_table)
    y = layer(total, scale, shift, output_count=1, epsilon=epsilon)
    assert isinstance(y, Tensor)
    lengths = torch.zeros(words.shape[0], dtype=torch.int32, device=words.device)
    if mask is not None:
        lengths = mask.sum(1).to(torch.int32)
    return y, lengths, total


def _mask(
    mask: Tensor | None,
    queries: int,
    keys: int,
    is_causal: bool,
    masked: float,
    like: Tensor,
) -> Tensor | None:
    """What is added to products, of a mask in one of its forms; None where it is nothing.

    Args:
        mask: of 0 and 1, of shape [batch, keys], [batch, queries, keys] or [batch, 1, ...]; or how
            many keys there are, of shape [batch].
        queries: how many.
        keys: how many.
        is_causal: queries do not look ahead.
        masked: what is added where attention does not go.
        like: of the batch, and of the type of the products.
    """
    bias = None
    if mask is not None:
        if mask.ndim == 1 and mask.shape[0] != like.shape[0]:
            raise ModelError("a mask of where keys start and end cannot be computed here")
        if mask.ndim == 1:
            mask = torch.arange(keys, device=mask.device) < mask[:, None]
        if mask.ndim == 4:
            # Of as many steps as there can be.
            mask = mask[:, :, keys - queries : keys, :keys]
        elif mask.ndim == 3:
            mask = mask[:, None]
        else:
            mask = mask[:, None, None]
        bias = (1 - mask.to(like.dtype)) * masked
    if is_causal:
        ahead = mask_of(within(queries, keys, keys - queries, -1, 0, like.device), like.dtype)
        bias = ahead if bias is None else bias + ahead
    return bias


def _with(bias: Tensor | None, other: Tensor | None) -> Tensor | None:
    if bias is None or other is None:
        return other if bias is None else bias
    return bias + other


def _attention(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    past: Tensor | None = None,
    attention_bias: Tensor | None = None,
    *,
    num_heads: int,
    mask_filter_value: float = _MASKED,
    qkv_hidden_sizes: Sequence[int] | None = None,
    scale: float = 0.0,
    unidirectional: int = 0,
) -> tuple[Tensor, Tensor]:
    all_three = x @ weight if bias is None else x @ weight + bias
    sizes = qkv_hidden_sizes or [all_three.shape[-1] // 3] * 3
    q, k, v = (heads_of(part, num_heads) for part in torch.split(all_three, list(sizes), -1))
    if past is not None:
        k, v = torch.cat((past[0], k), 2), torch.cat((past[1], v), 2)
    added = _mask(mask, q.shape[2], k.shape[2], bool(unidirectional), mask_filter_value, q)
    y, _ = attend(q, k, v, _with(added, attention_bias), scale or 1 / math.sqrt(q.shape[-1]))
    present = torch.stack((k, v)) if k.shape == v.shape else k
    return joined(y), present


def _multi_head_attention(
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    attention_bias: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    *,
    num_heads: int,
    mask_filter_value: float = _MASKED,
    scale: float = 0.0,
    unidirectional: int = 0,
) -> tuple[Tensor, ...]:
    if query.ndim == 5:
        # [batch, steps, heads, 3, size]
        query, key, value = (part.flatten(2) for part in query.unbind(3))
    elif key is not None and key.ndim == 5:
        key, value = (part.flatten(2) for part in key.unbind(3))
    assert key is not None and value is not None
    parts = [query, key, value]
    if bias is not None:
        widths = [query.shape[-1], query.shape[-1], bias.shape[0] - 2 * query.shape[-1]]
        parts = [
            part if part.ndim == 4 else part + own
            for part, own in zip(parts, torch.split(bias, widths), strict=True)
        ]
    q, k, v = (part if part.ndim == 4 else heads_of(part, num_heads) for part in parts)
    if past_key is not None and past_value is not None:
        k, v = torch.cat((past_key, k), 2), torch.cat((past_value, v), 2)
    added = _mask(mask, q.shape[2], k.shape[2], bool(unidirectional), mask_filter_value, q)
    y, products = attend(q, k, v, _with(added, attention_bias), scale or 1 / math.sqrt(q.shape[-1]))
    return joined(y), k, v, products[2]


def _grouped_query_attention(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    past_key: Tensor | None,
    past_value: Tensor | None,
    last_keys: Tensor,
    total: Tensor,
    cosines: Tensor | None = None,
    sines: Tensor | None = None,
    positions: Tensor | None = None,
    attention_bias: Tensor | None = None,
    *,
    kv_num_heads: int,
    num_heads: int,
    do_rotary: int = 0,
    local_window_size: int = -1,
    rotary_interleaved: int = 0,
    scale: float = 0.0,
    softcap: float = 0.0,
    smooth_softmax: int = 0,
) -> tuple[Tensor, ...]:
    if smooth_softmax > 0:
        raise ModelError("GroupQueryAttention with smooth_softmax cannot be computed in torch")
    if key is None or value is None:
        size = query.shape[-1] // (num_heads + 2 * kv_num_heads)
        widths = [num_heads * size, kv_num_heads * size, kv_num_heads * size]
        query, key, value = torch.split(query, widths, -1)
    q, k, v = heads_of(query, num_heads), heads_of(key, kv_num_heads), heads_of(value, kv_num_heads)
    steps, before = q.shape[2], 0 if past_key is None else past_key.shape[2]
    if integer(total) != before + steps:
        raise ModelError("GroupQueryAttention whose cache has a fixed size cannot be computed here")
    if do_rotary and cosines is not None and sines is not None:
        if positions is None:
            positions = torch.arange(before, before + steps, device=q.device)[None]
        angles = cosines[positions][:, None], sines[positions][:, None]
        turned = 2 * cosines.shape[-1] if 2 * cosines.shape[-1] < q.shape[-1] else 0
        q, k = (rotated(part, *angles, bool(rotary_interleaved), turned) for part in (q, k))
    if past_key is not None and past_value is not None:
        k, v = torch.cat((past_key, k), 2), torch.cat((past_value, v), 2)
    left = local_window_size - 1 if local_window_size > 0 else -1
    added = mask_of(within(steps, k.shape[2], before, left, 0, q.device), q.dtype)
    y, _ = attend(
        q, k, v, _with(added, attention_bias), scale or 1 / math.sqrt(q.shape[-1]), softcap
    )
    return joined(y), k, v


def _rotary_embedding(
    x: Tensor,
    positions: Tensor,
    cosines: Tensor,
    sines: Tensor,
    *,
    interleaved: int = 0,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
    scale: float = 1.0,
) -> Tensor:
    pairs = cosines.shape[-1]
    if x.ndim == 4:
        heads = x
    else:
        heads = heads_of(x, num_heads or x.shape[-1] // (rotary_embedding_dim or 2 * pairs))
    if positions.numel() == 1:
        steps = torch.arange(heads.shape[2], device=x.device)
        positions = (positions.reshape(1, 1) + steps).expand(heads.shape[0], -1)
    angles = cosines[positions][:, None], sines[positions][:, None]
    y = rotated(heads, *angles, bool(interleaved), rotary_embedding_dim)
    return y if x.ndim == 4 else joined(y)


OPERATORS: Table = {
    "Attention": _attention,
    "BiasGelu": _bias_gelu,
    "EmbedLayerNormalization": _embed_layer,
    "FastGelu": _fast_gelu,
    "FusedMatMul": _fused_matmul,
    "Gelu": gelu,
    "GroupQueryAttention": _grouped_query_attention,
    "MultiHeadAttention": _multi_head_attention,
    "QuickGelu": _quick_gelu,
    "RotaryEmbedding": _rotary_embedding,
    "SkipLayerNormalization": _skip_layer,
    "SkipSimplifiedLayerNormalization": _skip_root_mean_square,
}
"""Of the domain com.microsoft."""
