"""What trains the bundled model: tiles, degraded batches, Muon, and the two evaluations."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from infdit_core import load_model, sample
from infdit_core.edm import RESIDUAL_MAX
from infdit_core.network.model import InfDiT
from infdit_core.network.prior import Prior
from infdit_core.sampling import Preset
from tests.goldens import TINY_PRIOR, random_condition
from training import export, features, prior, tiles
from training.degrade_batch import jpeg, reduce_realistic_batch
from training.initial import initialise, initialise_prior
from training.muon import orthogonal
from training.recipe import SECOND_SIGMA, two_evaluations


def test_tiles_are_read_as_written_and_cropped_inside(tmp_path):
    picture = np.full((64, 64, 3), 200, np.uint8)
    tiles.write(tmp_path / "T.bin", [tiles.encode(picture)] * 3)
    found = tiles.read(tmp_path / "T.bin", torch.device("cpu"))
    assert found.shape == (3, 64, 64, 3)
    crops = tiles.crops(found, 5, 48, torch.Generator().manual_seed(0))
    assert crops.shape == (5, 3, 48, 48)
    torch.testing.assert_close(crops, torch.full_like(crops, 200 / 127.5 - 1), atol=0.02, rtol=0)


@pytest.mark.parametrize("quality", [30, 80])
def test_jpeg_is_that_of_pillow(quality):
    """In the mean of a batch: a coefficient between two steps may be rounded either way."""
    smooth = torch.nn.functional.interpolate(torch.rand(16, 3, 6, 6), (48, 48), mode="bicubic")
    levels = (smooth.clamp(0, 1) * 255).round()
    expected = []
    for picture in levels.byte():
        file = io.BytesIO()
        pixels = picture.permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(file, "JPEG", quality=quality, subsampling=2)
        expected.append(torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1).float())
    found = jpeg(levels / 255, torch.full((16,), float(quality))) * 255
    assert (found - torch.stack(expected)).abs().mean() < 1


def test_degraded_pictures_are_levels_of_a_quarter_of_the_size():
    lr = reduce_realistic_batch(torch.rand(5, 3, 96, 96) * 2 - 1, np.random.default_rng(0), group=2)
    assert lr.shape == (5, 3, 24, 24)
    levels = (lr + 1) * 127.5
    torch.testing.assert_close(levels, levels.round(), atol=1e-3, rtol=0)
    assert 0 <= levels.min() <= levels.max() <= 255


def test_muon_turns_any_matrix_into_a_nearly_orthogonal_one():
    values = torch.linalg.svdvals(orthogonal(torch.randn(2, 20, 45)).float())
    assert 0.5 < values.min() <= values.max() < 1.3


def test_a_prior_starts_as_interpolation():
    net = Prior(8, 2)
    initialise_prior(net)
    lr = torch.rand(1, 3, 8, 8)
    assert not net(lr).any()
    assert prior.gain(prior.enlarged(net, lr), lr, torch.rand(1, 3, 32, 32)) == 0


def test_two_evaluations_are_the_preset_of_the_file():
    model = initialise(InfDiT(TINY_PRIOR)).requires_grad_(False)
    for parameter in model.final.parameters():
        parameter.normal_(0, 0.05, generator=torch.Generator().manual_seed(0))
    noise, cond = random_condition(model, 2, 2)
    for dial in (0.3, 1.0):
        levels = Preset("euler", 2, (1.0, SECOND_SIGMA)).sigmas(1.0, RESIDUAL_MAX * dial)
        expected = sample(model, cond, levels, noise=noise, solver="euler")
        found = two_evaluations(model, cond, noise, torch.tensor([dial]))
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_an_exported_file_has_the_other_prior_and_loads(tmp_path):
    weights = dict(InfDiT(TINY_PRIOR).state_dict())
    other = {f"prior.{k}": v for k, v in Prior(4, 1).state_dict().items()}
    for name, factor in (("a", 1), ("b", 4)):
        state = {k: factor * v for k, v in other.items()} | {"else": torch.zeros(1)}
        save_file(state, tmp_path / name)
    mean = prior.read_priors([tmp_path / name for name in "aab"])  # (1 + 1 + 4) / 3
    weights, config = export.with_prior(weights, TINY_PRIOR, mean)
    export.write(config, weights, tmp_path / "m.safetensors", {})
    found = load_model(tmp_path / "m.safetensors")
    assert found.config.prior_width == 4
    expected = 2 * other["prior.head.weight"].bfloat16().float()
    torch.testing.assert_close(
        found.state_dict()["prior.head.weight"].float(), expected, atol=0, rtol=0.01
    )


def test_a_prior_is_trained_in_every_way_and_gone_on_from(tmp_path, monkeypatch):
    generator = np.random.default_rng(0)
    for split, side in (("train", 96), ("test", prior.TEST_PX)):
        (tmp_path / split).mkdir()
        pixels = generator.integers(256, size=(side, side, 3), dtype=np.uint8)
        np.save(tmp_path / split / "noise.npy", pixels)

    def train(out, *words):
        sizes = [
            "--width",
            "4",
            "--depth",
            "1",
            "--crop",
            "32",
            "--batch",
            "2",
            "--minutes",
            "0.01",
        ]
        command = ["prior", tmp_path, tmp_path / out, *sizes, "--device", "cpu", *words]
        monkeypatch.setattr("sys.argv", [str(word) for word in command])
        prior.main()
        return load_file(tmp_path / out)

    first = train("a", "--real", "0.5")
    ways = "--edges 0.1 --borders 1 --consistency 1 --colours --shrunk 0.5 --decay 0.1 --l1 1"
    second = train("b", "--start", tmp_path / "a", tmp_path / "a", *ways.split())
    for name, weight in second.items():
        assert weight.isfinite().all()
        assert name.endswith("bias") or not torch.equal(weight, first[name])


def test_the_distance_of_features_is_0_for_the_same_and_grows(lite0_file):
    lite0, picture = features.read(lite0_file), torch.rand(1, 3, 64, 64)
    near, far = picture + 0.01 * torch.randn_like(picture), torch.rand_like(picture)
    same, close, apart = (
        features.distance(lite0(p), lite0(picture)).item() for p in (picture, near, far)
    )
    assert same == 0 < close < apart
