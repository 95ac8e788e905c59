"""What the commands of `cli` do."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from ..blocks.schedules import BlockMajor, Full, LayerMajor, Schedule
from ..checkpoints.checkpoint import open_checkpoint
from ..checkpoints.convert import convert
from ..checkpoints.load import check, load_model, read_config
from ..checkpoints.names import CLIP_PREFIX, clip_state_dict, release_shapes
from ..clip import ClipGuide, read_clip
from ..errors import InfDiTError
from ..memory.adaptive import Adaptive, is_out_of_memory
from ..memory.host import require_memory
from ..memory.planner import describe, evaluation_flop, gigabytes, plans
from ..network.condition import Condition
from ..network.config import DTYPES
from ..network.fp8 import use_fp8
from ..network.model import InfDiT
from ..network.residual_cache import ResidualCache
from ..pictures.colour_fix import fix_colours
from ..pictures.files import check_writable, read_image, write_image
from ..pictures.prepare import pass_sizes, prepare, target_size
from ..sampling import PRESETS, Preset, Step, sample
from .jobs import CommandError, is_disk_full, plan_jobs, summary


class UsageError(Exception):
    """Arguments that contradict each other."""


def upscale(args: argparse.Namespace) -> int:
    """Upscale every picture; go on after one that fails, and leave alone what is there already."""
    _check_schedule(args)
    jobs = plan_jobs(args.input, args.output, args.format, args.overwrite)
    for target in jobs.finished:
        _say(f"{target} is there already; --overwrite makes it anew")
    if not jobs.todo:
        return 0
    device = _device(args.device)
    dtype = DTYPES[args.dtype] if args.dtype else None
    if dtype is None:
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    guide = _guide(args, device)
    for _, target in jobs.todo:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CommandError(
                f"{target.parent} cannot be made ({error.strerror}); expected a folder to write to"
            ) from error
        check_writable(target, alpha=False, bit_depth=args.bit_depth)
    model = _load(args.model, device, dtype)
    if args.reuse_layers and args.reuse_layers >= model.config.num_layers:
        raise CommandError(
            f"--reuse-layers: expected less than the {model.config.num_layers} layers of"
            f" {args.model.name}, got {args.reuse_layers}"
        )
    if args.fp8:
        use_fp8(model)
    if args.compile:
        model.compile_layers()
    failed = []
    for source, target in jobs.todo:
        try:
            try:
                _upscale_picture(model, guide, source, target, args)
            except (RuntimeError, MemoryError) as error:
                if not is_out_of_memory(error):
                    raise
                raise CommandError(
                    f"{source}: the memory of {device} is too small for --schedule {args.schedule};"
                    " try block-major or layer-major with few --blocks"
                ) from error
        except InfDiTError as error:
            if args.debug or jobs.single or is_disk_full(error):
                raise
            failed.append(source)
            sys.stderr.write(f"infdit: error: {source}: {error}\n")
    if failed:
        raise CommandError(summary(failed, jobs))
    return 0


def _upscale_picture(
    model: InfDiT,
    guide: ClipGuide | None,
    source: Path,
    target: Path,
    args: argparse.Namespace,
) -> None:
    started = time.monotonic()
    image, info = read_image(source)
    check_writable(target, alpha=image.shape[-1] == 4, bit_depth=args.bit_depth)
    source_size = image.shape[1], image.shape[2]
    factor = args.size / max(source_size) if args.size else args.scale
    sizes = pass_sizes(source_size, target_size(source_size, factor))
    require_memory(sizes[-1], next(model.parameters()).device)
    vector = None
    if guide:
        vector = guide.guide(image, args.positive, args.negative, args.text_strength)
    picture = image
    preset = PRESETS[args.preset]
    preset = Preset(args.solver or preset.solver, args.steps or preset.steps)
    sigmas = preset.sigmas(args.denoise)
    with _Progress(source.name, (len(sigmas) - 1) * len(sizes)) as progress:
        for size in sizes:
            picture = _one_pass(model, picture, size, vector, preset.solver, sigmas, progress, args)
    picture = fix_colours(picture, image, args.colour_fix)
    write_image(target, picture, bit_depth=args.bit_depth, info=info, overwrite=args.overwrite)
    (height, width), (to_height, to_width) = source_size, sizes[-1]
    _say(
        f"{source} ({width}×{height}) -> {target} ({to_width}×{to_height}),"
        f" {time.monotonic() - started:.1f} s"
    )


def _one_pass(
    model: InfDiT,
    picture: Tensor,
    size: tuple[int, int],
    vector: Tensor | None,
    solver: str,
    sigmas: Tensor,
    progress: _Progress,
    args: argparse.Namespace,
) -> Tensor:
    canvas = prepare(picture, size=size, block_px=model.config.block_px)
    device = next(model.parameters()).device
    # On the CPU, so that the device does not change the picture.
    noise = torch.randn(canvas.concat.shape, generator=torch.Generator().manual_seed(args.seed))
    result = sample(
        model,
        Condition(canvas.concat.to(device), canvas.lr.to(device), vector),
        sigmas,
        noise=noise,
        solver=solver,
        schedule=_schedule(args, model, canvas.concat),
        callback=progress.step,
        progress=progress.cells,
        cache=ResidualCache(args.reuse_layers) if args.reuse_layers else None,
    )
    if not result.isfinite().all():
        raise CommandError(
            "expected finite pixels from the network, got NaN or infinity;"
            " try --dtype fp32, or another --model"
        )
    return canvas.finish(result.cpu())


class _Progress:
    """Two bars on a terminal: the solver's steps, and the chunks of blocks of an evaluation."""

    def __init__(self, name: str, steps: int) -> None:
        from tqdm import tqdm

        # disable=None: no bars where the output is no terminal
        self._steps = tqdm(desc=name, total=steps, unit="step", disable=None)
        self._cells = tqdm(desc="blocks", unit="chunk", position=1, leave=False, disable=None)

    def step(self, step: Step) -> None:
        self._steps.set_postfix_str(f"sigma {step.sigma:.3g}")
        self._steps.update(1)

    def cells(self, done: int, total: int) -> None:
        if done <= self._cells.n or self._cells.total is None:
            self._cells.reset(total)
        self._cells.update(done - self._cells.n)

    def __enter__(self) -> _Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._cells.close()
        self._steps.close()


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
            "clip image tower": _yes(clip + "visual.proj" in checkpoint.shapes),
            "clip text tower": _yes(clip + "ln_final.weight" in checkpoint.shapes),
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
    """The model on its device, or with its layers in main memory where it does not fit."""
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


