"""What a saved network is, beside its weights: how to build it again, and what its inputs and outputs mean."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from sparsepipe.artefact import read_json, write_text
from sparsepipe.settings import Choice, check

SPEC_FILE = "model.json"
WEIGHTS_FILE = "model.safetensors"
MASKS_FILE = "masks.safetensors"
FILM_FILE = "mask_film.safetensors"
LAYERS_FILE = "layers.json"
"""The table of layers, of `convert` and `export`."""
SPEC_KEY = "sparsepipe.spec"
"""Metadata of an exported file: the contents of `model.json`."""
TARGET_KEY = "sparsepipe.target"
"""Metadata of an exported file: dense, portable or universal."""
PRECISION_KEY = "sparsepipe.precision"
"""Metadata of an exported file: fp32 or int8."""
CALIBRATION_KEY = "sparsepipe.calibration"
"""Metadata of an int8 file: the dataset that its ranges come from."""


class Preprocessing(BaseModel):
    """From raw inputs to what the network takes: `(raw * scale - mean) / std`, images as channels first.

    Raw images are uint8 [N, H, W, C]; raw features are float32 [N, F] with `scale` 1. `mean` and `std` have one
    value per channel (or feature), in units of the scaled input.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    scale: float = 1.0
    mean: tuple[float, ...]
    std: tuple[float, ...]


class ModelSpec(BaseModel):
    """Contents of `model.json`, which stands beside the weights in every artefact that holds a network."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: Choice
    """Registry name or `module:function`, and the options it was built with."""
    input_shape: tuple[int, ...]
    """Shape of one sample as the network takes it: (C, H, W) or (F,)."""
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    method: str = "unknown"
    pattern: str = "unstructured"
    data: Choice | None = None
    """The dataset that it was trained on; None where that is not known."""
    recipe_digest: str | None = None
    activation_ranges: dict[str, tuple[float, float]] | None = None
    """Of a network that was trained by int8-qat: tensor of its ONNX form -> the range that its int8 form gets."""

    def write(self, folder: Path) -> None:
        write_text(folder / SPEC_FILE, self.model_dump_json(indent=2) + "\n")

    @classmethod
    def read(cls, path: Path) -> ModelSpec:
        """Read a `model.json`.

        Raises:
            ArtefactError: missing or not JSON.
            RecipeError: a key is missing, unknown or of the wrong type.
        """
        table: Any = read_json(path)
        return check(cls, table, where=str(path))
