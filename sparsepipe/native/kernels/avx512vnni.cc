#if !defined(__AVX512VNNI__) || !defined(__AVX512BW__) || !defined(__AVX512VL__)
#error "CMakeLists.txt sets the flags of this file"
#endif
#define SPARSEPIPE_LANES 16
#define SPARSEPIPE_REGISTERS 32
#define SPARSEPIPE_NAMESPACE avx512vnni
#define SPARSEPIPE_DOT(sum, x, w) \
  (reinterpret_cast<vi>(_mm512_dpbusd_epi32(reinterpret_cast<__m512i>(sum), reinterpret_cast<__m512i>(x), reinterpret_cast<__m512i>(w))))
#define SPARSEPIPE_DOT4(sum, x, w) \
  (reinterpret_cast<v4>(_mm_dpbusd_epi32(reinterpret_cast<__m128i>(sum), reinterpret_cast<__m128i>(x), reinterpret_cast<__m128i>(w))))
#define SPARSEPIPE_SIGNED false
#include "kernels/qtemplate.h"

namespace sparsepipe::kernels {
namespace {
bool runs_here() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
}
}  // namespace
}  // namespace sparsepipe::kernels

SPARSEPIPE_DEFINE_QISA(kAvx512Vnni, "avx512vnni", false, runs_here)
