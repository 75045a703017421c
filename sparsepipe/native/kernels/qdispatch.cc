#include <cstdlib>
#include <cstring>

#include "kernels/qkernel.h"

namespace sparsepipe::kernels {

#if defined(SPARSEPIPE_X86)
extern const QIsa kAvx512Vnni, kAvxVnni, kQAvx2, kQSse4;
#elif defined(SPARSEPIPE_ARM64)
extern const QIsa kNeonDot, kQNeon;
#endif
extern const QIsa kQPortable;

const QIsa* const* compiled_quantized() {
  static const QIsa* const all[] = {
#if defined(SPARSEPIPE_X86)
      &kAvx512Vnni, &kAvxVnni, &kQAvx2, &kQSse4,
#elif defined(SPARSEPIPE_ARM64)
      &kNeonDot, &kQNeon,
#endif
      &kQPortable, nullptr};
  return all;
}

const QIsa* select_quantized() {
  const char* wanted = std::getenv("SPARSEPIPE_ISA");
  // AVX-512 without VNNI has no better product of bytes than AVX2.
  if (wanted != nullptr && std::strcmp(wanted, "avx512") == 0) wanted = "avx2";
  const bool any = wanted == nullptr || *wanted == '\0';
  for (const QIsa* const* isa = compiled_quantized(); *isa; ++isa) {
    if ((any || std::strcmp(wanted, (*isa)->name) == 0) && (*isa)->supported()) return *isa;
  }
  return nullptr;
}

}  // namespace sparsepipe::kernels
