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

// The first n < kLanes floats only.
SPARSEPIPE_INLINE vf load_some(const float* p, int n) {
#if defined(__AVX512F__) && SPARSEPIPE_LANES == 16
  return reinterpret_cast<vf>(_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1u), p));
#else
  alignas(64) float buffer[kLanes] = {};
  for (int i = 0; i < n; ++i) buffer[i] = p[i];
  return load(buffer);
#endif
}
#if defined(__AVX512F__) && SPARSEPIPE_LANES == 16
SPARSEPIPE_INLINE __mmask16 lanes_between(std::int64_t first, std::int64_t last) {
  first = first < 0 ? 0 : (first > 16 ? 16 : first);
  last = last < first ? first : (last > 16 ? 16 : last);
  return static_cast<__mmask16>((0xffffu << first) & ~(0xffffu << last));
}
#endif

// p[index + first, index + last) in the lanes [first, last), zeros in the others; nothing else is read.
SPARSEPIPE_INLINE vf load_between(const float* p, std::int64_t index, int first, int last) {
  if (last <= first) return vf{};
#if defined(__AVX512F__) && SPARSEPIPE_LANES == 16
  const auto mask = static_cast<__mmask16>((0xffffu << first) & (0xffffu >> (16 - last)));
  return reinterpret_cast<vf>(_mm512_maskz_loadu_ps(mask, p + index));
#else
  alignas(64) float buffer[kLanes] = {};
  for (int i = first; i < last; ++i) buffer[i] = p[index + i];
  return load(buffer);
#endif
}
SPARSEPIPE_INLINE void store_some(float* p, vf v, int n) {
#if defined(__AVX512F__) && SPARSEPIPE_LANES == 16
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1u), reinterpret_cast<__m512>(v));
#else
  alignas(64) float buffer[kLanes];
  store(buffer, v);
  for (int i = 0; i < n; ++i) p[i] = buffer[i];
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
// p interpolates at the Chebyshev nodes of u. Absolute error of erf below 3.2e-7; no exponential and no division.
SPARSEPIPE_INLINE vf gelu(vf x) {
  constexpr float kP[] = {0.362583965f,   -0.181011796f,  0.134691328f,   -0.109506115f, 0.0906657502f,
                          -0.0740841925f, 0.0579325855f,  -0.0414545611f, 0.0290557351f, -0.0227585491f,
                          0.0137005467f,  -0.00295000221f, 0.00181648647f, -0.00421919301f, 0.00194829132f};
  const vf z = at_most(at_least(x * broadcast(0.707106781f), broadcast(-3.9f)), broadcast(3.9f));
  const vf u = z * z * broadcast(2.0f / (3.9f * 3.9f)) - broadcast(1.0f);
  vf p = broadcast(kP[14]);
  SPARSEPIPE_UNROLL
  for (int i = 13; i >= 0; --i) p = p * u + broadcast(kP[i]);
  const vf half = broadcast(0.5f) * x;
  return half + half * (z * p);
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

template <int R>
struct Entry {
  std::int32_t offset;
  float value[R];
};

template <int R, int T>
SPARSEPIPE_INLINE void multiply(vf (&sum)[R][T], const Entry<R>& entry, const float* x) {
  const float* at = x + entry.offset;
  if constexpr (R == 1) {
    const vf w = broadcast(entry.value[0]);
    SPARSEPIPE_UNROLL
    for (int t = 0; t < T; ++t) sum[0][t] += w * load(at + t * kLanes);
  } else {
    SPARSEPIPE_UNROLL
    for (int t = 0; t < T; ++t) {
      const vf in = load(at + t * kLanes);
      SPARSEPIPE_UNROLL
      for (int r = 0; r < R; ++r) sum[r][t] += broadcast(entry.value[r]) * in;
    }
  }
}

// Sums within bounds: all that the activations but HardSwish, SiLU and GELU are. Those are applied to what is stored.
struct Bounds {
  vf low, high;
  SPARSEPIPE_INLINE vf operator()(vf x) const { return at_most(at_least(x, low), high); }
};

SPARSEPIPE_INLINE Bounds bounds_of(const Epilogue& e) {
  const bool clip = e.activation == Activation::kClip;
  const float low = clip ? e.low : (e.activation == Activation::kRelu ? 0.0f : -__builtin_inff());
  return {broadcast(low), broadcast(clip ? e.high : __builtin_inff())};
}

SPARSEPIPE_INLINE void curve(float* y, std::int64_t count, const Epilogue& epilogue) {
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) store(y + i, activate(load(y + i), epilogue));
  if (const int rest = static_cast<int>(count - i); rest) store_some(y + i, activate(load_some(y + i, rest), epilogue), rest);
}

