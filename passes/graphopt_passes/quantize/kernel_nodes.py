"""Nodes that read weights as they are stored, and the bytes that they read.

MatMulNBits multiplies with a weight, and GatherBlockQuantized looks rows of it up:

    y = x W^T      codes are uint8 of shape [N, blocks, block * bits / 8]
    y = W[index]   codes are uint8 of shape [N, K * bits / 8], or in blocks, as y then is

Both have W = (code - 2^(bits - 1)) * scale, with a scale for each block of a row, and codes that
begin in the low bits of a byte. Where blocks divide a row, they read the same bytes.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.rewriting import input_of, replace_value

DOMAIN, VERSION = "com.microsoft", 1


def product_node(
    node: ir.Node,
    codes: ir.Value,
    scales: ir.Value,
    shape: tuple[int, int],
    bits: int,
    block: int,
    accuracy_level: int,
) -> ir.Node:
    """A MatMulNBits that computes what a MatMul or Gemm does; see `put_in_place`.

    Args:
        node: reads its weight second, and a bias of one dimension third, if at all.
        codes: see `packed_blocks`.
        scales: of shape [N, blocks], and the type of the product.
        shape: N and K.
        bits: of a code.
        block: of inputs.
        accuracy_level: 1 or 4.
    """
    rows, inputs = shape
    bias = input_of(node, 2)
    ending = [] if bias is None else [None, None, bias]
    return ir.node(
        "MatMulNBits",
        [node.inputs[0], codes, scales, *ending],
        {
            "K": inputs,
            "N": rows,
            "bits": bits,
            "block_size": block,
            "accuracy_level": accuracy_level,
        },
        domain=DOMAIN,
        name=node.name,
    )


def lookup_node(node: ir.Node, codes: ir.Value, scales: ir.Value, bits: int, block: int) -> ir.Node:
    """A GatherBlockQuantized that computes what a Gather of rows does; see `put_in_place`.

    Args:
        node: of a table of two dimensions.
        codes: see `packed_rows`; or `packed_blocks`, which gives rows in blocks.
        scales: of shape [N, blocks], for blocks [N, blocks, 1], and the type of the table.
        bits: of a code.
        block: of inputs.
    """
    last = 1 if codes.shape is None else len(codes.shape) - 1
    return ir.node(
        "GatherBlockQuantized",
        [codes, node.inputs[1], scales],
        {"bits": bits, "block_size": block, "gather_axis": 0, "quantize_axis": last},
        domain=DOMAIN,
        name=node.name,
    )


def put_in_place(node: ir.Node, kernel: ir.Node) -> None:
    """Let a node of one output take the place, the readers and the name of another."""
    graph, old, (new,) = node.graph, node.outputs[0], kernel.outputs
    assert isinstance(graph, ir.Graph)
    graph.insert_before(node, kernel)
    new.type, new.shape = old.type, old.shape
    if not old.is_graph_output():
        new.name, old.name = old.name, None
    replace_value(old, new)
    graph.remove(node, safe=True)


def packed_rows(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes as GatherBlockQuantized reads them.

    Args:
        codes: uint8 of shape [N, K]; K * bits is a multiple of 8.
        bits: 2, 4 or 8.

    Returns:
        uint8 of shape [N, K * bits / 8].
    """
    together = 8 // bits
    digits = codes.reshape(len(codes), -1, together)
    shifts = np.arange(together, dtype=np.uint8) * np.uint8(bits)
    return np.asarray((digits << shifts).sum(axis=-1), np.uint8)


def packed_blocks(codes: np.ndarray, bits: int, block: int) -> np.ndarray:
    """Codes as MatMulNBits reads them.

    Args:
        codes: uint8 of shape [N, K]; what stands for 0 is 2^(bits - 1).
        bits: 2, 4 or 8.
        block: of inputs.

    Returns:
        uint8 of shape [N, blocks, block * bits / 8].
    """
    rows, inputs = codes.shape
    padded = np.pad(codes, ((0, 0), (0, -inputs % block)), constant_values=1 << (bits - 1))
    return packed_rows(padded, bits).reshape(rows, -1, block * bits // 8)
