"""The recipe: one TOML file that configures every stage, read into typed sections.

A section that chooses something by name (`model`, `data`, `method`, `optimizer`, `schedule`) may be written as a
table, `[model] name = "resnet20"`, or in short as `model = "resnet20"`. Overrides are `KEY=VALUE` with dotted keys;
`method=rigl` changes the name and keeps the section's other keys.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import tomli_w
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationInfo,
    field_validator,
)

from sparsepipe.artefact import digest_bytes, write_text
from sparsepipe.errors import RecipeError
from sparsepipe.settings import Choice, NamedChoice, Section, check, from_short_form

Fraction = Annotated[float, Field(ge=0, lt=1)]
Target = Literal["dense", "portable", "universal"]
INT8_TARGETS: tuple[Target, ...] = ("dense", "universal")
DEFAULT_METHOD = "dst-ee"
LONGEST_NAME = 200
"""Bytes; file systems take 255 for a folder, and verbs append to it what they are."""
WeightFormat = Literal["csr", "bsr", "nm", "bitmask", "dense"]


def _method_from_short_form(value: Any) -> Any:
    value = from_short_form(value)
    return {"name": DEFAULT_METHOD, **value} if isinstance(value, dict) else value


def _shapes_from_short_form(value: Any) -> Any:
    return {"": value} if isinstance(value, (list, tuple)) else value


Shapes = Annotated[
    dict[str, Annotated[tuple[PositiveInt, ...], Field(min_length=1)]], BeforeValidator(_shapes_from_short_form)
]
"""Shapes of inputs by name, batch first; a shape alone, or under the name "", is that of the only input."""


def _list_from_short_form(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


def _modifiers_from_short_form(value: Any) -> Any:
    return [name.strip() for name in value.split(",") if name.strip()] if isinstance(value, str) else value


Modifiers = Annotated[tuple[NamedChoice, ...], BeforeValidator(_modifiers_from_short_form)]
"""What combines with the method, in this order: names, or tables of a name and options."""


class Augment(Section):
    """Augmentation of training batches, on tensors."""

    crop: Annotated[int, Field(ge=0)] = 0
    """Random crop after padding each side by this many zero pixels."""
    flip: bool = False
    """Mirror left-right with probability one half."""
    cutout: Annotated[int, Field(ge=0)] = 0
    """Side of a square, in pixels, set to zero at a random place."""
    resized_crop: Fraction = 0.0
    """Crop a random part of at least this share of the area and resize it to the old size; 0 for none."""


class Optimizer(Section):
    name: Literal["sgd", "adamw"] = "sgd"
    lr: Annotated[float, Field(gt=0)] = 0.1
    weight_decay: Annotated[float, Field(ge=0)] = 5e-4
    momentum: Fraction = 0.9
    """SGD only."""
    nesterov: bool = True
    """SGD only."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """AdamW only."""
    decay_norms: bool = True
    """Whether weight decay also acts on biases and normalisation parameters."""


class Schedule(Section):
    """The learning rate over training, as a multiple of `optimizer.lr`."""

    name: Literal["cosine", "multistep", "constant"] = "cosine"
    warmup: Annotated[float, Field(ge=0)] = 0.0
    """Linear warm-up, in epochs."""
    milestones: tuple[Fraction, ...] = (0.5, 0.75)
    """multistep: the fractions of training at which the rate is multiplied by `gamma`."""
    gamma: Annotated[float, Field(gt=0, lt=1)] = 0.1


class Training(Section):
    epochs: PositiveInt = 20
    batch_size: PositiveInt = 128
    precision: Literal["fp32", "bf16", "fp16", "int8-qat"] = "fp32"
    """Of the passes through the network; weights and optimizer are in fp32. fp16 scales the loss. int8-qat rounds
    weights and activations in the last passes as the int8 export will."""
    qat_start: Fraction = 0.8
    """int8-qat: the fraction of training after which passes round; masks must be final by then."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: Annotated[int, Field(ge=0)] = 0
    """CPU threads; 0 takes all."""
    label_smoothing: Fraction = 0.0
    ema: Fraction = 0.0
    """Decay of a moving average of the weights, which is then what is validated, selected and saved; 0 keeps none."""
    validation: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Fraction of the training split held out, by seed, to select on."""
    select: Literal["last", "best"] = "best"
    """Which epoch's weights are kept; `best` is by validation accuracy once the masks are final."""
    checkpoint_every: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps between checkpoints; 0 writes one every half minute, less often where writing takes long."""
    dense_twin: bool = False
    """Train the same recipe with `method = "dense"` too, as the baseline of the result table."""


class Conversion(Section):
    formats: Annotated[tuple[WeightFormat, ...], Field(min_length=1)] = ("csr", "bsr", "nm", "bitmask")
    """Formats to choose from, layer by layer, by size; a layer that none makes smaller stays dense."""


class Export(Section):
    targets: Annotated[tuple[Target, ...], Field(min_length=1)] = ("dense", "portable", "universal")
    opset: Annotated[int, Field(ge=13, le=22)] = 18
    isa: Literal["any", "avx512", "avx2", "sse4", "neon", "portable"] = "any"
    """universal: the instruction set of the machines that the file is for. `any` lets a layer go sparse only where the
    cost model expects it to pay on each of them."""
    measure: bool = False
    """universal: choose by timing the layers on this machine instead of by the cost model alone."""
    measure_seconds: Annotated[float, Field(gt=0)] = 30.0
    """About how long measuring may take."""
    precision: Annotated[
        tuple[Literal["fp32", "int8"], ...], BeforeValidator(_list_from_short_form), Field(min_length=1)
    ] = ("fp32",)
    """One, or both side by side: then the int8 files are called `model.TARGET.int8.onnx`. int8: weights int8 for each
    output channel, activations uint8 for each tensor; `portable` has no such form."""
    calibrate: NamedChoice | None = None
    """int8: the dataset on whose training split the ranges of activations are found."""
    calibration: Literal["minmax", "percentile", "entropy"] = "minmax"
    """int8: how the range of a tensor comes from its values. The last two keep all of them in memory."""
    calibration_samples: PositiveInt = 128
    calibration_seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """int8: which samples of the split are taken."""
    max_drop: Annotated[float, Field(ge=0, le=100)] | None = None
    """int8: points of accuracy that may be lost on further samples of that split; layers stay fp32 until that holds.
    None quantises all of them."""

    @field_validator("measure")
    @classmethod
    def _measuring_has_a_choice(cls, measure: bool, info: ValidationInfo) -> bool:
        if measure and "universal" not in info.data.get("targets", ("universal",)):
            raise ValueError("only the target universal has a choice that could be measured; add it or do not measure")
        return measure

    @field_validator("precision")
    @classmethod
    def _precisions_have_files(
        cls, precision: tuple[Literal["fp32", "int8"], ...], info: ValidationInfo
    ) -> tuple[Literal["fp32", "int8"], ...]:
        if "fp32" not in precision and info.data.get("measure"):
            raise ValueError("layers of int8 files are chosen by the cost model; they cannot be measured yet")
        targets = set(info.data.get("targets", INT8_TARGETS))
        # A run's recipe names the default, too, of which portable is left out.
        chosen = targets != set(cls.model_fields["targets"].default)
        in_vain = chosen and "fp32" not in precision and "portable" in targets
        if "int8" in precision and (in_vain or not targets & set(INT8_TARGETS)):
            raise ValueError("the target portable has no int8 form; name the targets dense, universal or both")
        return tuple(sorted(set(precision)))  # fp32 first: what others are compared with


class Validation(Section):
    max_relative: Annotated[float, Field(gt=0)] = 1e-3
    """Largest allowed |difference| of the logits, relative to the largest |logit| of the reference."""
    min_agreement: Annotated[float, Field(gt=0, le=1)] = 0.999
    """Smallest allowed share of samples on which both predict the same class."""
    int8_max_drop: Annotated[float, Field(ge=0, le=100)] = 1.0
    """int8 files, in place of the two above: largest allowed loss of accuracy, in points. A file fails where the whole
    95% interval of its loss is above this."""
    int8_min_agreement: Annotated[float, Field(ge=0, le=1)] = 0.9
    """int8 files, where labels are not known: smallest allowed share of samples of the same class. A file fails where
    the whole 95% interval of its share is below this."""
    int8_max_error: Annotated[float, Field(gt=0)] = 0.1
    """int8 files: largest allowed root mean square of the differences, in units of the range of the output."""
    batch_size: PositiveInt = 256


class Bench(Section):
    threads: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1,)
    batch: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (1,)
    seconds: Annotated[float, Field(gt=0)] = 6.0
    """Measuring time for each file at each setting."""
    pin: bool = True
    """Pin each benchmark process to as many cores as it has threads."""
    input: Shapes = Field(default_factory=dict)
    """Where the files leave sizes open."""
    timeout: Annotated[float, Field(gt=0)] | None = None
    """Seconds that a process may take to answer, to load a file above all, before it counts as hanging. None allows a
    minute, ten times `seconds`, and a second for every 10 MB of the file."""


class Recipe(Section):
    """Everything that `sparsepipe run` needs."""

    name: str = "run"
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    model: NamedChoice
    data: NamedChoice
    method: Annotated[Choice, BeforeValidator(_method_from_short_form)] = Choice(name=DEFAULT_METHOD)
    modifiers: Modifiers = ()
    augment: Augment = Augment()
    optimizer: Annotated[Optimizer, BeforeValidator(from_short_form)] = Optimizer()
    schedule: Annotated[Schedule, BeforeValidator(from_short_form)] = Schedule()
    train: Training = Training()
    convert: Conversion = Conversion()
    export: Export = Export()
    validation: Validation = Field(default=Validation(), alias="validate")
    bench: Bench = Bench()

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, populate_by_name=True)

    def refuse_uncalibrated(self) -> None:
        """For a chain of training and export: nothing but the recipe can name samples to calibrate on.

        Raises:
            RecipeError: the section `export` asks for int8, and there will be nothing to find ranges on.
        """
        export = self.export
        if "int8" not in export.precision or export.calibrate is not None:
            return
        if export.max_drop is not None:
            what = "export.max_drop measures the accuracy of int8 on samples, and none are named."
        elif self.train.precision != "int8-qat":
            what = "int8 needs samples, on which the ranges of activations are found, and none are named."
        else:
            return
        raise RecipeError(
            what,
            where="export.calibrate",
            advice=f"Set it to a dataset, such as the one that is trained on, '{self.data.name}'.",
        )

    @field_validator("name")
    @classmethod
    def _name_is_a_file_name(cls, name: str) -> str:
        if not name or name.startswith(".") or "/" in name or "\\" in name:
            raise ValueError("name must be usable as the name of a folder")
        if not name.isprintable():
            raise ValueError("the name of a folder has no control characters")
        if len(name.encode()) > LONGEST_NAME:
            raise ValueError(f"the name of a folder has at most {LONGEST_NAME} bytes, not {len(name.encode())}")
        return name


def load(path: Path, overrides: Iterable[str] = ()) -> Recipe:
    """Read a recipe file and apply `KEY=VALUE` overrides.

    Raises:
        RecipeError: the file is missing or not TOML, or a key is unknown or its value not allowed.
    """
    return parse(read_table(path), overrides, where=str(path))


def read_table(path: Path) -> dict[str, Any]:
    """The nested dict that the TOML file `path` holds, unchecked.

    Raises:
        RecipeError: the file is missing or not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))  # Windows editors write a byte order mark
    except FileNotFoundError as error:
        raise RecipeError("There is no such recipe file.", where=str(path)) from error
    except IsADirectoryError as error:
        raise RecipeError("This is a folder, not a recipe file.", where=str(path)) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"The recipe is not valid TOML: {error}.", where=str(path)) from error