// Applies HardSwish, SiLU or GELU to the stored outputs of a block row.
void curves(const RowsArgs& a, std::int64_t row, int block, int vectors) {
  float* y = a.y + (row - a.row_begin) * block * a.y_stride;
  for (int r = 0; r < block; ++r, y += a.y_stride) {
    if (a.pitch) {
      curve(y + a.target[0], static_cast<std::int64_t>(a.positions) * a.position_rows, a.epilogue);
    } else if (a.whole) {
      curve(y + a.target[0], static_cast<std::int64_t>(vectors) * kLanes, a.epilogue);
    } else {
      for (int t = 0; t < vectors; ++t) curve(y + a.target[t], a.count[t], a.epilogue);
    }
  }
}

template <int R, int T>
SPARSEPIPE_INLINE void finish(const vf (&sum)[R][T], const RowsArgs& a, std::int64_t row, const Bounds& bounds) {
  const std::int64_t shift = (row - a.row_begin) * R * a.y_stride;
  if (a.pitch) {
    float* y = a.y + shift + a.target[0];
    const float* residual = a.residual ? a.residual + shift + a.target[0] : nullptr;
    SPARSEPIPE_UNROLL
    for (int r = 0; r < R; ++r, y += a.y_stride) {
      alignas(64) float sums[(T + 1) * kLanes];
      SPARSEPIPE_UNROLL
      for (int t = 0; t < T; ++t) store(sums + t * kLanes, sum[r][t]);
      for (std::int32_t i = 0; i < a.position_rows; ++i) {
        vf v = load(sums + i * a.pitch);
        const std::int64_t at = static_cast<std::int64_t>(i) * a.positions;
        if (residual) v += load_some(residual + at, a.positions);
        store_some(y + at, bounds(v), a.positions);
      }
      if (residual) residual += a.y_stride;
    }
    return;
  }
  if (a.whole) {
    float* y = a.y + shift + a.target[0];
    if (a.residual) {
      const float* residual = a.residual + shift + a.target[0];
      SPARSEPIPE_UNROLL
      for (int r = 0; r < R; ++r, y += a.y_stride, residual += a.y_stride) {
        SPARSEPIPE_UNROLL
        for (int t = 0; t < T; ++t) store(y + t * kLanes, bounds(sum[r][t] + load(residual + t * kLanes)));
      }
    } else {
      SPARSEPIPE_UNROLL
      for (int r = 0; r < R; ++r, y += a.y_stride) {
        SPARSEPIPE_UNROLL
        for (int t = 0; t < T; ++t) store(y + t * kLanes, bounds(sum[r][t]));
      }
    }
    return;
  }
  float* y = a.y + shift;
  const float* residual = a.residual ? a.residual + shift : nullptr;
  SPARSEPIPE_UNROLL
  for (int r = 0; r < R; ++r, y += a.y_stride) {
    SPARSEPIPE_UNROLL
    for (int t = 0; t < T; ++t) {
      vf v = sum[r][t];
      if (a.count[t] == kLanes) {
        if (residual) v += load(residual + a.target[t]);
        store(y + a.target[t], bounds(v));
      } else if (a.count[t] > 0) {
        if (residual) v += load_some(residual + a.target[t], a.count[t]);
        store_some(y + a.target[t], bounds(v), a.count[t]);
      }
    }
    if (residual) residual += a.y_stride;
  }
}

// Independent sums: enough to hide the latency of the FMA units even for small tiles.
template <int R, int T>
constexpr int kChains = R * T >= 8 ? 1 : (R * T >= 4 ? 2 : 4);

