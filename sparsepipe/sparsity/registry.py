"""Sparse-training methods by name. Importing this module loads no method and no torch."""

from __future__ import annotations

import difflib
import inspect
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from importlib import import_module
from typing import TYPE_CHECKING, Any

from sparsepipe.errors import MissingExtraError, RecipeError

if TYPE_CHECKING:
    from sparsepipe.sparsity.method import Method

log = logging.getLogger("sparsepipe")


@dataclass(frozen=True)
class MethodInfo:
    """What can be said of a method without loading it."""

    name: str
    home: str
    """`module:class`."""
    summary: str
    source: str
    exact: bool = True
    """Whether it reaches the target sparsity exactly, with its own default of `distribution`."""
    state: str = "mask, int16 counter"
    """What it keeps for each weight while it trains."""
    knob: str = ""
    """Where it has no target sparsity: the option that makes it sparser as it grows."""


METHODS: dict[str, MethodInfo] = {
    info.name: info
    for info in (
        MethodInfo(
            "dst-ee",
            "sparsepipe.sparsity.methods.dst_ee:DSTEE",
            "drop by magnitude, grow by |gradient| plus a bonus for weights that were seldom active",
            "arXiv 2211.16667",
        ),
        MethodInfo(
            "rigl",
            "sparsepipe.sparsity.methods.rigl:RigL",
            "drop by magnitude, grow by |gradient|",
            "arXiv 1911.11134",
        ),
        MethodInfo(
            "set",
            "sparsepipe.sparsity.methods.set:SET",
            "drop by magnitude, grow at random",
            "doi 10.1038/s41467-018-04316-3",
        ),
        MethodInfo(
            "snfs",
            "sparsepipe.sparsity.methods.snfs:SNFS",
            "drop by magnitude, grow by |momentum|, most in layers of the largest momentum",
            "arXiv 1907.04840",
            state="mask, int16 counter, float32 momentum",
        ),
        MethodInfo(
            "dsr",
            "sparsepipe.sparsity.methods.dsr:DSR",
            "drop by magnitude over all layers, grow at random, most in layers where most survived",
            "arXiv 1902.05967",
        ),
        MethodInfo(
            "mest",
            "sparsepipe.sparsity.methods.mest:MEST",
            "drop by magnitude and gradient of active weights alone, grow at random; em&s: with a surplus that melts",
            "arXiv 2110.14032",
        ),
        MethodInfo(
            "rigl-itop",
            "sparsepipe.sparsity.methods.rigl_itop:RigLITOP",
            "rigl with few, large updates to the very end",
            "arXiv 2102.02887",
        ),
        MethodInfo(
            "set-itop",
            "sparsepipe.sparsity.methods.set_itop:SETITOP",
            "set with few, large updates to the very end",
            "arXiv 2102.02887",
        ),
        MethodInfo(
            "deepr",
            "sparsepipe.sparsity.methods.deepr:DeepR",
            "drop what changes its sign, under drift to zero and noise, grow at random, in every step",
            "arXiv 1711.05136",
            state="mask, int16 counter, int8 sign",
        ),
        MethodInfo(
            "top-kast",
            "sparsepipe.sparsity.methods.top_kast:TopKAST",
            "compute with the largest magnitudes; a larger set gets gradients and a penalty, so that others can grow",
            "arXiv 2106.03517",
            state="two masks, the last value of each weight",
        ),
        MethodInfo(
            "srigl",
            "sparsepipe.sparsity.methods.srigl:SRigL",
            "rigl with the same number of weights in every neuron, but for neurons that it ablates",
            "arXiv 2305.02299",
            exact=False,
        ),
        MethodInfo(
            "granet",
            "sparsepipe.sparsity.methods.granet:GraNet",
            "start at half the weights, prune along a cubic schedule, regrow by |gradient| at each pruning",
            "arXiv 2106.10404",
        ),
        MethodInfo(
            "static",
            "sparsepipe.sparsity.methods.static:Static",
            "random masks that never change",
            "baseline of arXiv 1911.11134",
        ),
        MethodInfo(
            "random",
            "sparsepipe.sparsity.methods.random:Random",
            "random masks of the same density in every layer but the first convolution (dense), which never change",
            "baseline of arXiv 2202.02643",
            exact=False,
        ),
        MethodInfo(
            "erk-static",
            "sparsepipe.sparsity.methods.erk_static:ERKStatic",
            "random masks of ERK densities, which never change",
            "arXiv 1911.11134, 2202.02643",
        ),
        MethodInfo(
            "snip",
            "sparsepipe.sparsity.methods.snip:SNIP",
            "keep the largest |weight x gradient| of the first batches, before training",
            "arXiv 1810.02340",
        ),
        MethodInfo(
            "grasp",
            "sparsepipe.sparsity.methods.grasp:GraSP",
            "keep what preserves the norm of the gradient, by Hessian-gradient products, before training",
            "arXiv 2002.07376",
        ),
        MethodInfo(
            "synflow",
            "sparsepipe.sparsity.methods.synflow:SynFlow",
            "keep what most of the flow of an input of ones passes through, in 100 rounds, before training",
            "arXiv 2006.05467",
        ),
        MethodInfo(
            "gmp",
            "sparsepipe.sparsity.methods.gmp:GMP",
            "start dense, prune by magnitude along a cubic schedule",
            "arXiv 1710.01878",
        ),
        MethodInfo(
            "magnitude-oneshot",
            "sparsepipe.sparsity.methods.magnitude_oneshot:MagnitudeOneShot",
            "train dense, prune once by magnitude, fine-tune",
            "arXiv 1506.02626",
        ),
        MethodInfo(
            "lottery",
            "sparsepipe.sparsity.methods.lottery:Lottery",
            "train, prune by magnitude, rewind what is kept to an early step, train again, in rounds",
            "arXiv 1803.03635, 1912.05671",
            state="mask, int16 counter, the weight of the early step",
        ),
        MethodInfo(
            "acdc",
            "sparsepipe.sparsity.methods.acdc:ACDC",
            "dense and sparse phases by turns; the dense network before the last one is kept, too",
            "arXiv 2106.12379, 2308.02060",
        ),
        MethodInfo(
            "gap",
            "sparsepipe.sparsity.methods.gap:GaP",
            "one part of the network after the other grows dense and is pruned again",
            "arXiv 2106.09857",
        ),
        MethodInfo(
            "autosparse",
            "sparsepipe.sparsity.methods.autosparse:AutoSparse",
            "learned soft thresholds; masked weights get a share of the gradient that falls to 0",
            "arXiv 2304.06941",
            exact=False,
            state="none; a threshold per channel or layer",
            knob="threshold_decay",
        ),
        MethodInfo(
            "autosparse-top-k",
            "sparsepipe.sparsity.methods.autosparse:AutoSparseTopK",
            "top-k magnitudes of each step; the others get a share of the gradient that falls to 0",
            "arXiv 2304.06941",
            state="mask",
        ),
        MethodInfo(
            "str",
            "sparsepipe.sparsity.methods.autosparse:STR",
            "learned soft thresholds, one for each layer",
            "arXiv 2002.03231",
            exact=False,
            state="none; a threshold per layer",
            knob="threshold_decay",
        ),
        MethodInfo(
            "l0-constrained",
            "sparsepipe.sparsity.methods.l0_constrained:L0Constrained",
            "stochastic gates whose expected density is constrained; what is left is sparser than that",
            "arXiv 2208.04425",
            exact=False,
            state="gate and two Adam moments, per weight or group",
        ),
        MethodInfo(
            "xrda",
            "sparsepipe.sparsity.methods.xrda:XRDA",
            "adaptively weighted l1 by dual averaging; it moves the weights itself",
            "arXiv 2008.09661",
            exact=False,
            state="4 floats",
            knob="lam",
        ),
        MethodInfo(
            "directional",
            "sparsepipe.sparsity.methods.directional:Directional",
            "gRDA: soft thresholds of a copy that plain SGD moves",
            "arXiv 2006.09358",
            exact=False,
            state="1 float",
            knob="c",
        ),
        MethodInfo(
            "structured-directional",
            "sparsepipe.sparsity.methods.directional:StructuredDirectional",
            "the same for whole output channels",
            "arXiv 2107.05328",
            exact=False,
            state="1 float",
            knob="c",
        ),
        MethodInfo(
            "dense",
            "sparsepipe.sparsity.methods.dense:Dense",
            "ordinary dense training, the baseline",
            "-",
            state="-",
        ),
    )
}


