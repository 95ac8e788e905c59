"""The command line, with the tiny network of random weights."""

import io
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from infdit_core import edm_sigmas, load_model, prepare, sample
from infdit_core.__main__ import main
from infdit_core.clip import ClipGuide
from infdit_core.pictures.colour_fix import fix_colours
from infdit_core.pictures.files import read_image
from tests.goldens import golden, golden_path
from tools.comfy_server import ROOT

FAST = ["--steps", "2", "--solver", "euler", "--device", "cpu"]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Path]:
    """One model that needs CLIP and has none, one that brings it, one that needs none."""
    folder = tmp_path_factory.mktemp("models")
    weights = golden("xs/model.safetensors")
    tower = load_file(golden_path("e_clip/tiny_clip.safetensors"))
    variants = {
        "without": weights,
        "with": weights | tower,
        "none": {k: v for k, v in weights.items() if not k.startswith("cond_embed.")},
    }
    paths = {name: folder / f"{name}.safetensors" for name in variants}
    for name, tensors in variants.items():
        save_file(tensors, paths[name])
    prefix = "image_encoder.model."
    paths["clip"] = folder / "clip.safetensors"
    save_file({k.removeprefix(prefix): v for k, v in tower.items()}, paths["clip"])
    return paths


@pytest.fixture
def picture(tmp_path) -> Path:
    path = tmp_path / "photo.jpg"
    pixels = np.random.default_rng(0).integers(0, 256, (9, 14, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, quality=95)
    return path


def upscale(*args: object) -> int:
    return main(["upscale", *FAST, *map(str, args)])


def fails(capsys, *parts: str) -> None:
    """The one line that a user error leaves on stderr."""
    error = capsys.readouterr().err
    assert error.startswith("infdit: error: "), error
    assert "Traceback" not in error
    for part in parts:
        assert part in error


def test_upscale_is_the_library_call(models, picture, tmp_path, capsys):
    out = tmp_path / "out.png"
    assert upscale(picture, "-o", out, "--model", models["none"], "--seed", 7, "--scale", 3) == 0
    canvas = prepare(read_image(picture)[0], 3, block_px=32)
    x = sample(
        load_model(models["none"]),
        canvas.condition(),
        edm_sigmas(2),
        noise=torch.randn(canvas.concat.shape, generator=torch.Generator().manual_seed(7)),
        solver="euler",
    )
    expected = (canvas.finish(x)[0] * 255).round().numpy()
    assert np.array_equal(np.array(Image.open(out)), expected)
    said = capsys.readouterr().out
    assert "photo.jpg (14×9) -> " in said
    assert "out.png (42×27), " in said


@pytest.mark.parametrize(
    "options",
    [["--schedule", "block-major"], ["--schedule", "layer-major", "--blocks", "2"]],
)
def test_schedules_give_the_same_picture(models, picture, tmp_path, options):
    arguments = (picture, "--model", models["none"], "--bit-depth", 16)
    assert upscale(*arguments, "-o", tmp_path / "full.png") == 0
    assert upscale(*arguments, "-o", tmp_path / "other.png", *options) == 0
    full, other = (read_image(tmp_path / name)[0] for name in ("full.png", "other.png"))
    assert (full - other).abs().max() < 1e-4
    assert full.std() > 0.01


def test_reused_layers_change_the_picture_a_little(models, picture, tmp_path):
    arguments = (picture, "--model", models["none"], "--bit-depth", 16, "--steps", 3)
    arguments += ("--solver", "heun")
    assert upscale(*arguments, "-o", tmp_path / "exact.png") == 0
    assert upscale(*arguments, "-o", tmp_path / "other.png", "--reuse-layers", 1) == 0
    exact, other = (read_image(tmp_path / name)[0] for name in ("exact.png", "other.png"))
    unrelated = (exact - exact.roll(1, dims=1)).square().mean().sqrt()
    assert 0 < (exact - other).square().mean().sqrt() < unrelated / 2


def test_colours_are_fixed_and_denoise_keeps_closer(models, picture, tmp_path):
    def run(*options: object) -> torch.Tensor:
        out = tmp_path / "out.png"
        arguments = ("--model", models["none"], "--steps", 4, "--overwrite", "--bit-depth", 16)
        assert upscale(picture, "-o", out, *arguments, *options) == 0
        return read_image(out)[0]

    source = read_image(picture)[0]
    plain = run()
    fixed = fix_colours(plain, source, "wavelet")
    torch.testing.assert_close(run("--colour-fix", "wavelet"), fixed, atol=1e-4, rtol=0)
    canvas = prepare(source)
    enlarged = canvas.finish(canvas.concat)
    closer = run("--denoise", 0.25)
    assert 0 < (closer - enlarged).abs().mean() < 0.5 * (plain - enlarged).abs().mean()


def test_size_is_the_longer_side(models, picture, tmp_path):
    assert upscale(picture, "-o", tmp_path / "a.tif", "--model", models["none"], "--size", 50) == 0
    assert Image.open(tmp_path / "a.tif").size == (50, 32)


def test_folders_and_alpha(models, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    Image.new("RGBA", (5, 4), (255, 0, 0, 128)).save(folder / "clear.webp", lossless=True)
    Image.new("L", (3, 6), 77).save(folder / "grey.png")
    (folder / "notes.txt").write_text("not a picture")
    assert upscale(folder, "-o", tmp_path / "new" / "out", "--model", models["none"]) == 0
    results = {p.name: Image.open(p) for p in (tmp_path / "new" / "out").iterdir()}
    assert {n: (p.mode, p.size) for n, p in results.items()} == {
        "clear.png": ("RGBA", (20, 16)),
        "grey.png": ("RGB", (12, 24)),
    }


def test_clip_from_the_model_file_and_from_another(models, picture, tmp_path):
    a, b = tmp_path / "a.png", tmp_path / "b.png"
    assert upscale(picture, "-o", a, "--model", models["with"]) == 0
    assert upscale(picture, "-o", b, "--model", models["without"], "--clip", models["clip"]) == 0
    assert a.read_bytes() == b.read_bytes()
    canvas = prepare(read_image(picture)[0], 4, block_px=32)
    tower = {k.removeprefix("visual."): v for k, v in load_file(models["clip"]).items()}
    guide = ClipGuide.from_state_dict({f"visual.{k}": v for k, v in tower.items()})
    x = sample(
        load_model(models["without"]),
        canvas.condition(guide.guide(read_image(picture)[0])),
        edm_sigmas(2),
        noise=torch.randn(canvas.concat.shape, generator=torch.Generator().manual_seed(0)),
        solver="euler",
    )
    assert np.array_equal(np.array(Image.open(a)), (canvas.finish(x)[0] * 255).round().numpy())


def test_missing_clip(models, picture, tmp_path, capsys):
    assert upscale(picture, "-o", tmp_path / "a.png", "--model", models["without"]) == 1
    fails(capsys, "without.safetensors needs a CLIP embedding", "--clip", "ViT-L-14")


def test_text_without_a_text_tower(models, picture, tmp_path, capsys):
    arguments = (picture, "-o", tmp_path / "a.png", "--text-strength", 2)
    assert upscale(*arguments, "--model", models["with"]) == 1
    fails(capsys, "text tower", "ViT-L-14")
    assert upscale(*arguments, "--model", models["none"]) == 1
    fails(capsys, "takes no CLIP embedding")


def test_a_pyramid_is_asked_for_and_needs_tif(models, picture, tmp_path, capsys):
    arguments = (picture, "--model", models["none"], "--size", 300, "--pyramid")
    assert upscale(*arguments, "-o", tmp_path / "a.tif") == 0
    with Image.open(tmp_path / "a.tif") as found:
        assert (found.size, found.n_frames) == ((300, 193), 2)
    with pytest.raises(SystemExit):
        upscale(*arguments, "-o", tmp_path / "a.png")
    assert "--pyramid goes with results that end in .tif" in capsys.readouterr().err


def test_nothing_is_overwritten_unasked(models, picture, tmp_path, capsys):
    out = tmp_path / "out.png"
    out.write_bytes(b"precious")
    assert upscale(picture, "-o", out, "--model", models["none"]) == 1
    fails(capsys, "out.png already exists", "--overwrite")
    assert out.read_bytes() == b"precious"
    assert upscale(picture, "-o", out, "--model", models["none"], "--overwrite") == 0
    assert Image.open(out).size == (56, 36)
    before, other = picture.read_bytes(), tmp_path / "other.jpg"
    other.hardlink_to(picture)
    for name in (picture, other):
        assert upscale(picture, "-o", name, "--model", models["none"], "--overwrite") == 1
        fails(capsys, f"{name.name} is an input; expected another --output")
    assert picture.read_bytes() == before


def test_user_errors_in_names(models, picture, tmp_path, capsys):
    def check(*args: object, parts: tuple[str, ...]) -> None:
        assert upscale(*args, "--model", models["none"]) == 1
        fails(capsys, *parts)

    twin = tmp_path / "photo.webp"
    Image.open(picture).save(twin)
    empty = tmp_path / "empty"
    empty.mkdir()
    check(tmp_path / "no.png", "-o", "a.png", parts=("no.png does not exist",))
    check(empty, "-o", tmp_path / "out", parts=("empty holds no picture", ".png"))
    check(picture, "-o", tmp_path / "a.xyz", parts=("a.xyz: expected a name that ends in",))
    (tmp_path / "plain").write_text("a file")
    check(picture, "-o", tmp_path / "plain", parts=("plain cannot be made", "a folder"))
    check(picture, "-o", tmp_path / "plain" / "a.png", parts=("plain cannot be made",))
    check(picture, twin, "-o", tmp_path / "a.png", parts=("expected a folder",))
    (tmp_path / "other").mkdir()
    same = twin.rename(tmp_path / "other" / "photo.jpg")
    check(picture, same, "-o", tmp_path / "out", parts=("2 of 2 pictures", "another picture's"))
    check(picture, "-o", tmp_path / "a.png", "--scale", "0", parts=("factor", "got 0"))
    check(picture, "-o", tmp_path / "a.webp", "--bit-depth", 16, parts=("expected .png",))
    check(
        picture, "-o", tmp_path / "a.png", "--reuse-layers", 99, parts=("expected less than the",)
    )
    check(picture, "-o", tmp_path / "a.png", "--device", "toaster", parts=("--device toaster",))
    check(picture, "-o", tmp_path / "a.png", "--device", "meta:x", parts=("--device meta:x",))
    check(picture, "-o", tmp_path / "a.png", "--device", "meta", parts=("--device meta cannot",))


def test_bad_models(picture, tmp_path, capsys):
    text = tmp_path / "text.pt"
    text.write_text("hello")
    for model, part in ((text, "is a text file"), (tmp_path / "no.pt", "does not exist")):
        assert upscale(picture, "-o", tmp_path / "a.png", "--model", model) == 1
        fails(capsys, part)
        assert main(["inspect", str(model)]) == 1
        fails(capsys, part)


def test_debug_shows_the_traceback(picture, tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        main(["inspect", str(tmp_path / "no.pt"), "--debug"])


UPSCALE = ["upscale", "a.png", "-o", "b.png", "--model", "m.safetensors"]
PLAN = ["plan", "--size"]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "COMMAND"),
        (["shrink"], "shrink"),
        (["upscale", "a.png"], "-o/--output"),
        ([*UPSCALE, "--steps", "0"], "at least 1, got '0'"),
        ([*UPSCALE, "--seed", "-1"], "2^64 - 1"),
        ([*UPSCALE, "--denoise", "-1"], "from 0 to 1"),
        ([*UPSCALE, "--scale", "2", "--size", "9"], "not allowed"),
        ([*UPSCALE, "--blocks", "2"], "--schedule"),
        ([*UPSCALE, "--schedule", "full", "--memory", "8GB"], "--memory goes with --schedule auto"),
        ([*PLAN, "4096"], "expected"),
        ([*PLAN, "0x5"], "expected"),
        ([*PLAN, "8x8", "--memory", "lots"], "expected"),
    ],
)
def test_usage_errors(args, message, capsys):
    with pytest.raises(SystemExit) as raised:
        main(args)
    assert raised.value.code == 2
    assert message in capsys.readouterr().err


