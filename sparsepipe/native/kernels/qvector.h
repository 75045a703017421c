// One instruction set's vectors for int8: products of four bytes, rounding, and bytes from sums and back.
//
// vpdpbusd and sdot sum four products of bytes into 32 bits and never saturate. Without them the even and the odd bytes
// of the input become uint16 and meet weights of int16 in pmaddwd: |255 * 128 * 2| fits its 32 bits, where pmaddubsw
// would saturate at 16.
#pragma once

#include "kernels/qkernel.h"

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define SPARSEPIPE_INLINE inline __attribute__((always_inline))
#define SPARSEPIPE_UNROLL _Pragma("GCC unroll 16")

namespace sparsepipe::kernels {
namespace {
namespace SPARSEPIPE_NAMESPACE {

constexpr int kLanes = SPARSEPIPE_LANES;
constexpr int kPositions = 4 * kLanes;  // of a vector of bytes

typedef std::int32_t vi __attribute__((vector_size(kLanes * 4)));
typedef std::int32_t loose_vi __attribute__((vector_size(kLanes * 4), aligned(1), may_alias));
typedef float vf __attribute__((vector_size(kLanes * 4)));
typedef std::uint8_t vb __attribute__((vector_size(kLanes * 4)));
typedef std::uint8_t loose_vb __attribute__((vector_size(kLanes * 4), aligned(1), may_alias));
typedef std::uint8_t bytes16 __attribute__((vector_size(16), aligned(1), may_alias));
typedef std::int16_t short16 __attribute__((may_alias));
typedef std::uint64_t word8 __attribute__((aligned(1), may_alias));
typedef std::uint32_t word4 __attribute__((aligned(1), may_alias));

SPARSEPIPE_INLINE vi load(const void* p) { return *static_cast<const loose_vi*>(p); }
SPARSEPIPE_INLINE void store(void* p, vi v) { *static_cast<loose_vi*>(p) = v; }
SPARSEPIPE_INLINE vi broadcast(std::int32_t s) { return s - vi{}; }
SPARSEPIPE_INLINE vf broadcast(float s) { return s - vf{}; }
SPARSEPIPE_INLINE vb broadcast(std::uint8_t s) { return s - vb{}; }
SPARSEPIPE_INLINE vf to_float(vi v) { return __builtin_convertvector(v, vf); }
// Wraps, as the instructions do.
SPARSEPIPE_INLINE vi add(vi a, vi b) {
  typedef std::uint32_t vu __attribute__((vector_size(kLanes * 4)));
  return reinterpret_cast<vi>(reinterpret_cast<vu>(a) + reinterpret_cast<vu>(b));
}
SPARSEPIPE_INLINE vf at_least(vf x, vf low) {
#if defined(__AVX512F__) && SPARSEPIPE_LANES == 16  // of the comparison GCC makes a mask and a blend
  return reinterpret_cast<vf>(_mm512_max_ps(reinterpret_cast<__m512>(x), reinterpret_cast<__m512>(low)));
#else
  return low > x ? low : x;
#endif
}
SPARSEPIPE_INLINE vf at_most(vf x, vf high) {
#if defined(__AVX512F__) && SPARSEPIPE_LANES == 16
  return reinterpret_cast<vf>(_mm512_min_ps(reinterpret_cast<__m512>(x), reinterpret_cast<__m512>(high)));
#else
  return high < x ? high : x;
#endif
}

// Fewer than 16 bytes.
SPARSEPIPE_INLINE void copy_few(const std::uint8_t* from, std::uint8_t* to, std::int64_t n) {
  if (n >= 8) {
    const std::uint64_t a = *reinterpret_cast<const word8*>(from), b = *reinterpret_cast<const word8*>(from + n - 8);
    *reinterpret_cast<word8*>(to) = a;
    *reinterpret_cast<word8*>(to + n - 8) = b;
  } else if (n >= 4) {
    const std::uint32_t a = *reinterpret_cast<const word4*>(from), b = *reinterpret_cast<const word4*>(from + n - 4);
    *reinterpret_cast<word4*>(to) = a;
    *reinterpret_cast<word4*>(to + n - 4) = b;
  } else {
    for (std::int64_t i = 0; i < n; ++i) to[i] = from[i];
  }
}

SPARSEPIPE_INLINE void copy_bytes(const std::uint8_t* from, std::uint8_t* to, std::int64_t n) {
  if (n >= 16) {
    std::int64_t i = 0;
    for (; i + 16 <= n; i += 16) {
      *reinterpret_cast<bytes16*>(to + i) = *reinterpret_cast<const bytes16*>(from + i);
      __asm__("" : : : "memory");  // or GCC calls memmove
    }
    if (i < n) *reinterpret_cast<bytes16*>(to + n - 16) = *reinterpret_cast<const bytes16*>(from + n - 16);
  } else {
    copy_few(from, to, n);
  }
}

#if defined(__aarch64__)
// sdot where the CPU has none: products of 16 bits, summed in pairs twice.
SPARSEPIPE_INLINE vi without_dot(vi sum, vi x, vi w) {
  const auto a = reinterpret_cast<int8x16_t>(x), b = reinterpret_cast<int8x16_t>(w);
  const int32x4_t low = vpaddlq_s16(vmull_s8(vget_low_s8(a), vget_low_s8(b)));
  const int32x4_t high = vpaddlq_s16(vmull_high_s8(a, b));
  return add(sum, reinterpret_cast<vi>(vpaddq_s32(low, high)));
}
#endif

#if defined(SPARSEPIPE_DOT)  // four products of a byte each
constexpr int kWords = 1;
using Input = vi;
using Weight = vi;
SPARSEPIPE_INLINE Input prepare(vi x) { return x; }
SPARSEPIPE_INLINE Weight weight(const std::int32_t* w) { return broadcast(*w); }
SPARSEPIPE_INLINE vi dot(vi sum, Input x, Weight w) { return SPARSEPIPE_DOT(sum, x, w); }
#elif defined(SPARSEPIPE_MADD)  // two products of 16 bits
constexpr int kWords = 2;
struct Input {
  vi even, odd;
};
using Weight = Input;
SPARSEPIPE_INLINE Input prepare(vi x) {
  typedef std::uint16_t vs __attribute__((vector_size(kLanes * 4)));
  const vs pairs = reinterpret_cast<vs>(x);
  return {reinterpret_cast<vi>(pairs & 0xff), reinterpret_cast<vi>(pairs >> 8)};
}
SPARSEPIPE_INLINE Weight weight(const std::int32_t* w) { return {broadcast(w[0]), broadcast(w[1])}; }
SPARSEPIPE_INLINE vi dot(vi sum, Input x, Weight w) {
  return add(sum, add(SPARSEPIPE_MADD(x.even, w.even), SPARSEPIPE_MADD(x.odd, w.odd)));
}
#else  // plain products of 32 bits
constexpr int kWords = 1;
struct Input {
  vi byte[4];
};
using Weight = Input;
SPARSEPIPE_INLINE Input prepare(vi x) { return {{x & 0xff, (x >> 8) & 0xff, (x >> 16) & 0xff, (x >> 24) & 0xff}}; }
SPARSEPIPE_INLINE Weight weight(const std::int32_t* w) {
  const auto* byte = reinterpret_cast<const std::int8_t*>(w);
  return {{broadcast(std::int32_t{byte[0]}), broadcast(std::int32_t{byte[1]}), broadcast(std::int32_t{byte[2]}),
           broadcast(std::int32_t{byte[3]})}};
}
SPARSEPIPE_INLINE vi dot(vi sum, const Input& x, const Weight& w) {
  SPARSEPIPE_UNROLL
  for (int c = 0; c < 4; ++c) sum = add(sum, x.byte[c] * w.byte[c]);
  return sum;
}
#endif

// Sums of a block's R outputs for one position.
template <int R>
struct Sums {
#if defined(SPARSEPIPE_DOT4)  // side by side in four lanes
  typedef std::int32_t v4 __attribute__((vector_size(16)));
  v4 total;
  SPARSEPIPE_INLINE void add(const std::uint8_t* x, const std::int32_t* weights) {
    const std::int32_t in = *reinterpret_cast<const std::int32_t*>(x);
    v4 w = {};
    SPARSEPIPE_UNROLL
    for (int r = 0; r < R; ++r) w[r] = weights[r];
    total = SPARSEPIPE_DOT4(total, (v4{in, in, in, in}), w);
  }
  SPARSEPIPE_INLINE std::uint32_t of(int r) const { return static_cast<std::uint32_t>(total[r]); }
#else
  std::uint32_t total[R];
  SPARSEPIPE_INLINE void add(const std::uint8_t* x, const std::int32_t* weights) {
    SPARSEPIPE_UNROLL
    for (int r = 0; r < R; ++r) {
      std::int32_t sum = 0;
#if defined(SPARSEPIPE_MADD)
      const auto* w = reinterpret_cast<const short16*>(weights + r * kWords);
      sum = x[0] * w[0] + x[2] * w[1] + x[1] * w[2] + x[3] * w[3];
#else
      const auto* w = reinterpret_cast<const std::int8_t*>(weights + r);
      for (int c = 0; c < 4; ++c) sum += (SPARSEPIPE_SIGNED ? static_cast<std::int8_t>(x[c]) : x[c]) * w[c];
#endif
      total[r] += static_cast<std::uint32_t>(sum);
    }
  }
  SPARSEPIPE_INLINE std::uint32_t of(int r) const { return total[r]; }
#endif
};

// To the nearest integer, halves to the even one, within [least, most].
SPARSEPIPE_INLINE vi rounded(vf x, vf least, vf most) {
#if defined(__AVX512F__) && SPARSEPIPE_LANES == 16
  (void)least;  // what is too small becomes INT_MIN, which saturates as it should
  return reinterpret_cast<vi>(_mm512_cvtps_epi32(reinterpret_cast<__m512>(at_most(x, most))));
#elif defined(__AVX2__) && SPARSEPIPE_LANES == 8
  (void)least;
  return reinterpret_cast<vi>(_mm256_cvtps_epi32(reinterpret_cast<__m256>(at_most(x, most))));
#elif defined(__SSE4_1__) && SPARSEPIPE_LANES == 4
  (void)least;
  return reinterpret_cast<vi>(_mm_cvtps_epi32(reinterpret_cast<__m128>(at_most(x, most))));
#elif defined(__aarch64__)
  (void)least;
  (void)most;  // the conversion saturates
  return reinterpret_cast<vi>(vcvtnq_s32_f32(reinterpret_cast<float32x4_t>(x)));
#else
  const vf magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const vf shifted = at_most(at_least(x, least), most) + magic;
  return reinterpret_cast<vi>(shifted) - reinterpret_cast<vi>(magic);
#endif
}

// To the nearest integer, halves to the even one, for |x| < 2^22.
SPARSEPIPE_INLINE vi rounded_small(vf x) {
#if defined(__AVX512F__) && SPARSEPIPE_LANES == 16
  return reinterpret_cast<vi>(_mm512_cvtps_epi32(reinterpret_cast<__m512>(x)));
#elif defined(__AVX2__) && SPARSEPIPE_LANES == 8
  return reinterpret_cast<vi>(_mm256_cvtps_epi32(reinterpret_cast<__m256>(x)));
#else
  const vf far = broadcast(65536.0f);
  return rounded(x, -far, far);
#endif
}

// a * b + c, rounded once; without an FMA as a double first, which hardly ever gives another float.
SPARSEPIPE_INLINE vf multiply_add(vf a, vf b, vf c) {
#if defined(__AVX512F__) && SPARSEPIPE_LANES == 16
  return reinterpret_cast<vf>(_mm512_fmadd_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
#elif defined(__FMA__) && SPARSEPIPE_LANES == 8
  return reinterpret_cast<vf>(_mm256_fmadd_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(c)));
#elif defined(__aarch64__)
  return reinterpret_cast<vf>(vfmaq_f32(reinterpret_cast<float32x4_t>(c), reinterpret_cast<float32x4_t>(a), reinterpret_cast<float32x4_t>(b)));
#else
  typedef double vd __attribute__((vector_size(kLanes * 8)));  // holds the product of two floats
  const vd sum = __builtin_convertvector(a, vd) * __builtin_convertvector(b, vd) + __builtin_convertvector(c, vd);
  return __builtin_convertvector(sum, vf);
#endif
}

// Four vectors of integers plus `shift` as bytes, saturated, in order.
SPARSEPIPE_INLINE vb to_bytes(vi a, vi b, vi c, vi d, std::int32_t shift) {
#if defined(__AVX512BW__) && SPARSEPIPE_LANES == 16
  const __m512i add = _mm512_set1_epi16(static_cast<short>(shift));
  const auto pair = [&](vi p, vi q) { return _mm512_adds_epi16(_mm512_packs_epi32(reinterpret_cast<__m512i>(p), reinterpret_cast<__m512i>(q)), add); };
  const __m512i mixed = _mm512_packus_epi16(pair(a, b), pair(c, d));
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  return reinterpret_cast<vb>(_mm512_permutexvar_epi32(order, mixed));
#elif defined(__AVX2__) && SPARSEPIPE_LANES == 8
  const __m256i add = _mm256_set1_epi16(static_cast<short>(shift));
  const auto pair = [&](vi p, vi q) { return _mm256_adds_epi16(_mm256_packs_epi32(reinterpret_cast<__m256i>(p), reinterpret_cast<__m256i>(q)), add); };
  const __m256i mixed = _mm256_packus_epi16(pair(a, b), pair(c, d));
  return reinterpret_cast<vb>(_mm256_permutevar8x32_epi32(mixed, _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7)));
#elif defined(__SSE2__) && SPARSEPIPE_LANES == 4 && defined(SPARSEPIPE_MADD)
  const __m128i add = _mm_set1_epi16(static_cast<short>(shift));
  const auto pair = [&](vi p, vi q) { return _mm_adds_epi16(_mm_packs_epi32(reinterpret_cast<__m128i>(p), reinterpret_cast<__m128i>(q)), add); };
  return reinterpret_cast<vb>(_mm_packus_epi16(pair(a, b), pair(c, d)));
#elif defined(__aarch64__)
  const int16x8_t add = vdupq_n_s16(static_cast<std::int16_t>(shift));
  const auto pair = [&](vi p, vi q) { return vqaddq_s16(vcombine_s16(vqmovn_s32(reinterpret_cast<int32x4_t>(p)), vqmovn_s32(reinterpret_cast<int32x4_t>(q))), add); };
  return reinterpret_cast<vb>(vcombine_u8(vqmovun_s16(pair(a, b)), vqmovun_s16(pair(c, d))));
#else
  const vi all[4] = {a, b, c, d};
  vb bytes;
  for (int i = 0; i < kPositions; ++i) {
    const std::int32_t v = all[i / kLanes][i % kLanes] + shift;
    bytes[i] = static_cast<std::uint8_t>(v < 0 ? 0 : (v > 255 ? 255 : v));
  }
  return bytes;
#endif
}

// kLanes bytes as integers.
SPARSEPIPE_INLINE vi from_bytes(const std::uint8_t* p) {
#if defined(__AVX512F__) && SPARSEPIPE_LANES == 16
  return reinterpret_cast<vi>(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__) && SPARSEPIPE_LANES == 8
  return reinterpret_cast<vi>(_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  vi v;
  for (int i = 0; i < kLanes; ++i) v[i] = p[i];
  return v;
#endif
}

// n < kPositions bytes, then zeros.
SPARSEPIPE_INLINE vb load_bytes(const std::uint8_t* from, std::int64_t n) {
#if defined(__AVX512BW__) && SPARSEPIPE_LANES == 16
  return reinterpret_cast<vb>(_mm512_maskz_loadu_epi8((1ull << n) - 1, from));
#else
  alignas(64) std::uint8_t bytes[kPositions] = {};
  kPositions > 16 ? copy_bytes(from, bytes, n) : copy_few(from, bytes, n);
  return *reinterpret_cast<const vb*>(bytes);
#endif
}

// The first n bytes only, n <= kPositions.
SPARSEPIPE_INLINE void store_bytes(std::uint8_t* to, vb v, std::int64_t n) {
  if (n == kPositions) {
    *reinterpret_cast<loose_vb*>(to) = v;
    return;
  }
#if defined(__AVX512BW__) && SPARSEPIPE_LANES == 16
  _mm512_mask_storeu_epi8(to, (1ull << n) - 1, reinterpret_cast<__m512i>(v));
#else
  alignas(64) std::uint8_t bytes[kPositions];
  *reinterpret_cast<vb*>(bytes) = v;
  kPositions > 16 ? copy_bytes(bytes, to, n) : copy_few(bytes, to, n);
#endif
}

// Four channels' bytes of kPositions positions, position by position.
SPARSEPIPE_INLINE void interleave(vb a, vb b, vb c, vb d, std::uint8_t* out) {
#if defined(__AVX512BW__) && SPARSEPIPE_LANES == 16
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  const auto spread = [&](vb v) { return _mm512_permutexvar_epi32(order, reinterpret_cast<__m512i>(v)); };
  const __m512i w = spread(a), x = spread(b), y = spread(c), z = spread(d);
  const __m512i low0 = _mm512_unpacklo_epi8(w, x), high0 = _mm512_unpackhi_epi8(w, x);
  const __m512i low1 = _mm512_unpacklo_epi8(y, z), high1 = _mm512_unpackhi_epi8(y, z);
  _mm512_storeu_si512(out, _mm512_unpacklo_epi16(low0, low1));
  _mm512_storeu_si512(out + 64, _mm512_unpackhi_epi16(low0, low1));
  _mm512_storeu_si512(out + 128, _mm512_unpacklo_epi16(high0, high1));
  _mm512_storeu_si512(out + 192, _mm512_unpackhi_epi16(high0, high1));
#elif defined(__AVX2__) && SPARSEPIPE_LANES == 8
  const __m256i order = _mm256_setr_epi32(0, 2, 4, 6, 1, 3, 5, 7);
  const auto spread = [&](vb v) { return _mm256_permutevar8x32_epi32(reinterpret_cast<__m256i>(v), order); };
  const __m256i w = spread(a), x = spread(b), y = spread(c), z = spread(d);
  const __m256i low0 = _mm256_unpacklo_epi8(w, x), high0 = _mm256_unpackhi_epi8(w, x);
  const __m256i low1 = _mm256_unpacklo_epi8(y, z), high1 = _mm256_unpackhi_epi8(y, z);
  auto* to = reinterpret_cast<__m256i*>(out);
  _mm256_storeu_si256(to, _mm256_unpacklo_epi16(low0, low1));
  _mm256_storeu_si256(to + 1, _mm256_unpackhi_epi16(low0, low1));
  _mm256_storeu_si256(to + 2, _mm256_unpacklo_epi16(high0, high1));
  _mm256_storeu_si256(to + 3, _mm256_unpackhi_epi16(high0, high1));
#elif defined(__SSE2__) && SPARSEPIPE_LANES == 4
  const auto w = reinterpret_cast<__m128i>(a), x = reinterpret_cast<__m128i>(b);
  const auto y = reinterpret_cast<__m128i>(c), z = reinterpret_cast<__m128i>(d);
  const __m128i low0 = _mm_unpacklo_epi8(w, x), high0 = _mm_unpackhi_epi8(w, x);
  const __m128i low1 = _mm_unpacklo_epi8(y, z), high1 = _mm_unpackhi_epi8(y, z);
  auto* to = reinterpret_cast<__m128i*>(out);
  _mm_storeu_si128(to, _mm_unpacklo_epi16(low0, low1));
  _mm_storeu_si128(to + 1, _mm_unpackhi_epi16(low0, low1));
  _mm_storeu_si128(to + 2, _mm_unpacklo_epi16(high0, high1));
  _mm_storeu_si128(to + 3, _mm_unpackhi_epi16(high0, high1));
#else
  for (int i = 0; i < kPositions; ++i) {
    out[4 * i] = a[i];
    out[4 * i + 1] = b[i];
    out[4 * i + 2] = c[i];
    out[4 * i + 3] = d[i];
  }
#endif
}

#if defined(__aarch64__) || defined(__SSSE3__)
#define SPARSEPIPE_TABLE
// Bytes of a table of 256, one for each byte of a vector.
struct Table {
#if defined(__aarch64__)  // four registers of 64 bytes; an index outside leaves what is there
  uint8x16x4_t part[4];
  SPARSEPIPE_INLINE explicit Table(const std::uint8_t* table) {
    for (int i = 0; i < 16; ++i) part[i / 4].val[i % 4] = vld1q_u8(table + 16 * i);
  }
  SPARSEPIPE_INLINE vb of(vb x) const {
    const auto index = reinterpret_cast<uint8x16_t>(x);
    uint8x16_t found = vqtbl4q_u8(part[0], index);
    found = vqtbx4q_u8(found, part[1], vsubq_u8(index, vdupq_n_u8(64)));
    found = vqtbx4q_u8(found, part[2], vsubq_u8(index, vdupq_n_u8(128)));
    found = vqtbx4q_u8(found, part[3], vsubq_u8(index, vdupq_n_u8(192)));
    return reinterpret_cast<vb>(found);
  }
#else
  // A shuffle takes one of 16 bytes by the low bits of an index, and 0 where that is negative. Row i is stored as what it
  // has else than the row before (xor), and indices fall by 16 from row to row: what they meet until they are negative
  // makes up the byte. Both halves of the table are such a chain, so that 127 is not exceeded.
  vb change[16];
  SPARSEPIPE_INLINE explicit Table(const std::uint8_t* table) {
    for (int i = 0; i < 16; ++i) {
      for (int k = 0; k < kPositions; ++k) {
        const int at = 16 * i + k % 16;
        change[i][k] = static_cast<std::uint8_t>(i % 8 ? table[at] ^ table[at - 16] : table[at]);
      }
    }
  }
  SPARSEPIPE_INLINE vb of(vb x) const {
    vb low = x, high = x ^ broadcast(std::uint8_t{0x80}), found = {};
    SPARSEPIPE_UNROLL
    for (int i = 0; i < 8; ++i) {
      found ^= shuffled(change[i], low) ^ shuffled(change[8 + i], high);
      low = less_16(low);
      high = less_16(high);
    }
    return found;
  }
#if SPARSEPIPE_LANES == 16
  static SPARSEPIPE_INLINE vb shuffled(vb row, vb index) {
    return reinterpret_cast<vb>(_mm512_shuffle_epi8(reinterpret_cast<__m512i>(row), reinterpret_cast<__m512i>(index)));
  }
  static SPARSEPIPE_INLINE vb less_16(vb index) {  // saturates
    return reinterpret_cast<vb>(_mm512_subs_epi8(reinterpret_cast<__m512i>(index), _mm512_set1_epi8(16)));
  }
#elif SPARSEPIPE_LANES == 8
  static SPARSEPIPE_INLINE vb shuffled(vb row, vb index) {
    return reinterpret_cast<vb>(_mm256_shuffle_epi8(reinterpret_cast<__m256i>(row), reinterpret_cast<__m256i>(index)));
  }
  static SPARSEPIPE_INLINE vb less_16(vb index) {
    return reinterpret_cast<vb>(_mm256_subs_epi8(reinterpret_cast<__m256i>(index), _mm256_set1_epi8(16)));
  }
#else
  static SPARSEPIPE_INLINE vb shuffled(vb row, vb index) {
    return reinterpret_cast<vb>(_mm_shuffle_epi8(reinterpret_cast<__m128i>(row), reinterpret_cast<__m128i>(index)));
  }
  static SPARSEPIPE_INLINE vb less_16(vb index) {
    return reinterpret_cast<vb>(_mm_subs_epi8(reinterpret_cast<__m128i>(index), _mm_set1_epi8(16)));
  }
#endif
#endif
};
#endif

}  // namespace SPARSEPIPE_NAMESPACE
}  // namespace
}  // namespace sparsepipe::kernels
