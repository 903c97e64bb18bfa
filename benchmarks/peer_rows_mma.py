"""For a run of the harness in which humming goes without wgmma, as on an A100.

On a Hopper GPU humming multiplies by wgmma from 17 tokens on, which the portable kernels cannot.
Here it takes its mma.sync kernels, in the configurations that it picks for sm_80. The harness runs
this file before peer_rows.py; it changes all humming rows of the process.
"""

import importlib
import sys

from humming.config import MmaType
from humming.tune.sm8x import Sm80Heuristics

for name in ("humming.forward", "humming.kernel.humming", "humming.layer"):
    importlib.import_module(name)
for module in [m for name, m in sys.modules.items() if name.startswith("humming")]:
    if hasattr(module, "get_default_mma_type"):
        module.get_default_mma_type = lambda layer_config: MmaType.MMA
    if hasattr(module, "get_heuristics_class"):
        module.get_heuristics_class = lambda device=None: Sm80Heuristics
