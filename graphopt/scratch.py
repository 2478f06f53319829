"""Where the large tensors that passes make are kept while a model with external data is rewritten.

The weights of such a model stay in their files, so that memory does not grow with them; it must not
grow with rewritten weights either.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import onnx_ir as ir

from graphopt.content import chunks, remember
from graphopt.errors import ModelError

LARGE_BYTES = 1 << 20

_SCRATCH = "graphopt.scratch"


class Scratch:
    """A file in the folder for temporary files (TMPDIR); it goes with the last tensor in it."""

    def __init__(self) -> None:
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._size_bytes = 0

    def keep(self, tensor: ir.TensorProtocol) -> ir.TensorProtocol:
        """The same tensor, in the file if it is large.

        Raises:
            ModelError: the folder is full, or cannot be written.
        """
        if tensor.dtype == ir.DataType.STRING or tensor.nbytes < LARGE_BYTES:
            return tensor
        try:
            path = self._path()
            with open(path, "ab") as file:
                for chunk in chunks(tensor):
                    file.write(chunk.data)
        except OSError as error:
            raise ModelError(
                f"cannot keep {tensor.nbytes} bytes of {tensor.name!r} in the folder for temporary "
                f"files, {tempfile.gettempdir()} (TMPDIR): {error.strerror}"
            ) from None
        kept = ir.ExternalTensor(
            path,
            self._size_bytes,
            tensor.nbytes,
            tensor.dtype,
            shape=ir.Shape(tensor.shape.numpy()),
            name=tensor.name or "",
        )
        remember(kept)
        kept.meta[_SCRATCH] = self
        self._size_bytes += tensor.nbytes
        return kept

    def _path(self) -> Path:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="graphopt-")
        return Path(self._folder.name) / "tensors"


def is_scratch(tensor: ir.TensorProtocol) -> bool:
    """The tensor is in the file of a `Scratch`."""
    return _SCRATCH in tensor.meta
