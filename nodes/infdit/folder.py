"""Upscaling a folder of pictures: each is read, upscaled and written before the next."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import folder_paths
import torch
from comfy.cli_args import args
from comfy_api.latest import io

from ...infdit_core.cli.jobs import CommandError, Jobs, is_disk_full, plan_jobs, summary
from ...infdit_core.errors import InfDiTError
from ...infdit_core.memory.adaptive import is_out_of_memory
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
from .folder_progress import FolderProgress
from .inputs import (
    check_inputs,
    colour_fix_input,
    longest_edge_input,
    result_size,
    size_inputs,
)
from .patches import warn_of_patches
from .sampler import MAX_SEED, GuiderDraw, core_sampler

_NAME = "Inf-DiT Upscale Folder"
_FORMATS = ("png", "tif", "webp", "jpg")
_SHOWN_IN_BROWSERS = ("png", "webp", "jpg")
_MAX_SHOWN = 50


class InfDiTUpscaleFolder(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="InfDiTUpscaleFolder",
            display_name=_NAME,
            category=CATEGORY,
            description="Upscales every picture of a folder and writes each as soon as it is done."
            " After a cancel or an error, queue again: what is there is left alone.",
            inputs=[
                io.Model.Input("model", tooltip="From Load Inf-DiT Checkpoint."),
                io.Combo.Input(
                    "folder",
                    options=folder_paths.get_input_subfolders(),
                    tooltip="A folder in ComfyUI's input folder. Press R after making a new one.",
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
                    tooltip="Of the results, which have the names of the pictures. EXIF, XMP and"
                    " colour profile are kept; png also holds the workflow.",
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
            return folder is None or bool(_source(folder))
        except InfDiTError as error:
            return f"{_NAME}: {error}"

    @classmethod
    def fingerprint_inputs(
        cls,
        folder: str | None,
        output_folder: str = "",
        overwrite: bool = False,
        **_: object,
    ) -> str:
        """Changes with the pictures, and with the results unless they are made anyway."""
        try:
            folders = [_source(folder or "")]
            if not overwrite:
                folders.append(_target(output_folder or folder or ""))
        except InfDiTError:
            return ""
        return repr([sorted(_states(path)) for path in folders])

    @classmethod
    @named_errors(_NAME)
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
    ) -> io.NodeOutput:
        if not 0 <= denoise <= 1:
            raise InfDiTError(f"expected denoise in 0..1; got {denoise}")
        require_infdit(model)
        warn_of_patches(model)
        source = _source(require(folder, str, "expected folder from the list"))
        target = _target(output_folder.strip() or folder)
        jobs = _plan(source, target, format, overwrite)
        check_writable(target / f"result.{format}", alpha=False, bit_depth=int(bit_depth))
        check_inputs(model, torch.zeros(1, 1, 1, 3), None)  # whether it has the CLIP it needs
        hidden = cls.hidden
        texts = {}
        if hidden and not args.disable_metadata:  # as core's SaveImage
            texts = {"prompt": hidden.prompt} if hidden.prompt is not None else {}
            texts |= hidden.extra_pnginfo or {}
        settings = {key: json.dumps(value) for key, value in texts.items()}
        chosen = find_preset(preset, model.model.infdit.metadata)
        sigmas = chosen.sigmas(denoise, model.model.infdit_config.sigma_max)
        chosen = chosen._replace(steps=len(sigmas) - 1)
        asked = upscale_by, longest_edge, size_by, megapixels, (height, width)
        failed, made = {}, []
        with FolderProgress(hidden.unique_id if hidden else None) as progress:
            progress.start([_work(path, *asked) for path, _ in jobs.todo], chosen)
            for n, (path, result) in enumerate(jobs.todo):
                progress.picture(n, path.name)
                try:
                    image, info = read_image(path)
                    progress.source(image)
                    check_writable(result, alpha=image.shape[-1] == 4, bit_depth=int(bit_depth))
                    size = result_size((image.shape[1], image.shape[2]), *asked)
                    sampler, back = core_sampler(chosen.solver), chosen.consistency
                    draw = GuiderDraw(model, sampler, sigmas, seed, progress, back)
                    vectors = check_inputs(model, image, None)
                    picture = upscale(image, size, draw, vectors=vectors, colour_fix=colour_fix)
                    info = _with_texts(info, settings)
                    write_image(
                        result, picture, bit_depth=int(bit_depth), info=info, overwrite=overwrite
                    )
                    made.append(result)
                except (InfDiTError, RuntimeError, MemoryError) as error:
                    if not (isinstance(error, InfDiTError) or is_out_of_memory(error)):
                        raise
                    if is_disk_full(error):
                        raise
                    failed[path] = str(error) if isinstance(error, InfDiTError) else "out of memory"
                    logging.warning("%s: %s: %s", _NAME, path.name, failed[path])
            progress.end(len(made), len(jobs.finished), len(failed))
        if failed:
            first = next(iter(failed.values()))
            raise CommandError(
                f"{summary(list(failed), jobs)}. The first: {first}. {len(made)} others are"
                f" written to {_shown(target)}"
            )
        return io.NodeOutput(ui={"images": _images(made)})


def _source(folder: str) -> Path:
    """A folder below ComfyUI's input folder."""
    path = _inside(folder_paths.get_input_directory(), folder, "input")
    if not folder or not path.is_dir():
        raise InfDiTError(f"expected a folder in ComfyUI's input folder; {folder!r} is not there")
    return path


def _target(folder: str) -> Path:
    """A folder below ComfyUI's output folder, which need not be there."""
    return _inside(folder_paths.get_output_directory(), folder, "output")


def _inside(base: str, folder: str, name: str) -> Path:
    path = os.path.abspath(os.path.join(base, folder))
    if not folder_paths.is_within_directory(base, path):
        raise InfDiTError(f"expected a folder in ComfyUI's {name} folder; got {folder!r}")
    return Path(path)


def _shown(path: Path | str) -> str:
    """A path, or paths within a text, as they are seen from ComfyUI's folder."""
    text = str(path)
    for base, name in (
        (folder_paths.get_input_directory(), "input"),
        (folder_paths.get_output_directory(), "output"),
    ):
        text = text.replace(os.path.abspath(base), name)
    return text


def _plan(source: Path, target: Path, format: str, overwrite: bool) -> Jobs:
    try:
        target.mkdir(parents=True, exist_ok=True)
        return plan_jobs([source], target, format, overwrite)
    except OSError as error:
        raise InfDiTError(f"{_shown(target)} cannot be made: {error.strerror}") from error
    except CommandError as error:
        text = _shown(str(error)).replace("--output or --overwrite", "output_folder or overwrite")
        raise InfDiTError(text.replace("--output", "output_folder")) from error


def _states(folder: Path) -> list[tuple[str, int, int]]:
    """Name, size and time of every file of a folder."""
    if not folder.is_dir():
        return []
    states = [(path.name, path.stat()) for path in folder.iterdir() if path.is_file()]
    return [(name, state.st_size, state.st_mtime_ns) for name, state in states]


def _work(path: Path, *asked: Any) -> int:
    """Pixels of all passes of a picture for a size as `result_size` takes it; 0 if unreadable."""
    if (source := picture_size(path)) is None:
        return 0
    sizes = pass_sizes(source, result_size(source, *asked))
    return sum(height * width for height, width in sizes)


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
