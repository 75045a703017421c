"""Effective model complexity: how many training samples a network fits, dense or sparse."""
