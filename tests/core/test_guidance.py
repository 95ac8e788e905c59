"""CLIP guidance against the release, and text guidance against its formula."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize

from infdit_core.clip import ClipGuide, GuidanceError, read_clip
from tests.goldens import GOLDEN, golden, golden_marks, thinned

RECORDED = "e_clip/preprocess.safetensors"
TOWER = GOLDEN / "e_clip" / "tiny_clip.safetensors"
HEAD_WIDTH = 16


@pytest.fixture(scope="module")
def guide():
    return ClipGuide.from_state_dict(read_clip(TOWER), head_width=HEAD_WIDTH)


@pytest.mark.parametrize(
    "size",
    [
        pytest.param(key[3:-3], marks=golden_marks(RECORDED, key))
        for key in golden(RECORDED)
        if key.startswith("in_")
    ],
)
def test_embeddings_equal_the_release(guide, size):
    tensors = golden(RECORDED)
    image = tensors[f"in_{size}_u8"].float().permute(1, 2, 0)[None] / 255
    if (prepared := tensors.get(f"out_{size}")) is not None:
        found = thinned(guide.preprocess(image)[0], prepared)
        torch.testing.assert_close(found, prepared, atol=1e-5, rtol=0)
    embedding = tensors[f"tiny_embed_{size}"]
    torch.testing.assert_close(guide.guide(image).flatten(), embedding, atol=1e-5, rtol=0)


@pytest.fixture(scope="module")
def whole_clip():
    import open_clip

    torch.manual_seed(0)
    model = open_clip.CLIP(
        24,
        open_clip.CLIPVisionCfg(layers=2, width=32, head_width=16, patch_size=14, image_size=56),
        open_clip.CLIPTextCfg(context_length=77, vocab_size=49408, width=32, heads=2, layers=2),
    )
    return model.eval()


def test_text_guidance_follows_the_formula(whole_clip, tmp_path):
    import open_clip

    save_file(
        {k: v.contiguous() for k, v in whole_clip.state_dict().items()}, tmp_path / "c.safetensors"
    )
    guide = ClipGuide.from_state_dict(read_clip(tmp_path / "c.safetensors"), head_width=16)
    image = torch.rand(3, 70, 90, 3)
    tokens = open_clip.get_tokenizer("ViT-L-14")(["clear", "blur"])
    with torch.no_grad():
        clear, blur = whole_clip.encode_text(tokens, normalize=True)
        picture = whole_clip.encode_image(guide.preprocess(image), normalize=True)
    expected = normalize(picture + 2 * clear - 2 * blur, dim=-1)
    torch.testing.assert_close(guide.guide(image, "clear", "blur", 2.0), expected)
    only_positive = normalize(picture + 2 * clear, dim=-1)
    torch.testing.assert_close(guide.guide(image, "clear", "", 2.0), only_positive)
    torch.testing.assert_close(guide.guide(image, "clear", "blur", 0.0), picture)


def test_text_without_its_tower_says_what_is_needed(guide):
    image = torch.rand(1, 30, 30, 3)
    guide.guide(image, "", "", 2.0)
    with pytest.raises(GuidanceError, match="needs the whole open_clip ViT-L-14"):
        guide.guide(image, "clear", "", 2.0)


def test_grey_and_alpha_pictures_are_taken(guide):
    grey = torch.rand(1, 30, 40, 1)
    colour = grey.expand(-1, -1, -1, 3)
    torch.testing.assert_close(guide.guide(grey), guide.guide(colour))
    with_alpha = torch.cat([colour, torch.rand(1, 30, 40, 1)], dim=-1)
    torch.testing.assert_close(guide.guide(with_alpha), guide.guide(colour))


def test_a_file_without_clip_is_named(tmp_path):
    with pytest.raises(GuidanceError, match="expected an open_clip ViT-L-14 file"):
        read_clip(GOLDEN / "xs" / "model.safetensors")
    broken = load_file(TOWER)
    broken = {k.removeprefix("image_encoder.model."): v for k, v in broken.items()}
    del broken["visual.ln_post.weight"]
    with pytest.raises(GuidanceError, match="ln_post"):
        ClipGuide.from_state_dict(broken, head_width=HEAD_WIDTH)


def test_the_released_model_has_no_text_tower():
    """It keeps the token embedding and the projection that the text tower had."""
    tensors = read_clip(TOWER) | {
        "token_embedding.weight": torch.zeros(100, 32),
        "positional_embedding": torch.zeros(77, 32),
        "text_projection": torch.zeros(32, 16),
        "logit_scale": torch.zeros(()),
    }
    with pytest.raises(GuidanceError, match="the text tower is missing"):
        ClipGuide.from_state_dict(tensors, head_width=HEAD_WIDTH).encode_text(["a"])