SPREADS: dict[str, str] = {
    "uniform": "the same density in every layer; the first convolution stays dense and is not made up for",
    "er": "density in proportion to (outputs + inputs) / (outputs x inputs)",
    "erk": "the same with the kernel's height and width (the default)",
    "global": "the largest magnitudes of the whole network",
    "{GLOB = DENSITY, ...}": 'relative densities of your own, the first match wins: {"stem*" = 2.0, "*" = 1.0}',
}
"""Values of the option `distribution`: how the weights that are kept are spread over the layers."""
EXCHANGES: dict[str, str] = {
    "none": "each layer grows as much as it dropped (the default, but for snfs and dsr)",
    "score": "in proportion to the mean grow score of a layer's active weights; with |momentum| the rule of snfs",
    "magnitude": "in proportion to their mean magnitude",
    "nonzeros": "in proportion to what survived the drop, the rule of dsr",
    "global": "to the best inactive weights of all layers together",
}
"""Values of the option `redistribution`: where methods that drop and grow put what all layers dropped."""


def available(glob: str = "*") -> list[MethodInfo]:
    """Methods whose name matches `glob`."""
    return [info for info in METHODS.values() if fnmatchcase(info.name, glob)]


def create(name: str, options: Mapping[str, Any] | None = None) -> Method:
    """Make a method from its name and options.

    An option that only other methods take is passed over with a line in the log, so that a recipe stays valid when
    only its method's name changes.

    Raises:
        RecipeError: unknown name, an option that no method takes, or a value that is not allowed.
        MissingExtraError: torch is not installed.
    """
    options = options or {}
    own = options_of(name)
    foreign = [key for key in options if key not in own]
    known = {key for other in METHODS for key in options_of(other)} if foreign else set()
    for key in foreign:
        if key not in known:
            listed = f"Options of {name}: {', '.join(own)}." if own else f"The method '{name}' takes no options."
            raise RecipeError(f"No method takes an option '{key}'{_hint(key, known)}.", where="method", advice=listed)
    if foreign:
        log.info("The method '%s' has no use for: %s.", name, ", ".join(foreign))
    try:
        method: Method = _load(name)(**{key: value for key, value in options.items() if key in own})
    except RecipeError as error:
        where = "method" if error.where is None else f"method.{error.where}"
        raise RecipeError(error.what, where=where, advice=error.advice) from error
    return method


