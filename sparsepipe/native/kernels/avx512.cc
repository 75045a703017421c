#if !defined(__AVX512F__) || !defined(__AVX512DQ__)
#error "CMakeLists.txt sets the flags of this file"
#endif
#define SPARSEPIPE_LANES 16
#define SPARSEPIPE_REGISTERS 32
#define SPARSEPIPE_NAMESPACE avx512
#include "kernels/template.h"

namespace sparsepipe::kernels {
namespace {
bool runs_here() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
}  // namespace
}  // namespace sparsepipe::kernels

SPARSEPIPE_DEFINE_ISA(kAvx512, "avx512", runs_here)
