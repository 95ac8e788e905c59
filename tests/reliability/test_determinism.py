"""The same seed gives the same picture: bit for bit in the same order of computation, and to a
stated tolerance in any other order, with any number of threads and on another machine.

The golden picture of the bundled model is made anew, after that model was replaced on purpose, by

    INFDIT_FREEZE=1 python3 tools/dev.py test tests/reliability/test_determinism.py
"""

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch

from infdit_core import edm_sigmas, load_model, prepare, sample, upscale
from infdit_core.blocks.schedules import BlockMajor, Full, LayerMajor
from infdit_core.checkpoints.load import BUNDLED_FOLDER
from infdit_core.memory.adaptive import Adaptive
from infdit_core.memory.planner import Workload, plans
from infdit_core.pictures.files import read_image, write_image
from infdit_core.upscale import with_prior

ROOT = Path(__file__).resolve().parents[2]
MODEL = BUNDLED_FOLDER / "infdit_small.safetensors"
GOLDEN_PICTURE = ROOT / "tests" / "golden" / "bundled_picture.png"
GOLDEN_FACTS = GOLDEN_PICTURE.with_suffix(".json")
TOP, LEFT, SIDE = 96, 64, 16
"""The part of examples/demo_photo.png that is upscaled, in pixels."""
ORDER = 1e-4
"""Of pixels in 0..1: what another order of computation may change, a fortieth of an 8-bit level."""
MACHINE = 1e-3
"""What another processor and another PyTorch may change: a quarter of an 8-bit level."""


@pytest.fixture(scope="module")
def model():
    return load_model(MODEL)


@pytest.fixture(scope="module")
def image() -> torch.Tensor:
    picture, _ = read_image(ROOT / "examples" / "demo_photo.png")
    return picture[:, TOP : TOP + SIDE, LEFT : LEFT + SIDE]


@pytest.fixture(scope="module")
def draw(model):
    def drawn(image, seed=0, schedule=None, retry=None, steps=5) -> torch.Tensor:
        """(B, H, W, 3) in 0..1; each picture of a batch has the seed's noise."""
        canvas = prepare(image, 4.0, block_px=model.config.block_px)
        canvas = with_prior(canvas, model, torch.device("cpu"), torch.float32)
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(1, *canvas.concat.shape[1:], generator=generator)
        noise = noise.expand_as(canvas.concat)
        sigmas = edm_sigmas(steps, sigma_max=model.config.sigma_max)
        x = sample(model, canvas.condition(), sigmas, noise=noise, schedule=schedule, retry=retry)
        return canvas.finish(x)

    return drawn


@pytest.fixture(scope="module")
def reference(draw, image):
    return draw(image)


def test_the_same_twice(draw, image, reference):
    assert torch.equal(draw(image), reference)
    assert torch.equal(draw(image, schedule=Full()), reference)


def test_another_seed_is_another_picture(draw, image, reference):
    assert (draw(image, seed=1) - reference).abs().max() > 10 * MACHINE


@pytest.mark.parametrize(
    "schedule",
    [BlockMajor(1), BlockMajor(2), LayerMajor(1), LayerMajor(2), LayerMajor(3),
     LayerMajor(2, keep_lr=False), LayerMajor(1, tokens_on_host=True)],
    ids=str,
)  # fmt: skip
def test_any_schedule_and_chunk_size(draw, image, reference, schedule):
    first = draw(image, schedule=schedule)
    torch.testing.assert_close(first, reference, atol=ORDER, rtol=0)
    assert torch.equal(draw(image, schedule=schedule), first)


def test_any_memory(draw, model, image, reference):
    found = plans(Workload(model.config, 4 * SIDE, 4 * SIDE, torch.float32, device="cpu"))
    for memory in {plan.peak_bytes for plan in found}:
        result = draw(image, retry=Adaptive(found, memory).call)
        torch.testing.assert_close(result, reference, atol=ORDER, rtol=0)


def test_any_place_in_a_batch(draw, image, reference):
    others = torch.rand(2, *image.shape[1:], generator=torch.Generator().manual_seed(1))
    for place in range(3):
        batch = torch.cat([others[:place], image, others[place:]])
        result = draw(batch)[place : place + 1]
        torch.testing.assert_close(result, reference, atol=ORDER, rtol=0)


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_any_number_of_threads(draw, image, reference, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        result = draw(image)
        assert torch.equal(draw(image), result)
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(result, reference, atol=ORDER, rtol=0)


def test_the_bundled_model_draws_its_golden_picture(model, image):
    picture = upscale(image, model=model)
    facts = {
        "model": MODEL.name,
        "model_sha256": hashlib.sha256(MODEL.read_bytes()).hexdigest(),
        "source": f"examples/demo_photo.png, {SIDE}×{SIDE} px from ({LEFT}, {TOP})",
        "how": "4 times, preset auto, seed 0, float32",
    }
    if os.environ.get("INFDIT_FREEZE"):
        write_image(GOLDEN_PICTURE, picture, bit_depth=16)
        GOLDEN_FACTS.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", "utf-8")
        return
    assert json.loads(GOLDEN_FACTS.read_text("utf-8")) == facts, __doc__
    golden, _ = read_image(GOLDEN_PICTURE)
    torch.testing.assert_close(picture, golden, atol=MACHINE, rtol=0)


# In ComfyUI


@pytest.mark.comfy
def test_any_place_in_a_batch_of_the_node(load, upscale):
    """The node takes one picture after the other, so each is the same to the last bit."""
    model = load("tiny")[0]
    images = torch.rand(3, 8, 12, 3, generator=torch.Generator().manual_seed(0))
    batch = upscale(model, images, seed=7)
    for i in range(3):
        assert torch.equal(upscale(model, images[i : i + 1], seed=7), batch[i : i + 1])
    assert torch.equal(upscale(model, images.flip(0), seed=7), batch.flip(0))


@pytest.mark.comfy
@pytest.mark.parametrize("seed", [0, 2**64 - 1])
def test_the_node_draws_what_the_engine_draws(comfy, load, upscale, seed):
    model, engine = load("tiny")[0], comfy.module("infdit_core")
    image = torch.rand(1, 8, 12, 3, generator=torch.Generator().manual_seed(0))
    net = engine.load_model(comfy.models_dir / "infdit" / "tiny.safetensors")
    canvas = engine.prepare(image, 2.0, block_px=32)
    noise = torch.randn(canvas.concat.shape, generator=torch.Generator().manual_seed(seed))
    x = engine.sample(net, canvas.condition(), engine.edm_sigmas(4), noise=noise)
    expected = canvas.finish(x)
    torch.testing.assert_close(upscale(model, image, seed=seed), expected, atol=1e-5, rtol=0)
