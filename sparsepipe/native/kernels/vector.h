// Vectors of floats: loads, stores, activations. Part of kernels/template.h, inside its namespaces.

constexpr int kLanes = SPARSEPIPE_LANES;

// Loads and stores at any alignment, of L floats.
template <int L>
struct Vector {
  typedef float type __attribute__((vector_size(L * 4)));
  typedef float loose __attribute__((vector_size(L * 4), aligned(4), may_alias));
  typedef std::int32_t integer __attribute__((vector_size(L * 4)));
};
using vf = Vector<kLanes>::type;
using vi = Vector<kLanes>::integer;

template <int L = kLanes>
SPARSEPIPE_INLINE typename Vector<L>::type load(const float* p) {
  return *reinterpret_cast<const typename Vector<L>::loose*>(p);
}
template <int L = kLanes>
SPARSEPIPE_INLINE void store(float* p, typename Vector<L>::type v) {
  *reinterpret_cast<typename Vector<L>::loose*>(p) = v;
}
SPARSEPIPE_INLINE vf broadcast(float s) { return s - vf{}; }

// Parts of vectors. None of them may call a function, memcpy included: the sums of a tile live across them, and GCC would
// keep those in memory in the loop over entries, too.
#if defined(__AVX512F__) && SPARSEPIPE_LANES == 16
SPARSEPIPE_INLINE __mmask16 lanes_between(std::int64_t first, std::int64_t last) {
  first = first < 0 ? 0 : (first > 16 ? 16 : first);
  last = last < first ? first : (last > 16 ? 16 : last);
  return static_cast<__mmask16>((0xffffu << first) & ~(0xffffu << last));
}
#elif defined(__AVX2__) && SPARSEPIPE_LANES == 8
SPARSEPIPE_INLINE __m256i lanes_between(int first, int last) {
  const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
  return _mm256_andnot_si256(_mm256_cmpgt_epi32(_mm256_set1_epi32(first), lane),
                             _mm256_cmpgt_epi32(_mm256_set1_epi32(last), lane));
}
#endif

// p[index + first, index + last) in the lanes [first, last), zeros in the others; nothing else is read.
SPARSEPIPE_INLINE vf load_between(const float* p, std::int64_t index, int first, int last) {
  if (last <= first) return vf{};
#if defined(__AVX512F__) && SPARSEPIPE_LANES == 16
  const auto mask = static_cast<__mmask16>((0xffffu << first) & (0xffffu >> (16 - last)));
  return reinterpret_cast<vf>(_mm512_maskz_loadu_ps(mask, p + index));
#elif defined(__AVX2__) && SPARSEPIPE_LANES == 8
  return reinterpret_cast<vf>(_mm256_maskload_ps(p + index, lanes_between(first, last)));
#else
  vf v{};
  SPARSEPIPE_UNROLL
  for (int i = 0; i < kLanes; ++i) {
    if (i >= first && i < last) v[i] = p[index + i];
  }
  return v;
#endif
}

// The first n < kLanes floats only.
SPARSEPIPE_INLINE vf load_some(const float* p, int n) { return load_between(p, 0, 0, n); }

SPARSEPIPE_INLINE void store_some(float* p, vf v, int n) {
#if defined(__AVX512F__) && SPARSEPIPE_LANES == 16
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1u), reinterpret_cast<__m512>(v));
#else
  alignas(64) float buffer[kLanes];
  store(buffer, v);
  const float* from = buffer;
  if constexpr (kLanes > 8) {
    if (n & 8) __builtin_memcpy(p, from, 32), p += 8, from += 8;
  }
  if constexpr (kLanes > 4) {
    if (n & 4) __builtin_memcpy(p, from, 16), p += 4, from += 4;
  }
  if (n & 2) __builtin_memcpy(p, from, 8), p += 2, from += 2;
  if (n & 1) *p = *from;
#endif
}

// Lanes 1, 2, ... of a, then lane 0 of b.
SPARSEPIPE_INLINE vf next_lanes(vf a, vf b) {
#if SPARSEPIPE_LANES == 16
  return __builtin_shufflevector(a, b, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16);
#elif SPARSEPIPE_LANES == 8
  return __builtin_shufflevector(a, b, 1, 2, 3, 4, 5, 6, 7, 8);
#else
  return __builtin_shufflevector(a, b, 1, 2, 3, 4);
#endif
}