// Rows between the prefetch of an output and its use.
template <int R>
constexpr int kAhead = R == 1 ? 6 : (R == 2 ? 3 : 2);

// The lines that a later row writes (and adds) are on their way while this one computes: planes lie pages apart, where
// the hardware does not prefetch.
template <int R, int T>
SPARSEPIPE_INLINE void prefetch_output(const RowsArgs& a, std::int64_t row) {
  const std::int64_t shift = ((row - a.row_begin) + kAhead<R>) * R * a.y_stride;
  SPARSEPIPE_UNROLL
  for (int r = 0; r < R; ++r) {
    float* y = a.y + shift + r * a.y_stride;
    SPARSEPIPE_UNROLL
    for (int t = 0; t < T; ++t) __builtin_prefetch(y + a.target[t], 1, 3);
    if (a.residual) {
      const float* residual = a.residual + shift + r * a.y_stride;
      SPARSEPIPE_UNROLL
      for (int t = 0; t < T; ++t) __builtin_prefetch(residual + a.target[t], 0, 3);
    }
  }
}

// The sums of one block row, as C independent ones.
template <int R, int T>
struct Sums {
  static constexpr int C = kChains<R, T>;
  vf of[C][R][T];

  SPARSEPIPE_INLINE void clear_from(int first) {
    SPARSEPIPE_UNROLL
    for (int c = first; c < C; ++c) {
      SPARSEPIPE_UNROLL
      for (int r = 0; r < R; ++r) {
        SPARSEPIPE_UNROLL
        for (int t = 0; t < T; ++t) of[c][r][t] = vf{};
      }
    }
  }
  SPARSEPIPE_INLINE void multiply_all(const Entry<R>* e, const Entry<R>* end, const float* x) {
    if constexpr (C > 1) {
      for (; end - e >= C; e += C) {
        SPARSEPIPE_UNROLL
        for (int c = 0; c < C; ++c) multiply<R, T>(of[c], e[c], x);
      }
    }
    for (; e != end; ++e) multiply<R, T>(of[0], *e, x);
  }
  SPARSEPIPE_INLINE void join() {
    SPARSEPIPE_UNROLL
    for (int c = 1; c < C; ++c) {
      SPARSEPIPE_UNROLL
      for (int r = 0; r < R; ++r) {
        SPARSEPIPE_UNROLL
        for (int t = 0; t < T; ++t) of[0][r][t] += of[c][r][t];
      }
    }
  }
  SPARSEPIPE_INLINE void move_down() {
    SPARSEPIPE_UNROLL
    for (int r = 0; r < R; ++r) {
      SPARSEPIPE_UNROLL
      for (int t = 0; t < T; ++t) of[0][r][t] = next_lanes(of[0][r][t], t + 1 < T ? of[0][r][t + 1] : vf{});
    }
  }
};

