#if !defined(__SSE4_2__)
#error "CMakeLists.txt sets the flags of this file"
#endif
#define SPARSEPIPE_LANES 4
#define SPARSEPIPE_REGISTERS 16
#define SPARSEPIPE_NAMESPACE sse4
#include "kernels/template.h"

namespace sparsepipe::kernels {
namespace {
bool runs_here() {
  return __builtin_cpu_supports("sse4.2");
}
}  // namespace
}  // namespace sparsepipe::kernels

SPARSEPIPE_DEFINE_ISA(kSse4, "sse4", runs_here)
