#if !defined(__AVX2__) || !defined(__FMA__)
#error "CMakeLists.txt sets the flags of this file"
#endif
#define SPARSEPIPE_LANES 8
#define SPARSEPIPE_REGISTERS 16
#define SPARSEPIPE_NAMESPACE qavx2
#define SPARSEPIPE_MADD(x, w) \
  (reinterpret_cast<vi>(_mm256_madd_epi16(reinterpret_cast<__m256i>(x), reinterpret_cast<__m256i>(w))))
#define SPARSEPIPE_SIGNED false
#include "kernels/qtemplate.h"

namespace sparsepipe::kernels {
namespace {
bool runs_here() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}
}  // namespace
}  // namespace sparsepipe::kernels

SPARSEPIPE_DEFINE_QISA(kQAvx2, "avx2", false, runs_here)
