// For every CPU: no flags beyond the compiler's default.
#define SPARSEPIPE_LANES 4
#define SPARSEPIPE_REGISTERS 16
#define SPARSEPIPE_NAMESPACE qportable
#define SPARSEPIPE_SIGNED false
#include "kernels/qtemplate.h"

namespace sparsepipe::kernels {
namespace {
bool runs_here() {
  return true;
}
}  // namespace
}  // namespace sparsepipe::kernels

SPARSEPIPE_DEFINE_QISA(kQPortable, "portable", false, runs_here)
