"""Few-step distillation: it learns, resumes as if never stopped, its file says how to sample."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from infdit_core import InfDiTError, load_model
from infdit_core.checkpoints.names import CLIP_PREFIX
from infdit_core.sampling import AUTO, find_preset
from tests.goldens import ASKED, TINY, TINY_PRIOR, golden, golden_path, random_tensors
from training.distil import MODEL, Distiller, Settings, distil
from training.plot import read_log
from training.resumable import LOG, STATE

CPU = torch.device("cpu")
QUICK = Settings(
    "", "40,2", teacher_steps=2, crop_blocks=2, batch_size=2, learning_rate=3e-3, warmup_steps=1,
    total_steps=40, ema_decay=0.9,
)  # fmt: skip


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "test"):
        (folder / split).mkdir()
        coarse = torch.rand(1, 3, 24, 24, generator=generator) * 255
        picture = torch.nn.functional.interpolate(coarse, (192, 192), mode="bicubic")[0]
        np.save(folder / split / "a.npy", picture.clamp(0, 255).permute(1, 2, 0).byte().numpy())
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Files of random weights: with a prior, and with an embedding and its CLIP tower."""
    folder = tmp_path_factory.mktemp("models")
    paths = {name: folder / f"{name}.safetensors" for name in ("pictures", "residuals", "clip")}
    save_file(random_tensors(TINY), paths["pictures"])
    save_file(random_tensors(TINY_PRIOR), paths["residuals"], ASKED | {"license": "theirs"})
    tower = load_file(golden_path("e_clip/tiny_clip.safetensors"))
    save_file(golden("xs/model.safetensors") | tower, paths["clip"])
    return {name: str(path) for name, path in paths.items()}


@pytest.mark.parametrize(("kind", "sigmas"), [("pictures", "40,2"), ("residuals", "0.5,0.1")])
def test_few_steps_come_nearer_to_many_steps_of_the_model(checkpoints, photos, kind, sigmas):
    run = Distiller(replace(QUICK, checkpoint=checkpoints[kind], sigmas=sigmas), photos, CPU)
    before = run.measure()["off"]
    for _ in range(QUICK.total_steps):
        run.train_step()
    assert run.measure()["off"] < 0.85 * before


def test_the_teacher_samples_as_its_file_asks(checkpoints, photos):
    settings = replace(QUICK, checkpoint=checkpoints["residuals"], sigmas="0.5", teacher_steps=0)
    solver, sigmas = Distiller(settings, photos, CPU).path(0)
    assert (solver, sigmas.tolist()) == ("euler", [0.5, 0.125, 0])
    run = Distiller(replace(settings, sigmas="0.5,0.05", teacher_steps=2), photos, CPU)
    solver, sigmas = run.path(0)
    assert solver == "heun"
    assert sigmas.tolist()[::2] == pytest.approx([0.5, 0.05])


def test_resuming_equals_never_stopping(checkpoints, photos, tmp_path, lite0_file):
    settings = replace(QUICK, checkpoint=checkpoints["pictures"], features=str(lite0_file))
    whole = Distiller(settings, photos, CPU)
    losses = [whole.train_step() for _ in range(6)]
    first = Distiller(settings, photos, CPU)
    for _ in range(3):
        first.train_step()
    first.save(tmp_path / STATE)
    second = Distiller(settings, photos, CPU)
    second.load(tmp_path / STATE)
    assert [second.train_step() for _ in range(3)] == losses[3:]
    assert "judge" in losses[3]
    for name, value in whole.ema.items():
        assert torch.equal(value, second.ema[name]), name


def test_the_adversary_moves_the_last_step_only(checkpoints, photos, lite0_file):
    plain = replace(QUICK, checkpoint=checkpoints["pictures"])
    both = [Distiller(s, photos, CPU) for s in (plain, replace(plain, features=str(lite0_file)))]
    for differs in (False, True):
        for run in both:
            run.train_step()
        a, b = (run.model.state_dict() for run in both)
        assert any(not torch.equal(a[name], b[name]) for name in a) == differs


def test_what_is_computed_again_has_the_same_gradients(checkpoints, photos):
    plain = replace(QUICK, checkpoint=checkpoints["residuals"], sigmas="0.5")
    a, b = (Distiller(s, photos, CPU) for s in (plain, replace(plain, recompute=True)))
    assert a.train_step() == b.train_step()
    for name, value in a.model.state_dict().items():
        assert torch.equal(value, b.model.state_dict()[name]), name


def test_the_file_asks_for_the_steps_it_was_made_for(checkpoints, photos, tmp_path):
    settings = replace(QUICK, checkpoint=checkpoints["residuals"], sigmas="0.5,0.2,0.05")
    run = Distiller(settings, photos, CPU)
    distil(tmp_path, run, stop_at=2, every=1, save_minutes=9, commit="abc")
    assert read_log(tmp_path / LOG)["step"].tolist() == [0, 1, 2]
    model = load_model(tmp_path / MODEL)
    preset = find_preset(AUTO, model.metadata)
    assert preset.solver == "euler"
    assert preset.consistency == 1, "as the source's file asks"
    sigmas = preset.sigmas(1.0, model.config.sigma_max)
    torch.testing.assert_close(sigmas, torch.tensor([0.5, 0.2, 0.05, 0]))
    assert model.metadata["license"] == "theirs"
    told = model.metadata["infdit.distilled"]
    assert json.loads(told)["step"] == 2
    assert checkpoints["residuals"] not in told
    for name, value in model.state_dict().items():
        assert torch.equal(value, run.ema[name].bfloat16().float()), name


def test_a_model_with_clip_learns_with_its_embedding_and_keeps_its_tower(
    checkpoints, photos, tmp_path
):
    settings = replace(QUICK, checkpoint=checkpoints["clip"], crop_blocks=1, sigmas="40")
    run = Distiller(settings, photos, CPU)
    _, cond = run.pictures(torch.rand(2, 3, run.config.block_px, run.config.block_px), run.numpy)
    assert cond.vector is not None
    torch.testing.assert_close(cond.vector.norm(dim=1), torch.ones(2))
    run.export(tmp_path / MODEL, "abc")
    kept = {k for k in load_file(tmp_path / MODEL) if k.startswith(CLIP_PREFIX)}
    assert kept == {k for k in load_file(settings.checkpoint) if k.startswith(CLIP_PREFIX)} != set()


@pytest.mark.parametrize(
    ("sigmas", "message"),
    [
        ("40,50", "sigmas that fall"),
        ("20,2", "first is 40, got 20"),
        ("40;2", "expected numbers, got '40;2'"),
    ],
)
def test_sigmas_that_the_model_cannot_start_from_are_refused(checkpoints, photos, sigmas, message):
    settings = replace(QUICK, checkpoint=checkpoints["pictures"], sigmas=sigmas)
    with pytest.raises(InfDiTError, match=message):
        Distiller(settings, photos, CPU)
