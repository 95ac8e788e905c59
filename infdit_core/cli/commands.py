"""What the commands of `cli` do."""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..blocks.schedules import BlockMajor, Full, LayerMajor, Schedule
from ..checkpoints.checkpoint import open_checkpoint
from ..checkpoints.convert import convert
from ..checkpoints.load import check, load_model, read_config
from ..checkpoints.names import CLIP_PREFIX, clip_state_dict, release_shapes
from ..clip import ClipGuide, read_clip
from ..memory.adaptive import is_out_of_memory
from ..memory.host import gigabytes, require_memory, waiting_bytes
from ..memory.planner import Workload, evaluation_flop, lean_plan, plans
from ..network.config import DTYPES
from ..network.model import InfDiT
from ..pictures.alpha import fill_invisible
from ..pictures.files import ImageInfo, check_writable, read_image, write_image
from ..pictures.prepare import pass_sizes, target_size
from ..pictures.start import check_start
from ..pictures.wrap import check_wrap
from ..sampling import Preset, find_preset
from ..scratch import Scratch
from ..upscale import Sampler, upscale
from .jobs import CommandError, Jobs, Size, check_jobs, check_result, make_folder, plan_jobs
from .progress import Progress


class UsageError(Exception):
    """Arguments that contradict each other."""


class Job(NamedTuple):
    """A picture that was read and can be worked on."""

    image: Tensor
    """(1, H, W, C) in 0..1."""
    info: ImageInfo
    """What is written with the result."""
    size: Size
    """Of the result."""
    start: Tensor | None
    """What sampling starts from instead of the picture."""


def upscale_files(args: argparse.Namespace) -> int:
    """Upscale every picture; go on after one that fails, and leave alone what is there already."""
    _check_schedule(args)
    jobs = plan_jobs(
        args.input,
        args.output,
        args.format,
        args.overwrite,
        recursive=args.recursive,
        debug=args.debug,
        tell=_warn,
    )
    check_wrap(args.wrap, args.colour_fix)
    if args.start and not jobs.single:
        raise UsageError("--start goes with a single picture")
    for target in jobs.finished:
        _say(f"{target} is there already; --overwrite replaces it")
    if jobs.todo:
        _upscale_all(jobs, args)
    if jobs.failed:
        raise CommandError(jobs.summary())
    return 0


def _upscale_all(jobs: Jobs, args: argparse.Namespace) -> None:
    device = _device(args.device)
    dtype = DTYPES[args.dtype] if args.dtype else None
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16

    @cache  # asked twice for each picture, it says once that one would shrink
    def result_size(source: Size) -> Size:
        size = target_size(source, args.scale, args.size)
        if args.scratch is None:
            require_memory(size, device)
        return size

    if not jobs.single:  # what none of them could do is said once
        make_folder(args.output)
        check_writable(args.output / f"result.{args.format}", alpha=False, bit_depth=args.bit_depth)
    check_jobs(jobs, result_size, args.bit_depth)
    if not jobs.todo:
        return
    # Of a single picture all that can be refused is refused before the model is loaded.
    ready = _read(*jobs.todo[0], result_size, args) if jobs.single else None
    guide = _guide(args, device)
    model = _load(args.model, device, dtype)
    if args.reuse_layers and args.reuse_layers >= model.config.num_layers:
        raise CommandError(
            f"--reuse-layers: expected less than the {model.config.num_layers} layers of"
            f" {args.model.name}, got {args.reuse_layers}"
        )
    if args.compile:
        model.compile_layers()
    for source, target in jobs.todo:
        with jobs.attempt(source):
            try:
                job = ready or _read(source, target, result_size, args)
                _upscale_picture(model, guide, source, target, job, args)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                raise CommandError(
                    f"{source}: the memory of {device} is too small for --schedule {args.schedule};"
                    " try block-major or layer-major with few --blocks"
                ) from error


