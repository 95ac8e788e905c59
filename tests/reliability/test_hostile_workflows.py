"""Workflows that ask for nonsense over the API of a real server, which is killed once before.

At length, with workflows by chance from the seed INFDIT_SEED on:

    INFDIT_SEED=1000 python3 tools/dev.py test -m slow tests/reliability/test_hostile_workflows.py
"""

import itertools
import json
import re
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from random import Random

import pytest
import torch

from tests.goldens import TINY, random_tensors
from tests.reliability import fuzz, fuzz_workflows
from tests.reliability.workflows import debug_server, node, pixels, workflow
from tools.comfy_server import ComfyError, ComfyServer

pytestmark = pytest.mark.comfy

LIMIT_SECONDS = 120
LONG = (pytest.mark.slow, pytest.mark.timeout(3600))
MAX_SEED = 2**64 - 1
STARTED = "Inf-DiT: 256×256 px"
"""Logged before the first evaluation of the job that is cut off."""
_seeds = itertools.count(1000)


def run(server: ComfyServer, graph: dict) -> list:
    return server.output_files(server.submit(graph, timeout=LIMIT_SECONDS))


@pytest.fixture(scope="module")
def killed(comfy_source, tmp_path_factory):
    """A folder that a server left behind when it was killed in the middle of a job, that job, and
    the picture that it would have made."""
    base = tmp_path_factory.mktemp("killed")
    job = workflow(seed=1, width=64, height=64)
    with debug_server(comfy_source, base) as server:
        # of a copy of the model, so that the server does not know the result already
        models = server.models_dir / "infdit"
        shutil.copy(models / "tiny.safetensors", models / "copy.safetensors")
        (saved,) = run(server, workflow(seed=1, model="copy", width=64, height=64))
        expected = pixels(saved)
        started = server.log().count(STARTED)
        server.queue(job)
        end = time.monotonic() + LIMIT_SECONDS
        while server.log().count(STARTED) == started:
            assert time.monotonic() < end
            time.sleep(0.01)
        server.process.kill()
        server.process.wait()
        assert "Prompt executed" not in server.log().split(STARTED)[-1]
    return base, job, expected


@pytest.fixture(scope="module")
def server(killed, comfy_source):
    with debug_server(comfy_source, killed[0]) as server:
        yield server


def test_a_killed_server_leaves_nothing_half_and_goes_on(server: ComfyServer, killed):
    _, job, expected = killed
    (saved,) = server.output_dir.iterdir()
    assert torch.equal(pixels(saved), expected)
    assert torch.equal(pixels(run(server, job)[0]), expected)


def works(server: ComfyServer) -> None:
    """The server lives, and the next job runs."""
    (made,) = run(server, workflow(seed=next(_seeds)))
    assert pixels(made).shape == (32, 64, 3)


def refused(server: ComfyServer, graph: dict) -> str:
    start = time.monotonic()
    with pytest.raises(ComfyError) as caught:
        server.submit(graph, timeout=LIMIT_SECONDS)
    assert time.monotonic() - start < 30
    assert "Traceback" not in str(caught.value)
    return str(caught.value)


SMALL, LARGE = "smaller than min", "bigger than max"
INPUTS = [
    ("upscale", "upscale_by", 0, SMALL),
    ("upscale", "upscale_by", 0.999, SMALL),
    ("upscale", "upscale_by", -1, SMALL),
    ("upscale", "upscale_by", 100000, LARGE),
    ("upscale", "upscale_by", float("inf"), LARGE),
    ("upscale", "upscale_by", float("nan"), "Inf-DiT Upscale: expected a factor above 0, got nan"),
    ("upscale", "upscale_by", "four", "upscale_by"),
    ("upscale", "upscale_by", None, "upscale_by"),
    ("upscale", "steps", 0, SMALL),
    ("upscale", "steps", 100000, LARGE),
    ("upscale", "steps", "", "steps"),
    ("upscale", "seed", -1, SMALL),
    ("upscale", "seed", MAX_SEED + 1, LARGE),
    ("upscale", "seed", 10**400, LARGE),
    ("upscale", "preset", "nonsense", "nonsense"),
    ("upscale", "preset", {"a": 1}, "preset"),
    ("upscale", "longest_edge", -1, SMALL),
    ("upscale", "longest_edge", 100000, LARGE),
    ("upscale", "denoise", 1.5, LARGE),
    ("upscale", "denoise", float("nan"), "Inf-DiT Upscale: expected .*denoise"),
    ("upscale", "colour_fix", "nonsense", "nonsense"),
    ("upscale", "model", ["image", 0], "mismatch"),
    ("upscale", "image", ["load", 0], "mismatch"),
    ("upscale", "image", ["nothing", 0], ""),
    ("upscale", "image", ["image", 7], ""),
    ("upscale", "model", "tiny.safetensors", ""),
    ("load", "model_name", "../../../../etc/passwd", "is not there"),
    ("load", "model_name", "/etc/passwd", "is not there"),
    ("load", "model_name", "..\\..\\secret.pt", "is not there"),
    ("load", "model_name", "", "is not there"),
    ("load", "model_name", 5, "is not there"),
    ("load", "weight_dtype", "fp4", "fp4"),
    ("image", "width", 0, SMALL),
    ("image", "width", 100000, LARGE),
    ("image", "batch_size", 0, SMALL),
]


