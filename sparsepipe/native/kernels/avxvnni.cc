#if !defined(__AVXVNNI__) || !defined(__FMA__)
#error "CMakeLists.txt sets the flags of this file"
#endif
#define SPARSEPIPE_LANES 8
#define SPARSEPIPE_REGISTERS 16
#define SPARSEPIPE_NAMESPACE avxvnni
#define SPARSEPIPE_DOT(sum, x, w) \
  (reinterpret_cast<vi>(_mm256_dpbusd_avx_epi32(reinterpret_cast<__m256i>(sum), reinterpret_cast<__m256i>(x), reinterpret_cast<__m256i>(w))))
#define SPARSEPIPE_DOT4(sum, x, w) \
  (reinterpret_cast<v4>(_mm_dpbusd_avx_epi32(reinterpret_cast<__m128i>(sum), reinterpret_cast<__m128i>(x), reinterpret_cast<__m128i>(w))))
#define SPARSEPIPE_SIGNED false
#include "kernels/qtemplate.h"

namespace sparsepipe::kernels {
namespace {
bool runs_here() {
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("avxvnni");
}
}  // namespace
}  // namespace sparsepipe::kernels

SPARSEPIPE_DEFINE_QISA(kAvxVnni, "avxvnni", false, runs_here)
