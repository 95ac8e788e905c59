"""The trainer of DiMR: its loss by value, resuming, and a network that learns its classes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file, save_file

from infdit_core.dimr.config import NULL_CLASS, XL_2R
from infdit_core.dimr.load import load_model
from infdit_core.dimr.model import DiMR
from infdit_core.dimr.names import release_shapes
from infdit_core.dimr.sampling import sample
from training import dimr
from training.dimr import Settings, Trainer, add_noise, objective, read_data, stage_errors
from training.resumable import STATE

TINY = Settings(
    width=32, heads=4, blocks=3, fine_blocks=1, kernel=3, batch_size=64, learning_rate=6e-3,
    warmup_steps=20,
)  # fmt: skip
CLASSES = 10


def patterns():
    """(10, 1, 4, 4): one of plus and minus ones for each class."""
    return torch.randn(CLASSES, 1, 4, 4, generator=torch.Generator().manual_seed(0)).sign()


def patterns_in_noise(count=1000):
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(CLASSES, (count,), generator=generator)
    return patterns()[labels] + 0.25 * torch.randn(count, 1, 4, 4, generator=generator), labels


def trainer(data=None, **changes):
    data = patterns_in_noise() if data is None else data
    return Trainer(replace(TINY, **changes), *data, torch.device("cpu"))


def share_of_class(model, templates, cfg_scale, classes=None, evaluations=12):
    """Of pictures drawn of each class, how many are nearest to its template."""
    wanted = torch.arange(CLASSES).repeat(8)
    shape = len(wanted), *templates.shape[1:]
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    drawn = sample(
        model,
        noise,
        wanted if classes is None else torch.full_like(wanted, classes),
        evaluations=evaluations,
        cfg_scale=cfg_scale,
    )
    nearest = torch.cdist(drawn.flatten(1), templates.flatten(1)).argmin(dim=1)
    return (nearest == wanted).float().mean().item()


def test_it_learns_to_draw_what_it_is_asked_for():
    run = trainer()
    errors = torch.stack([run.train_step() for _ in range(300)])
    # Predicting nothing has an error of 1 at every stage.
    assert errors[-50:].mean(dim=0).max() < 0.28
    model = run.ema_model()
    plain, guided = (share_of_class(model, patterns(), scale) for scale in (1.0, 3.0))
    assert plain > 0.7, "a tenth by chance"
    assert guided > plain + 0.04
    assert share_of_class(model, patterns(), 1.0, classes=NULL_CLASS) < 0.25


def digits(count, side, seed):
    """Digits in Pillow's own font, of varied place, size, angle and weight, and their labels."""
    generator = np.random.default_rng(seed)
    labels = generator.integers(CLASSES, size=count)
    pictures, large = [], 4 * side
    for label in labels:
        picture = Image.new("L", (large, large))
        font = ImageFont.load_default(generator.uniform(0.95, 1.05) * large)
        x, y = large * (0.5 + generator.uniform(-0.03, 0.03, 2))
        ImageDraw.Draw(picture).text(
            (x, y), str(label), fill=255, font=font, anchor="mm",
            stroke_width=int(generator.integers(large // 16 + 1)),
        )  # fmt: skip
        turned = picture.rotate(generator.uniform(-6, 6), Image.Resampling.BILINEAR)
        pictures.append(np.asarray(turned.resize((side, side), Image.Resampling.BOX)))
    levels = torch.from_numpy(np.stack(pictures)[:, None]).float()
    return levels / 127.5 - 1, torch.from_numpy(labels)


@pytest.mark.slow
def test_it_learns_digits():
    latents, labels = digits(2000, 8, seed=0)
    means = torch.stack([latents[labels == n].mean(dim=0) for n in range(CLASSES)])
    run = trainer((latents, labels), width=64, batch_size=32, learning_rate=4e-3, warmup_steps=30)
    for _ in range(1500):
        run.train_step()
    plain, guided = (share_of_class(run.ema_model(), means, scale) for scale in (1.0, 3.0))
    assert plain > 0.4, "a tenth by chance"
    assert guided > 0.8


def test_noise_is_the_authors_and_keeps_the_variance():
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    kept = np.cumprod(1 - betas)
    ones, zeros = torch.ones(3, 1, 2, 2), torch.zeros(3, 1, 2, 2)
    t = torch.tensor([1, 500, 1000]) / 1000
    expected = torch.from_numpy(kept[[0, 499, 999]]).float()
    torch.testing.assert_close(add_noise(ones, zeros, t)[:, 0, 0, 0] ** 2, expected)
    torch.testing.assert_close(add_noise(zeros, ones, t)[:, 0, 0, 0] ** 2, 1 - expected)


def test_a_coarse_stage_is_asked_for_sums_of_variance_one():
    noise = torch.arange(16.0).reshape(1, 1, 4, 4)
    sums = torch.tensor([[10.0, 18.0], [42.0, 50.0]]) / 2
    errors = stage_errors([sums[None, None] + 2, noise + 1], noise)
    assert errors.tolist() == [4, 1]
    assert objective(torch.tensor([4.0, 8.0, 1.0])) == 4  # quarters of all but the last


def test_the_start_is_the_authors():
    model = dimr.initialise(DiMR(TINY.config(4, 8)))
    x, classes = torch.randn(1, 4, 8, 8), torch.tensor([7])
    early, late = (model(x, torch.tensor([t]), classes) for t in (0.1, 0.9))
    assert torch.equal(early, late), "time means nothing yet"
    assert not torch.equal(early, model(x, torch.tensor([0.1]), classes + 1))
    state = model.state_dict()
    for name in ("norm.weight", "enlarge.norm_in.weight", "blocks.0.mlp.norm.scale"):
        ends, between = state[f"stages.1.{name}.rows.weight"].split(2)
        assert (ends == 1).all()
        assert (between == 0).all()
    assert not state["stages.1.norm.bias.rows.weight"].any()
    assert not state["stages.0.blocks.0.mlp.gate.bias"].any()
    narrow = 0.02 * (XL_2R.stages[0].dim / TINY.width) ** 0.5
    for name in ("blocks.0.mlp.gate", "class_embed"):
        assert state[f"stages.0.{name}.weight"].std() == pytest.approx(narrow, rel=0.1)


def test_every_parameter_is_trained_and_norms_do_not_decay():
    run = trainer(batch_size=4)
    start = {k: v.clone() for k, v in run.model.state_dict().items()}
    for _ in range(3):
        run.train_step()
    same = [k for k, v in run.model.state_dict().items() if torch.equal(v, start[k])]
    assert not same
    other, norms = run.optimizers[0].param_groups
    assert (other["weight_decay"], norms["weight_decay"]) == (0.03, 0)
    names = {id(p): k for k, p in run.model.named_parameters()}
    assert {names[id(p)] for p in norms["params"]} == {k for k in start if "rows" in k}


def test_resuming_equals_never_stopping(tmp_path):
    whole = trainer(batch_size=4)
    errors = [whole.train_step() for _ in range(5)]
    first = trainer(batch_size=4)
    for _ in range(3):
        first.train_step()
    first.save(tmp_path / STATE)
    second = trainer(batch_size=4)
    second.load(tmp_path / STATE)
    for expected in errors[3:]:
        assert torch.equal(second.train_step(), expected)
    for name, value in whole.ema.items():
        assert torch.equal(value, second.ema[name]), name


def test_an_export_is_a_checkpoint_with_its_heads(tmp_path):
    run = trainer(batch_size=4, bf16=True)
    run.train_step()
    path = tmp_path / "model.safetensors"
    run.export(path, "abc")
    assert load_file(path).keys() == release_shapes(run.config).keys()
    model = load_model(path)
    assert model.config == run.config
    for name, value in model.state_dict().items():
        assert torch.equal(value, run.ema[name]), name


def test_data_come_from_either_kind_of_file(tmp_path):
    latents, labels = patterns_in_noise(6)
    np.savez(tmp_path / "a.npz", latents=latents.numpy(), labels=labels.int().numpy())
    save_file({"latents": latents, "labels": labels}, tmp_path / "a.safetensors")
    for name in ("a.npz", "a.safetensors"):
        found = read_data(tmp_path / name)
        assert torch.equal(found[0], latents)
        assert torch.equal(found[1], labels)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": None}, r"a\.safetensors: .* without \['labels'\]"),
        ({"latents": torch.zeros(2, 1, 4, 6)}, r"even side, got \(2, 1, 4, 6\)"),
        ({"latents": torch.zeros(0, 1, 4, 4)}, r"even side, got \(0, 1, 4, 4\)"),
        ({"latents": torch.zeros(2, 1, 5, 5)}, r"even side, got \(2, 1, 5, 5\)"),
        ({"labels": torch.zeros(2)}, r"2 integers as labels, got torch\.float32 \(2,\)"),
        ({"labels": torch.zeros(3).long()}, r"2 integers as labels, got torch\.int64 \(3,\)"),
        ({"labels": torch.tensor([0, 1000])}, "labels from 0 to 999"),
    ],
)
def test_wrong_data_are_named(tmp_path, change, message):
    data = {"latents": torch.zeros(2, 1, 4, 4), "labels": torch.zeros(2).long()} | change
    path = tmp_path / "a.safetensors"
    save_file({k: v for k, v in data.items() if v is not None}, path)
    with pytest.raises(ValueError, match=message):
        read_data(path)
