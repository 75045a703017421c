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

// Sets that are others for int8 only (qdispatch.cc), and what float32 runs on with them.
struct Alias {
  const char *name, *of_float;
};
constexpr Alias kAliases[] = {{"avx512vnni", "avx512"}, {"avxvnni", "avx2"}, {"neondot", "neon"}};

void append(char* text, std::size_t size, const char* name) {
  const std::size_t used = std::strlen(text);
  std::snprintf(text + used, size - used, " %s", name);
}

}  // namespace

const Isa* select(char* error, std::size_t error_size) {
  const char* wanted = std::getenv("SPARSEPIPE_ISA");
  const bool any = wanted == nullptr || *wanted == '\0';
  const char* name = wanted;
  for (const Alias& alias : kAliases) {
    if (!any && std::strcmp(wanted, alias.name) == 0) name = alias.of_float;
  }
  for (const Isa* const* isa = compiled(); *isa; ++isa) {
    if (!any && std::strcmp(name, (*isa)->name) != 0) continue;
    if ((*isa)->supported()) return *isa;
    if (!any) {
      std::snprintf(error, error_size, "SPARSEPIPE_ISA=%s: this CPU does not run it", wanted);
      return nullptr;
    }
  }
  std::snprintf(error, error_size, "SPARSEPIPE_ISA=%.40s is unknown; this library has:", any ? "" : wanted);
  for (const Isa* const* isa = compiled(); *isa; ++isa) {
    for (const Alias& alias : kAliases) {
      if (std::strcmp(alias.of_float, (*isa)->name) == 0) append(error, error_size, alias.name);
    }
    append(error, error_size, (*isa)->name);
  }
  return nullptr;
}

}  // namespace sparsepipe::kernels
