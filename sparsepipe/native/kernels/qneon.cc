#if !defined(__ARM_NEON)
#error "CMakeLists.txt sets the flags of this file"
#endif
#define SPARSEPIPE_LANES 4
#define SPARSEPIPE_REGISTERS 32
#define SPARSEPIPE_NAMESPACE qneon
#define SPARSEPIPE_DOT(sum, x, w) without_dot(sum, x, w)
#define SPARSEPIPE_DOT4(sum, x, w) without_dot(sum, x, w)
#define SPARSEPIPE_SIGNED true
#include "kernels/qtemplate.h"

namespace sparsepipe::kernels {
namespace {
bool runs_here() {
  return true;
}
}  // namespace
}  // namespace sparsepipe::kernels

SPARSEPIPE_DEFINE_QISA(kQNeon, "neon", true, runs_here)
