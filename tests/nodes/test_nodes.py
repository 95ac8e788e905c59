"""The nodes in a real ComfyUI, in this process."""

import gc
import importlib
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from tests.comfy import STEPS
from tests.goldens import TINY

pytestmark = pytest.mark.comfy


def ksampler(pack, model, image, steps, seed):
    """The advanced way: Conditioning, what core's KSampler node calls, Decode."""
    from comfy.sample import prepare_noise, sample

    conditioning, latent, canvas = pack.nodes["InfDiTConditioning"].execute(model, image, 4.0).args
    start = latent["samples"]
    samples = sample(
        model, prepare_noise(start, seed), steps, 1.0, "heun", "karras",
        conditioning, conditioning, start, disable_pbar=True, seed=seed,
    )  # fmt: skip
    return pack.nodes["InfDiTDecode"].execute({"samples": samples}, canvas).args[0]


@pytest.mark.parametrize("name", ["tiny", "prior"])
def test_ksampler_equals_upscale_and_the_engine(comfy, load, upscale, name):
    """heun / karras / 20 steps of core, our node and our own sampler: one picture."""
    model, _ = load(name)
    image = torch.rand(1, 20, 30, 3)
    by_ksampler = ksampler(comfy, model, image, 20, seed=7)
    by_node = upscale(model, image, 4.0, seed=7, steps=20, preset="exact")
    torch.testing.assert_close(by_node, by_ksampler, atol=1e-3, rtol=0)

    engine = comfy.module("infdit_core")
    net = engine.load_model(comfy.models_dir / "infdit" / f"{name}.safetensors")
    by_engine = engine.upscale(image, model=net, seed=7, preset="exact")
    torch.testing.assert_close(by_engine, by_ksampler, atol=1e-3, rtol=0)


