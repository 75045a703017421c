#if !defined(__ARM_NEON)
#error "CMakeLists.txt sets the flags of this file"
#endif
#define SPARSEPIPE_LANES 4
#define SPARSEPIPE_REGISTERS 32
#define SPARSEPIPE_NAMESPACE neon
#include "kernels/template.h"

namespace sparsepipe::kernels {
namespace {
bool runs_here() {
  return true;
}
}  // namespace
}  // namespace sparsepipe::kernels

SPARSEPIPE_DEFINE_ISA(kNeon, "neon", runs_here)
