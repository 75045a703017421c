"""Run ONNX files in whatever onnxruntime is on the path; needs that and numpy only.

    python run_networks.py LIBRARY INPUTS.npz OUTPUTS.npz NAME=MODEL...

INPUTS holds an array "x" for each NAME. OUTPUTS gets "NAME/0" (without the library), "NAME/1" and "NAME/3" (with it, on
that many threads). Prints the version of onnxruntime.
"""

import sys

import numpy as np
import onnxruntime


def outputs(model, x, library, threads):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    if library:
        options.register_custom_ops_library(library)
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def main(library, inputs, target, *entries):
    found = {}
    feeds = np.load(inputs)
    for entry in entries:
        name, model = entry.split("=", 1)
        for threads in (0, 1, 3):
            found[f"{name}/{threads}"] = outputs(model, feeds[name], library if threads else None, threads or 1)
    np.savez(target, **found)
    print(onnxruntime.__version__)


if __name__ == "__main__":
    main(*sys.argv[1:])