def _schedule(args: argparse.Namespace, model: InfDiT, concat: Tensor) -> Schedule:
    if args.schedule == "full":
        return Full()
    if args.schedule == "block-major":
        return BlockMajor(args.blocks or 1)
    if args.schedule == "layer-major":
        return LayerMajor(args.blocks or 1)
    weight = model.final.linear.weight
    memory = args.memory
    if memory is None and weight.device.type == "cuda":
        held = sum(p.nbytes for p in model.parameters() if p.device == weight.device)
        memory = torch.cuda.mem_get_info(weight.device)[0] + held
    height, width = concat.shape[-2:]
    found = plans(
        model.config,
        height,
        width,
        weight.dtype,
        device=weight.device.type,
        residual=bool(args.reuse_layers),
    )
    return Adaptive(found, memory)


def plan_table(args: argparse.Namespace) -> int:
    """Print the schedules for a size of picture, the one that would be taken marked."""
    with open_checkpoint(args.model) as checkpoint:
        config = read_config(checkpoint)
    height, width = args.size[1], args.size[0]
    dtype = DTYPES[args.dtype]
    found = plans(config, height, width, dtype, device=args.device)
    chosen = next((p for p in found if args.memory is None or p.peak_bytes <= args.memory), None)
    petaflop = evaluation_flop(config, height, width) / 1e15
    _say(f"{width}×{height} px, {args.dtype}: {petaflop:.3g} PFLOP per evaluation")
    _say(f"{'':2}{'schedule':64}{'peak':>10}{'host':>10}{'time':>7}")
    for p in found:
        mark = "> " if p is chosen else "  "
        host = gigabytes(p.host_bytes) if p.host_bytes else "-"
        row = f"{describe(p.schedule):64}{gigabytes(p.peak_bytes):>10}{host:>10}{p.cost:>6.2f}x"
        _say(mark + row)
    if chosen is None and args.memory is not None:
        smallest = min(found, key=lambda p: p.peak_bytes)
        raise CommandError(f"nothing fits {gigabytes(args.memory)}; the smallest needs {smallest}")
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


def _yes(condition: bool) -> str:
    return "yes" if condition else "no"


def _say(line: str) -> None:
    # What a file says of itself must not drive the terminal.
    shown = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in line)
    sys.stdout.write(shown + "\n")