template <int R, int T, bool kGroups>
SPARSEPIPE_INLINE void rows_of(const RowsArgs& a, const Bounds& bounds) {
  const bool curved = a.epilogue.activation > Activation::kClip;
  std::int64_t next = 0;
  const auto* entries = reinterpret_cast<const Entry<R>*>(a.entries);
  for (std::int64_t row = a.row_begin; row < a.row_end; ++row) {
    Sums<R, T> sum;
    const std::uint32_t* start = a.row_start + (kGroups ? row * a.groups : row);
    if constexpr (kGroups) {
      sum.clear_from(0);
      for (std::int32_t group = 1; group < a.groups; ++group, ++start) {
        sum.multiply_all(entries + start[0], entries + start[1], a.x);
        sum.join();
        sum.clear_from(1);
        sum.move_down();
      }
    } else {
      sum.clear_from(1);
    }
    float* partial = a.first && a.last ? nullptr : a.partial + (row - a.row_begin) * (R * T * kLanes);
    SPARSEPIPE_UNROLL
    for (int r = 0; r < R; ++r) {
      const float bias = a.first && a.epilogue.bias ? a.epilogue.bias[row * R + r] : 0.0f;
      SPARSEPIPE_UNROLL
      for (int t = 0; t < T; ++t) {
        const vf begin = a.first ? broadcast(bias) : load(partial + (r * T + t) * kLanes);
        sum.of[0][r][t] = kGroups ? sum.of[0][r][t] + begin : begin;
      }
    }
    if (a.last && a.prefetch_output) prefetch_output<R, T>(a, row);
    for (std::int64_t i = 0; i < a.next_channels_per_row && next < a.next_channels; ++i, ++next) {
      const float* line = a.next + next * a.next_stride;
      SPARSEPIPE_UNROLL
      for (int t = 0; t < T; ++t) __builtin_prefetch(line + t * kLanes, 0, 2);
    }
    sum.multiply_all(entries + start[0], entries + start[1], a.x);
    sum.join();
    if (a.last) {
      finish<R, T>(sum.of[0], a, row, bounds);
      if (curved) curves(a, row, R, T);
    } else {
      SPARSEPIPE_UNROLL
      for (int r = 0; r < R; ++r) {
        SPARSEPIPE_UNROLL
        for (int t = 0; t < T; ++t) store(partial + (r * T + t) * kLanes, sum.of[0][r][t]);
      }
    }
  }
}

template <int R, int T>
void rows_of(const RowsArgs& a) {
  const Bounds bounds = bounds_of(a.epilogue);
  if (a.groups > 1) {
    rows_of<R, T, true>(a, bounds);
  } else {
    rows_of<R, T, false>(a, bounds);
  }
}

// Tiles that fit the register file: R * T sums, the R broadcast weights and, unless it is a memory operand, an input.
template <int R>
constexpr int max_vectors() {
  constexpr int fit = R == 1 ? SPARSEPIPE_REGISTERS - 2 : (SPARSEPIPE_REGISTERS - 1 - R) / R;
  constexpr int cap = R == 1 ? 14 : 24 / R;
  return fit < cap ? fit : cap;
}

template <int R, int T>
void rows_dispatch(const RowsArgs& a, int vectors) {
  if constexpr (T <= max_vectors<R>()) {
    if (vectors == T) {
      rows_of<R, T>(a);
    } else {
      rows_dispatch<R, T + 1>(a, vectors);
    }
  }
}

void rows(const RowsArgs& a, int block, int vectors) {
  switch (block) {
    case 1:
      return rows_dispatch<1, 1>(a, vectors);
    case 2:
      return rows_dispatch<2, 1>(a, vectors);
    default:
      return rows_dispatch<4, 1>(a, vectors);
  }
}

void pack_flat(const float* input, std::int64_t input_stride, std::int64_t channels, std::int64_t count,
               float* output, std::int64_t output_stride) {
  const std::int64_t whole = count / kLanes * kLanes;
  const int rest = static_cast<int>(count - whole);
  for (std::int64_t c = 0; c < channels; ++c) {
    const float* from = input + c * input_stride;
    float* to = output + c * output_stride;
    std::int64_t i = 0;
    for (; i < whole; i += kLanes) store(to + i, load(from + i));
    if (rest) {
      store(to + i, load_some(from + i, rest));
      i += kLanes;
    }
    for (; i < output_stride; i += kLanes) store(to + i, vf{});
  }
}

template <int L>
SPARSEPIPE_INLINE void copy_runs(const PackArgs& a, const float* stage, float* to) {
  for (std::int32_t i = 0; i < a.copy_count; ++i) {
    const float* from = stage + a.copies[i].source;
    float* run = to + a.copies[i].target;
    for (std::int32_t f = 0; f < a.copy_floats; f += L) store<L>(run + f, load<L>(from + f));
  }
}

// 0, 2, 4, ... or 1, 3, 5, ... of two vectors of L floats.
template <int L>
SPARSEPIPE_INLINE void split_pairs(const float* from, float* even, float* odd) {
  const auto a = load<L>(from);
  const auto b = load<L>(from + L);
  if constexpr (L == 16) {
    store<L>(even, __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30));
    store<L>(odd, __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31));
  } else if constexpr (L == 8) {
    store<L>(even, __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14));
    store<L>(odd, __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15));
  } else {
    store<L>(even, __builtin_shufflevector(a, b, 0, 2, 4, 6));
    store<L>(odd, __builtin_shufflevector(a, b, 1, 3, 5, 7));
  }
}