def _read(
    source: Path, target: Path, result_size: Callable[[Size], Size], args: argparse.Namespace
) -> Job:
    """A picture that can be worked on."""
    image, info = _read_image(source, args.scratch)
    size = result_size((image.shape[1], image.shape[2]))
    info = check_result(target, image, size, args.bit_depth, info)
    start = None
    if args.start:
        start, _ = read_image(args.start)
        check_start(start, 1, size)
    return Job(image, info, size, start)


def _read_image(path: Path, scratch: Scratch | None) -> tuple[Tensor, ImageInfo]:
    """A picture in memory, or in a scratch file."""
    image, info = read_image(path)
    if scratch is not None:
        image = scratch.empty(image.shape).copy_(image)
    return image, info


def _upscale_picture(
    model: InfDiT,
    guide: ClipGuide | None,
    source: Path,
    target: Path,
    job: Job,
    args: argparse.Namespace,
) -> None:
    started = time.monotonic()
    image, info, size, start = job
    height, width = image.shape[1:3]
    vectors = None
    if guide:
        seen = fill_invisible(image)
        vectors = guide.guide(seen, args.positive, args.negative, args.text_strength)
    preset = find_preset(args.preset, model.metadata)
    if args.steps or args.solver:
        solver, steps = args.solver or preset.solver, args.steps or preset.steps
        preset = Preset(solver, steps, consistency=preset.consistency)
    steps = (len(preset.sigmas(args.denoise)) - 1) * len(pass_sizes((height, width), size))
    with Progress(source.name, steps) as progress:
        draw = Sampler(
            model,
            preset,
            args.seed,
            args.denoise,
            _schedule(args),
            args.memory,
            args.reuse_layers or 0,
            progress.step,
            progress.cells,
            args.scratch,
        )
        picture = upscale(
            image,
            size,
            draw,
            vectors=vectors,
            colour_fix=args.colour_fix,
            consistency=args.consistency,
            start=start,
            wrap=args.wrap,
        )
    write_image(target, picture, bit_depth=args.bit_depth, info=info, overwrite=args.overwrite)
    if args.scratch is not None:
        args.scratch.forget()
    _say(
        f"{source} ({width}×{height}) -> {target} ({size[1]}×{size[0]}),"
        f" {time.monotonic() - started:.1f} s"
    )


def convert_file(args: argparse.Namespace) -> int:
    """Convert a checkpoint and say what became of it."""
    dtype = DTYPES[args.dtype] if args.dtype else None
    report = convert(args.source, args.target, dtype, overwrite=args.overwrite)
    _say(f"{report.target}: {report.tensors} tensors, {report.size / 2**20:.1f} MiB")
    if report.dropped:
        _say(f"dropped {len(report.dropped)} tensors that the network does not use")
    for key in report.unknown:
        _say(f"unknown: {key}")
    return 0


def inspect(args: argparse.Namespace) -> int:
    """Describe a checkpoint; an incomplete one is an error."""
    with open_checkpoint(args.file) as checkpoint:
        config = read_config(checkpoint)
        unknown = check(checkpoint, config)
        shapes = release_shapes(config)
        count = sum(torch.Size(shape).numel() for shape in shapes.values())
        dtypes = Counter(str(checkpoint.dtypes[key]).removeprefix("torch.") for key in shapes)
        clip = CLIP_PREFIX + "model."
        _say(f"{args.file}: a complete Inf-DiT")
        lines: dict[str, object] = {
            **asdict(config),
            "block_px": config.block_px,
            "parameters": f"{count:,}",
            "dtype": ", ".join(f"{name} ({n} tensors)" for name, n in dtypes.items()),
            "clip image tower": "yes" if clip + "visual.proj" in checkpoint.shapes else "no",
            "clip text tower": "yes" if clip + "ln_final.weight" in checkpoint.shapes else "no",
            "unknown tensors": ", ".join(unknown) or "none",
            **checkpoint.metadata,
        }
    for name, value in lines.items():
        _say(f"  {name}: {value}")
    return 0


