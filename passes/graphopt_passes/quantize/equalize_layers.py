"""equalize-layers"""
from __future__ import annotations
from dataclasses import dataclass
from typing import ClassVar
import os
import numpy as np
import onnx_ir as ir
from graphopt.contract import Change, Context, Effect, Pass
from graphopt_passes.quantize.balancing import best_factors, questions_on
from graphopt_passes.quantize.flows import *
from graphopt_passes.quantize.rescaling import Rescaling, Source, by_input, is_product
from graphopt_passes.quantize.layers import layer_of

@dataclass(frozen=True)
class EqualizeLayers(Pass):
    """x"""
    name: ClassVar[str] = "equalize-layers"
    effect: ClassVar[Effect] = Effect.ROUNDING
    operators: ClassVar[frozenset[str] | None] = frozenset({"Conv", "Gemm", "MatMul"})

    def apply(self, model, context):
        change = Change()
        order = Order(model.graph)
        found = []
        for node in model.graph:
            if not is_product(node): continue
            reason = why_fixed(node)
            if reason: change.skip(node, reason); continue
            layer = layer_of(node)
            v = node.outputs[0]
            axis = 1 if not node.op_type == "MatMul" else rank_of(v) - 1
            t = constant_tensor(layer.weight)
            count = int(t.shape.numpy()[layer.axis])
            src = Source(node, v, axis, count, layer)
            try:
                flow = flow_of(v, Channels(axis, np.arange(count)), order)
            except Blocked as b:
                change.skip(node, str(b)); continue
            if flow.ceilings and not os.environ.get("EQ_CLIP"):
                change.skip(node, "clip"); continue
            found.append((src, flow))
        done = Rescaling()
        if os.environ.get("EQ_NAGEL"):
            for r in range(20):
                worst = 0
                for src, flow in found:
                    r1 = np.abs(done.matrix(src.layer)).max(axis=2).reshape(-1)
                    r2 = np.zeros(src.count)
                    for s in flow.sinks:
                        m = np.abs(done.matrix(s.layer)).max(axis=1).reshape(s.channels.origin.size, -1).max(axis=1)
                        np.maximum.at(r2, s.channels.origin[s.channels.own], m[s.channels.own])
                    f = np.ones(src.count)
                    live = (r1 > 0) & (r2 > 0)
                    f[live] = np.clip(np.sqrt(r1[live] / r2[live]), 1e-2, 1e2)
                    worst = max(worst, np.abs(np.log2(f)).max())
                    if np.abs(np.log2(f)).max() > 0.05:
                        done.add(src, flow, f); change.count("eq")
                if worst < 0.05: break
            print("rounds", r)
        else:
            answers = context.observe(model, [q for _, f in found for q in questions_on(f)])
            for r in range(20):
                any_ = False
                for src, flow in found:
                    f, why = best_factors(src, flow, answers, done)
                    if f is None:
                        continue
                    done.add(src, flow, f); change.count(f"round {r}"); any_ = True
                if not any_: break
        done.write(model, context)
        for s in change.skips: print("skip", s.node, s.reason) if os.environ.get("EQ_V") else None
        return change
