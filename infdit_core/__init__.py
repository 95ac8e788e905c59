"""Inf-DiT: diffusion upscaling of pictures of any size in bounded memory. Needs torch only.

The names below are the public interface; they do not change without a major version.
"""

from .blocks.schedules import BlockMajor, Full, LayerMajor, Schedule
from .checkpoints.checkpoint import CheckpointError
from .checkpoints.load import load_model
from .edm import edm_sigmas
from .errors import InfDiTError
from .memory.planner import PlanError, plan
from .network.condition import Condition
from .network.config import InfDiTConfig
from .network.model import InfDiT
from .pictures.prepare import Canvas, prepare
from .sampling import PRESETS, SOLVERS, Step, sample
from .scratch import Scratch
from .upscale import Sampler, upscale

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
    "Sampler",
    "Schedule",
    "Scratch",
    "Step",
    "edm_sigmas",
    "load_model",
    "plan",
    "prepare",
    "sample",
    "upscale",
]
