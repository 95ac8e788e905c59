"""The command line of `python -m infdit_core`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ..checkpoints.load import BUNDLED_FOLDER
from ..dimr.sampling import CFG_SCALE, EVALUATIONS
from ..farm.command import farm_pictures
from ..network.config import DTYPES
from ..pictures.colour_fix import COLOUR_FIXES
from ..pictures.wrap import WRAPS
from ..sampling import AUTO, PRESETS, SOLVERS
from .commands import convert_file, inspect, plan_table, upscale_files
from .generate import generate_files
from .values import (
    byte_count,
    count,
    evaluation_count,
    few,
    positive,
    scratch_folder,
    seed,
    share,
    size_in_pixels,
    up_to_100,
)

_BUNDLED_MODEL = BUNDLED_FOLDER / "infdit_small.safetensors"


def build_parser() -> argparse.ArgumentParser:
    """The command line; the parsed `command` is the function to call."""
    parser = argparse.ArgumentParser(
        prog="infdit", description="Upscale pictures of any size with Inf-DiT, without seams."
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_upscale(commands, common)
    _add_generate(commands, common)
    _add_farm(commands, common)
    _add_convert(commands, common)
    _add_inspect(commands, common)
    _add_plan(commands, common)
    return parser


def _add_upscale(commands, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "upscale",
        parents=[common],
        help="upscale pictures",
        description="Upscale pictures. PNG, JPEG, WebP, TIFF, BMP, GIF, AVIF and, where the package"
        " pillow-heif is installed, HEIC are read with all their bits. Grey becomes RGB, CMYK sRGB"
        " by its profile; alpha, colours, EXIF, XMP, IPTC and the texts of PNG are kept.",
    )
    parser.set_defaults(command=upscale_files, ranks=None)
    parser.add_argument("input", nargs="+", type=Path, help="pictures, or folders of pictures")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        help="a file (.png, .webp, .tif or .jpg) for a single picture, else a folder, where each"
        " result gets its picture's name, with the ending too (anim.gif.png) where two would have"
        " one name; of several pictures those whose result is there are left"
        " alone, so a run that was cut off goes on",
    )
    _add_picture_options(parser)


def _add_farm(commands, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "farm",
        parents=[common],
        help="upscale a folder on all processors of this machine or a cluster, with Ray",
        description="Upscale the pictures of a folder on all processors of this machine, or on a"
        " Ray cluster. Results, names and options are those of `infdit upscale`. Results that are"
        " there are left alone, so a run that was cut off goes on. Needs comfyui-infdit[farm].",
    )
    parser.set_defaults(command=farm_pictures, start=None, device=None, ranks=None, scratch=None)
    parser.add_argument(
        "source", metavar="IN", help="a folder of pictures, or its URL, such as s3://bucket/in"
    )
    parser.add_argument("target", metavar="OUT", help="the folder of the results, or its URL")
    _add_picture_options(parser, farm=True)

    farm = parser.add_argument_group(
        "farm", "A worker is a process that holds the model and makes one picture at a time."
    )
    farm.add_argument(
        "--address",
        help="of a Ray cluster, as 10.0.0.1:6379, or auto; every machine of it needs this package,"
        " the model and the folders under the same names (default: this machine alone)",
    )
    farm.add_argument(
        "--workers", type=positive, help="the most at once (default: as many as there is room for)"
    )
    farm.add_argument(
        "--cpus-per-actor",
        type=positive,
        default=1,
        help="processors, and threads, of a worker (default: %(default)s)",
    )
    farm.add_argument(
        "--gpus-per-actor",
        type=count,
        help="GPUs of a worker, which take a strip each of its picture; 0 computes on the CPU"
        " (default: 1 where the farm has GPUs, else 0)",
    )
    farm.add_argument(
        "--memory-per-actor",
        type=byte_count,
        help="RAM of a worker, such as 8GB; pictures that need more come last, with fewer workers"
        " (default: a machine's share of it)",
    )
    farm.add_argument(
        "--retries",
        type=count,
        default=2,
        help="how often a picture that failed, or whose worker died, is tried again"
        " (default: %(default)s)",
    )


def _add_picture_options(parser: argparse.ArgumentParser, *, farm: bool = False) -> None:
    """What `upscale` and `farm` let one choose for a picture."""
    parser.add_argument(
        "--format",
        choices=("png", "tif", "webp", "jpg"),
        default="png",
        help="of the results in a folder (default: %(default)s)",
    )
    parser.add_argument(
        "--model",
        type=Path,
        default=_BUNDLED_MODEL,
        help=".safetensors, or the release's .pt (default: the small model of this pack)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace results that exist")
    parser.add_argument(
        "--recursive",
        action="store_true",
        help="take the pictures of sub-folders too; their results lie in such sub-folders",
    )
    parser.add_argument(
        "--bit-depth",
        type=int,
        choices=(8, 16),
        default=8,
        help="bits per channel of the result; 16 needs .png or .tif (default: %(default)s)",
    )
    parser.add_argument(
        "--pyramid",
        action="store_true",
        help="write into a .tif the result at half its size, a quarter and so on too, for viewers"
        " of large pictures; a third more of the file",
    )

    target = parser.add_argument_group("size").add_mutually_exclusive_group()
    target.add_argument(
        "--scale",
        type=float,
        default=4.0,
        help="how many times wider and higher, above 4 in several passes (default: %(default)g)",
    )
    target.add_argument(
        "--size",
        type=positive,
        help="the longer side in pixels, instead; never less than the picture's own",
    )

    sampling = parser.add_argument_group("sampling")
    sampling.add_argument(
        "--seed", type=seed, default=0, help="chooses the invented detail (default: %(default)s)"
    )
    sampling.add_argument(
        "--preset",
        choices=(AUTO, *PRESETS),
        default=AUTO,
        help="auto is what the model's file asks for, else exact; exact is the authors' choice;"
        " fast takes a third of its time, draft a sixth (default: %(default)s)",
    )
    sampling.add_argument("--steps", type=positive, help="instead of the preset's")
    sampling.add_argument(
        "--solver",
        choices=sorted(SOLVERS),
        help="instead of the preset's; heun evaluates the network twice a step, the others once",
    )
    sampling.add_argument(
        "--denoise",
        type=share,
        default=1.0,
        help="part of the noise and of the steps, 0 to 1; less keeps closer to the picture, 0 is"
        " the enlarged picture that sampling starts from (default: %(default)g)",
    )
    sampling.add_argument(
        "--consistency",
        type=count,
        help="correct the result so many times that, reduced again, it equals the picture"
        " (default: what the preset asks for, mostly 0)",
    )
    if not farm:
        sampling.add_argument(
            "--start",
            type=Path,
            help="another upscaler's picture of the one input, to start from in place of the"
            " enlarged input; --denoise says how much of it is drawn again",
        )
    sampling.add_argument(
        "--wrap",
        choices=WRAPS,
        default="none",
        help="edges where the pictures go on around: left and right of a 360 degree panorama, or"
        " all of a seamless texture (default: %(default)s)",
    )
    sampling.add_argument(
        "--colour-fix",
        choices=COLOUR_FIXES,
        default="none",
        help="take the colours of the input picture: all that is coarser than about 32 px"
        " (wavelet), or mean and contrast in RGB (adain) or CIELAB (lab) (default: %(default)s)",
    )

    guidance = parser.add_argument_group(
        "guidance", "For models that take a CLIP embedding, as the released one does."
    )
    guidance.add_argument(
        "--clip",
        type=Path,
        help="a whole open_clip ViT-L-14 file (datacomp_xl_s13b_b90k), for models that came without"
        " a CLIP tower, and for texts",
    )
    guidance.add_argument(
        "--text-strength",
        type=float,
        default=0.0,
        help="weight of the texts; 0 leaves them out, 2 is the paper's choice (default: 0)",
    )
    guidance.add_argument(
        "--positive", default="HD, high resolution, clear.", help='default: "%(default)s"'
    )
    guidance.add_argument(
        "--negative", default="noisy,blurry,low resolution.", help='default: "%(default)s"'
    )

    machine = parser.add_argument_group(
        "speed and memory (none changes the picture, but the dtype)"
    )
    if not farm:
        machine.add_argument(
            "--device", help="such as cpu or cuda:1 (default: cuda where there is one)"
        )
        machine.add_argument(
            "--gpus",
            type=positive,
            default=1,
            help="so many GPUs work on each picture, a strip each; with --device cpu so many"
            " processes (default: %(default)s)",
        )
        machine.add_argument(
            "--scratch",
            type=scratch_folder,
            metavar="DIR",
            help="keep pictures in files of this folder, on a fast disk: memory then grows with the"
            " side of a result and no more with its area; and what each step leaves, from which the"
            " same command goes on after the run was killed",
        )
    machine.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of the network (default: bf16 on a GPU, fp32 on the CPU)",
    )
    machine.add_argument(
        "--schedule",
        choices=("auto", "full", "block-major", "layer-major"),
        default="auto",
        help="the order of computation; auto takes the fastest that fits (default: %(default)s)",
    )
    machine.add_argument(
        "--memory",
        type=byte_count,
        help="what auto may take on the device, such as 8GB (default: what is free on a GPU, no"
        " limit on the CPU)",
    )
    machine.add_argument(
        "--compile",
        action="store_true",
        help="compile the layers first: about a minute, and faster for large pictures on a GPU",
    )
    machine.add_argument(
        "--blocks",
        type=positive,
        help="side of the square of blocks that block-major takes at a time, or the number of"
        " blocks that layer-major does (default: 1)",
    )

    faster = parser.add_argument_group("faster and not exact")
    faster.add_argument(
        "--reuse-layers",
        type=positive,
        help="leave out this many of the last layers where heun evaluates a noise level for the"
        " second time, and add what they added the first time",
    )


def _add_generate(commands, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "generate",
        parents=[common],
        help="draw pictures of ImageNet's classes with DiMR",
        description="Draw pictures of 256×256 of ImageNet's classes with DiMR, which takes no text."
        " On a CPU without --cfg-exponent the latents are to the bit those of its nodes in ComfyUI"
        " for the same seed.",
    )
    parser.set_defaults(command=generate_files)
    parser.add_argument(
        "--model",
        type=Path,
        required=True,
        help="the authors' DiMR-XL_2R_800epochs.pth or DiMR-G_2R_800epochs.pth",
    )
    parser.add_argument(
        "--class",
        dest="classes",
        nargs="+",
        action="extend",
        required=True,
        metavar="CLASS",
        help='numbers of 0 to 999, 1000 for none, or names, such as "golden retriever"; of several'
        " the pictures take turns",
    )
    parser.add_argument(
        "--count", type=few, default=1, help="pictures, all drawn at once (default: %(default)s)"
    )
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path(),
        help="a file for a single picture, else a folder (default: the one you are in)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    parser.add_argument(
        "--vae",
        type=Path,
        help="a VAE of Stable Diffusion 1.5, or a whole checkpoint of it: writes pictures (.png)."
        " Without it latents are written (.latent), for ComfyUI's node Load Latent",
    )
    parser.add_argument("--seed", type=seed, default=0, help="default: %(default)s")
    parser.add_argument(
        "--evaluations",
        type=evaluation_count,
        default=EVALUATIONS,
        help="of the network, twice where it is guided (default: %(default)s, as the authors)",
    )
    parser.add_argument(
        "--cfg",
        type=up_to_100,
        default=CFG_SCALE,
        help="strength of guidance, 1 for none (default: %(default)g, as the authors)",
    )
    parser.add_argument(
        "--cfg-exponent",
        type=up_to_100,
        help="lets guidance grow from 1 to --cfg, the later the higher this is (default: the same"
        " guidance at all times)",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="of the network (default: bf16 on a GPU, fp32 on the CPU)"
    )
    parser.add_argument("--device", help="such as cpu or cuda:1 (default: cuda where there is one)")


def _add_convert(commands, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "convert",
        parents=[common],
        help="convert a checkpoint to .safetensors",
        description="Convert a checkpoint of Inf-DiT or DiMR to .safetensors: what the network does"
        " not use is dropped, a CLIP tower is kept.",
    )
    parser.set_defaults(command=convert_file)
    parser.add_argument(
        "source", type=Path, help="the release's .pt or .pth, or a .safetensors file"
    )
    parser.add_argument("target", type=Path, help="ends in .safetensors")
    parser.add_argument("--dtype", choices=DTYPES, help="default: that of the source")
    parser.add_argument("--overwrite", action="store_true", help="replace a target that exists")


def _add_inspect(commands, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "inspect",
        parents=[common],
        help="say what a checkpoint holds",
        description="Say what a checkpoint holds, and whether it is complete.",
    )
    parser.set_defaults(command=inspect)
    parser.add_argument("file", type=Path)


def _add_plan(commands, common: argparse.ArgumentParser) -> None:
    parser = commands.add_parser(
        "plan",
        parents=[common],
        help="say what memory a size of picture takes",
        description="List the orders of computation for a size of picture, the fastest first, with"
        " the memory each takes at its peak, weights included.",
    )
    parser.set_defaults(command=plan_table)
    parser.add_argument(
        "--size", type=size_in_pixels, required=True, help="of the result, as 4096x4096"
    )
    parser.add_argument("--memory", type=byte_count, help="what may be taken, as 8GB")
    parser.add_argument(
        "--ram", type=byte_count, help="what may wait in RAM, as 32GB; default: what is free here"
    )
    parser.add_argument(
        "--scratch", action="store_true", help="with pictures in files, as upscale --scratch DIR"
    )
    parser.add_argument("--model", type=Path, default=_BUNDLED_MODEL, help="a model file")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="default: %(default)s")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