def write(recipe: Recipe, path: Path) -> None:
    """Write the resolved recipe, every default filled in, as TOML."""
    table = recipe.model_dump(mode="json", by_alias=True, exclude_none=True)
    write_text(path, tomli_w.dumps(table))


def with_modifiers(recipe: Recipe, names: str) -> Recipe:
    """The recipe with these modifiers, comma-separated, alone; those that it has keep their options."""
    known = {modifier.name: modifier for modifier in recipe.modifiers}
    chosen = tuple(known.get(name, Choice(name=name)) for name in _modifiers_from_short_form(names))
    return recipe.model_copy(update={"modifiers": chosen})


def digest(recipe: BaseModel) -> str:
    """Digest of a resolved recipe or section: equal for equal settings, however they were written down."""
    return digest_bytes(json.dumps(recipe.model_dump(mode="json"), sort_keys=True).encode())


def parse(table: dict[str, Any], overrides: Iterable[str] = (), *, where: str = "recipe") -> Recipe:
    """Build a recipe from a nested dict, as TOML gives it, and `KEY=VALUE` overrides."""
    for override in overrides:
        _apply(table, override)
    return check(Recipe, table, where=where)


def _apply(table: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    parts = key.strip().split(".")
    if not separator or not all(parts):
        raise RecipeError(
            f"'{override}' is not of the form key=value.", where="--set", advice="Example: --set method.sparsity=0.95"
        )
    value = _parse_value(text.strip())
    for position, part in enumerate(parts[:-1]):
        inner = table.setdefault(part, {})
        if isinstance(inner, str):  # the short form of a named choice
            inner = table[part] = {"name": inner}
        if not isinstance(inner, dict):
            raise RecipeError(f"'{'.'.join(parts[: position + 1])}' is a value, not a section.", where=f"--set {key}")
        table = inner
    current = table.get(parts[-1])
    if len(parts) == 1 and isinstance(current, dict) and isinstance(value, str):  # a choice keeps its other keys
        current["name"] = value
    else:
        table[parts[-1]] = value


def _parse_value(text: str) -> Any:
    """A TOML value where it is one (0.9, true, [1, 2], "text"), else the text itself (rigl, cifar10:DIR)."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
