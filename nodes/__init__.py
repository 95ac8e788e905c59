"""What ComfyUI sees: one file per family of nodes. Only this package imports comfy.*"""

from comfy_api.latest import ComfyExtension, io

from .diffusehigh.node import DiffuseHigh, DiffuseHighGuidance
from .dimr.loader import DiMRLoader
from .dimr.nodes import DiMRCFGDecay, DiMRClass, DiMRSampler
from .hidiffusion.node import HiDiffusion
from .infdit.advanced import InfDiTConditioning, InfDiTDecode
from .infdit.folder import InfDiTUpscaleFolder
from .infdit.guidance import InfDiTGuidance
from .infdit.loader import InfDiTCheckpointLoader, InfDiTCLIPLoader
from .infdit.sampler import InfDiTSampler
from .infdit.schedule import InfDiTSchedule
from .upsample_guidance.node import UpsampleGuidance


class InfDiTExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            InfDiTCheckpointLoader,
            InfDiTCLIPLoader,
            InfDiTGuidance,
            InfDiTSampler,
            InfDiTConditioning,
            InfDiTDecode,
            InfDiTSchedule,
            DiffuseHighGuidance,
            DiffuseHigh,
            HiDiffusion,
            UpsampleGuidance,
            InfDiTUpscaleFolder,
            DiMRLoader,
            DiMRClass,
            DiMRSampler,
            DiMRCFGDecay,
        ]