// Lanes 0, 2, 4, ... of a, then of b.
template <int L>
SPARSEPIPE_INLINE typename Vector<L>::type evens(typename Vector<L>::type a, typename Vector<L>::type b) {
  if constexpr (L == 16) {
    return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  } else if constexpr (L == 8) {
    return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14);
  } else {
    return __builtin_shufflevector(a, b, 0, 2, 4, 6);
  }
}
// Lanes 1, 3, 5, ... of a, then of b.
template <int L>
SPARSEPIPE_INLINE typename Vector<L>::type odds(typename Vector<L>::type a, typename Vector<L>::type b) {
  if constexpr (L == 16) {
    return __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  } else if constexpr (L == 8) {
    return __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
  } else {
    return __builtin_shufflevector(a, b, 1, 3, 5, 7);
  }
}

SPARSEPIPE_INLINE vf at_least(vf x, vf low) { return low > x ? low : x; }  // a NaN stays
SPARSEPIPE_INLINE vf at_most(vf x, vf high) { return high < x ? high : x; }

// e^x to about 2 ulp: e^x = 2^n e^r, |r| <= ln2 / 2, with the Taylor polynomial of degree 7 for e^r.
SPARSEPIPE_INLINE vf exponential(vf x) {
  x = at_most(at_least(x, broadcast(-87.0f)), broadcast(88.0f));
  const vf magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer in the low bits
  const vf shifted = x * broadcast(1.44269504f) + magic;
  const vf n = shifted - magic;
  const vf r = (x - n * broadcast(0.693145752f)) - n * broadcast(1.42860677e-6f);
  vf p = broadcast(1.0f / 5040);
  p = p * r + broadcast(1.0f / 720);
  p = p * r + broadcast(1.0f / 120);
  p = p * r + broadcast(1.0f / 24);
  p = p * r + broadcast(1.0f / 6);
  p = p * r + broadcast(0.5f);
  p = p * r + broadcast(1.0f);
  p = p * r + broadcast(1.0f);
  const vi power = (reinterpret_cast<vi>(shifted) << 23) + (vi{} + 0x3f800000);
  return p * reinterpret_cast<vf>(power);
}

// x / 2 (1 + erf(x / sqrt 2)). erf(z) = z p(u), u = z^2 2 / 3.9^2 - 1, with z within 3.9 (beyond, erf is 1 to 4e-8);
// p interpolates at the Chebyshev nodes of u. Absolute error of erf below 1.1e-6; no exponential and no division.
SPARSEPIPE_INLINE vf gelu(vf x) {
  constexpr float kP[] = {0.362583965f,   -0.181011796f,  0.134691328f,   -0.109506115f, 0.0906657502f,
                          -0.0740841925f, 0.0579325855f,  -0.0414545611f, 0.0290557351f, -0.0227585491f,
                          0.0137005467f,  -0.00295000221f, 0.00181648647f, -0.00421919301f, 0.00194829132f};
  const vf z = at_most(at_least(x * broadcast(0.707106781f), broadcast(-3.9f)), broadcast(3.9f));
  const vf u = z * z * broadcast(2.0f / (3.9f * 3.9f)) - broadcast(1.0f);
  vf p = broadcast(kP[14]);
  SPARSEPIPE_UNROLL
  for (int i = 13; i >= 0; --i) p = p * u + broadcast(kP[i]);
  // Stretched so that it reaches 1: what is far below zero then becomes zero.
  const vf erf = at_most(at_least(z * p * broadcast(1.0000007f), broadcast(-1.0f)), broadcast(1.0f));
  return broadcast(0.5f) * x * (broadcast(1.0f) + erf);
}

SPARSEPIPE_INLINE vf activate(vf x, const Epilogue& e) {
  switch (e.activation) {
    case Activation::kRelu:
      return at_least(x, vf{});
    case Activation::kClip:
      return at_most(at_least(x, broadcast(e.low)), broadcast(e.high));
    case Activation::kHardSwish:
      return x * at_most(at_least(x * broadcast(1.0f / 6) + broadcast(0.5f), vf{}), broadcast(1.0f));
    case Activation::kSilu:
      return x / (broadcast(1.0f) + exponential(-x));
    case Activation::kGelu:
      return gelu(x);
    case Activation::kNone:
      break;
  }
  return x;
}

template <int N>
struct Number {
  static constexpr int value = N;
};
