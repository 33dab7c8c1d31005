"""Where the time of one FedTune round goes, from a cProfile of it.

cProfile slows Python code and not the kernels beneath, so the share outside forward, backward and
optimizer reads too high rather than too low.
"""

import cProfile
import pstats
from typing import Any

FORWARD = ("torch/nn/modules/module.py", "_call_impl")
BACKWARD = ("torch/_tensor.py", "backward")
OPTIMIZER = ("fedtune/vectorized.py", "fedtune/stacked.py")
OPTIMIZER_NAMES = ("_update", "gather", "gather_clipped")
LINES = 15


def summary(profile: cProfile.Profile) -> dict[str, Any]:
    """Seconds in all, in forward, backward and optimizer, their complement, and what costs most."""
    table: Any = pstats.Stats(profile)
    total = float(table.total_tt)
    parts = {"forward": 0.0, "backward": 0.0, "optimizer": 0.0}
    others = []
    for (file, line, name), (_, calls, own, below, _) in table.stats.items():
        if file.endswith(FORWARD[0]) and name == FORWARD[1]:
            parts["forward"] += below
        elif file.endswith(BACKWARD[0]) and name == BACKWARD[1]:
            parts["backward"] += below
        elif any(part in file for part in OPTIMIZER) and name in OPTIMIZER_NAMES:
            parts["optimizer"] += below
        else:
            others.append((own, calls, f"{'/'.join(file.split('/')[-2:])}:{line}({name})"))
    outside = total - sum(parts.values())
    return {
        "seconds": total,
        **parts,
        "outside": outside,
        "outside_share": outside / total if total else 0.0,
        # Own time, so that a line does not repeat its callees; kernels of forward and backward
        # are among them.
        "lines": [
            [f"{own:.3f} s", calls, place] for own, calls, place in sorted(others)[:-LINES:-1]
        ],
    }
