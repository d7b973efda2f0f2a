"""How much signal and noise a latent holds at a network time, as graph nodes: for graphs that are told t alone.

Mirrors the formulas of `reference/schedule.py`. Step graphs need none of this: their rows hold alpha and sigma.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from mdm.export.graph import Graph, Value
from mdm.runtime.schedule import make_schedule


def levels_at(g: Graph, spec: Mapping[str, Any], t: Value) -> tuple[Value, Value]:
    """alpha and sigma at network time t [B] -> [B,1,1] each."""
    schedule = make_schedule(spec)
    with g.scope("levels"):
        full = float(schedule.model_time(1.0))
        time = g.unsqueeze(t, 1, 2) / full
        if spec["kind"] == "cosine":  # alpha / sigma = shift * cot(pi t / 2)
            noise = g.op("Sin", time * (math.pi / 2))
            # The cosine, as the sine of the time that is left: exact where little is.
            left = (full - g.unsqueeze(t, 1, 2)) * (math.pi / 2 / full)
            signal = g.op("Sin", left) * float(spec.get("shift", 1.0))
            length = g.op("Sqrt", signal * signal + noise * noise)
            return signal / length, noise / length
        if spec["kind"] == "vp-linear":
            log_alpha = time * (time * -4.975 + -0.05)
        else:  # "sd": log alpha is linear between the table's entries
            times = np.arange(1, 1001) / 1000
            table = g.constant(schedule.log_alpha(times), t.dtype)  # [1000]
            steps = time * 1000.0 - 1.0
            below = g.op("Clip", g.op("Floor", steps), 0.0, 998.0)
            k = g.cast(below, "int64")
            log_alpha = g.op("Min", table[k] + (steps - below) * (table[k + 1] - table[k]), 0.0)
        # sigma^2 = 1 - alpha^2 = -2 alpha sinh(log alpha), which loses no digits where alpha is near 1
        alpha = g.op("Exp", log_alpha)
        return alpha, g.op("Sqrt", alpha * -2.0 * g.op("Sinh", log_alpha))