def test_auto_does_what_the_file_asks_for(comfy, load, upscale, bar):
    model, image = load("prior")[0], torch.rand(1, 20, 30, 3)
    by_node = upscale(model, image, 4.0, seed=7, preset="auto")
    net = comfy.module("infdit_core").load_model(comfy.models_dir / "infdit" / "prior.safetensors")
    by_engine = comfy.module("infdit_core").upscale(image, model=net, seed=7)
    torch.testing.assert_close(by_node, by_engine, atol=1e-4, rtol=0)
    assert bar[-1][0] == bar[-1][1]
    alone = upscale(model, image, 4.0, preset="auto", denoise=0.0)
    expected = comfy.module("infdit_core").upscale(image, model=net, denoise=0)
    torch.testing.assert_close(alone, expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(("size", "factor"), [((1, 1), 4.0), ((13, 21), 1.37), ((9, 5), 8.0)])
def test_the_exact_size_comes_out(load, upscale, size, factor, channels):
    image = torch.rand(1, *size, channels)
    before = image.clone()
    result = upscale(load("tiny")[0], image, factor, steps=2)
    h, w = (round(side * factor) for side in size)
    assert result.shape == (1, h, w, 4 if channels == 4 else 3)
    assert result.isfinite().all()
    assert torch.equal(image, before), "the input was changed"


def test_half_precision_pictures_are_upscaled(comfy, load, upscale, monkeypatch):
    model, image = load("tiny")[0], torch.rand(1, 10, 12, 4)
    exact = upscale(model, image)
    assert (upscale(model, image.half()) - exact).abs().mean() < 1e-2
    arguments = importlib.import_module("comfy.cli_args").args
    monkeypatch.setattr(arguments, "fp16_intermediates", True)
    full = ksampler(comfy, model, image.half(), STEPS, seed=0)
    assert (full - upscale(model, image, 4.0)).abs().mean() < 1e-2


@pytest.mark.parametrize("preset", ["fast", "draft"])
def test_presets_take_fewer_evaluations(comfy, load, upscale, evaluations, preset):
    model, image = load("tiny")[0], torch.rand(1, 10, 12, 3)
    exact = upscale(model, image, steps=20)
    evaluations.clear()
    quick = upscale(model, image, preset=preset)
    assert len(evaluations) == comfy.module("infdit_core.sampling").PRESETS[preset].evaluations
    assert (quick - exact).square().mean().sqrt() < 0.1


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_every_weight_dtype_runs(load, upscale, dtype):
    image = torch.rand(1, 10, 12, 3)
    exact = upscale(load("tiny")[0], image)
    assert (upscale(load("tiny", dtype)[0], image) - exact).abs().mean() < 0.02


def test_the_schedule_in_transformer_options_is_used(comfy, load, upscale):
    keys, schedule = (
        comfy.module("nodes.infdit.comfy_model"),
        comfy.module("infdit_core.blocks.schedules"),
    )
    model, image = load("tiny")[0], torch.rand(1, 20, 12, 3)
    exact = upscale(model, image, 4.0)
    chunked, seen = model.clone(), []

    class Watched(schedule.LayerMajor):
        def cells(self, grid, num_layers):
            seen.append(grid)
            return super().cells(grid, num_layers)

    chunked.model_options["transformer_options"] = {keys.SCHEDULE: Watched(1)}
    torch.testing.assert_close(upscale(chunked, image, 4.0), exact, atol=1e-4, rtol=0)
    assert {(grid.rows, grid.columns) for grid in seen} == {(3, 2)}
    assert len(seen) % (2 * STEPS - 1) == 0
    assert keys.PROGRESS not in model.model_options.get("transformer_options", {})


@pytest.mark.parametrize(
    ("schedule", "blocks", "on_cpu", "memory_gb"),
    [("auto", 1, False, 0.0), ("auto", 1, False, 0.5), ("whole picture", 1, False, 0.0),
     ("block by block", 2, False, 0.0), ("layer by layer", 3, True, 0.0)],
)  # fmt: skip
def test_the_schedule_node_does_not_change_the_picture(
    comfy, load, upscale, schedule, blocks, on_cpu, memory_gb
):
    model, image = load("tiny")[0], torch.rand(1, 20, 12, 3)
    node = comfy.nodes["InfDiTSchedule"]
    scheduled = node.execute(model, schedule, blocks, on_cpu, memory_gb).args[0]
    expected = upscale(model, image, 4.0)
    torch.testing.assert_close(upscale(scheduled, image, 4.0), expected, atol=1e-4, rtol=0)


def test_reused_layers_change_the_picture_a_little_and_cost_less(comfy, load, upscale):
    model, image = load("tiny")[0], torch.rand(1, 20, 12, 3)
    node, layers = comfy.nodes["InfDiTSchedule"], []
    attention = type(model.model.diffusion_model.net.layers[0].attention)
    forward = attention.forward

    def count(*args):
        layers.append(1)
        return forward(*args)

    pictures, counts = [], []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "forward", count)
        for reuse in (0, 1):
            layers.clear()
            scheduled = node.execute(model, "auto", 1, False, 0.0, reuse).args[0]
            pictures.append(upscale(scheduled, image, 4.0))
            counts.append(len(layers))
    a_layer = counts[0] // (2 * STEPS - 1) // TINY.num_layers
    assert counts[1] == counts[0] - (STEPS - 1) * a_layer
    assert 0 < (pictures[0] - pictures[1]).square().mean().sqrt() < 0.2
    with pytest.raises(ValueError, match="Inf-DiT Schedule: expected reuse_layers below"):
        node.execute(model, "auto", 1, False, 0.0, 99)


def test_8_bit_layers_are_loaded_sampled_and_smaller(comfy, load, upscale):
    image = torch.rand(1, 20, 12, 3)
    exact, rounded = load("tiny")[0], load("tiny", "fp8 layers")[0]
    h, mlp = TINY.hidden_size, TINY.mlp_size
    saved = TINY.num_layers * 3 * (4 * h * h + 2 * h * mlp)  # three of four bytes
    assert rounded.model_size() == pytest.approx(exact.model_size() - saved, rel=0.01)
    expected, result = upscale(exact, image, 4.0), upscale(rounded, image, 4.0)
    assert 0 < (result - expected).square().mean().sqrt() < 0.2

    patch = {"diffusion_model.net.layers.0.mlp.fc1.weight": ("diff", (torch.randn(mlp, h) / 4,))}
    patched = [model.clone() for model in (exact, rounded)]
    assert all(model.add_patches(patch) for model in patched)
    changed, result = (upscale(model, image, 4.0) for model in patched)
    moved = (changed - expected).square().mean().sqrt()
    assert (result - changed).square().mean().sqrt() < moved / 2


def test_memory_required_grows_with_the_picture_not_with_the_square(comfy, load):
    model = load("tiny")[0].model
    small, large = (model.memory_required([1, 3, side, side]) for side in (512, 2048))
    assert 4 < large / small < 20


