"""Ordinary dense training, as a method, so that baselines run through the same loop."""

from __future__ import annotations

from sparsepipe.sparsity.method import Method


class Dense(Method):
    """Mask nothing."""

    name = "dense"
