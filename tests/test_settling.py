"""Codes come to rest at what they were most of the time, the first layer first."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")

from graphopt.testing import parse  # noqa: E402
from graphopt.training.settling import SETTLED_FROM, SETTLED_TO, Settling  # noqa: E402
from graphopt.training.stored_weights import stored_weights  # noqa: E402

TWO = """
    agraph (float[1,4] x, int8[4,4] p, int8[4,4] q, float s) => (float[1,4] y) {
        v = DequantizeLinear(p, s)  w = DequantizeLinear(q, s)
        h = MatMul(x, v)  y = MatMul(h, w)
    }
"""


def test_what_goes_to_and_fro_rests_where_it_was_most_of_the_time() -> None:
    codes = np.full((4, 4), 3, np.int8)
    codes[0] = 5
    weights = stored_weights(parse(TWO, p=codes, q=codes, s=np.float32(0.1)).graph)
    latent = [weight.numbers.clone().requires_grad_() for weight in weights]
    settling = Settling(weights, [0, 1])

    def watch(share: float) -> list[torch.Tensor]:
        rounded = [w.nearest(n.detach()) for w, n in zip(weights, latent, strict=True)]
        settling.watch(share, latent, rounded)
        return rounded

    for step in range(300):
        with torch.no_grad():
            # Three of four times 4, and at last 3.
            latent[0][1:] = 3.4 if step % 4 == 3 else 3.6
        watch(SETTLED_FROM * step / 300)
    assert latent[0].requires_grad and float(latent[0][1, 0]) == pytest.approx(3.4)
    latent[0].grad = torch.ones_like(latent[0])
    rounded = watch(SETTLED_FROM)

    assert not latent[0].requires_grad and latent[0].grad is None
    assert latent[0][0].tolist() == [5] * 4 and latent[0][1:].unique().tolist() == [4]
    assert torch.equal(rounded[0], latent[0])
    # The second layer learns on with that.
    assert latent[1].requires_grad
    watch(SETTLED_TO)
    assert not latent[1].requires_grad