@pytest.fixture
def gpu(comfy, load, monkeypatch):
    """A model of the released size that is to be loaded to a GPU of `total` bytes."""
    management = importlib.import_module("comfy.model_management")
    config = comfy.module("infdit_core.network.config").RELEASED
    model = load("tiny")[0].model

    def install(total):
        monkeypatch.setattr(management, "get_torch_device", lambda: torch.device("cuda", 0))
        monkeypatch.setattr(management, "get_total_memory", lambda device: total)
        monkeypatch.setattr(management, "module_size", lambda module: 1.5e9)
        monkeypatch.setattr(model, "current_patcher", None)
        monkeypatch.setattr(model.infdit, "config", config)
        monkeypatch.setattr(model, "get_dtype_inference", lambda: torch.bfloat16)
        return model

    return install


def test_memory_required_is_planned_for_the_gpu_before_the_model_is_there(gpu):
    required = gpu(80e9).memory_required([1, 3, 4096, 4096])
    pictures = 9 * 3 * 4096**2 * 4
    assert 3e9 + pictures < required < 6e9 + pictures


def test_memory_required_leaves_room_for_the_weights(gpu):
    """On a small GPU a leaner plan: with no room left, ComfyUI would keep no weight there."""
    ample, small = (gpu(total).memory_required([1, 3, 4096, 4096]) for total in (80e9, 8e9))
    assert small < ample
    assert small <= 0.9 * 8e9 - 1.1 * 1.5e9


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_run_takes_what_the_patcher_gives_without_its_weights_and_a_reserve(comfy, dynamic):
    """With dynamic VRAM the weights of all models count as free, and ours are to stay."""
    patcher = SimpleNamespace(
        get_free_memory=lambda device: 8e9, is_dynamic=lambda: dynamic, model_size=lambda: 1.5e9
    )
    run = comfy.module("nodes.infdit.runs").PlannedRun()
    run.patcher = patcher
    given = 0.9 * (8e9 - 1.5e9 * dynamic)
    for scratch, reserve in ((False, 4 * 3 * 1024**2 * 4), (True, 0)):
        work = comfy.module("infdit_core.memory.planner").Workload(
            TINY, 1024, 1024, torch.float32, pictures=0, scratch=scratch
        )
        assert run._budget(work, torch.device("meta")) == pytest.approx(given - reserve)


@pytest.mark.parametrize(("loaded", "by_layers"), [(1.5e9, False), (1.4e9, True)])
def test_weights_that_come_at_use_come_for_few_chunks(comfy, loaded, by_layers):
    planner = comfy.module("infdit_core.memory.planner")
    config = comfy.module("infdit_core.network.config").RELEASED
    work = planner.Workload(config, 8192, 8192, torch.bfloat16, weights=False, pictures=0)
    run = comfy.module("nodes.infdit.runs").PlannedRun()
    run.patcher = SimpleNamespace(loaded_size=lambda: loaded, model_size=lambda: 1.5e9)
    turns = [p.schedule.residency(work.grid, config.num_layers).turn for p in run._plans(work)]
    assert (turns == sorted(turns, key=bool)) == by_layers


def test_memory_is_pinned_by_comfyui_as_it_was_told(comfy, monkeypatch):
    management = importlib.import_module("comfy.model_management")
    run = comfy.module("nodes.infdit.runs").PlannedRun()
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(management, "MAX_PINNED_MEMORY", -1)  # --disable-pinned-memory
    run.host.take(100, torch.device("cuda", 0))
    assert not run.host.pinned
    told = []
    monkeypatch.setattr(management, "pin_memory", lambda memory: told.append(memory) or True)
    monkeypatch.setattr(management, "unpin_memory", lambda memory: told.remove(memory))
    run.release()
    run.host.take(100, torch.device("cuda", 0))
    assert run.host.pinned
    assert len(told) == 1
    del run
    gc.collect()
    assert not told


def test_a_schedule_that_the_ram_is_too_small_for_is_refused(comfy, load, upscale, monkeypatch):
    planner = comfy.module("infdit_core.memory.planner")
    model = load("tiny")[0]
    model = comfy.nodes["InfDiTSchedule"].execute(model, "layer by layer", 1, True, 0.0).args[0]
    upscale(model, torch.rand(1, 16, 8, 3), 4.0)
    monkeypatch.setattr(planner, "waiting_bytes", lambda: 10.0)
    with pytest.raises(ValueError, match=r"tokens in RAM: 0 MB would wait in RAM, of which 0 MB"):
        upscale(model, torch.rand(1, 16, 8, 3), 4.0)


