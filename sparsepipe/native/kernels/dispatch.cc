#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "kernels/kernel.h"

namespace sparsepipe::kernels {

#if defined(SPARSEPIPE_X86)
extern const Isa kAvx512, kAvx2, kSse4;
#elif defined(SPARSEPIPE_ARM64)
extern const Isa kNeon;
#endif
extern const Isa kPortable;

const Isa* const* compiled() {
  static const Isa* const all[] = {
#if defined(SPARSEPIPE_X86)
      &kAvx512, &kAvx2, &kSse4,
#elif defined(SPARSEPIPE_ARM64)
      &kNeon,
#endif
      &kPortable, nullptr};
  return all;
}

namespace {
// Sets that differ for int8 only (qdispatch.cc), and what float32 runs on with them.
const char* for_float(const char* name) {
  if (std::strcmp(name, "avx512vnni") == 0) return "avx512";
  if (std::strcmp(name, "avxvnni") == 0) return "avx2";
  if (std::strcmp(name, "neondot") == 0) return "neon";
  return name;
}
}  // namespace

const Isa* select(char* error, std::size_t error_size) {
  const char* wanted = std::getenv("SPARSEPIPE_ISA");
  const bool any = wanted == nullptr || *wanted == '\0';
  if (!any) wanted = for_float(wanted);
  for (const Isa* const* isa = compiled(); *isa; ++isa) {
    if (!any && std::strcmp(wanted, (*isa)->name) != 0) continue;
    if ((*isa)->supported()) return *isa;
    if (!any) {
      std::snprintf(error, error_size, "SPARSEPIPE_ISA=%s: this CPU does not run it", wanted);
      return nullptr;
    }
  }
  int used = std::snprintf(error, error_size, "SPARSEPIPE_ISA=%.40s is unknown; this library has:", any ? "" : wanted);
  for (const Isa* const* isa = compiled(); *isa; ++isa) {
    if (used < 0 || static_cast<std::size_t>(used) >= error_size) break;
    used += std::snprintf(error + used, error_size - static_cast<std::size_t>(used), " %s", (*isa)->name);
  }
  return nullptr;
}

}  // namespace sparsepipe::kernels
