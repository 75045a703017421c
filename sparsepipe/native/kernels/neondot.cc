#if !defined(__ARM_FEATURE_DOTPROD)
#error "CMakeLists.txt sets the flags of this file"
#endif
#if defined(__linux__)
#include <sys/auxv.h>
#endif
#define SPARSEPIPE_LANES 4
#define SPARSEPIPE_REGISTERS 32
#define SPARSEPIPE_NAMESPACE neondot
#define SPARSEPIPE_DOT(sum, x, w) \
  (reinterpret_cast<vi>(vdotq_s32(reinterpret_cast<int32x4_t>(sum), reinterpret_cast<int8x16_t>(x), reinterpret_cast<int8x16_t>(w))))
#define SPARSEPIPE_DOT4(sum, x, w) \
  (reinterpret_cast<v4>(vdotq_s32(reinterpret_cast<int32x4_t>(sum), reinterpret_cast<int8x16_t>(x), reinterpret_cast<int8x16_t>(w))))
#define SPARSEPIPE_SIGNED true
#include "kernels/qtemplate.h"

namespace sparsepipe::kernels {
namespace {
bool runs_here() {
#if defined(__linux__)
  return (getauxval(AT_HWCAP) & (1ul << 20)) != 0;  // HWCAP_ASIMDDP
#elif defined(__APPLE__)
  return true;
#else
  return false;
#endif
}
}  // namespace
}  // namespace sparsepipe::kernels

SPARSEPIPE_DEFINE_QISA(kNeonDot, "neondot", true, runs_here)