@pytest.mark.parametrize(("where", "name", "value", "message"), INPUTS)
def test_inputs_out_of_range(server, where, name, value, message):
    graph = workflow(seed=next(_seeds))
    graph[where]["inputs"][name] = value
    said = refused(server, graph)
    assert re.search(message, said, re.DOTALL), said
    works(server)


EXPECTED_SHAPE = r"Inf-DiT Upscale: expected an image of shape \(batch, height, width"
FINITE = "Inf-DiT Upscale: expected finite pixels in 0..1, got NaN or infinity"
FLOATING = "Inf-DiT Upscale: expected floating point pixels"
SHAPES = ("batch 0", "height 0", "width 0", "5-D", "3-D", "0-D", "2 channels", "9 channels")
IMAGES = dict.fromkeys(("nan", "one nan", "infinite"), FINITE)
IMAGES |= dict.fromkeys(SHAPES, EXPECTED_SHAPE) | dict.fromkeys(("integers", "complex"), FLOATING)


@pytest.mark.parametrize("kind", IMAGES)
def test_images_that_are_none(server, kind):
    graph = workflow(seed=next(_seeds)) | {"image": node("DebugImage", kind=kind)}
    assert re.search(IMAGES[kind], refused(server, graph))
    works(server)


@pytest.mark.parametrize(
    ("kind", "size"), [("one pixel", (4, 4)), ("out of range", (32, 32)), ("half", (32, 32))]
)
def test_images_that_are_odd_but_right(server, kind, size):
    graph = workflow(seed=next(_seeds)) | {"image": node("DebugImage", kind=kind)}
    (made,) = run(server, graph)
    assert tuple(pixels(made).shape) == (*size, 3)


@pytest.mark.parametrize(
    "values",
    [[], [1.0], [0.0, 10.0, 40.0], [40.0, 10.0, 10.0, 0.0], [40.0, float("nan"), 0.0],
     [float("inf"), 1.0, 0.0], [40.0, 1.0], [40.0, -1.0], [[40.0, 0.0]], 40.0],
)  # fmt: skip
def test_sigmas_that_do_not_fall_to_zero(server, values):
    graph = workflow(seed=next(_seeds)) | {"sigmas": node("DebugSigmas", values=json.dumps(values))}
    graph["upscale"]["inputs"]["sigmas"] = ["sigmas", 0]
    assert "Inf-DiT Upscale: expected sigmas that" in refused(server, graph)
    works(server)


@pytest.mark.parametrize("seed", [0, MAX_SEED])
def test_seeds_at_both_ends(server, seed):
    first, again = (pixels(run(server, workflow(seed, width=w))[0]) for w in (17, 17))
    assert first.shape == (32, 68, 3)
    assert torch.equal(first, again)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("nan", "finite pixels from the network"),
        ("of Stable Diffusion", "the LATENT .* 1 of 64x32 px and 3 channels; got 1 of 8x8 px"),
        ("5-D", r"the LATENT .* got shape \(1, 3, 1, 32, 64\)"),
        ("0-D", r"the LATENT .* got shape \(\)"),
        (5, "samples from a sampler; got int"),
    ],
)
def test_latents_that_are_none(server, kind, message):
    graph = workflow() | {
        "latent": node("DebugLatent", kind=kind),
        "conditioning": node(
            "InfDiTConditioning", model=["load", 0], image=["image", 0], upscale_by=4.0
        ),
        "decode": node("InfDiTDecode", samples=["latent", 0], canvas=["conditioning", 2]),
        "save": node("SaveImage", images=["decode", 0], filename_prefix="result"),
    }
    del graph["upscale"]
    if kind == 5:
        graph["decode"]["inputs"]["samples"] = 5
    assert re.search(f"Inf-DiT Decode: expected {message}", refused(server, graph))
    works(server)


@pytest.mark.parametrize(
    ("where", "name", "value"),
    [("upscale", "model", 5), ("upscale", "image", "x"), ("upscale", "sampler", {"a": 1}),
     ("upscale", "sigmas", 0.5), ("load", "model_name", None)],
)  # fmt: skip
def test_plain_values_for_sockets(server, where, name, value):
    """ComfyUI lets them through to the node."""
    graph = workflow(seed=next(_seeds))
    graph[where]["inputs"][name] = value
    assert re.search(
        r"(Inf-DiT Upscale|Load Inf-DiT Checkpoint): expected ", refused(server, graph)
    )
    works(server)


@pytest.mark.parametrize("count", [60, pytest.param(1000, marks=LONG)])
def test_workflows_by_chance(server, count):
    seeds = range(fuzz.FIRST_SEED, fuzz.FIRST_SEED + count)
    outcomes, findings = fuzz_workflows.run(server, seeds)
    assert findings == []
    assert outcomes["named"] > 10
    assert outcomes["refused"] > 10
    assert outcomes["done"] > 3


