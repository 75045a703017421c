#if !defined(__AVX2__) || !defined(__FMA__)
#error "CMakeLists.txt sets the flags of this file"
#endif
#define SPARSEPIPE_LANES 8
#define SPARSEPIPE_REGISTERS 16
#define SPARSEPIPE_NAMESPACE avx2
#include "kernels/template.h"

namespace sparsepipe::kernels {
namespace {
bool runs_here() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
}  // namespace
}  // namespace sparsepipe::kernels

SPARSEPIPE_DEFINE_ISA(kAvx2, "avx2", runs_here)
