"""The trainer: resuming loses nothing, and what it exports is a checkpoint."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from infdit_core.checkpoints.checkpoint import open_checkpoint
from infdit_core.checkpoints.load import load_model
from training import export
from training.data import FLAT, Photos, condition, detail, reduce_bicubic
from training.evaluate import evaluate, read
from training.plot import read_log
from training.train import (
    LOG,
    STATE,
    Settings,
    Trainer,
    stratified_normal,
    write_log,
)

TINY = Settings(
    hidden_size=16, num_layers=2, num_heads=2, crop_px=64, batch_size=2, warmup_steps=2,
    total_steps=6,
)  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    generator = np.random.default_rng(0)
    for i in range(3):
        np.save(folder / f"{i}.npy", generator.integers(256, size=(80, 90, 3), dtype=np.uint8))
    return Photos(folder, TINY.crop_px)


def trainer(photos, **changes):
    return Trainer(replace(TINY, **changes), photos, torch.device("cpu"))


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_resuming_equals_never_stopping(photos, tmp_path, optimizer):
    whole = trainer(photos, optimizer=optimizer)
    losses = [whole.train_step()[1] for _ in range(5)]

    first = trainer(photos, optimizer=optimizer)
    for _ in range(3):
        first.train_step()
    first.save(tmp_path / STATE)
    second = trainer(photos, optimizer=optimizer)
    second.load(tmp_path / STATE)
    assert second.step == 3
    for expected in losses[3:]:
        assert torch.equal(second.train_step()[1], expected)
    for a, b in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(a, b)
    for name, value in whole.ema.items():
        assert torch.equal(value, second.ema[name]), name


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_training_changes_every_parameter(photos, optimizer):
    run = trainer(photos, optimizer=optimizer)
    assert run.train_step()[1].mean() == pytest.approx(1, rel=0.5)  # EDM: 1 at every sigma at first
    start = {k: v.clone() for k, v in run.model.state_dict().items()}
    for _ in range(5):
        run.train_step()
    changed = [k for k, v in run.model.state_dict().items() if not torch.equal(v, start[k])]
    assert len(changed) == len(start), "a parameter is not trained"


def test_the_border_weight_is_trained_on_and_not_logged(photos):
    plain, weighted = trainer(photos), trainer(photos, border_weight=1.0)
    for run in (plain, weighted):
        run.train_step()  # the output is zero at first, and with it all that lies before
    a, b = (run.train_step()[1] for run in (plain, weighted))
    torch.testing.assert_close(a, b, rtol=0.05, atol=0)
    weights = [run.ema["final.linear.weight"] for run in (plain, weighted)]
    assert not torch.equal(*weights)


def test_the_local_weight_is_not_given_to_dropped_pictures(photos):
    """A dropped picture is black, and black is flat."""
    first = [trainer(photos, lr_dropout=1.0, local_weight=flag) for flag in (False, True)]
    for run in first:
        run.train_step()
    for name, value in first[0].model.state_dict().items():
        assert torch.equal(value, first[1].model.state_dict()[name]), name
    plain, weighted = trainer(photos, lr_dropout=0.0), trainer(photos, lr_dropout=0.0)
    weighted.settings.local_weight = True
    losses = [run.train_step()[1] for run in (plain, weighted)]
    assert torch.equal(*losses), "logged is the loss of EDM"
    weights = [run.model.state_dict()["final.linear.weight"] for run in (plain, weighted)]
    assert not torch.equal(*weights)


def test_an_export_is_a_checkpoint_with_its_history(photos, tmp_path):
    run = trainer(photos)
    for _ in range(2):
        run.train_step()
    run.save(tmp_path / STATE)
    export.export(tmp_path, tmp_path / "model.safetensors", commit="abc")
    model = load_model(tmp_path / "model.safetensors")
    assert model.config == TINY.config
    for name, value in model.state_dict().items():
        assert torch.equal(value, run.ema[name].bfloat16().float()), name
    with open_checkpoint(tmp_path / "model.safetensors") as checkpoint:
        assert checkpoint.metadata["infdit.steps"] == "2"
        assert json.loads(checkpoint.metadata["infdit.training"])["batch_size"] == 2


def test_degradation_keeps_the_picture_in_place():
    ramp = torch.linspace(-1, 1, 64).expand(1, 3, 64, 64)
    cond = condition(reduce_bicubic(ramp))
    assert cond.lr.shape == (1, 3, 16, 16)
    torch.testing.assert_close(cond.concat[..., 8:-8], ramp[..., 8:-8], atol=0.01, rtol=0)


def test_the_learning_rate_warms_up_and_falls():
    rates = [TINY.rate(step) for step in range(TINY.total_steps + 1)]
    assert rates[0] < rates[1] == TINY.learning_rate
    assert rates[-1] == pytest.approx(TINY.learning_rate / 100)


def test_a_log_with_steps_done_twice_reads_as_done_once(photos, tmp_path):
    run = trainer(photos)
    for step, loss in ((50, 3.0), (100, 2.0), (100, 1.0)):  # killed after 100, resumed before it
        run.step = step
        write_log(tmp_path / LOG, run, torch.full((2,), 0.2), torch.full((2,), loss), 0.1)
    log = read_log(tmp_path / LOG)
    assert log["step"].tolist() == [50, 100]
    assert log["loss"].tolist() == log["loss_0.1_0.3"].tolist() == [3, 1]
    assert np.isnan(log["loss_1.0_inf"]).all()


def test_training_goes_on_from_a_checkpoint_of_another_size(photos, tmp_path):
    run = trainer(photos, hidden_size=32)
    run.train_step()
    run.save(tmp_path / STATE)
    export.export(tmp_path, tmp_path / "model.safetensors", commit="abc")
    tuned = trainer(photos, checkpoint=str(tmp_path / "model.safetensors"))
    assert tuned.config.hidden_size == 32
    for name, value in tuned.model.state_dict().items():
        assert torch.equal(value, run.ema[name].bfloat16().float()), name
    tuned.train_step()


def test_crops_must_be_whole_blocks(photos):
    with pytest.raises(ValueError, match="multiple of the block side 32, got 80"):
        trainer(photos, crop_px=80)


def test_stratified_noise_levels_are_normal_and_cover_the_range():
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([stratified_normal(8, generator) for _ in range(2000)])
    assert abs(drawn.mean()) < 0.01
    assert drawn.std() == pytest.approx(1, abs=0.02)
    counts = torch.special.ndtr(drawn).mul(8).long().sort(dim=1).values
    assert torch.equal(counts, torch.arange(8).expand(2000, 8))
    assert abs(torch.corrcoef(drawn.T)[0, 1]) < 0.25  # the order within a batch is random


def test_flat_crops_are_drawn_again(tmp_path):
    picture = np.zeros((64, 128, 3), dtype=np.uint8)
    picture[:, 64:] = np.random.default_rng(0).integers(256, size=(64, 64, 3))
    np.save(tmp_path / "half.npy", picture)
    photos, generator = Photos(tmp_path, 32), np.random.default_rng(0)
    crops = ((photos.batch(400, generator) + 1) * 127.5).round().byte().permute(0, 2, 3, 1)
    flat = (detail(crops) < FLAT).float().mean()
    assert 0.05 < flat < 0.2  # a third of the places, so a ninth after the second try


def test_evaluation_reads_runs_and_checkpoints_and_knows_better_from_worse(photos, tmp_path):
    run = trainer(photos)
    run.train_step()
    run.save(tmp_path / STATE)
    export.export(tmp_path, tmp_path / "model.safetensors", commit="abc")
    pictures = photos.batch(2, np.random.default_rng(0))
    found, interpolated = evaluate(read(tmp_path), pictures, reduce_bicubic(pictures))
    again, _ = evaluate(read(tmp_path / "model.safetensors"), pictures, reduce_bicubic(pictures))
    assert again == pytest.approx(found, rel=0.02)  # bf16
    # hardly trained, D is c_skip · x: the noise at low levels, the picture itself at high ones
    assert found[0] == pytest.approx(0.05 * 127.5, rel=0.05)
    power = pictures.square().mean().sqrt().item() * 127.5
    assert found[-1] == pytest.approx(power, rel=0.05)
    assert interpolated < power


def test_crops_are_places_of_the_picture_flipped_and_turned(tmp_path):
    picture = np.arange(40 * 50, dtype=np.int64)[:, None] // np.array([1, 256, 65536]) % 256
    np.save(tmp_path / "each-pixel-once.npy", picture.reshape(40, 50, 3).astype(np.uint8))
    crops = Photos(tmp_path, 32).batch(200, np.random.default_rng(0), side=8)
    levels = ((crops + 1) * 127.5).round().long()
    places = levels[:, 0] + 256 * levels[:, 1]  # (200, 8, 8)
    down, right = places.diff(dim=1), places.diff(dim=2)
    for step in (down, right):
        assert (step == step[:, :1, :1]).all()
    ways = set(zip(down[:, 0, 0].tolist(), right[:, 0, 0].tolist(), strict=True))
    assert ways == {(s * a, t * b) for a, b in ((50, 1), (1, 50)) for s in (1, -1) for t in (1, -1)}
    assert places.unique().numel() > 1700
