"""A folder whose pictures wait on disk."""

import importlib
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from infdit_core.__main__ import main
from infdit_core.pictures.files import read_image
from tests.nodes.photos import folder_graph, put
from tools.comfy_server import running_server

pytestmark = pytest.mark.comfy

SCRATCH = ".infdit-scratch"


@pytest.fixture
def run(comfy, load):
    """Run the node Inf-DiT Upscale Folder with pictures on disk."""

    def run(model=None, upscale_by=4.0, preset="draft", denoise=1.0, output_folder="", **more):
        format, overwrite = more.pop("format", "tif"), more.pop("overwrite", False)
        with torch.inference_mode():  # as ComfyUI runs nodes
            return comfy.nodes["InfDiTUpscaleFolder"].execute(
                model or load("tiny")[0], "photos", upscale_by, 7, preset, denoise, output_folder,
                format, "16", overwrite, **({"pictures_on_disk": True} | more),
            )  # fmt: skip

    return run


def picture(path: Path) -> torch.Tensor:
    return read_image(path)[0]


@pytest.mark.parametrize(
    "settings", [{"preset": "auto"}, {"preset": "fast", "denoise": 0.5, "upscale_by": 5.0}]
)
def test_results_are_those_of_the_command_line_and_nearly_those_in_memory(
    folders, load, run, tmp_path: Path, settings
):
    (folders[0] / "photos" / "c.webp").unlink()
    small = load("infdit_small")[0]
    run(small, colour_fix="wavelet", **settings)
    run(small, colour_fix="wavelet", **settings, output_folder="memory", pictures_on_disk=False)
    options = {"scale" if key == "upscale_by" else key: value for key, value in settings.items()}
    words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
    words += ["--seed", "7", "--colour-fix", "wavelet", "--format", "tif", "--bit-depth", "16"]
    words += ["--scratch", str(tmp_path / "scratch"), "--device", "cpu"]
    target, output = tmp_path / "by_command", folders[1] / "photos"
    assert not main(["upscale", str(folders[0] / "photos"), "-o", str(target), *words])
    assert sorted(path.name for path in output.iterdir()) == ["a.tif", "b.tif"]
    for name in ("a.tif", "b.tif"):
        found = picture(output / name)
        assert torch.equal(found, picture(target / name))
        assert (found - picture(folders[1] / "memory" / name)).abs().max() <= 1e-4


def test_after_a_cancel_it_goes_on_from_the_last_step(
    comfy, folders, run, evaluations, monkeypatch
):
    """Of the picture that was cancelled. What waits is no picture, and goes with the last."""
    node, target = comfy.nodes["InfDiTUpscaleFolder"], folders[1] / "photos"
    run(output_folder="whole")  # which plans: the planner evaluates too
    evaluations.clear()
    management = importlib.import_module("comfy.model_management")
    check = management.throw_exception_if_processing_interrupted

    def interrupted():
        if len(evaluations) > 6 + 3:
            raise management.InterruptProcessingException
        check()

    with monkeypatch.context() as patches:
        patches.setattr(management, "throw_exception_if_processing_interrupted", interrupted)
        with pytest.raises(management.InterruptProcessingException):
            run()
    assert [path.suffix for path in (target / SCRATCH).iterdir()] == [".infdit-state"]
    evaluations.clear()
    run()
    assert len(evaluations) == 3 + 6
    assert sorted(path.name for path in target.iterdir()) == ["a.tif", "b.tif", "c.tif"]
    for path in target.iterdir():
        assert torch.equal(picture(path), picture(folders[1] / "whole" / path.name))
    before = node.fingerprint_inputs("photos", recursive=True)
    other = target / SCRATCH / "x.infdit-state"
    other.parent.mkdir()
    other.write_bytes(b"of another run")
    assert node.fingerprint_inputs("photos", recursive=True) == before
    run(overwrite=True)
    assert [*other.parent.iterdir()] == [other]


def test_a_result_that_could_not_be_written_is_not_drawn_again(
    comfy, folders, run, evaluations, monkeypatch
):
    node = comfy.module("nodes.infdit.folder")

    def refused(path, *args, write=node.write_image, **options):
        if path.stem == "a":
            raise PermissionError(13, "Permission denied", str(path))
        write(path, *args, **options)

    with monkeypatch.context() as patches:
        patches.setattr(node, "write_image", refused)
        with pytest.raises(ValueError, match=r"1 of 3 pictures .*: a.png"):
            run()
    evaluations.clear()
    run()
    assert not evaluations
    assert len([*(folders[1] / "photos").iterdir()]) == 3


def test_out_of_memory_goes_to_less(comfy, folders, run, monkeypatch, caplog):
    run(output_folder="whole", longest_edge=512)
    net, failed = comfy.module("infdit_core.network.model").InfDiT, []

    def layer(self, n, tokens, *args, layer=net.layer):
        if tokens.device.type == "cpu" and not failed:
            failed.append(tokens.shape)
            raise torch.OutOfMemoryError("out of memory")
        return layer(self, n, tokens, *args)

    monkeypatch.setattr(net, "layer", layer)
    run(longest_edge=512)
    assert "out of memory with" in caplog.text
    for path in (folders[1] / "photos").iterdir():
        assert (picture(path) - picture(folders[1] / "whole" / path.name)).abs().max() <= 1e-4


