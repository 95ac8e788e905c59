"""Pictures with alpha through ComfyUI's nodes and the pack's."""

import importlib

import pytest
import torch
from PIL import Image, ImageDraw

pytestmark = pytest.mark.comfy

BLACK, MAGENTA = (0, 0, 0, 0), (255, 0, 255, 0)
SIZE = 24


def disc(hidden: tuple[int, int, int, int], colour: str = "white") -> Image.Image:
    picture = Image.new("RGBA", (SIZE, SIZE), hidden)
    ImageDraw.Draw(picture).ellipse((5, 5, 18, 18), fill=colour)
    return picture


@pytest.fixture
def join(comfy, tmp_path, monkeypatch):
    """Read a picture as a workflow does: Load Image, Join Image with Alpha."""
    compositing = importlib.import_module("comfy_extras.nodes_compositing")
    core, folder_paths = (importlib.import_module(name) for name in ("nodes", "folder_paths"))
    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path))

    def join(picture: Image.Image) -> torch.Tensor:
        picture.save(tmp_path / "disc.png")
        image, mask = core.LoadImage().load_image("disc.png")
        return compositing.JoinImageWithAlpha.execute(image, mask).args[0]

    return join


def test_a_white_disc_on_black_stays_white(upscale, load, join):
    result = upscale(load("infdit_small")[0], join(disc(BLACK)), 4.0, preset="auto")
    assert result.shape == (1, 4 * SIZE, 4 * SIZE, 4)
    visible = result[..., :3][result[..., 3] > 0.5 / 255]
    assert (visible * 255).round().min() >= 254


def advanced(comfy, model, image: torch.Tensor, start: torch.Tensor) -> torch.Tensor:
    """Inf-DiT Conditioning, what core's KSampler calls, Inf-DiT Decode."""
    sample = importlib.import_module("comfy.sample")
    condition = comfy.nodes["InfDiTConditioning"].execute
    conditioning, latent, canvas = condition(model, image, 4.0, start_image=start).args
    first = latent["samples"]
    samples = sample.sample(
        model, sample.prepare_noise(first, 3), 2, 1.0, "heun", "karras",
        conditioning, conditioning, first, disable_pbar=True, seed=3, denoise=0.5,
    )  # fmt: skip
    return comfy.nodes["InfDiTDecode"].execute({"samples": samples}, canvas, "adain").args[0]


def test_no_node_sees_what_is_invisible(comfy, load, upscale, join):
    results = []
    for hidden in (BLACK, MAGENTA):
        image, start = join(disc(hidden, "teal")), join(disc(hidden, "orange"))
        results.append(
            [
                advanced(comfy, load("tiny")[0], image, start),
                upscale(load("tiny")[0], image, 6.0, start_image=start, denoise=0.5, steps=2),
                upscale(load("clip")[0], image, 2.0, steps=2),
                comfy.nodes["InfDiTGuidance"].execute(load("clip")[1], image, "", "", 0.0).args[0],
            ]
        )
    for black, magenta in zip(*results, strict=True):
        assert torch.equal(black, magenta)


def test_no_file_of_a_folder_is_seen_where_invisible(comfy, load, join, tmp_path, monkeypatch):
    folder_paths = importlib.import_module("folder_paths")
    monkeypatch.setattr(folder_paths, "output_directory", str(tmp_path / "output"))
    (tmp_path / "discs").mkdir()
    for name, hidden in (("black", BLACK), ("magenta", MAGENTA)):
        disc(hidden, "teal").save(tmp_path / "discs" / f"{name}.png")
    comfy.nodes["InfDiTUpscaleFolder"].execute(
        load("tiny")[0], "discs", 2.0, 7, "draft", 0.5, "", "png", "8", False
    )
    black, magenta = (Image.open(p) for p in sorted((tmp_path / "output").rglob("*.png")))
    assert black.size == (2 * SIZE, 2 * SIZE)
    assert black.mode == "RGBA"
    assert black.tobytes() == magenta.tobytes()