def test_a_model_file_replaced_or_deleted_between_runs(server: ComfyServer):
    """The cached model of the old file must not be taken for the new one."""
    from safetensors.torch import save_file

    path = server.models_dir / "infdit" / "changing.safetensors"
    graph = workflow(seed=5, model="changing")
    made = []
    for seed in (0, 1, 0):
        save_file(random_tensors(TINY, seed), path)
        (picture,) = run(server, graph)
        made.append(pixels(picture))
        assert "result" in picture.name
    assert not torch.equal(made[0], made[1])
    assert torch.equal(made[0], made[2])
    path.write_bytes(b"\x08" + bytes(7) + b"{}      ")
    assert "changing.safetensors" in refused(server, graph)
    path.unlink()
    assert "'changing.safetensors' is not there" in refused(server, graph)
    works(server)


def test_two_clients_at_once(server: ComfyServer):
    """Jobs of two queues run one after the other; each gets its own pictures."""
    graphs = [workflow(seed=n, model=m, width=w) for n, m, w in
              ((1, "tiny", 16), (2, "other", 20), (3, "tiny", 16), (4, "other", 20))]  # fmt: skip
    prompts = [server.queue(graph, f"client {n % 2}") for n, graph in enumerate(graphs)]
    sizes = []
    for prompt in prompts:
        (made,) = server.output_files(server.wait(prompt, timeout=LIMIT_SECONDS))
        sizes.append(pixels(made).shape[1])
    assert sizes == [64, 80, 64, 80]


def probe(server: ComfyServer) -> tuple[dict, torch.Tensor]:
    """What the server's process holds after the same job as ever, and the picture of that job."""
    graph = workflow(seed=0)
    graph["counts"] = node("DebugCounts", image=["upscale", 0], tag=next(_seeds))
    outputs = server.submit(graph, timeout=LIMIT_SECONDS)
    return outputs["counts"]["counts"][0], pixels(server.output_files(outputs)[0])


def job(server: ComfyServer, random: Random, kind: str, client: str = "first") -> None:
    """One of a size, factor and model by chance, which ends as its kind says."""
    size = (200, 160) if kind == "cancelled" else (random.randint(8, 40), random.randint(8, 40))
    factor = 4.0 if kind == "cancelled" else random.choice((1.0, 2.0, 3.3, 4.0, 5.0))
    model = random.choice(("tiny", "other", "infdit_small"))
    graph = workflow(next(_seeds), model, *size)
    graph["upscale"]["inputs"]["upscale_by"] = factor
    if kind == "failed":
        graph["image"] = node("DebugImage", kind="nan")
    prompt = server.queue(graph, client)
    if kind == "done":
        (made,) = server.output_files(server.wait(prompt, LIMIT_SECONDS))
        assert pixels(made).shape[:2] == tuple(round(side * factor) for side in reversed(size))
        return
    cancel = (lambda _: server.interrupt()) if kind == "cancelled" else None
    with pytest.raises(ComfyError, match="NaN" if kind == "failed" else "was interrupted"):
        server.wait(prompt, LIMIT_SECONDS, cancel)


@pytest.mark.parametrize("rounds", [1, pytest.param(20, marks=LONG)])
def test_jobs_leave_nothing_behind(server: ComfyServer, rounds: int):
    """After every ten jobs the same picture to the bit, and no more held than after warm-up."""
    random, held = Random(0), [probe(server), probe(server)]
    for i in range(rounds):
        if i <= rounds * 2 // 3:
            kinds = ["done"] * 7 + ["cancelled"] * 2 + ["failed"]
            for kind in random.sample(kinds, 10):
                job(server, random, kind)
        else:
            chances = [(Random(f"{i} {name}"), name) for name in ("first", "second")]
            with ThreadPoolExecutor(2) as clients:
                made = [
                    clients.submit(job, server, chance, kind, name)
                    for kind in ("done", "done", "failed", "done", "done")
                    for chance, name in chances
                ]
            for one in made:
                one.result()
        held.append(probe(server))
    assert all(torch.equal(picture, held[0][1]) for _, picture in held)
    before, *later = (counts for counts, _ in held[len(held) // 3 :])
    for after in later:
        assert after["tensors"] <= before["tensors"]
        assert after["tensor_mib"] <= before["tensor_mib"]
        assert after["files"] <= before["files"] + 1
        assert rounds == 1 or after["rss_mib"] <= before["rss_mib"] + 40


def test_a_batch_of_64(server: ComfyServer):
    made = run(server, workflow(next(_seeds), width=9, height=7, batch=64))
    assert len(made) == 64
    pictures = torch.stack([pixels(path) for path in made])
    assert pictures.shape == (64, 28, 36, 3)
    assert torch.equal(pictures, pictures[:1].expand_as(pictures))  # one seed, one picture


def test_the_server_never_fell_over(server: ComfyServer):
    assert server.process.poll() is None
    assert "IMPORT FAILED" not in server.log()
