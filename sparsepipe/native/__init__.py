"""The native kernels: C++ sources, the operators' encoding (operators.py) and, once built, libsparsepipe_ops.so."""
