"""What ComfyUI sees: one file per family of nodes. Only this package imports comfy.*"""

from comfy_api.latest import ComfyExtension, io

from .advanced import InfDiTConditioning, InfDiTDecode
from .guidance import InfDiTGuidance
from .hidiffusion import HiDiffusion
from .loader import InfDiTCheckpointLoader, InfDiTCLIPLoader
from .sampler import InfDiTSampler
from .schedule import InfDiTSchedule


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
            HiDiffusion,
        ]