// Splits `count` floats into pairs; whole vectors, the last of them overlapping the one before.
template <int L>
SPARSEPIPE_INLINE void split_row(const float* from, std::int32_t count, float* even, float* odd) {
  if (count >= 2 * L) {
    std::int32_t i = 0;
    for (; i + 2 * L <= count; i += 2 * L) split_pairs<L>(from + i, even + i / 2, odd + i / 2);
    const std::int32_t end = count & ~1;
    if (i < end) split_pairs<L>(from + end - 2 * L, even + end / 2 - L, odd + end / 2 - L);
    if (count & 1) even[end / 2] = from[end];
    return;
  }
  if constexpr (L > 4) {
    split_row<L / 2>(from, count, even, odd);
  } else {
    for (std::int32_t i = 0; i < count; ++i) {
      float* to = i & 1 ? odd : even;  // not in one expression: GCC 12 miscompiles that under its sanitizers
      to[i / 2] = from[i];
    }
  }
}

template <int L>
SPARSEPIPE_INLINE void copy_row(const float* from, std::int32_t count, float* to) {
  if (count >= L) {
    std::int32_t i = 0;
    for (; i + L <= count; i += L) store<L>(to + i, load<L>(from + i));
    if (i < count) store<L>(to + count - L, load<L>(from + count - L));
    return;
  }
  if constexpr (L > 4) {
    copy_row<L / 2>(from, count, to);
  } else {
    for (std::int32_t i = 0; i < count; ++i) to[i] = from[i];
  }
}

SPARSEPIPE_INLINE void fill_stage(const PackArgs& a, const float* plane, float* stage) {
  for (std::int32_t i = 0; i < a.row_count; ++i) {
    const StageRow& row = a.rows[i];
    const float* from = plane + row.source;
    float* to = stage + row.target;
    if (a.step == 1) {
      copy_row<kLanes>(from, row.count, to + a.lead);
    } else if (a.step == 2) {
      float* even = to + a.lead / 2;
      float* odd = even + a.phase_stride;
      if (a.lead & 1) {
        if (row.count > 0) odd[0] = from[0];
        split_row<kLanes>(from + 1, row.count - 1, even + 1, odd + 1);
      } else {
        split_row<kLanes>(from, row.count, even, odd);
      }
    } else {
      std::int32_t phase = a.lead % a.step, index = a.lead / a.step;
      for (std::int32_t j = 0; j < row.count; ++j) {
        to[phase * a.phase_stride + index] = from[j];
        if (++phase == a.step) {
          phase = 0;
          ++index;
        }
      }
    }
  }
}

void pack_stage(const PackArgs& a) {
  for (std::int64_t c = 0; c < a.channels; ++c) {
    float* stage = a.stage + c % a.stage_count * a.stage_stride;
    fill_stage(a, a.input + c * a.input_stride, stage);
    float* to = a.output + c * a.output_stride;
    if (a.copy_floats <= 4) {
      copy_runs<4>(a, stage, to);
    } else if (a.copy_floats <= 8 && kLanes > 4) {
      copy_runs<(kLanes > 4 ? 8 : 4)>(a, stage, to);
    } else {
      copy_runs<kLanes>(a, stage, to);
    }
  }
}

