"""What the commands of `cli` do."""

from __future__ import annotations

import argparse
import math
import time
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..blocks.schedules import BlockMajor, Full, LayerMajor, Schedule
from ..checkpoints.checkpoint import Checkpoint, open_checkpoint
from ..checkpoints.convert import convert, infdit_contents
from ..checkpoints.load import check, load_model, read_config
from ..checkpoints.names import CLIP_PREFIX, clip_state_dict, release_shapes
from ..clip import ClipGuide, read_clip
from ..dimr import load as dimr
from ..distributed import LocalStripSampler, StripSampler
from ..memory.adaptive import is_out_of_memory, memory_budget
from ..memory.host import gigabytes, require_memory, waiting_bytes
from ..memory.planner import Workload, evaluation_flop, lean_plan, plans
from ..network.config import DTYPES
from ..network.model import InfDiT
from ..pictures.alpha import fill_invisible
from ..pictures.files import ImageInfo, check_writable, is_tiff, read_image, write_image
from ..pictures.prepare import pass_sizes, target_size
from ..pictures.start import check_start
from ..pictures.wrap import check_wrap
from ..sampling import Preset, find_preset
from ..upscale import Sampler, upscale
from .common import UsageError, choose_device, choose_dtype, say, warn
from .jobs import CommandError, Jobs, Size, check_jobs, check_result, make_folder, plan_jobs
from .progress import Progress
from .ranks import run_on_ranks

Shapes = Mapping[str, tuple[int, ...]]


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
    check_schedule(args)
    if args.gpus > 1 and args.ranks is None:
        return run_on_ranks(upscale_files, args)
    jobs = plan_jobs(
        args.input,
        args.output,
        args.format,
        args.overwrite,
        recursive=args.recursive,
        debug=args.debug,
        tell=warn,
    )
    check_wrap(args.wrap, args.colour_fix)
    if args.start and not jobs.single:
        raise UsageError("--start goes with a single picture")
    if args.pyramid and any(not is_tiff(target) for _, target in jobs.todo):
        raise UsageError("--pyramid goes with results that end in .tif")
    for target in jobs.finished:
        say(f"{target} is there already; --overwrite replaces it")
    if jobs.todo:
        _upscale_all(jobs, args)
    if jobs.failed:
        raise CommandError(jobs.summary())
    return 0


def _upscale_all(jobs: Jobs, args: argparse.Namespace) -> None:
    device = choose_device(args.device)

    @cache  # asked twice for each picture, it says once that one would shrink
    def result_size(source: Size) -> Size:
        size = target_size(source, args.scale, args.size)
        if args.scratch is None:
            require_memory(size, device)
        return size

    if not jobs.single:  # what none of them could do is said once
        make_folder(args.output)
        check_writable(args.output / f"result.{args.format}", alpha=False, bit_depth=args.bit_depth)
    check_jobs(jobs, result_size, args.bit_depth, scratch=args.scratch is not None)
    if not jobs.todo:
        return
    # Of a single picture all that can be refused is refused before the model is loaded.
    ready = read_picture(*jobs.todo[0], result_size, args) if jobs.single else None
    upscaler = Upscaler(args, device)
    for source, target in jobs.todo:
        if args.ranks and str(target) in args.ranks.done:
            continue
        with jobs.attempt(source), args.scratch or nullcontext():
            started = time.monotonic()
            job = ready or read_picture(source, target, result_size, args)
            upscaler.make(job, source, target)
            (height, width), size = job.image.shape[1:3], job.size
            say(
                f"{source} ({width}×{height}) -> {target} ({size[1]}×{size[0]}),"
                f" {time.monotonic() - started:.1f} s"
            )


def read_picture(
    source: Path, target: Path, result_size: Callable[[Size], Size], args: argparse.Namespace
) -> Job:
    """A picture that can be worked on."""
    image, info = read_image(source, args.scratch and args.scratch.empty)
    size = result_size((image.shape[1], image.shape[2]))
    info = check_result(target, image, size, args.bit_depth, info)
    start = None
    if args.start:
        start, _ = read_image(args.start)
        check_start(start, 1, size)
    return Job(image, info, size, start)