def _guide(args: argparse.Namespace, device: torch.device) -> ClipGuide | None:
    """The CLIP towers for a model that needs them: --clip before those of the model file."""
    with open_checkpoint(args.model) as checkpoint:
        size = read_config(checkpoint).vector_size
        if size == 0:
            if args.clip or args.text_strength:
                raise CommandError(
                    f"{args.model.name} takes no CLIP embedding: expected neither --clip"
                    " nor --text-strength"
                )
            return None
        weights = read_clip(args.clip) if args.clip else clip_state_dict(checkpoint)
        if weights is None:
            raise CommandError(
                f"{args.model.name} needs a CLIP embedding and has no CLIP tower: expected --clip"
                " with an open_clip ViT-L-14 file (datacomp_xl_s13b_b90k)"
            )
        guide = ClipGuide.from_state_dict(weights, device=device)
    found = weights["visual.proj"].shape[1]
    if found != size:
        raise CommandError(f"expected a CLIP tower with embeddings of {size} values, got {found}")
    if args.text_strength:
        guide.encode_text([args.positive, args.negative])  # fails now where there is no text tower
    return guide


def _load(path: Path, device: torch.device, dtype: torch.dtype) -> InfDiT:
    """The model on its device, or with its layers in RAM where it does not fit."""
    try:
        return load_model(path, device, dtype)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    model = load_model(path, "cpu", dtype)
    model.stream_layers(device)
    return model


def _check_schedule(args: argparse.Namespace) -> None:
    if args.blocks is not None and args.schedule not in ("block-major", "layer-major"):
        raise UsageError("--blocks goes with --schedule block-major or layer-major")
    if args.memory is not None and args.schedule != "auto":
        raise UsageError("--memory goes with --schedule auto")


def _schedule(args: argparse.Namespace) -> Schedule | None:
    """The order that was asked for; None for the fastest that fits."""
    if args.schedule == "full":
        return Full()
    if args.schedule == "block-major":
        return BlockMajor(args.blocks or 1)
    return LayerMajor(args.blocks or 1) if args.schedule == "layer-major" else None


def plan_table(args: argparse.Namespace) -> int:
    """Print the schedules for a size of picture, the one that would be taken marked."""
    with open_checkpoint(args.model) as checkpoint:
        config = read_config(checkpoint)
    height, width = args.size[1], args.size[0]
    dtype = DTYPES[args.dtype]
    work = Workload(config, height, width, dtype, device=args.device, scratch=args.scratch)
    found = plans(work)
    ram = waiting_bytes() if args.ram is None else args.ram
    allowed = [p for p in found if p.host_bytes <= ram]
    memory = math.inf if args.memory is None else args.memory
    chosen = next((p for p in allowed if p.peak_bytes <= memory), None)
    if args.scratch:
        chosen = lean_plan(found, memory, ram)
    petaflop = evaluation_flop(config, height, width) / 1e15
    _say(f"{width}×{height} px, {args.dtype}: {petaflop:.3g} PFLOP per evaluation")
    column = max(len(str(p.schedule)) for p in found)
    _say(f"{'':2}{'schedule':{column}}{'peak':>10}{'RAM':>10}{'time':>7}")
    for p in found:
        mark = "> " if p is chosen else "  "
        host = gigabytes(p.host_bytes) if p.host_bytes else "-"
        row = f"{p.schedule!s:{column}}{gigabytes(p.peak_bytes):>10}{host:>10}{p.cost:>6.2f}x"
        _say(mark + row)
    if chosen is None and args.memory is not None:
        smallest = min(allowed, key=lambda p: p.peak_bytes)
        raise CommandError(
            f"nothing fits {gigabytes(args.memory)} with {gigabytes(ram)} of RAM; the smallest"
            f" needs {smallest}"
        )
    return 0


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device).cpu()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise CommandError(f"--device {name} cannot be used here: {reason}") from error
    return device


def _say(line: str) -> None:
    sys.stdout.write(_printable(line) + "\n")


def _warn(line: str) -> None:
    sys.stderr.write(_printable(f"infdit: {line}") + "\n")


def _printable(line: str) -> str:
    # What a file says of itself must not drive the terminal.
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in line)