#if defined(__AVX512F__) && SPARSEPIPE_LANES == 16
// All rows have the same lanes: a load, a mask and a store for each vector.
template <int V>
SPARSEPIPE_INLINE void pack_rows_of(const PackRowsArgs& a) {
  __mmask16 inside[V];
  SPARSEPIPE_UNROLL
  for (int v = 0; v < V; ++v) inside[v] = lanes_between(a.lead - v * kLanes, a.lead + a.count - v * kLanes);
  const __mmask16 kept = lanes_between(0, a.copy_floats);
  for (std::int64_t c = 0; c < a.channels; ++c) {
    const float* plane = a.input + c * a.input_stride - a.lead;
    float* to = a.output + c * a.output_stride;
    for (std::int32_t i = 0; i < a.row_count; ++i) {
      const StageRow row = a.rows[i];
      SPARSEPIPE_UNROLL
      for (int v = 0; v < V; ++v) {
        const __mmask16 mask = row.count > 0 ? inside[v] : static_cast<__mmask16>(0);
        const __m512 x = _mm512_maskz_loadu_ps(mask, plane + row.source + v * kLanes);
        if constexpr (V > 1) {
          _mm512_storeu_ps(to + row.target + v * kLanes, x);
        } else {
          _mm512_mask_storeu_ps(to + row.target, kept, x);
        }
      }
    }
  }
}
#endif

void pack_rows(const PackRowsArgs& a) {
#if defined(__AVX512F__) && SPARSEPIPE_LANES == 16
  switch ((a.copy_floats + kLanes - 1) / kLanes) {
    case 1:
      return pack_rows_of<1>(a);
    case 2:
      return pack_rows_of<2>(a);
    case 4:
      return pack_rows_of<4>(a);
    default:
      break;
  }
#endif
  for (std::int64_t c = 0; c < a.channels; ++c) {
    const float* plane = a.input + c * a.input_stride;
    float* to = a.output + c * a.output_stride;
    for (std::int32_t i = 0; i < a.row_count; ++i) {
      const StageRow& row = a.rows[i];
      float* out = to + row.target;
      const float* from = plane + row.source;
      const std::int32_t end = row.count > 0 ? a.lead + a.count : 0;
      for (std::int32_t column = 0; column < a.copy_floats; column += kLanes, out += kLanes) {
        const std::int32_t first = a.lead > column ? a.lead - column : 0;
        const std::int32_t last = end - column;
        if (first == 0 && last >= kLanes) {
          store(out, load(from + (column - a.lead)));
          continue;
        }
        const vf v = load_between(from, column - a.lead, first, last < kLanes ? last : kLanes);
        if (a.copy_floats >= kLanes) {
          store(out, v);
        } else {
          store_some(out, v, a.copy_floats);
        }
      }
    }
  }
}

#include "kernels/depthwise.h"

// The square of kLanes x kLanes floats, by swapping ever larger off-diagonal blocks.
template <int D, int... I>
SPARSEPIPE_INLINE void swap_blocks(vf& a, vf& b) {
  const vf first = __builtin_shufflevector(a, b, ((I & D) ? kLanes + I - D : I)...);
  const vf second = __builtin_shufflevector(a, b, ((I & D) ? kLanes + I : I + D)...);
  a = first;
  b = second;
}
template <int D>
SPARSEPIPE_INLINE void swap_stage(vf (&m)[kLanes]) {
  SPARSEPIPE_UNROLL
  for (int i = 0; i < kLanes; ++i) {
    if (!(i & D)) {
#if SPARSEPIPE_LANES == 16
      swap_blocks<D, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15>(m[i], m[i + D]);
#elif SPARSEPIPE_LANES == 8
      swap_blocks<D, 0, 1, 2, 3, 4, 5, 6, 7>(m[i], m[i + D]);
#else
      swap_blocks<D, 0, 1, 2, 3>(m[i], m[i + D]);
#endif
    }
  }
}

void transpose(const float* input, std::int64_t input_stride, std::int64_t rows, std::int64_t columns,
               float* output, std::int64_t output_stride) {
  std::int64_t i = 0;
  for (; i + kLanes <= rows; i += kLanes) {
    std::int64_t j = 0;
    for (; j + kLanes <= columns; j += kLanes) {
      vf m[kLanes];
      SPARSEPIPE_UNROLL
      for (int l = 0; l < kLanes; ++l) m[l] = load(input + (i + l) * input_stride + j);
      swap_stage<1>(m);
      swap_stage<2>(m);
      if constexpr (kLanes >= 8) swap_stage<4>(m);
      if constexpr (kLanes >= 16) swap_stage<8>(m);
      SPARSEPIPE_UNROLL
      for (int l = 0; l < kLanes; ++l) store(output + (j + l) * output_stride + i, m[l]);
    }
    for (; j < columns; ++j) {
      for (int l = 0; l < kLanes; ++l) output[j * output_stride + i + l] = input[(i + l) * input_stride + j];
    }
  }
  for (std::int64_t j = 0; j < columns && i < rows; ++j) {
    for (std::int64_t l = i; l < rows; ++l) output[j * output_stride + l] = input[l * input_stride + j];
  }
}

