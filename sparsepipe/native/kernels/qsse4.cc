#if !defined(__SSE4_2__)
#error "CMakeLists.txt sets the flags of this file"
#endif
#define SPARSEPIPE_LANES 4
#define SPARSEPIPE_REGISTERS 16
#define SPARSEPIPE_NAMESPACE qsse4
#define SPARSEPIPE_MADD(x, w) (reinterpret_cast<vi>(_mm_madd_epi16(reinterpret_cast<__m128i>(x), reinterpret_cast<__m128i>(w))))
#define SPARSEPIPE_SIGNED false
#include "kernels/qtemplate.h"

namespace sparsepipe::kernels {
namespace {
bool runs_here() {
  return __builtin_cpu_supports("sse4.2");
}
}  // namespace
}  // namespace sparsepipe::kernels

SPARSEPIPE_DEFINE_QISA(kQSse4, "sse4", false, runs_here)
