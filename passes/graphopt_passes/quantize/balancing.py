"""Factors that make a value easier to round to 8 bits, and what that does to the layers."""
from __future__ import annotations
import os
from collections.abc import Sequence
from dataclasses import dataclass
import numpy as np
import onnx_ir as ir
from graphopt.observe import Answers, Question
from graphopt.statistics import Rows, Spread
from graphopt_passes.quantize.affine import affine_of
from graphopt_passes.quantize.flows import Flow, Sink
from graphopt_passes.quantize.layers import products
from graphopt_passes.quantize.rescaling import Rescaling, Source, by_input

EXPONENTS = tuple(float(x) for x in os.environ.get("EQ_EXP", "0.3,0.5,0.7,0.85,1").split(","))
TRIED_ROWS = 256
MODE = os.environ.get("EQ_MODE", "relative")
FACTOR_RANGE = (1e-2, 1e2)

def questions_on(flow: Flow) -> list[Question]:
    asked = []
    for sink in flow.sinks:
        asked.append(sink.layer.ask("rows"))
        asked.append(spread_of(sink))
    return asked

def spread_of(sink: Sink) -> Question:
    return Question(sink.layer.source.name or "", "spread", sink.channels.axis)

class Trial:
    """A product on rows of its input."""
    def __init__(self, sink: Sink, answers: Answers, done: Rescaling):
        self.sink = sink
        layer = sink.layer
        rows, spread = answers[layer.ask("rows")], answers[spread_of(sink)]
        before = done.of_inputs(layer)
        self.matrix = done.matrix(layer)
        values = rows.values[:, :TRIED_ROWS].astype(np.float64)
        self.rows = values / by_input(layer, before, self.matrix)
        self.low, self.high = spread.channel_low / before, spread.channel_high / before
        self.whole = products(self.rows.astype(np.float32), self.matrix.astype(np.float32)).astype(np.float64)
        self.signal = np.square(self.whole).sum(axis=1)

    def error(self, factors: np.ndarray) -> float:
        f = self.sink.channels.spread(factors)
        rep = by_input(self.sink.layer, f, self.matrix)
        m = self.matrix * rep
        affine = affine_of(float((self.low / f).min()), float((self.high / f).max()))
        scales = np.abs(m).max(axis=2, keepdims=True) / 127
        scales[scales == 0] = 1
        mq = np.rint(m / scales) * scales
        xq = affine.rounded((self.rows / rep).astype(np.float32))
        err = np.square(products(xq, mq.astype(np.float32)) - self.whole).sum(axis=1)
        if MODE == "relative":
            live = self.signal > 1e-12 * self.signal.max()
            return float((err[live] / self.signal[live]).mean())
        return float(err.sum() / max(self.signal.sum(), 1e-30))

def channel_maxima(count: int, trials: Sequence[Trial]) -> tuple[np.ndarray, np.ndarray, float]:
    sizes, columns, others = np.zeros(count), np.zeros(count), 0.0
    for t in trials:
        ch = t.sink.channels
        size = np.maximum(np.abs(t.low), np.abs(t.high))
        m = np.abs(t.matrix).max(axis=1)  # g, in
        column = m.reshape(size.size, -1).max(axis=1)
        np.maximum.at(sizes, ch.origin[ch.own], size[ch.own])
        np.maximum.at(columns, ch.origin[ch.own], column[ch.own])
        if not ch.own.all():
            others = max(others, float(size[~ch.own].max()))
    return sizes, columns, others

def candidates(sizes, columns, others):
    live = (sizes > 0) & (columns > 0)
    if not live.any():
        return
    for e in EXPONENTS:
        f = np.ones(sizes.size)
        f[live] = sizes[live] ** e / columns[live] ** (1 - e)
        top = (sizes[live] / f[live]).max()
        levels = [sizes.max()] + ([others] if others > 0 else [])
        for level in levels:
            g = f * (top / level)
            g[~live] = 1
            yield e, np.clip(g, *FACTOR_RANGE)

def best_factors(source: Source, flow: Flow, answers: Answers, done: Rescaling, worthwhile=0.9):
    trials = [Trial(s, answers, done) for s in flow.sinks]
    if any(not t.rows.size or t.low.size != t.sink.channels.origin.size for t in trials):
        return None, "not observed"
    s, c, o = channel_maxima(source.count, trials)
    now = sum(t.error(np.ones(source.count)) for t in trials)
    best = min(((sum(t.error(f) for t in trials), e, f) for e, f in candidates(s, c, o)), key=lambda x: x[0], default=None)
    if best is None: return None, "dead"
    if os.environ.get("EQ_V"): print(source.node.name, "x".join(str(x.layer.node.op_type) for x in flow.sinks), f"{now:.3e} -> {best[0]:.3e} a={best[1]}")
    if best[0] > worthwhile * now: return None, f"the error falls to {best[0]/max(now,1e-30):.2f} only"
    return best[2], ""
