"""Upscaling a folder of pictures: each is read, upscaled and written before the next."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path

import folder_paths
import torch
from comfy.cli_args import args
from comfy_api.latest import io

from ...infdit_core.cli.jobs import CommandError, check_jobs, check_result
from ...infdit_core.errors import InfDiTError
from ...infdit_core.memory.adaptive import is_out_of_memory
from ...infdit_core.memory.host import require_memory
from ...infdit_core.pictures.files import (
    ImageInfo,
    check_writable,
    picture_size,
    read_image,
    write_image,
)
from ...infdit_core.pictures.prepare import pass_sizes
from ...infdit_core.sampling import AUTO, PRESETS, find_preset
from ...infdit_core.upscale import upscale
from ..common import CATEGORY, named_errors, require
from .comfy_model import require_infdit
from .folder_files import (
    NAME,
    file_states,
    in_our_words,
    plan_folder,
    scratch_files,
    shown,
    source_folder,
    target_folder,
)
from .folder_progress import FolderProgress
from .inputs import (
    check_inputs,
    colour_fix_input,
    longest_edge_input,
    result_size,
    size_inputs,
)
from .managed_sampler import ManagedSampler, managed_sampler
from .patches import warn_of_patches
from .sampler import MAX_SEED, GuiderDraw, core_sampler

_TIFF, _PYRAMID = "tif", "tif pyramid"
_FORMATS = ("png", _TIFF, "webp", "jpg", _PYRAMID)
_SHOWN_IN_BROWSERS = ("png", "webp", "jpg")
_MAX_SHOWN = 50


class InfDiTUpscaleFolder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InfDiTUpscaleFolder",
            display_name=NAME,
            category=CATEGORY,
            description="Upscales every picture of a folder and writes each as soon as it is done."
            " After a cancel or an error, queue again: what is there is left alone.",
            inputs=[
                io.Model.Input("model", tooltip="From Load Inf-DiT Checkpoint."),
                io.Combo.Input(
                    "folder",
                    options=folder_paths.get_input_subfolders(),
                    tooltip="A folder in ComfyUI's input folder. Press R after making a new one."
                    " Read are PNG, JPEG, WebP, TIFF, BMP, GIF and AVIF, HEIC with the package"
                    " pillow-heif; the log says what else is there.",
                ),
                io.Float.Input(
                    "upscale_by",
                    default=4.0,
                    min=1.0,
                    max=8.0,
                    step=0.05,
                    tooltip="How many times wider and higher the results are. Above 4 each picture"
                    " goes through the model twice. Other ways to say the size are among the"
                    " advanced inputs.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    control_after_generate=False,
                    tooltip="Chooses the invented detail, the same for every picture.",
                ),
                io.Combo.Input(
                    "preset",
                    options=[*PRESETS, AUTO],
                    default=AUTO,
                    tooltip="As in Inf-DiT Upscale: auto is what the model's file asks for; exact"
                    " takes 39 evaluations of the network a picture and pass, fast 12, draft 6.",
                ),
                io.Float.Input(
                    "denoise",
                    default=1.0,
                    min=0.0,
                    max=1.0,
                    step=0.05,
                    tooltip="Fidelity, as in Inf-DiT Upscale: less keeps closer to the pictures"
                    " and takes fewer evaluations, except with auto.",
                ),
                io.String.Input(
                    "output_folder",
                    default="",
                    tooltip="A folder in ComfyUI's output folder; it is made if it is not there."
                    " Left empty, it has the name of the folder that is read.",
                ),
                io.Combo.Input(
                    "format",
                    options=list(_FORMATS),
                    default="png",
                    tooltip="Of the results, which have the names of the pictures. EXIF, XMP, IPTC"
                    " and colours are kept as far as the format holds them; png also holds the"
                    " workflow, and HDR (PQ, HLG) needs it. tif is for results of any size, BigTIFF"
                    " where it has to be; tif pyramid adds smaller copies, for viewers of large"
                    " pictures.",
                ),
                io.Combo.Input(
                    "bit_depth",
                    options=["8", "16"],
                    default="8",
                    tooltip="Bits of each colour in the results; 16 needs png or tif.",
                    advanced=True,
                ),
                io.Boolean.Input(
                    "overwrite",
                    default=False,
                    tooltip="Whether results that are there are made again. Off, they are left"
                    " alone, whatever settings made them.",
                    advanced=True,
                ),
                longest_edge_input(),
                colour_fix_input(),
                *size_inputs(),
                io.Boolean.Input(
                    "recursive",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Whether pictures of the folders within are read too. Their results"
                    " lie in such folders within the output folder.",
                ),
                io.Boolean.Input(
                    "pictures_on_disk",
                    default=False,
                    optional=True,
                    advanced=True,
                    tooltip="Pictures wait in files beside the results instead of in memory: for"
                    " results larger than the RAM. A run that was cancelled or killed goes on from"
                    " its last step. Needs format tif, and pictures without alpha.",
                ),
            ],
            outputs=[],
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
            search_aliases=["inf-dit", "infdit", "upscale", "batch", "directory", "folder"],
        )

    @classmethod
    def validate_inputs(cls, folder: str | None) -> bool | str:
        # None: it comes from another node, and is looked up when that has run
        try:
            return folder is None or bool(source_folder(folder))
        except InfDiTError as error:
            return f"{NAME}: {error}"

    @classmethod
    def fingerprint_inputs(
        cls,
        folder: str | None,
        output_folder: str = "",
        overwrite: bool = False,
        recursive: bool = False,
        **_: object,
    ) -> str:
        """Changes with the pictures, and with the results unless they are made anyway."""
        try:
            source = source_folder(folder or "")
            target = target_folder(output_folder.strip() or folder or "")
        except InfDiTError:
            return ""
        states = [file_states(source, recursive, target)]
        if not overwrite:
            states.append(file_states(target, recursive))
        return repr(states)

    @classmethod
    @named_errors(NAME)
    def execute(
        cls,
        model,
        folder: str,
        upscale_by: float,
        seed: int,
        preset: str,
        denoise: float,
        output_folder: str,
        format: str,
        bit_depth: str,
        overwrite: bool,
        longest_edge: int = 0,
        colour_fix: str = "none",
        size_by: str = "factor or longest edge",
        megapixels: float = 4.0,
        width: int = 2048,
        height: int = 2048,
        recursive: bool = False,
        pictures_on_disk: bool = False,
    ) -> io.NodeOutput:
        if pictures_on_disk and format not in (_TIFF, _PYRAMID):
            raise InfDiTError(
                f"expected format {_TIFF} or {_PYRAMID} with pictures_on_disk, because others are"
                f" written from memory; got {format}"
            )
        if not 0 <= denoise <= 1:
            raise InfDiTError(f"expected denoise in 0..1; got {denoise}")
        require_infdit(model)
        warn_of_patches(model)
        source = source_folder(require(folder, str, "expected folder from the list"))
        target = target_folder(output_folder.strip() or folder)
        depth = int(bit_depth)
        pyramid, format = format == _PYRAMID, _TIFF if format == _PYRAMID else format
        jobs = plan_folder(source, target, format, overwrite, recursive)
        check_writable(target / f"result.{format}", alpha=False, bit_depth=depth)
        check_inputs(model, torch.zeros(1, 1, 1, 3), None)  # whether it has the CLIP it needs
        hidden = cls.hidden
        texts = {}
        if hidden and format == "png" and not args.disable_metadata:  # as core's SaveImage
            texts = {"prompt": hidden.prompt} if hidden.prompt is not None else {}
            texts |= hidden.extra_pnginfo or {}
        settings = {key: json.dumps(value) for key, value in texts.items()}
        chosen = find_preset(preset, model.model.infdit.metadata)
        sigmas = chosen.sigmas(denoise, model.model.infdit_config.sigma_max)
        progress = FolderProgress(hidden.unique_id if hidden else None)
        asked = upscale_by, longest_edge, size_by, megapixels, (height, width)

        with scratch_files(target) if pictures_on_disk else nullcontext() as scratch:
            if scratch is not None:
                draw = managed_sampler(model, chosen, seed, denoise, scratch, progress)
            else:
                sampler, back = core_sampler(chosen.solver), chosen.consistency
                draw = GuiderDraw(model, sampler, sigmas, seed, progress, back)

            @cache  # asked more than once for each picture, it says once that one would shrink
            def sizes(source: tuple[int, int]) -> tuple[int, int]:
                size = result_size(source, *asked)
                if isinstance(draw, ManagedSampler):
                    draw.require_scratch([source, *pass_sizes(source, size)][-2], size)
                else:
                    require_memory(size, model.load_device)
                return size

            def make(path: Path, result: Path) -> None:
                image, info = read_image(path, scratch and scratch.empty)
                progress.source(image)
                size = sizes((image.shape[1], image.shape[2]))
                info = check_result(result, image, size, depth, info)
                vectors = check_inputs(model, image, None)
                picture = upscale(image, size, draw, vectors=vectors, colour_fix=colour_fix)
                write_image(
                    result,
                    picture,
                    bit_depth=depth,
                    info=_with_texts(info, settings),
                    overwrite=overwrite,
                    pyramid=pyramid,
                )

            check_jobs(jobs, sizes, depth, scratch=pictures_on_disk)
            made = []
            with progress:
                work = [_work(path, sizes) for path, _ in jobs.todo]
                progress.start(work, chosen._replace(steps=len(sigmas) - 1))
                for n, (path, result) in enumerate(jobs.todo):
                    progress.picture(n, path.name)
                    with jobs.attempt(path), _memory_errors(), scratch or nullcontext():
                        make(path, result)
                        made.append(result)
                progress.end(len(made), len(jobs.finished), len(jobs.failed))
        if jobs.failed:
            first = in_our_words(next(iter(jobs.failed.values())))
            written = f". Written to {shown(target)}: {len(made)}" if made else ""
            raise CommandError(f"{jobs.summary()}. The first: {first}{written}")
        return io.NodeOutput(ui={"images": _images(made)})


@contextmanager
def _memory_errors() -> Iterator[None]:
    """A picture that does not fit the memory is an error that its user can mend."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise CommandError("out of memory") from error


def _work(path: Path, sizes: Callable[[tuple[int, int]], tuple[int, int]]) -> int:
    """Pixels of all passes of a picture; 0 if unreadable."""
    if (source := picture_size(path)) is None:
        return 0
    return sum(height * width for height, width in pass_sizes(source, sizes(source)))


def _with_texts(info: ImageInfo, texts: dict[str, str]) -> ImageInfo:
    metadata = replace(info.metadata, text=info.metadata.text | texts)
    return replace(info, metadata=metadata)


def _images(made: list[Path]) -> list[dict[str, str]]:
    """The last results as the interface shows them."""
    output = Path(os.path.abspath(folder_paths.get_output_directory()))
    shown = [path for path in made if path.suffix[1:] in _SHOWN_IN_BROWSERS][-_MAX_SHOWN:]
    folders = [path.parent.relative_to(output).as_posix() for path in shown]
    return [
        {"filename": path.name, "subfolder": folder.removeprefix("."), "type": "output"}
        for path, folder in zip(shown, folders, strict=True)
    ]
