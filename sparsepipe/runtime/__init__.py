"""Run exported files in onnxruntime with the native kernels: what a deployment needs. No torch.

    session("model.universal.onnx", threads=2).run(None, {"input": images})

`session` opens a file with the kernel library registered. Code that makes its own `onnxruntime.InferenceSession` takes
`library_path` instead: `session_options.register_custom_ops_library(library_path())`. onnxruntime itself is imported
by the first session.
"""

from sparsepipe.runtime.library import library_path
from sparsepipe.runtime.sessions import predict, run, session

__all__ = ["library_path", "predict", "run", "session"]