template <int R, typename Index>
SPARSEPIPE_INLINE void vector_of(const float* x, const Index* index, const float* values,
                                 const std::uint32_t* row_start, std::int64_t row_begin, std::int64_t row_end,
                                 const Epilogue& epilogue, const float* residual, float* y) {
  alignas(64) float out[kLanes];
  int filled = 0;
  std::int64_t channel = row_begin * R;
  for (std::int64_t row = row_begin; row < row_end; ++row) {
    std::uint32_t e = row_start[row];
    const std::uint32_t end = row_start[row + 1];
    if constexpr (R == 1) {
      float s0 = 0, s1 = 0, s2 = 0, s3 = 0;
      for (; e + 4 <= end; e += 4) {
        s0 += values[e] * x[index[e]];
        s1 += values[e + 1] * x[index[e + 1]];
        s2 += values[e + 2] * x[index[e + 2]];
        s3 += values[e + 3] * x[index[e + 3]];
      }
      for (; e < end; ++e) s0 += values[e] * x[index[e]];
      out[filled++] = (s0 + s1) + (s2 + s3);
    } else {
      typename Vector<R>::type s[4] = {};
      for (; e + 4 <= end; e += 4) {
        SPARSEPIPE_UNROLL
        for (int c = 0; c < 4; ++c) {
          s[c] += x[index[e + c]] * load<R>(values + static_cast<std::size_t>(e + c) * R);
        }
      }
      for (; e < end; ++e) s[0] += x[index[e]] * load<R>(values + static_cast<std::size_t>(e) * R);
      const typename Vector<R>::type total = (s[0] + s[1]) + (s[2] + s[3]);
      for (int r = 0; r < R; ++r) out[filled++] = total[r];
    }
    if (filled == kLanes || row + 1 == row_end) {
      vf v = load(out);
      if (filled == kLanes) {
        if (epilogue.bias) v += load(epilogue.bias + channel);
        if (residual) v += load(residual + channel);
        store(y + channel, activate(v, epilogue));
      } else {
        if (epilogue.bias) v += load_some(epilogue.bias + channel, filled);
        if (residual) v += load_some(residual + channel, filled);
        store_some(y + channel, activate(v, epilogue), filled);
      }
      channel += filled;
      filled = 0;
    }
  }
}

template <int R>
SPARSEPIPE_INLINE void vector_dispatch(const float* x, const std::uint16_t* index16, const std::uint32_t* index32,
                                       const float* values, const std::uint32_t* row_start, std::int64_t row_begin,
                                       std::int64_t row_end, const Epilogue& epilogue, const float* residual, float* y) {
  if (index16) {
    vector_of<R>(x, index16, values, row_start, row_begin, row_end, epilogue, residual, y);
  } else {
    vector_of<R>(x, index32, values, row_start, row_begin, row_end, epilogue, residual, y);
  }
}

void vector(const float* x, const std::uint16_t* index16, const std::uint32_t* index32, const float* values,
            const std::uint32_t* row_start, std::int64_t row_begin, std::int64_t row_end, int block,
            const Epilogue& epilogue, const float* residual, float* y) {
  switch (block) {
    case 1:
      return vector_dispatch<1>(x, index16, index32, values, row_start, row_begin, row_end, epilogue, residual, y);
    case 2:
      return vector_dispatch<2>(x, index16, index32, values, row_start, row_begin, row_end, epilogue, residual, y);
    default:
      return vector_dispatch<4>(x, index16, index32, values, row_start, row_begin, row_end, epilogue, residual, y);
  }
}

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
                        SPARSEPIPE_NAMESPACE::vector};                                                      \
  }
