"""Which kernel configurations exist, which are legal, and which one a problem gets.

The single statement of every kernel constraint. Pure: no CUDA, no torch calls; what the hardware
offers arrives as a `Device`. The kernels state the same facts as static_asserts. One file a kernel;
choice.py picks the family, tuned.py reads what was measured (the only files it reads but the
kernels' own), shipped.py lists what is compiled ahead.
"""

from .choice import Config as Config
from .choice import Matmul as Matmul
from .choice import candidates as candidates
from .choice import in_lane_order as in_lane_order
from .choice import of_int4 as of_int4
from .choice import pick as pick
from .choice import pick_mx_integers as pick_mx_integers
from .choice import predicted as predicted
from .choice import reason as reason
from .choice import takes_lanes as takes_lanes
from .epilogue import Activation as Activation
from .epilogue import with_epilogue as with_epilogue
from .experts import MOST_SLOTS as MOST_SLOTS
from .experts import ExpertTiles as ExpertTiles
from .experts import grid_of as grid_of
from .experts import pick_experts as pick_experts
from .experts import slots_of as slots_of
from .experts import tiles_together as tiles_together
from .experts import tokens_of as tokens_of
from .fp4 import FP4_MAX_M as FP4_MAX_M
from .fp4 import FP4_UNIT as FP4_UNIT
from .fp4 import FP4_X as FP4_X
from .fp4 import DecodeFp4 as DecodeFp4
from .fp4 import MxCodes as MxCodes
from .fp4 import MxRange as MxRange
from .fp4 import pick_fp4 as pick_fp4
from .gemm import Gemm as Gemm
from .gemm_tiles import is_idle as is_idle
from .hopper import HOPPER_BLOCK_K as HOPPER_BLOCK_K
from .hopper import Hopper as Hopper
from .hopper import TokenSums as TokenSums
from .hopper import why_not_hopper as why_not_hopper
from .hopper_tiles import hopper_candidates as hopper_candidates
from .problem import ARCHS as ARCHS
from .problem import BITS as BITS
from .problem import LUT4 as LUT4
from .problem import PAIRS as PAIRS
from .problem import TYPE_BYTES as TYPE_BYTES
from .problem import Device as Device
from .problem import Grouping as Grouping
from .problem import Shape as Shape
from .problem import decoded_fp4 as decoded_fp4
from .problem import device_of as device_of
from .problem import widens as widens
from .problem import without_wgmma as without_wgmma
from .quantize import Before as Before
from .quantize import Quantize as Quantize
from .quantize import pick_quantize as pick_quantize
from .rotate_hopper import RotateHopper as RotateHopper
from .rotate_hopper import makes_lanes as makes_lanes
from .rotate_quantize import RotateQuantize as RotateQuantize
from .rotate_quantize import pick_rotate_quantize as pick_rotate_quantize
from .shipped import shipped_configs as shipped_configs
from .skinny import SKINNY_MAX_M as SKINNY_MAX_M
from .skinny import Skinny as Skinny
from .skinny_held import SkinnyHeld as SkinnyHeld
from .skinny_mx import SkinnyMx as SkinnyMx
from .skinny_ring import SkinnyRing as SkinnyRing
from .store_rows import StoreRows as StoreRows
from .store_rows import pick_store_rows as pick_store_rows
from .transposed import TRANSPOSED_MAX_M as TRANSPOSED_MAX_M
from .transposed import Transposed as Transposed
from .transposed import pick_transposed as pick_transposed
from .transposed import why_not_transposed as why_not_transposed
from .transposed_wgmma import TRANSPOSED_WGMMA_M as TRANSPOSED_WGMMA_M
from .transposed_wgmma import TransposedWgmma as TransposedWgmma
from .transposed_wgmma import pick_transposed_wgmma as pick_transposed_wgmma
from .transposed_wgmma import why_not_transposed_wgmma as why_not_transposed_wgmma
from .widen import Widen as Widen
from .widen import pick_widen as pick_widen
