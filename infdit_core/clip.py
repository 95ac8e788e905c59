"""CLIP guidance: the embedding that tells the network what the picture shows (arXiv 2405.04312).

The towers are open_clip's ViT-L-14 with the weights datacomp_xl_s13b_b90k and plain GELU; other
implementations of ViT-L use quick GELU and give other embeddings. open_clip is imported when a
tower is built, not before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .checkpoints.checkpoint import Checkpoint, open_checkpoint
from .checkpoints.names import CLIP_PREFIX, clip_state_dict
from .errors import InfDiTError

_MEAN = (0.48145466, 0.4578275, 0.40821073)
_STD = (0.26862954, 0.26130258, 0.27577711)
_HEAD_WIDTH = 64
_EXPECTED = "expected an open_clip ViT-L-14 file with the weights datacomp_xl_s13b_b90k"


class GuidanceError(InfDiTError):
    """A CLIP file or what is asked of it cannot be used."""


def read_clip(path: str | Path) -> dict[str, Tensor]:
    """The CLIP weights of an Inf-DiT checkpoint or of an open_clip file, under open_clip's names.

    Raises:
        CheckpointError: the file cannot be read.
        GuidanceError: there is no CLIP in it.
    """
    with open_checkpoint(path) as checkpoint:
        tower = clip_state_dict(checkpoint)
        if tower is not None:
            return tower
        if not holds_clip(checkpoint):
            found = ", ".join(sorted(checkpoint.shapes)[:3])
            raise GuidanceError(f"{checkpoint.path.name}: {_EXPECTED}, found the keys {found}, ...")
        return {key: checkpoint.tensor(key) for key in checkpoint.shapes}


def holds_clip(checkpoint: Checkpoint) -> bool:
    """Whether there is a CLIP under open_clip's names, by itself or in an Inf-DiT checkpoint."""
    return any(key.startswith(("visual.", CLIP_PREFIX)) for key in checkpoint.shapes)


class ClipGuide:
    """CLIP's image tower, and its text tower where the file has one."""

    def __init__(self, model: nn.Module, image_size: int, context_length: int = 0) -> None:
        self.model = model
        self._image_size = image_size
        self._context_length = context_length

    @classmethod
    def from_state_dict(
        cls,
        state_dict: Mapping[str, Tensor],
        *,
        head_width: int = _HEAD_WIDTH,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> ClipGuide:
        """Build the towers whose weights are there, sizes read from their shapes.

        Args:
            state_dict: open_clip's names: `visual.*`, and `transformer.*` etc. for the text tower.
            head_width: of the attention, which no shape tells; 64 in every released CLIP.

        Raises:
            GuidanceError: weights are missing, or not those of such a tower.
        """
        tensors = {k.removeprefix("module."): v for k, v in state_dict.items()}
        try:
            guide = cls._build(tensors, head_width)
            wanted = guide.model.state_dict()
            guide.model.load_state_dict({k: v for k, v in tensors.items() if k in wanted})
        except (KeyError, RuntimeError) as error:
            raise GuidanceError(f"{_EXPECTED}, got other weights: {error}") from error
        guide.model.to(device=device, dtype=dtype).eval().requires_grad_(False)
        return guide

    @classmethod
    def _build(cls, tensors: dict[str, Tensor], head_width: int) -> ClipGuide:
        import open_clip
        from open_clip.transformer import VisionTransformer

        conv = tensors["visual.conv1.weight"]
        width, patch = conv.shape[0], conv.shape[-1]
        grid = math.isqrt(tensors["visual.positional_embedding"].shape[0] - 1)
        layers = _count_layers(tensors, "visual.transformer.resblocks.")
        mlp_ratio = tensors["visual.transformer.resblocks.0.mlp.c_fc.weight"].shape[0] / width
        embed_dim = tensors["visual.proj"].shape[1]
        image_size = grid * patch
        if "ln_final.weight" not in tensors:  # the released model keeps the token embedding alone
            model = nn.Module()
            model.visual = VisionTransformer(
                image_size,
                patch,
                width,
                layers,
                heads=width // head_width,
                mlp_ratio=mlp_ratio,
                output_dim=embed_dim,
            )
            return cls(model, image_size)
        vocabulary, text_width = tensors["token_embedding.weight"].shape
        context_length = tensors["positional_embedding"].shape[0]
        model = open_clip.CLIP(
            embed_dim,
            open_clip.CLIPVisionCfg(
                layers=layers,
                width=width,
                head_width=head_width,
                mlp_ratio=mlp_ratio,
                patch_size=patch,
                image_size=image_size,
            ),
            open_clip.CLIPTextCfg(
                context_length=context_length,
                vocab_size=vocabulary,
                width=text_width,
                heads=text_width // head_width,
                layers=_count_layers(tensors, "transformer.resblocks."),
            ),
        )
        return cls(model, image_size, context_length)

    def preprocess(self, image: Tensor) -> Tensor:
        """(B, H, W, C) in 0..1 to the tower's (B, 3, size, size): the middle, normalised."""
        x = image[..., :3].float().permute(0, 3, 1, 2).expand(-1, 3, -1, -1)
        size, (height, width) = self._image_size, x.shape[-2:]
        shorter = min(height, width)
        resized = tuple(int(size * side / shorter) for side in (height, width))
        x = F.interpolate(x, size=resized, mode="bicubic", antialias=True)
        top, left = (round((side - size) / 2) for side in resized)
        x = x[..., top : top + size, left : left + size]
        mean, std = (x.new_tensor(values)[:, None, None] for values in (_MEAN, _STD))
        return (x - mean) / std

    def encode_image(self, image: Tensor) -> Tensor:
        """Unit embeddings (B, embed_dim) float32 of pictures (B, H, W, C) in 0..1."""
        parameter = next(self.model.parameters())
        x = self.preprocess(image).to(parameter)
        return F.normalize(self.model.get_submodule("visual")(x).float(), dim=-1)

    def encode_text(self, texts: list[str]) -> Tensor:
        """Unit embeddings (len(texts), embed_dim) float32.

        Raises:
            GuidanceError: there is no text tower.
        """
        import open_clip

        if not isinstance(self.model, open_clip.CLIP):
            raise GuidanceError(
                "the text tower is missing: guidance by text needs the whole open_clip ViT-L-14"
                " file (datacomp_xl_s13b_b90k, about 1.7 GB), which an Inf-DiT file does not hold."
                " Load that file as the CLIP, or set the text strength to 0"
            )
        tokens = open_clip.SimpleTokenizer(context_length=self._context_length)(texts)
        device = next(self.model.parameters()).device
        return F.normalize(self.model.encode_text(tokens.to(device)).float(), dim=-1)

    @torch.no_grad()
    def guide(
        self, image: Tensor, positive: str = "", negative: str = "", text_strength: float = 0.0
    ) -> Tensor:
        """Embeddings of pictures, moved towards one text and away from another.

        unit(image + strength · text(positive) - strength · text(negative)), an empty text counting
        as nothing.

        Args:
            image: (B, H, W, C) in 0..1.

        Returns:
            (B, embed_dim) float32, of unit length.

        Raises:
            GuidanceError: a text counts, and there is no text tower.
        """
        vector = self.encode_image(image)
        for text, weight in ((positive, text_strength), (negative, -text_strength)):
            if text.strip() and weight:
                vector = vector + weight * self.encode_text([text])
        return F.normalize(vector, dim=-1)


def _count_layers(tensors: Mapping[str, Tensor], prefix: str) -> int:
    return len({k.removeprefix(prefix).split(".")[0] for k in tensors if k.startswith(prefix)})
