"""One evaluation beside the authors' own network: python -m benchmarks.release --release FOLDER

FOLDER is a checkout of the authors' repository, of which nothing is here; INFDIT_RELEASE may name
it instead. Its dependency SwissArmyTransformer has to be installed. Their network, in its mode
`full`, and ours evaluate D(x; 1) by turns, with the same random weights and inputs: seconds, peak
bytes beside the weights, and how far our D is from theirs. Without flash_attn, and in fp32, which
it does not know, torch's attention takes its place. Writes benchmarks/results/release_<device>.json
after every size.
With a GPU: --config released --device cuda --dtype bf16 --sizes 1024 2048 4096
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from infdit_core.checkpoints.names import is_known_extra, release_state_dict
from infdit_core.memory.adaptive import is_out_of_memory
from infdit_core.network.condition import Condition
from infdit_core.network.config import DTYPES, LR_SCALE, InfDiTConfig
from infdit_core.network.model import InfDiT
from infdit_core.network.run import Run

from . import common
from .common import CONFIGS, RESULTS

SIGMA = 1.0
IMAGE_SIZE = 512
"""The release's own setting; its positions wrap after eight times as many pixels."""
RELEASE = "release"


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """What flash_attn_func computes, by torch: (B, T, A, d), (B, S, A, d) twice -> (B, T, A, d)."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # (B, A, tokens, d)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def stand_in(name: str, **contents: Any) -> None:
    """A module of that name for those who import it."""
    module = sys.modules[name] = ModuleType(name)
    vars(module).update(contents)


def import_release(folder: Path, dtype: torch.dtype) -> tuple[ModuleType, dict[str, str]]:
    """The module of their network, and what it runs with."""
    if not (folder / "dit" / "model.py").is_file():
        raise SystemExit(f"expected a checkout with dit/model.py in --release, got {folder}")
    if find_spec("sat") is None:
        raise SystemExit("expected SwissArmyTransformer: pip install SwissArmyTransformer")
    import_module("sat.model")  # first: transformers looks for a flash_attn that is installed
    used = "flash_attn"
    if dtype == torch.float32 or find_spec("flash_attn") is None:
        stand_in("flash_attn", flash_attn_func=attention, flash_attn_qkvpacked_func=None)
        used = "scaled_dot_product_attention"
    if find_spec("omegaconf") is None:

        def load(path: Path) -> Any:
            return import_module("yaml").safe_load(Path(path).read_text("utf-8"))

        reader = type("OmegaConf", (), {"load": staticmethod(load)})
        stand_in("omegaconf", OmegaConf=reader, ListConfig=list)
    sys.path.insert(0, str(folder))
    return import_module("dit.model"), {"attention": used, "sat": import_module("sat").__version__}


def build_ours(config: InfDiTConfig, dtype: torch.dtype, device: torch.device) -> InfDiT:
    """Our network, with weights with which attention prefers some keys by far.

    With those of `common.build` all keys weigh about the same: two segments that change places
    change D by 1e-5, with these by 0.05.
    """
    net = common.build(
        replace(config, rope_wrap=8 * IMAGE_SIZE // config.patch_size), dtype, device
    )
    torch.manual_seed(0)
    for name, parameter in net.named_parameters():
        if name.endswith("norm.weight"):
            nn.init.normal_(parameter, 1, 0.2)
        elif name.endswith("weight"):
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5)
        else:  # biases and what is added to queries and keys
            nn.init.normal_(parameter, std=0.2)
    return net


def build_release(engine: Any, folder: Path, net: InfDiT) -> Any:
    """Their network with the sizes and weights of ours, by the arguments of their script."""
    config, weight = net.config, net.final.linear.weight
    args = engine.get_args(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_heads,
        inner_hidden_size=config.mlp_size,
        patch_size=config.patch_size,
        image_block_size=config.block_px,
        image_size=IMAGE_SIZE,
        in_channels=6,
        vocab_size=1,
        max_sequence_length=256,
        layernorm_epsilon=1e-6,
        nogate=True,
        qk_ln=True,
        random_position=True,
        re_position=True,
        cross_lr=True,
        vector_dim=config.vector_size,
        config_path=str(folder / "configs" / "text2image-sr.yaml"),
        skip_init=True,
    )
    theirs = import_module("sat.model").get_model(args, engine)
    theirs = theirs.to(weight.device, weight.dtype).eval().requires_grad_(False)
    state = release_state_dict(net.state_dict(), config)
    missing, unexpected = theirs.load_state_dict(state, strict=False)
    wrong = [key for key in missing if not is_known_extra(key)] + unexpected
    if wrong:
        raise SystemExit(f"expected the tensors of the release that is known, got others: {wrong}")
    return theirs


def evaluations(
    net: InfDiT, theirs: Any, side: int, schedules: Sequence[Any]
) -> dict[str, Callable[..., Tensor]]:
    """What gives D (1, 3, side, side) by name: the release's, then ours in every order.

    Ours share one run unless they are called with another; the release knows no runs.
    """
    weight = net.final.linear.weight
    generator = torch.Generator(weight.device).manual_seed(1)
    random = partial(torch.randn, device=weight.device, generator=generator)
    # the release keeps pictures in the dtype of the weights; so that both get the same
    x = random(1, 3, side, side).to(weight.dtype)
    lr = random(1, 3, side // LR_SCALE, side // LR_SCALE).clamp(-1, 1).to(weight.dtype)
    concat = x.clamp(-1, 1)

    def prepared(denoiser: Any, cond: Any, rope_position_ids: Tensor, **_: Any) -> Any:
        sigmas = torch.full((1,), SIGMA, dtype=weight.dtype, device=weight.device)
        return lambda run=None: denoiser(x, sigmas, rope_position_ids, cond, 0)

    theirs.sampler = prepared  # their own sampling prepares what it evaluates
    release = theirs.sample(concat.shape, images=concat, lr_imgs=lr)
    condition, run = Condition(concat.float(), lr.float()), Run()
    ours = {str(s): partial(net.denoise, x.float(), SIGMA, condition, s) for s in schedules}
    return {RELEASE: release} | {name: partial(d, run=run) for name, d in ours.items()}


def measure(
    evaluate: dict[str, Callable[..., Tensor]], rounds: int, device: torch.device
) -> dict[str, dict[str, Any]]:
    """Errors, peaks and seconds by name; who runs out of memory does not stop the others.

    Peaks are those of a run's first evaluation, and so with the keys and values that it keeps.
    """
    rows: dict[str, dict[str, Any]] = {name: {} for name in evaluate}
    expected = None
    for name, denoise in evaluate.items():
        try:
            denoised = denoise().float()
            first = partial(denoise, run=Run())
            rows[name]["peak_bytes"] = common.peak_bytes(first, device)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            rows[name]["out_of_memory"] = True
            continue
        if name == RELEASE:
            expected = denoised
        elif expected is not None:
            difference = denoised - expected
            rows[name]["error_max"] = float(f"{difference.abs().max():.2e}")
            rows[name]["error_rms"] = float(f"{difference.square().mean().sqrt():.2e}")
    fitting = {name: run for name, run in evaluate.items() if "peak_bytes" in rows[name]}
    times = common.in_turn(fitting, rounds, device)
    for name, seconds in times.items():
        row = rows[name]
        row["seconds"] = round(statistics.median(seconds), 4)
        row["seconds_min"] = round(min(seconds), 4)
        row["seconds_all"] = [round(s, 4) for s in seconds]
        if RELEASE in times:
            row["of_release"] = common.ratio(seconds, times[RELEASE])
            row["min_of_release"] = round(min(seconds) / min(times[RELEASE]), 4)
            row["peak_of_release"] = round(row["peak_bytes"] / rows[RELEASE]["peak_bytes"], 4)
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    parser = common.arguments(
        "release", __doc__, "device", "dtype",
        config={"default": "small"}, rounds={"default": 7}, schedules={},
    )  # fmt: skip
    parser.add_argument("--release", type=Path, default=os.environ.get("INFDIT_RELEASE"))
    parser.add_argument("--sizes", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--out", type=Path, help="instead of the name in benchmarks/results")
    args = common.parse(parser, argv)
    dtype, device = DTYPES[args.dtype], args.device
    if args.release is None:
        parser.error("expected a checkout of the authors' repository in --release")
    if device.type == "cpu" and dtype != torch.float32:
        parser.error(f"the release computes {args.dtype} on a GPU only, expected --dtype fp32")
    module, runs_with = import_release(args.release, dtype)
    torch.backends.cudnn.allow_tf32 = False  # as matmul does: in fp32 errors tell right from wrong
    net = build_ours(CONFIGS[args.config], dtype, device)
    theirs = build_release(module.DiffusionEngine, args.release, net)
    result = common.header(args, "config", "dtype", "rounds", release=runs_with, sizes={})
    path = args.out or RESULTS / f"release_{device.type}.json"
    for side in args.sizes:
        schedules = args.schedules or common.schedules_for(net.config, side)
        rows = measure(evaluations(net, theirs, side, schedules), args.rounds, device)
        result["sizes"][side] = rows
        common.save(path, result)
        for name, row in rows.items():
            print(side, name, row, flush=True)


if __name__ == "__main__":
    main()