@pytest.mark.slow
def test_after_a_kill_another_server_goes_on(comfy_source: Path, tmp_path: Path):
    graph = folder_graph("photos", "tif", pictures_on_disk=True)
    put(tmp_path / "input" / "photos", {"a.png": (96, 80)})
    target, server = tmp_path / "output" / "photos", (Path(sys.executable), comfy_source, tmp_path)
    with running_server(*server, arguments=["--cpu"]) as first:
        first.queue(graph)
        deadline = time.monotonic() + 120
        while not [*target.glob(f"{SCRATCH}/*.infdit-state")]:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        first.process.kill()
        first.process.wait()
    assert not [*target.glob("*.tif")]
    with running_server(*server, arguments=["--cpu"]) as second:
        second.submit(graph, timeout=120)
        assert "going on after step" in second.log()
    assert [path.name for path in target.iterdir()] == ["a.tif"]


def test_a_lora_is_applied_and_the_state_is_of_the_model_with_it(comfy, folders, run, load):
    model, key = load("tiny")[0], "diffusion_model.net.layers.0.mlp.fc1.weight"
    patched = model.clone()
    shift = torch.full_like(model.model_state_dict()[key], 0.5)
    assert patched.add_patches({key: (shift,)}, 1.0)
    sampler = comfy.module("nodes.infdit.managed_sampler").ManagedSampler

    def digest(patcher):
        return sampler(patcher.model.infdit, patcher=patcher).weights_digest()

    with_lora = digest(patched)
    assert digest(model) == digest(model.clone()) != with_lora
    run(patched)
    assert digest(patched) == with_lora, "now that the weights are patched"
    run(patched, output_folder="memory", pictures_on_disk=False)
    run(output_folder="plain")
    for name in ("a.tif", "b.tif", "c.tif"):
        found, in_memory, plain = (
            picture(folders[1] / folder / name) for folder in ("photos", "memory", "plain")
        )
        assert (found - in_memory).abs().max() <= 1e-4
        assert (found - plain).abs().max() > 1e-2


def test_a_model_describes_the_pictures_to_itself(folders, run, load):
    run(load("clip")[0])
    run(load("clip")[0], output_folder="memory", pictures_on_disk=False)
    for path in (folders[1] / "photos").iterdir():
        assert (picture(path) - picture(folders[1] / "memory" / path.name)).abs().max() <= 1e-4


def test_weights_in_8_bits_or_cast_at_use(folders, run, load):
    for dtype in ("fp8 layers", "bf16"):
        with torch.inference_mode():
            model = load("tiny", dtype)[0]
        run(model, output_folder=dtype)
        run(model, output_folder="memory", overwrite=True, pictures_on_disk=False)
        for path in (folders[1] / dtype).iterdir():
            found, expected = picture(path), picture(folders[1] / "memory" / path.name)
            assert (found - expected).abs().mean() <= 0.02, dtype


def test_what_cannot_be_on_disk_is_refused_before_any_work(
    comfy, folders, run, load, evaluations, caplog, monkeypatch
):
    with pytest.raises(ValueError, match="Upscale Folder: expected format tif or tif pyramid with"):
        run(format="png")
    Image.new("RGBA", (4, 4), (9, 9, 9, 9)).save(folders[0] / "photos" / "b.png")
    Image.new("P", (4, 4)).save(folders[0] / "photos" / "p.gif", transparency=0)
    node = comfy.module("nodes.infdit.folder")

    def upscale(*args, upscale=node.upscale, **options):
        assert "b.png: alpha: expected none of that with pictures in scratch files" in caplog.text
        assert "p.gif: alpha: expected none of that with pictures in scratch files" in caplog.text
        return upscale(*args, **options)

    with monkeypatch.context() as patches:
        patches.setattr(node, "upscale", upscale)
        message = r"Upscale Folder: 2 of 5 pictures could not be upscaled: b.png, p.gif. The first"
        with pytest.raises(ValueError, match=message):
            run()
    assert len([*(folders[1] / "photos").iterdir()]) == 3
    evaluations.clear()
    reusing = comfy.nodes["InfDiTSchedule"].execute(load("tiny")[0], "auto", 4, False, 0.0, 1)
    with pytest.raises(ValueError, match=r"Upscale Folder: .*expected no reuse of layers"):
        run(reusing.args[0], overwrite=True)
    small = SimpleNamespace(free=9)
    monkeypatch.setattr(comfy.module("infdit_core.scratch").shutil, "disk_usage", lambda _: small)
    message = r"scratch files are needed in output/photos/.infdit-scratch.*ComfyUI's output folder"
    with pytest.raises(ValueError, match=message):
        run(overwrite=True)
    assert not evaluations


def test_what_works_in_comfyui_s_samplers_is_refused(folders, run, load):
    from comfy_extras.nodes_eps import EpsilonScaling

    patched = EpsilonScaling.execute(load("tiny")[0], 1.1).args[0]
    with pytest.raises(ValueError, match=r"Folder: expected a model as .* with EpsilonScaling on"):
        run(patched)
