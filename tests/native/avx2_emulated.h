// The masked load of AVX2 in plain C++, lane by lane: sanitizers do not look at what the instruction reads. Included
// before kernels/avx2.cc by the build option SPARSEPIPE_EMULATED.
#pragma once

#include <immintrin.h>

namespace sparsepipe_emulated {

inline __attribute__((always_inline)) __m256 masked_load(const float* from, __m256i mask) {
  int wanted[8];
  float lanes[8];
  __builtin_memcpy(wanted, &mask, sizeof wanted);
  for (int i = 0; i < 8; ++i) lanes[i] = wanted[i] < 0 ? from[i] : 0.0f;
  __m256 vector;
  __builtin_memcpy(&vector, lanes, sizeof lanes);
  return vector;
}

}  // namespace sparsepipe_emulated

#define _mm256_maskload_ps sparsepipe_emulated::masked_load
