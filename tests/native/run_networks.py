"""Run ONNX files in whatever onnxruntime is on the path; needs that and numpy only.

    python run_networks.py LIBRARY FOLDER OUTPUTS.npz NAME...

For each NAME, FOLDER holds the input "x" of the networks as NAME.npy, the dense network as NAME.onnx and the universal
one as NAME/model.universal.onnx. OUTPUTS gets "NAME/dense", "NAME/0" (the universal one without the library), "NAME/1"
and "NAME/3" (with it, on that many threads). Prints the version of onnxruntime.
"""

import sys
from pathlib import Path

import numpy as np
import onnxruntime


def output(model, x, library=None, threads=1):
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    if library:
        options.register_custom_ops_library(library)
    session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def main(library, folder, target, *names):
    found = {}
    for name in names:
        x = np.load(Path(folder, f"{name}.npy"))
        universal = Path(folder, name, "model.universal.onnx")
        found[f"{name}/dense"] = output(Path(folder, f"{name}.onnx"), x)
        found[f"{name}/0"] = output(universal, x)
        for threads in (1, 3):
            found[f"{name}/{threads}"] = output(universal, x, library, threads)
    np.savez(target, **found)
    print(onnxruntime.__version__)


if __name__ == "__main__":
    main(*sys.argv[1:])
