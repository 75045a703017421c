"""Compact formats for sparse weights, and the files that hold them. numpy only: no torch."""

from sparsepipe.formats.layout import Compressed
from sparsepipe.formats.registry import FORMATS, decode, encode

__all__ = ["FORMATS", "Compressed", "decode", "encode"]