def test_interrupted(models, picture, tmp_path, monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("infdit_core.cli.commands.upscale", interrupt)
    assert upscale(picture, "-o", tmp_path / "a.png", "--model", models["none"]) == 130
    assert capsys.readouterr().err == "infdit: interrupted\n"
    assert not (tmp_path / "a.png").exists()


def test_a_network_that_overflows_is_an_error(models, picture, tmp_path, capsys):
    weights = load_file(models["none"])
    weights["mixins.final_layer.linear.bias"][0] = float("nan")
    save_file(weights, tmp_path / "nan.safetensors")
    assert upscale(picture, "-o", tmp_path / "a.png", "--model", tmp_path / "nan.safetensors") == 1
    fails(capsys, "expected finite pixels", "bf16 or fp32")
    assert not (tmp_path / "a.png").exists()


def test_progress_counts_steps_and_chunks(models, picture, tmp_path, monkeypatch):
    bars = []

    class Bar:
        def __init__(self, desc, total=None, **options):
            self.desc, self.total, self.n, self.seen, self.closed = desc, total, 0, [], False
            bars.append(self)

        def update(self, n):
            self.n += n
            self.seen.append((self.n, self.total))

        def reset(self, total):
            self.n, self.total = 0, total

        def set_postfix_str(self, text):
            pass

        def close(self):
            self.closed = True

    monkeypatch.setattr("tqdm.tqdm", Bar)
    arguments = ["upscale", picture, "-o", tmp_path / "a.png", "--model", models["none"]]
    # 56×36 px are 2×2 blocks of 32 px; four layers; three evaluations for two steps of heun
    options = ["--steps", 2, "--schedule", "block-major", "--device", "cpu"]
    assert main([str(a) for a in arguments + options]) == 0
    steps, cells = bars
    assert steps.desc == "photo.jpg"
    assert steps.seen == [(1, 2), (2, 2)]
    assert cells.seen == [(n, 16) for n in range(1, 17)] * 3
    assert steps.closed
    assert cells.closed


def test_inspect(models, capsys):
    assert main(["inspect", str(models["with"])]) == 0
    said = capsys.readouterr().out
    for line in (
        "with.safetensors: a complete Inf-DiT\n",
        "hidden_size: 64\n",
        "num_layers: 4\n",
        "block_px: 32\n",
        "vector_size: 16\n",
        "dtype: float32 (",
        "clip image tower: yes\n",
        "clip text tower: no\n",
        "unknown tensors: none\n",
    ):
        assert line in said
    count = sum(p.numel() for p in load_model(models["with"]).parameters())
    assert f"parameters: {count:,}\n" in said


def test_convert_then_inspect(models, tmp_path, capsys):
    source = golden_path("xs/mp_rank_00_model_states.pt")
    target = tmp_path / "small.safetensors"
    assert main(["convert", str(source), str(target), "--dtype", "bf16"]) == 0
    assert "small.safetensors: " in capsys.readouterr().out
    assert main(["inspect", str(target)]) == 0
    said = capsys.readouterr().out
    assert "dtype: bfloat16 (" in said
    assert "infdit.source: mp_rank_00_model_states.pt" in said
    assert main(["convert", str(source), str(target)]) == 1
    fails(capsys, "already exists")
    assert main(["convert", str(source), str(target), "--overwrite"]) == 0


def test_a_name_that_the_terminal_cannot_show(models, picture, tmp_path, monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    source = picture.rename(tmp_path / "φ.jpg")
    assert upscale(source, "-o", tmp_path / "a.png", "--model", models["none"]) == 0
    stream.flush()
    assert b"\\u03c6.jpg (14\\xd79) -> " in stream.buffer.getvalue()


def test_as_a_program(models):
    """Exit status and streams of the real process, which imports open_clip only when it is used."""

    def run(*args: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-X", "importtime", "-m", "infdit_core", *args]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)

    shown = run("inspect", str(models["none"]))
    assert shown.returncode == 0
    assert "a complete Inf-DiT" in shown.stdout
    assert "open_clip" not in shown.stderr
    failed = run("inspect", "no.pt")
    assert failed.returncode == 1
    assert failed.stdout == ""


def test_plan_marks_what_is_taken(models, capsys):
    command = ["plan", "--model", models["none"], "--size", "4096x2048", "--dtype", "bf16"]
    assert main([*map(str, command), "--memory", "2GB"]) == 0
    out = capsys.readouterr().out
    assert "4096×2048 px, bf16" in out
    marked = [line for line in out.splitlines() if line.startswith("> ")]
    assert len(marked) == 1
    assert "layer by layer" in marked[0]
    assert main([*map(str, command), "--memory", "0.6MB"]) == 1
    assert "nothing fits 1 MB" in capsys.readouterr().err
    command += ["--memory", "500MB", "--ram"]  # what waits there has to fit too
    assert main([*map(str, command), "2GB"]) == 0
    assert re.search(r"^> .* in RAM", capsys.readouterr().out, re.MULTILINE)
    assert main([*map(str, command), "1MB"]) == 1
    assert "nothing fits 0.5 GB with 1 MB of RAM" in capsys.readouterr().err


def test_another_upscaler_s_picture_is_refined(models, picture, tmp_path, capsys):
    start, out = tmp_path / "start.png", tmp_path / "out.png"
    pixels = np.random.default_rng(1).integers(0, 256, (36, 56, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(start)
    options = ("--model", models["none"], "--start", start, "--steps", 4, "--denoise", 0.01)
    assert upscale(picture, "-o", out, *options) == 0
    assert (read_image(out)[0] - read_image(start)[0]).abs().mean() < 0.05
    with pytest.raises(SystemExit):
        upscale(tmp_path, "-o", tmp_path / "many", *options)
    assert "--start goes with a single picture" in capsys.readouterr().err


def test_a_bug_of_ours_is_not_told_as_a_mistake_of_the_user(monkeypatch):
    def bug(args):
        raise ValueError("a bug")

    monkeypatch.setattr("infdit_core.cli.parser.inspect", bug)
    with pytest.raises(ValueError, match="a bug"):
        main(["inspect", "model.safetensors"])
