"""Run an exported file in onnxruntime with the kernel library, without any other code of sparsepipe.

    python deploy.py model.universal.onnx [LIBRARY]

LIBRARY is the path of libsparsepipe_ops.so; with it, sparsepipe need not be installed. The inputs are made up. Prints
the name, shape and Adler-32 checksum of each output.
"""

import sys
import zlib

import numpy as np
import onnxruntime


def main(model: str, library: str | None) -> None:
    if library is None:
        import sparsepipe.runtime

        library = sparsepipe.runtime.library_path()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    if library is None:
        print("The kernel library was not built: running at dense speed.", file=sys.stderr)
    else:
        options.register_custom_ops_library(library)  # this is all that a deployment adds
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])

    feeds = {}
    for entry in session.get_inputs():
        shape = [size if isinstance(size, int) else 1 for size in entry.shape]  # a free dimension becomes 1
        feeds[entry.name] = (np.arange(np.prod(shape)) % 255 / 255).astype(np.float32).reshape(shape)
    for entry, output in zip(session.get_outputs(), session.run(None, feeds), strict=True):
        sizes = "x".join(map(str, output.shape))
        print(f"{entry.name} {sizes} {zlib.adler32(output.tobytes()):08x}")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit("usage: deploy.py MODEL [LIBRARY]")
    main(sys.argv[1], sys.argv[2] if len(sys.argv) == 3 else None)
