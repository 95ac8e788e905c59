"""Pictures in and out: exact sizes, nothing cropped, equal to the release where it says."""

from itertools import pairwise

import pytest
import torch

from infdit_core.pictures.prepare import PreparationError, pass_sizes, prepare, target_size
from tests.goldens import golden, golden_cases


@pytest.mark.parametrize("name", golden_cases("f_prepare/scale?.safetensors"))
def test_a_picture_of_whole_blocks_equals_the_release(name):
    tensors, scale = golden(name), int(name[-13])
    image = ((tensors["lr_cropped"] + 1) / 2).permute(0, 2, 3, 1)
    canvas = prepare(image, scale)
    torch.testing.assert_close(canvas.concat, tensors["concat_lr_imgs"], atol=1e-6, rtol=0)
    torch.testing.assert_close(canvas.lr, tensors["lr_imgs"], atol=1e-6, rtol=0)
    assert scale == 4 or canvas.lr.abs().max() > 1, "the LR picture is not clipped"


@pytest.mark.parametrize("name", golden_cases("f_prepare/scale?.safetensors"))
def test_an_odd_picture_equals_the_release_away_from_its_crop(name):
    tensors, scale = golden(name), int(name[-13])
    image = tensors["input_u8"].permute(1, 2, 0)[None].float() / 255
    canvas = prepare(image, scale)
    assert (canvas.height, canvas.width) == (75 * scale, 141 * scale)
    top, left, margin = 6 * scale, 6 * scale, 4 * scale
    expected = tensors["concat_lr_imgs"]
    found = canvas.concat[..., top:, left:][..., : 64 * scale, : 128 * scale]
    inside = (..., slice(margin, -margin), slice(margin, -margin))
    torch.testing.assert_close(found[inside], expected[inside], atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (75, 141), (33, 2), (64, 64)])
@pytest.mark.parametrize("factor", [1.0, 1.37, 2.0, 3.3, 4.0, 8.0])
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_exact_size_comes_out(size, factor, channels):
    image = torch.rand(2, *size, channels)
    before = image.clone()
    canvas = prepare(image, factor, block_px=32)
    h, w = (max(1, round(side * factor)) for side in size)
    assert canvas.concat.shape[-2] % 32 == canvas.concat.shape[-1] % 32 == 0
    assert canvas.concat.shape[-2] - h < 32
    assert canvas.concat.shape[-1] - w < 32
    assert tuple(canvas.lr.shape[-2:]) == tuple(side // 4 for side in canvas.concat.shape[-2:])
    result = canvas.finish(canvas.concat)
    assert result.shape == (2, h, w, 4 if channels == 4 else 3)
    assert result.min() >= 0
    assert result.max() <= 1
    assert torch.equal(image, before), "the input was changed"


def test_a_factor_of_one_gives_the_picture_back():
    image = torch.rand(1, 40, 50, 4)
    canvas = prepare(image, 1.0, block_px=32)
    torch.testing.assert_close(canvas.finish(canvas.concat), image, atol=1e-6, rtol=0)


def test_the_whole_picture_maps_onto_the_whole_target():
    """A ramp stays a ramp from edge to edge, also where the factor is no whole number."""
    ramp = torch.linspace(0, 1, 100)[None, None, :, None].expand(1, 20, 100, 3)
    result = prepare(ramp, size=(31, 137), block_px=32)
    line = result.finish(result.concat)[0, 15, :, 0]
    positions = (torch.arange(137) + 0.5) * 100 / 137 - 0.5
    inner = slice(5, -5)
    torch.testing.assert_close(line[inner], positions[inner] / 99, atol=1e-3, rtol=0)


def test_padding_reflects_the_picture():
    image = torch.rand(1, 20, 20, 3)
    canvas = prepare(image, 1.0, block_px=32)
    mirrored = canvas.concat[..., 20:32, :20]
    torch.testing.assert_close(mirrored, canvas.concat[..., 7:19, :20].flip(-2))


def test_fp16_pictures_are_taken():
    image = torch.rand(1, 16, 16, 3)
    half = prepare(image.half(), 4.0, block_px=32)
    assert half.concat.dtype == torch.float32
    torch.testing.assert_close(
        half.concat, prepare(image, 4.0, block_px=32).concat, atol=5e-3, rtol=0
    )


@pytest.mark.parametrize(
    ("image", "factor", "message"),
    [
        (torch.rand(8, 8, 3), 4.0, r"got \(8, 8, 3\)"),
        (torch.rand(1, 8, 8, 2), 4.0, r"got \(1, 8, 8, 2\)"),
        (torch.rand(1, 0, 8, 3), 4.0, r"got \(1, 0, 8, 3\)"),
        (torch.full((1, 8, 8, 3), float("nan")), 4.0, "NaN"),
        (torch.full((1, 8, 8, 3), float("inf")), 4.0, "infinity"),
        (torch.zeros(1, 8, 8, 3, dtype=torch.uint8), 4.0, "torch.uint8"),
        (torch.rand(1, 8, 8, 3), 0.0, "factor above 0, got 0"),
        (torch.rand(1, 8, 8, 3), float("nan"), "factor above 0, got nan"),
    ],
)
def test_bad_input_is_named(image, factor, message):
    with pytest.raises(PreparationError, match=message):
        prepare(image, factor)


@pytest.mark.parametrize(
    ("source", "factor", "count"),
    [
        ((9, 5), 8.0, 2),
        ((100, 60), 4.0, 1),
        ((100, 60), 4.01, 2),
        ((7, 3), 64.0, 3),
        ((5, 5), 0.5, 1),
    ],
)
def test_passes_end_at_the_target_in_steps_of_at_most_four(source, factor, count):
    target = target_size(source, factor)
    assert target == tuple(max(1, round(side * factor)) for side in source)
    sizes = pass_sizes(source, target)
    assert len(sizes) == count
    assert sizes[-1] == target
    for before, after in pairwise([source, *sizes]):
        assert all(b <= 4 * a + 2 for a, b in zip(before, after, strict=True))


def test_shrinking_has_a_limit():
    """The padding of one block, counted in source pixels, would grow without bound."""
    assert prepare(torch.rand(1, 41, 7, 3), 0.25).height == 10
    with pytest.raises(PreparationError, match="at least 1/4 of the picture's 41×41 px, got 9×41"):
        prepare(torch.rand(1, 41, 41, 3), size=(41, 9))
