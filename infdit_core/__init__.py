"""Inf-DiT: diffusion upscaling of pictures of any size in bounded memory. Needs torch only.

The names below are the public interface; they do not change without a major version.
"""

from .checkpoint import CheckpointError, load_model
from .condition import Condition
from .config import InfDiTConfig
from .edm import edm_sigmas
from .errors import InfDiTError
from .model import InfDiT
from .planner import PlanError, plan
from .prepare import Canvas, prepare
from .sampling import PRESETS, SOLVERS, Step, sample
from .schedule import BlockMajor, Full, LayerMajor, Schedule

__all__ = [
    "PRESETS",
    "SOLVERS",
    "BlockMajor",
    "Canvas",
    "CheckpointError",
    "Condition",
    "Full",
    "InfDiT",
    "InfDiTConfig",
    "InfDiTError",
    "LayerMajor",
    "PlanError",
    "Schedule",
    "Step",
    "edm_sigmas",
    "load_model",
    "plan",
    "prepare",
    "sample",
]
