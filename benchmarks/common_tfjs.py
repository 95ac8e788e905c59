"""Reads convolution networks of TensorFlow.js, so that no TensorFlow is needed: a library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

_ACTIVATIONS = {"linear": lambda x: x, "relu": F.relu}


class LayersModel(nn.Module):
    """A network in TensorFlow.js's layers format, of the layers that ESRGANs have.

    Args:
        description: what `model.json` holds.
        data: the files that it names in `weightsManifest`, one after another.
    """

    def __init__(self, description: Mapping[str, Any], data: bytes) -> None:
        super().__init__()
        topology = description["modelTopology"]["model_config"]["config"]
        self._layers = topology["layers"]
        self._output = topology["output_layers"][0][0]
        self._last_use = {
            source: i for i, layer in enumerate(self._layers) for source in _sources(layer)
        }
        for name, weight in read_weights(description["weightsManifest"], data).items():
            self.register_buffer(name, weight)

    def forward(self, x: Tensor) -> Tensor:
        """From (B, 3, h, w) to (B, 3, H, W), in the range of the network."""
        found: dict[str, Tensor] = {}
        for i, layer in enumerate(self._layers):
            sources = _sources(layer)
            found[layer["name"]] = self._layer(layer, [found[name] for name in sources] or [x])
            for name in {name for name in sources if self._last_use[name] == i}:
                del found[name]
        return found[self._output]

    def _layer(self, layer: Mapping[str, Any], inputs: Sequence[Tensor]) -> Tensor:
        config, x = layer["config"], inputs[0]
        match layer["class_name"]:
            case "InputLayer":
                return x
            case "Conv2D":
                return self._convolution(config, x)
            case "Activation":
                return _ACTIVATIONS[config["activation"]](x)
            case "Concatenate":
                return torch.cat([*inputs], dim=1)
            case "Add":
                return torch.stack([*inputs]).sum(0)
            case "MultiplyBeta":
                return x * config["beta"]
            case "UpSampling2D" if config["interpolation"] == "nearest":
                return F.interpolate(x, scale_factor=tuple(map(float, config["size"])))
            case "PixelShuffle4x":
                return depth_to_space(x, config["scale"])
            case kind:
                raise NotImplementedError(f"{config['name']}: expected a known layer, got {kind}")

    def _convolution(self, config: Mapping[str, Any], x: Tensor) -> Tensor:
        name, padding = _key(config["name"]), config["padding"]
        weight, bias = self.get_buffer(f"{name}_kernel"), self.get_buffer(f"{name}_bias")
        y = F.conv2d(
            x, weight, bias, config["strides"], padding, config["dilation_rate"], config["groups"]
        )
        return _ACTIVATIONS[config["activation"]](y)


def depth_to_space(x: Tensor, scale: int) -> Tensor:
    """(B, scale² c, h, w) to (B, c, scale h, scale w), channels in TensorFlow's order.

    There the place is the outer index of a channel and the colour the inner one; in
    `torch.pixel_shuffle` it is the other way round.
    """
    return rearrange(x, "b (dy dx c) h w -> b c (h dy) (w dx)", dy=scale, dx=scale)


def read_weights(manifest: Sequence[Mapping[str, Any]], data: bytes) -> dict[str, Tensor]:
    """Tensors by name, kernels (out, in, height, width); TensorFlow has (height, width, in, out).

    Raises:
        ValueError: there is more or less data than the manifest names.
    """
    found, start = {}, 0
    for entry in (entry for group in manifest for entry in group["weights"]):
        if entry["dtype"] != "float32" or "quantization" in entry:
            raise ValueError(f"{entry['name']}: expected plain float32")
        count = int(np.prod(entry["shape"]))
        values = np.frombuffer(data, "<f4", count, start).reshape(entry["shape"])
        weight = torch.from_numpy(values.copy())
        found[_key(entry["name"])] = weight.permute(3, 2, 0, 1) if weight.ndim == 4 else weight
        start += 4 * count
    if start != len(data):
        raise ValueError(f"expected {start} bytes of weights, got {len(data)}")
    return found


def _key(name: str) -> str:
    """A name that a buffer can have."""
    return name.replace("/", "_").replace(".", "_")


def _sources(layer: Mapping[str, Any]) -> list[str]:
    """Names of the layers that a layer reads."""
    return [node[0] for nodes in layer["inbound_nodes"][:1] for node in nodes]