def options_of(name: str) -> list[str]:
    """Names of the options that the method `name` takes: those it shares with most others first, its own last.

    Raises:
        RecipeError: unknown name.
        MissingExtraError: torch is not installed.
    """
    levels: list[list[str]] = []
    for base in _load(name).__mro__:
        if "__init__" in vars(base) and base is not object:
            parameters = list(inspect.signature(base.__init__).parameters.values())[1:]
            levels.append([each.name for each in parameters if each.kind is each.KEYWORD_ONLY])
            if all(each.kind is not each.VAR_KEYWORD for each in parameters):
                break
    return list(dict.fromkeys(option for level in reversed(levels) for option in level))


def _load(name: str) -> Any:
    if name not in METHODS:
        raise RecipeError(
            f"There is no method '{name}'{_hint(name, METHODS)}.",
            where="method",
            advice=f"Methods: {', '.join(METHODS)}.",
        )
    module, _, attribute = METHODS[name].home.partition(":")
    try:
        return getattr(import_module(module), attribute)
    except ModuleNotFoundError as error:
        if error.name != "torch":
            raise
        raise MissingExtraError("torch", "train", "Sparse training") from error


def _hint(word: str, known: Mapping[str, Any] | set[str]) -> str:
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" (did you mean '{close[0]}'?)" if close else ""
