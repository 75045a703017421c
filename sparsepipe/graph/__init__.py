"""ONNX in hand: from a torch network to a graph, folding, choosing what is stored sparse, and writing it down.

Only `build` needs torch; everything else works with the packages of the base install.
"""