class Upscaler:
    """The model that the options of `infdit upscale` name, ready for one picture after another.

    Args:
        device: that it computes on.
        others: devices that take strips of each picture beside it.
    """

    def __init__(
        self, args: argparse.Namespace, device: torch.device, *others: torch.device
    ) -> None:
        self.args, self.device = args, device
        self.guide = _guide(args, device)
        dtype = choose_dtype(args.dtype, device)
        self.model, *self.others = [_load(args.model, d, dtype) for d in (device, *others)]
        if args.reuse_layers and args.reuse_layers >= self.model.config.num_layers:
            raise CommandError(
                f"--reuse-layers: expected less than the {self.model.config.num_layers} layers of"
                f" {args.model.name}, got {args.reuse_layers}"
            )
        if args.compile:
            for model in (self.model, *self.others):
                model.compile_layers()

    def make(self, job: Job, source: Path, target: Path) -> None:
        """Upscale a picture that was read from `source`, and write it to `target`.

        Raises:
            CommandError: the device's memory is too small.
        """
        try:
            picture = self._upscale(job, source.name)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error) or self.args.ranks:
                raise
            raise CommandError(
                f"the memory of {self.device} is too small for --schedule {self.args.schedule};"
                " try block-major or layer-major with few --blocks"
            ) from error
        if self.args.ranks and not self.args.ranks.first:
            return
        write_image(
            target,
            picture,
            bit_depth=self.args.bit_depth,
            info=job.info,
            overwrite=self.args.overwrite,
            pyramid=self.args.pyramid,
        )
        if self.args.ranks:
            self.args.ranks.finish(target)

    def _upscale(self, job: Job, name: str) -> Tensor:
        args, (image, _, size, start) = self.args, job
        vectors = None
        if self.guide:
            seen = fill_invisible(image)
            vectors = self.guide.guide(seen, args.positive, args.negative, args.text_strength)
        preset = find_preset(args.preset, self.model.metadata)
        if args.steps or args.solver:
            solver, steps = args.solver or preset.solver, args.steps or preset.steps
            preset = Preset(solver, steps, consistency=preset.consistency)
        passes = pass_sizes((image.shape[1], image.shape[2]), size)
        steps = (len(preset.sigmas(args.denoise)) - 1) * len(passes)
        with Progress(name, steps) as progress:
            draw = self._sampler()(
                self.model,
                preset,
                args.seed,
                args.denoise,
                chosen_schedule(args),
                self._memory(),
                args.reuse_layers or 0,
                progress.step,
                progress.cells,
                args.scratch,
            )
            if isinstance(draw, LocalStripSampler):
                draw.others = self.others
            return upscale(
                image,
                size,
                draw,
                vectors=vectors,
                colour_fix=args.colour_fix,
                consistency=args.consistency,
                start=start,
                wrap=args.wrap,
            )

    def _sampler(self) -> type[Sampler]:
        if self.args.ranks:
            return StripSampler
        return LocalStripSampler if self.others else Sampler

    def _memory(self) -> float | None:
        """What a plan may take on the device; None for what is free."""
        if not self.args.ranks:
            return self.args.memory
        return self.args.ranks.memory_share * (self.args.memory or memory_budget(self.model))


def convert_file(args: argparse.Namespace) -> int:
    """Convert a checkpoint and say what became of it."""
    dtype = DTYPES[args.dtype] if args.dtype else None
    with open_checkpoint(args.source) as checkpoint:
        contents = dimr.contents if dimr.holds_dimr(checkpoint) else infdit_contents
    report = convert(args.source, args.target, dtype, overwrite=args.overwrite, contents=contents)
    say(f"{report.target}: {report.tensors} tensors, {report.size / 2**20:.1f} MiB")
    if report.dropped:
        say(f"dropped {len(report.dropped)} tensors that the network does not use")
    for key in report.unknown:
        say(f"unknown: {key}")
    return 0


def inspect(args: argparse.Namespace) -> int:
    """Describe a checkpoint; an incomplete one is an error."""
    with open_checkpoint(args.file) as checkpoint:
        name, describe = ("DiMR", _dimr) if dimr.holds_dimr(checkpoint) else ("Inf-DiT", _infdit)
        shapes, lines = describe(checkpoint)
        dtypes = Counter(str(checkpoint.dtypes[key]).removeprefix("torch.") for key in shapes)
        lines |= {
            "parameters": f"{sum(map(math.prod, shapes.values())):,}",
            "dtype": ", ".join(f"{name} ({n} tensors)" for name, n in dtypes.items()),
            **checkpoint.metadata,
        }
    say(f"{args.file}: a complete {name}")
    for key, value in lines.items():
        say(f"  {key}: {value}")
    return 0


def _infdit(checkpoint: Checkpoint) -> tuple[Shapes, dict[str, object]]:
    """Shapes of the network's tensors, and what is to be said of it."""
    config = read_config(checkpoint)
    unknown = check(checkpoint, config)
    clip = CLIP_PREFIX + "model."
    return release_shapes(config), {
        **asdict(config),
        "block_px": config.block_px,
        "clip image tower": "yes" if clip + "visual.proj" in checkpoint.shapes else "no",
        "clip text tower": "yes" if clip + "ln_final.weight" in checkpoint.shapes else "no",
        "unknown tensors": ", ".join(unknown) or "none",
    }


def _dimr(checkpoint: Checkpoint) -> tuple[Shapes, dict[str, object]]:
    """See `_infdit`."""
    config = dimr.read_config(checkpoint)
    stages = {
        f"stage {n}": ", ".join(f"{name} {value}" for name, value in asdict(stage).items())
        for n, stage in enumerate(config.stages)
    }
    side = config.latent_side
    return dimr.check(checkpoint, config), {**stages, "latent": f"{config.channels}×{side}×{side}"}


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


def check_schedule(args: argparse.Namespace) -> None:
    """Refuse options of the order of computation that contradict each other."""
    if args.blocks is not None and args.schedule not in ("block-major", "layer-major"):
        raise UsageError("--blocks goes with --schedule block-major or layer-major")
    if args.memory is not None and args.schedule != "auto":
        raise UsageError("--memory goes with --schedule auto")


def chosen_schedule(args: argparse.Namespace) -> Schedule | None:
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
    say(f"{width}×{height} px, {args.dtype}: {petaflop:.3g} PFLOP per evaluation")
    column = max(len(str(p.schedule)) for p in found)
    say(f"{'':2}{'schedule':{column}}{'peak':>10}{'RAM':>10}{'time':>7}")
    for p in found:
        mark = "> " if p is chosen else "  "
        host = gigabytes(p.host_bytes) if p.host_bytes else "-"
        row = f"{p.schedule!s:{column}}{gigabytes(p.peak_bytes):>10}{host:>10}{p.cost:>6.2f}x"
        say(mark + row)
    if chosen is None and args.memory is not None:
        smallest = min(allowed, key=lambda p: p.peak_bytes)
        raise CommandError(
            f"nothing fits {gigabytes(args.memory)} with {gigabytes(ram)} of RAM; the smallest"
            f" needs {smallest}"
        )
    return 0
