// The inner loops on GCC/Clang vector extensions. Compiled once per instruction set, each time with
// SPARSEPIPE_LANES, SPARSEPIPE_NAMESPACE and SPARSEPIPE_REGISTERS set by the including file.
//
// Only <cstdint>-like headers may be included: an inline function of the standard library compiled here
// could replace the baseline copy of another file at link time.
#include "kernels/kernel.h"

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#define SPARSEPIPE_INLINE inline __attribute__((always_inline))
#define SPARSEPIPE_UNROLL _Pragma("GCC unroll 16")

namespace sparsepipe::kernels {
namespace {
namespace SPARSEPIPE_NAMESPACE {

#include "kernels/vector.h"

#include "kernels/rows.h"

#include "kernels/pack.h"

#include "kernels/depthwise.h"

#include "kernels/linear.h"

#include "kernels/winograd.h"

}  // namespace SPARSEPIPE_NAMESPACE
}  // namespace
}  // namespace sparsepipe::kernels

#define SPARSEPIPE_DEFINE_ISA(variable, text, check)                                                        \
  namespace sparsepipe::kernels {                                                                           \
  extern const Isa variable;                                                                                \
  const Isa variable = {text,                                                                               \
                        SPARSEPIPE_LANES,                                                                   \
                        {0, SPARSEPIPE_NAMESPACE::max_vectors<1>(), SPARSEPIPE_NAMESPACE::max_vectors<2>(), \
                         0, SPARSEPIPE_NAMESPACE::max_vectors<4>()},                                        \
                        check,                                                                              \
                        SPARSEPIPE_NAMESPACE::rows,                                                         \
                        SPARSEPIPE_NAMESPACE::pack_flat,                                                    \
                        SPARSEPIPE_NAMESPACE::pack_stage,                                                   \
                        SPARSEPIPE_NAMESPACE::pack_rows,                                                    \
                        SPARSEPIPE_NAMESPACE::depthwise,                                                    \
                        SPARSEPIPE_NAMESPACE::kPlanes ? SPARSEPIPE_NAMESPACE::depthwise_planes : nullptr,   \
                        SPARSEPIPE_NAMESPACE::transpose,                                                    \
                        SPARSEPIPE_NAMESPACE::vector,                                                       \
                        SPARSEPIPE_NAMESPACE::winograd_input,                                               \
                        SPARSEPIPE_NAMESPACE::winograd_output,                                              \
                        SPARSEPIPE_NAMESPACE::max_pool};                                                    \
  }