def test_progress_per_chunk_and_a_preview_per_step(load, upscale, bar):
    upscale(load("tiny")[0], torch.rand(2, 10, 12, 3))
    values = [value for value, _, _ in bar]
    assert values == sorted(values)
    assert values[-1] == bar[-1][1]
    cells = 2 * (2 * STEPS - 1) * TINY.num_layers  # pictures, evaluations, cells of `Full`
    assert len(set(values)) == cells + 1
    previews = [preview for _, _, preview in bar if preview is not None]
    assert len(previews) == 1 + 2 * STEPS
    kind, picture, _ = previews[1]
    assert kind == "JPEG"
    assert picture.size == (24, 20)


def test_a_preview_is_small_and_shows_the_picture(comfy):
    preview_image = comfy.module("nodes.infdit.progress").preview_image
    white_left = -torch.ones(1, 3, 1000, 2000)
    white_left[..., :1000] = 1
    picture = preview_image(white_left)
    assert picture.size == (512, 256)
    assert picture.getpixel((10, 10)) == (255, 255, 255)
    assert picture.getpixel((500, 10)) == (0, 0, 0)


def test_guidance_reaches_the_model(comfy, load, upscale):
    model, clip = load("vector")
    image = torch.rand(2, 10, 12, 3)
    assert clip is None
    guidance = torch.nn.functional.normalize(torch.randn(2, 16), dim=-1)
    one = upscale(model, image, guidance=guidance)
    other = upscale(model, image, guidance=guidance.flip(0))
    assert (one - other).abs().max() > 1e-3
    single = upscale(model, image[:1], guidance=guidance[:1])
    torch.testing.assert_close(single, one[:1])


def test_the_tower_of_the_model_file_is_used_when_nothing_is_connected(comfy, load, upscale):
    model, clip = load("clip")
    image = torch.rand(1, 30, 40, 3)
    guidance = comfy.nodes["InfDiTGuidance"].execute(clip, image, "", "", 0.0).args[0]
    assert guidance.shape == (1, 16)
    torch.testing.assert_close(upscale(model, image), upscale(model, image, guidance=guidance))
    by_file = comfy.nodes["InfDiTCLIPLoader"].execute("tower.safetensors").args[0]
    same = comfy.nodes["InfDiTGuidance"].execute(by_file, image, "", "", 0.0).args[0]
    torch.testing.assert_close(same, guidance)


def test_errors_name_the_node_what_was_expected_and_what_came(comfy, load, upscale):
    load("tiny")
    image = torch.rand(1, 8, 8, 3)
    nodes = comfy.nodes
    with pytest.raises(
        ValueError, match="Inf-DiT Upscale: this model needs a CLIP embedding of 16"
    ):
        upscale(load("vector")[0], image)
    with pytest.raises(ValueError, match=r"Inf-DiT Upscale: expected guidance of shape \(1, 16\)"):
        upscale(load("vector")[0], image, guidance=torch.rand(1, 768))
    with pytest.raises(ValueError, match="Inf-DiT CLIP Guidance: the text tower is missing"):
        nodes["InfDiTGuidance"].execute(load("clip")[1], image, "clear", "", 2.0)
    with pytest.raises(ValueError, match="Inf-DiT CLIP Guidance: expected a CLIP tower"):
        nodes["InfDiTGuidance"].execute(None, image, "", "", 0.0)
    canvas = nodes["InfDiTConditioning"].execute(load("tiny")[0], image, 4.0).args[2]
    with pytest.raises(ValueError, match="Inf-DiT Decode: expected the LATENT of the sampler"):
        nodes["InfDiTDecode"].execute({"samples": torch.zeros(1, 4, 8, 8)}, canvas)
    with pytest.raises(ValueError, match=r"Load Inf-DiT CLIP: .*expected an open_clip"):
        nodes["InfDiTCLIPLoader"].execute("tiny.safetensors")


def test_a_wrong_model_file_is_named(comfy, load):
    save_file({"lora_up.weight": torch.zeros(2)}, comfy.models_dir / "infdit" / "lora.safetensors")
    with pytest.raises(ValueError, match=r"Load Inf-DiT Checkpoint: .*LoRA"):
        load("lora")


def test_foreign_conditioning_is_named(comfy, load):
    from comfy.sample import sample

    model, latent = load("tiny")[0], torch.zeros(1, 3, 32, 32)
    foreign = [[torch.zeros(1, 77, 768), {}]]
    with pytest.raises(ValueError, match="Inf-DiT Conditioning"):
        sample(model, latent, 2, 1.0, "heun", "karras", foreign, foreign, latent, disable_pbar=True)
