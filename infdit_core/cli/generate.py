"""`infdit generate`: pictures of ImageNet's classes with DiMR."""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from ..checkpoints.checkpoint import open_checkpoint
from ..dimr.classes import class_names, find_class
from ..dimr.config import CLASSES, NULL_CLASS, DiMRConfig
from ..dimr.load import load_model, read_config
from ..dimr.memory import sampling_bytes, weight_bytes
from ..dimr.sampling import LATENT_SCALE, sample
from ..dimr.vae import LATENT_CHANNELS, decode, read_decoder
from ..memory.host import PlanError, gigabytes, require_bytes
from ..pictures.files import ImageInfo, check_writable, write_image
from ..pictures.metadata import Metadata
from ..whole_files import whole_file
from .common import UsageError, choose_device, choose_dtype, say
from .jobs import CommandError, make_folder
from .progress import evaluation_bar

_LATENT = ".latent"


@dataclass(frozen=True)
class Target:
    """A picture to draw."""

    path: Path
    number: int
    """Of its class."""
    about: dict[str, str]
    """What its file says of it."""


def generate_files(args: argparse.Namespace) -> int:
    """Draw all pictures at once, as the nodes do; refuse before that what cannot be done."""
    if args.cfg_exponent is not None and args.cfg < 1:
        raise UsageError(f"--cfg-exponent goes with a --cfg of at least 1, got {args.cfg:g}")
    device = choose_device(args.device)
    dtype = choose_dtype(args.dtype, device)
    targets = _targets(args, dtype)
    with open_checkpoint(args.model) as checkpoint:
        config = read_config(checkpoint)
    decoder = read_decoder(args.vae) if args.vae else None
    if decoder is not None and config.channels != LATENT_CHANNELS:
        raise CommandError(
            f"--vae: expected a model of latents with {LATENT_CHANNELS} channels;"
            f" {args.model.name} has {config.channels}"
        )
    _require_memory(f"{args.count} of {args.model.name}", config, args.count, dtype, device)
    for folder in {target.path.parent for target in targets}:
        make_folder(folder)
    if decoder is not None:
        check_writable(targets[0].path, alpha=False, bit_depth=8)
    started = time.monotonic()
    latents = _draw(config, targets, dtype, device, args)
    for target, latent in zip(targets, latents.split(1), strict=True):
        _write(target, latent, decoder, device, args.overwrite)
    say(f"{args.count} from {args.model.name}, {time.monotonic() - started:.1f} s")
    return 0


def noise(seed: int, count: int, config: DiMRConfig) -> Tensor:
    """Unit Gaussian (count, C, H, W), to the bit that of ComfyUI for the seed."""
    side = config.latent_side
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, config.channels, side, side, generator=generator)


def _targets(args: argparse.Namespace, dtype: torch.dtype) -> list[Target]:
    """Every picture with its class and its file, which is not there or may be replaced."""
    classes = _classes(args.classes)
    output: Path = args.output
    one_file = bool(output.suffix) and not os.path.isdir(output)
    if one_file and args.count > 1:
        raise CommandError(f"{output} is one file; expected a folder for several pictures")
    if one_file and not args.vae and output.suffix != _LATENT:
        raise CommandError(
            f"{output}: expected a name that ends in {_LATENT}, or --vae for a picture"
        )
    settings = {
        "dimr.model": args.model.name,
        "dimr.seed": str(args.seed),
        "dimr.evaluations": str(args.evaluations),
        "dimr.cfg": f"{args.cfg:g}",
        "dimr.dtype": str(dtype).removeprefix("torch."),
    }
    if args.cfg_exponent is not None:
        settings["dimr.cfg_exponent"] = f"{args.cfg_exponent:g}"
    suffix, digits = ".png" if args.vae else _LATENT, len(str(args.count))
    targets = []
    for n in range(args.count):
        number, label = classes[n % len(classes)]
        name = f"class{number:03}_seed{args.seed}_{n + 1:0{digits}}{suffix}"
        path = output if one_file else output / name
        if os.path.isdir(path):
            raise CommandError(f"{path} is a folder; expected another --output")
        if os.path.exists(path) and not args.overwrite:
            raise CommandError(f"{path} already exists; expected another --output or --overwrite")
        about = settings | {"dimr.class": label, "dimr.picture": f"{n + 1} of {args.count}"}
        targets.append(Target(path, number, about))
    return targets


def _classes(texts: list[str]) -> list[tuple[int, str]]:
    """Numbers of classes, each with what it is called: with its name where names were given."""
    try:
        numbers = [find_class(text) for text in texts]
        if all(text.strip().isdigit() for text in texts):
            return [(number, str(number)) for number in numbers]
        names = [*class_names(), "no class"]
    except ImportError as error:
        raise CommandError(
            f"--class: names need torchvision, which cannot be used here ({error}); expected"
            f" numbers of 0 to {CLASSES - 1}, or {NULL_CLASS} for no class"
        ) from error
    return [(number, f"{number} {names[number]}") for number in numbers]


def _require_memory(
    what: str, config: DiMRConfig, count: int, dtype: torch.dtype, device: torch.device
) -> None:
    needed = weight_bytes(config, dtype) + sampling_bytes(config, count, dtype)
    if device.type != "cuda":
        require_bytes(needed, what, "a smaller --count")
    elif needed > (free := torch.cuda.mem_get_info(device)[0]):
        raise PlanError(
            f"{what} need at least {gigabytes(needed)} on {device}; {gigabytes(free)} are free."
            " Expected a smaller --count"
        )


def _draw(
    config: DiMRConfig,
    targets: list[Target],
    dtype: torch.dtype,
    device: torch.device,
    args: argparse.Namespace,
) -> Tensor:
    """Latents (N, C, H, W) on the CPU, in the network's scale."""
    model = load_model(args.model, device, dtype)
    with evaluation_bar(args.model.stem, args.evaluations) as callback:
        return sample(
            model,
            noise(args.seed, len(targets), config).to(device),
            torch.tensor([target.number for target in targets], device=device),
            evaluations=args.evaluations,
            cfg_scale=args.cfg,
            exponent=args.cfg_exponent,
            dtype=dtype,
            callback=callback,
        ).cpu()


def _write(
    target: Target, latent: Tensor, decoder: nn.Module | None, device: torch.device, overwrite: bool
) -> None:
    """Write a latent (1, C, H, W) as ComfyUI's node Load Latent reads it, or its picture."""
    if decoder is None:
        tensors = {
            # As in a LATENT; the second says that it is.
            "latent_tensor": latent / LATENT_SCALE,
            "latent_format_version_0": torch.tensor([]),
        }
        data = safetensors.torch.save(tensors, target.about)
        with whole_file(target.path, overwrite=overwrite) as file:
            file.write(data)
    else:
        picture = decode(decoder.to(device), latent.to(device))
        info = ImageInfo(metadata=Metadata(text=target.about))
        write_image(target.path, picture, info=info, overwrite=overwrite)
    say(f"{target.path}: class {target.about['dimr.class']}")
