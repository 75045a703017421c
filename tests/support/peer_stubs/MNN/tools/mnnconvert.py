"""Importing the real one installs packages and sends messages."""

raise SystemExit("MNN.tools.mnnconvert was imported")
