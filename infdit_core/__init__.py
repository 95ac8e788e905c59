"""Inf-DiT: diffusion upscaling of pictures of any size in bounded memory. Needs torch only.

The names below are the public interface; they do not change without a major version.
"""

from .checkpoint import CheckpointError, load_model
from .condition import Condition
from .config import InfDiTConfig
from .edm import edm_sigmas
from .model import InfDiT
from .prepare import Canvas, prepare
from .sampling import SOLVERS, Step, sample
from .schedule import BlockMajor, Full, LayerMajor, Schedule

__all__ = [
    "SOLVERS",
    "BlockMajor",
    "Canvas",
    "CheckpointError",
    "Condition",
    "Full",
    "InfDiT",
    "InfDiTConfig",
    "LayerMajor",
    "Schedule",
    "Step",
    "edm_sigmas",
    "load_model",
    "prepare",
    "sample",
]
