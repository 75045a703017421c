// AVX-512 in plain C++: the float32 kernels for it compile to AVX2 and run where the processor lacks it. Included before
// kernels/avx512.cc by the build option SPARSEPIPE_EMULATED. A sanitizer sees each lane that is read or written.
#pragma once

#include <immintrin.h>

namespace sparsepipe_emulated {

inline __attribute__((always_inline)) __m512 load(__mmask16 mask, const void* from) {
  float lanes[16];
  for (int i = 0; i < 16; ++i) lanes[i] = mask >> i & 1 ? static_cast<const float*>(from)[i] : 0.0f;
  __m512 vector;
  __builtin_memcpy(&vector, lanes, sizeof lanes);
  return vector;
}

inline __attribute__((always_inline)) void store(void* to, __mmask16 mask, __m512 vector) {
  float lanes[16];
  __builtin_memcpy(lanes, &vector, sizeof lanes);
  for (int i = 0; i < 16; ++i) {
    if (mask >> i & 1) static_cast<float*>(to)[i] = lanes[i];
  }
}

}  // namespace sparsepipe_emulated

#define _mm512_maskz_loadu_ps sparsepipe_emulated::load
#define _mm512_mask_storeu_ps sparsepipe_emulated::store
#define _mm512_storeu_ps(to, vector) sparsepipe_emulated::store(to, 0xffff, vector)
#define __builtin_cpu_supports(feature) true
#define __AVX512F__ 1
#define __AVX512DQ__ 1
