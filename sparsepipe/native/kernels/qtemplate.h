// The inner loops for int8 on the vectors of qvector.h. Compiled once per instruction set, each time with
// SPARSEPIPE_LANES, SPARSEPIPE_NAMESPACE, SPARSEPIPE_REGISTERS and the product (SPARSEPIPE_DOT or SPARSEPIPE_MADD) set
// by the including file.
#include "kernels/qvector.h"

namespace sparsepipe::kernels {
namespace {
namespace SPARSEPIPE_NAMESPACE {

template <int R>
struct QEntry {
  std::int32_t offset;
  std::int32_t weights[R * kWords];
};

template <int R, int T>
SPARSEPIPE_INLINE void multiply(vi (&sum)[R][T], const QEntry<R>& entry, const std::uint8_t* x) {
  const std::uint8_t* at = x + entry.offset;
  Weight w[R];
  SPARSEPIPE_UNROLL
  for (int r = 0; r < R; ++r) w[r] = weight(entry.weights + r * kWords);
  SPARSEPIPE_UNROLL
  for (int t = 0; t < T; ++t) {
    const Input in = prepare(load(at + t * kPositions));
    SPARSEPIPE_UNROLL
    for (int r = 0; r < R; ++r) sum[r][t] = dot(sum[r][t], in, w[r]);
  }
}

SPARSEPIPE_INLINE vb limited(vb v, const Requantize& q) {
  const vb low = broadcast(q.low), high = broadcast(q.high);
  v = v > low ? v : low;
  v = v < high ? v : high;
  return v ^ broadcast(q.flip);
}

// Bytes of T vectors of sums of one channel. `residual`: of the same positions, where there is one. kPlain: uint8 within
// the bounds of the type, and no sum comes near the limits of int32.
template <int T, bool kAdds, bool kPlain>
SPARSEPIPE_INLINE void requantized(const vi (&sum)[T], const Requantize& q, std::int64_t channel,
                                   const std::uint8_t* residual, vb (&bytes)[(T + 3) / 4]) {
  constexpr int kWhole = (T + 3) / 4 * 4;
  const vf scale = broadcast(q.scale[channel]), least = broadcast(q.least), most = broadcast(q.most);
  const vf far = broadcast(65536.0f);
  vi result[kWhole] = {};
  SPARSEPIPE_UNROLL
  for (int t = 0; t < T; ++t) {
    vf v = to_float(sum[t]) * scale;
    if constexpr (kAdds) {
      // Adding 1.5 * 2^23 rounds to an integer in the low bits. The output of the product is a byte before it meets the
      // residual, so it saturates here, too.
      v = at_most(at_least(v, least), most) + broadcast(12582912.0f);
      v -= broadcast(12582912.0f - q.zero_point);
      vi other = from_bytes(residual + t * kLanes);
      if constexpr (!kPlain) {
        const vi flip = broadcast(std::int32_t{q.flip});
        other = (other ^ flip) - flip;  // flipped twice: the sign extended
      }
      v = multiply_add(v, broadcast(q.sum_ratio),
                       multiply_add(to_float(other), broadcast(q.residual_ratio), broadcast(q.fixed)));
      result[t] = kPlain ? rounded_small(v) : rounded(v, -far, far);
    } else {
      result[t] = kPlain ? rounded_small(v) : rounded(v, least, most);
    }
  }
  SPARSEPIPE_UNROLL
  for (int i = 0; i < kWhole / 4; ++i) {
    bytes[i] = to_bytes(result[4 * i], result[4 * i + 1], result[4 * i + 2], result[4 * i + 3], q.shift);
    if constexpr (!kPlain) bytes[i] = limited(bytes[i], q);
  }
}

// Not inlined: each is in a hundred tiles.
__attribute__((noinline)) void take_runs(const Run* runs, std::int32_t count, const std::uint8_t* from,
                                         std::uint8_t* stage) {
  for (std::int32_t i = 0; i < count; ++i) copy_bytes(from + runs[i].to, stage + runs[i].from, runs[i].count);
}
__attribute__((noinline)) void put_runs(const Run* runs, std::int32_t count, const std::uint8_t* stage,
                                        std::uint8_t* to) {
  for (std::int32_t i = 0; i < count; ++i) copy_bytes(stage + runs[i].from, to + runs[i].to, runs[i].count);
}

// `a` must not be what the loop over the entries reads: constants of this would stay in registers that it needs.
template <int R, int T, bool kAdds, bool kPlain>
SPARSEPIPE_INLINE void finish(const vi (&sum)[R][T], const QRowsArgs& a, std::int64_t row) {
  constexpr int kVectors = (T + 3) / 4;
  const std::int64_t shift = (row - a.row_begin) * R * a.y_stride;
  const Run& first = a.runs[0];
  const bool one = a.run_count == 1 && first.from == 0;
  SPARSEPIPE_UNROLL
  for (int r = 0; r < R; ++r) {
    std::uint8_t* y = a.y + shift + r * a.y_stride;
    alignas(64) std::uint8_t stage[kVectors * kPositions];
    const std::uint8_t* residual = nullptr;
    if constexpr (kAdds) {
      const std::uint8_t* from = a.residual + shift + r * a.y_stride;
      residual = from + first.to;
      if (!one || first.count < T * kLanes) {
        take_runs(a.runs, a.run_count, from, stage);
        residual = stage;
      }
    }
    vb bytes[kVectors];
    requantized<T, kAdds, kPlain>(sum[r], a.requantize, row * R + r, residual, bytes);
    if (one) {
      std::int64_t left = first.count;
      SPARSEPIPE_UNROLL
      for (int i = 0; i < kVectors; ++i, left -= kPositions) {
        if (left > 0) store_bytes(y + first.to + i * kPositions, bytes[i], left < kPositions ? left : kPositions);
      }
    } else {
      SPARSEPIPE_UNROLL
      for (int i = 0; i < kVectors; ++i) *reinterpret_cast<vb*>(stage + i * kPositions) = bytes[i];
      put_runs(a.runs, a.run_count, stage, y);
    }
  }
}

// Independent sums: enough to hide the latency of the products even for small tiles.
template <int R, int T>
constexpr int kChains = R * T >= 8 ? 1 : (R * T >= 4 ? 2 : 4);

template <int R, int T, bool kAdds, bool kPlain>
SPARSEPIPE_INLINE void rows_of(const QRowsArgs& a) {
  constexpr int C = kChains<R, T>;
  const auto* entries = reinterpret_cast<const QEntry<R>*>(a.entries);
  for (std::int64_t row = a.row_begin; row < a.row_end; ++row) {
    vi sum[C][R][T];
    SPARSEPIPE_UNROLL
    for (int r = 0; r < R; ++r) {
      const vi bias = broadcast(a.requantize.bias[row * R + r]);
      SPARSEPIPE_UNROLL
      for (int t = 0; t < T; ++t) {
        sum[0][r][t] = bias;
        SPARSEPIPE_UNROLL
        for (int c = 1; c < C; ++c) sum[c][r][t] = vi{};
      }
    }
    const QEntry<R>* e = entries + a.row_start[row];
    const QEntry<R>* const end = entries + a.row_start[row + 1];
    constexpr int kAheadEntries = C > 1 ? 256 : 128;  // as in rows.h
    if constexpr (C > 1) {
      for (; end - e >= C; e += C) {
        __builtin_prefetch(e + kAheadEntries, 0, 3);
        SPARSEPIPE_UNROLL
        for (int c = 0; c < C; ++c) multiply<R, T>(sum[c], e[c], a.x);
      }
    } else {
      constexpr int kOfLine = sizeof(QEntry<R>) < 64 ? static_cast<int>(64 / sizeof(QEntry<R>)) : 1;
      while (end - e > kOfLine) {
        __builtin_prefetch(e + kAheadEntries, 0, 3);
        for (const QEntry<R>* const line = e + kOfLine; e != line; ++e) multiply<R, T>(sum[0], *e, a.x);
      }
    }
    for (; e != end; ++e) multiply<R, T>(sum[0], *e, a.x);
    SPARSEPIPE_UNROLL
    for (int c = 1; c < C; ++c) {
      SPARSEPIPE_UNROLL
      for (int r = 0; r < R; ++r) {
        SPARSEPIPE_UNROLL
        for (int t = 0; t < T; ++t) sum[0][r][t] = add(sum[0][r][t], sum[c][r][t]);
      }
    }
    const QRowsArgs* hidden = &a;
    __asm__("" : "+r"(hidden));
    finish<R, T, kAdds, kPlain>(sum[0], *hidden, row);
  }
}

// Tiles that fit the register file: R * T sums, the weights of a block and an input.
template <int R>
constexpr int most_vectors() {
  constexpr int fit = (SPARSEPIPE_REGISTERS - 2 - (R < 4 ? R : (SPARSEPIPE_REGISTERS > 16 ? 4 : 1)) * kWords) / R;
  constexpr int cap = kLanes == 16 ? (R == 4 ? 5 : kMostQVectors) : (R == 4 ? 3 : 4);
  return fit < cap ? fit : cap;
}

template <int R, int T>
void rows_dispatch(const QRowsArgs& a, int vectors) {
  if constexpr (T <= most_vectors<R>()) {
    if (vectors != T) {
      rows_dispatch<R, T + 1>(a, vectors);
    } else if (a.residual) {
      a.requantize.plain ? rows_of<R, T, true, true>(a) : rows_of<R, T, true, false>(a);
    } else {
      a.requantize.plain ? rows_of<R, T, false, true>(a) : rows_of<R, T, false, false>(a);
    }
  }
}

void rows(const QRowsArgs& a, int block, int vectors) {
  switch (block) {
    case 1:
      return rows_dispatch<1, 1>(a, vectors);
    case 2:
      return rows_dispatch<2, 1>(a, vectors);
    default:
      return rows_dispatch<4, 1>(a, vectors);
  }
}

template <bool kPlain>
SPARSEPIPE_INLINE void strip_of(const QRowsArgs& a, std::int64_t count, std::uint8_t* stage) {
  constexpr int T = 4;  // a vector of bytes
  const std::int64_t row = a.row_begin;
  const auto* const entries = reinterpret_cast<const QEntry<1>*>(a.entries);
  const QEntry<1>* const begin = entries + a.row_start[row];
  const QEntry<1>* const end = entries + a.row_start[row + 1];
  const vi bias = broadcast(a.requantize.bias[row]);
  for (std::int64_t i = 0; i < count; i += kPositions) {
    vi sum[1][T] = {{bias, bias, bias, bias}};
    for (const QEntry<1>* e = begin; e != end; ++e) multiply<1, T>(sum, *e, a.x + i * kQuad);
    vb bytes[1];
    requantized<T, false, kPlain>(sum[0], a.requantize, row, nullptr, bytes);
    *reinterpret_cast<loose_vb*>(stage + i) = bytes[0];
  }
  put_runs(a.runs, a.run_count, stage, a.y);
}

void strip(const QRowsArgs& a, std::int64_t count, std::uint8_t* stage) {
  a.requantize.plain ? strip_of<true>(a, count, stage) : strip_of<false>(a, count, stage);
}

void pack(const std::uint8_t* x, std::int64_t stride, std::int64_t channels, std::int64_t count, std::uint8_t flip,
          std::uint8_t* out, std::int64_t out_stride) {
  const vb mask = broadcast(flip);
  const std::int64_t whole = count / kPositions * kPositions;
  alignas(64) std::uint8_t last[kQuad * kPositions];
  for (std::int64_t first = 0; first < channels; first += kQuad, out += out_stride) {
    const std::uint8_t* plane[kQuad];
    for (std::int64_t c = 0; c < kQuad; ++c) plane[c] = x + (first + c < channels ? first + c : first) * stride;
    const auto bytes = [&](const std::uint8_t* p) { return *reinterpret_cast<const loose_vb*>(p) ^ mask; };
    for (std::int64_t i = 0; i < whole; i += kPositions) {
      interleave(bytes(plane[0] + i), bytes(plane[1] + i), bytes(plane[2] + i), bytes(plane[3] + i), out + 4 * i);
    }
    if (whole < count) {
      const std::int64_t left = count - whole;
      interleave(load_bytes(plane[0] + whole, left) ^ mask, load_bytes(plane[1] + whole, left) ^ mask,
                 load_bytes(plane[2] + whole, left) ^ mask, load_bytes(plane[3] + whole, left) ^ mask, last);
      for (std::int64_t i = 0; i < left; i += kLanes) store(out + 4 * (whole + i), load(last + 4 * i));
    }
  }
}

template <int N>
struct Bytes {
  typedef std::uint8_t type __attribute__((vector_size(N)));
  typedef std::uint8_t loose __attribute__((vector_size(N), aligned(1), may_alias));
  typedef std::uint16_t pairs __attribute__((vector_size(2 * N)));
  typedef std::uint16_t loose_pairs __attribute__((vector_size(2 * N), aligned(1), may_alias));
};

// N of 2 N bytes: 0, 2, 4, ... or 1, 3, 5, ...
template <int N, int kFirst>
SPARSEPIPE_INLINE void every_second(const std::uint8_t* from, std::uint8_t* to) {
  using V = Bytes<N>;
  const typename V::pairs in = *reinterpret_cast<const typename V::loose_pairs*>(from) >> (8 * kFirst);
  *reinterpret_cast<typename V::loose*>(to) = __builtin_convertvector(in & 0xff, typename V::type);
}

// 0, 2, ... of 2 count - 1 bytes.
template <int N>
SPARSEPIPE_INLINE void halve(const std::uint8_t* from, std::int64_t count, std::uint8_t* to) {
  if (count > N) {
    for (std::int64_t i = 0; i + N < count; i += N) every_second<N, 0>(from + 2 * i, to + i);
    // The byte after the last one that is wanted may lie outside of the tensor: the last vector ends with that one.
    every_second<N, 1>(from + 2 * (count - N) - 1, to + count - N);
  } else if constexpr (N > 4) {
    halve<N / 2>(from, count, to);
  } else {
    for (std::int64_t i = 0; i < count; ++i) to[i] = from[2 * i];
  }
}

void fill(const std::uint8_t* plane, const QStageRow* rows, std::int32_t row_count, std::int32_t step,
          std::uint8_t* stage) {
  for (const QStageRow* row = rows; row != rows + row_count; ++row) {
    const std::uint8_t* from = plane + row->source;
    std::uint8_t* to = stage + row->target;
    if (step == 1) {
      copy_bytes(from, to, row->count);
    } else if (step == 2) {
      halve<(kLanes >= 8 ? 16 : 8)>(from, row->count, to);
    } else {
      for (std::int64_t i = 0; i < row->count; ++i) to[i] = from[i * step];
    }
  }
}

void largest(const std::uint8_t* const* rows, std::int32_t row_count, std::int64_t count, std::uint8_t flip,
             std::uint8_t* to) {
  const vb mask = broadcast(flip);
  for (std::int64_t i = 0; i < count; i += kPositions) {
    const std::int64_t left = count - i;
    const auto bytes = [&](std::int32_t k) {
      return (left < kPositions ? load_bytes(rows[k] + i, left) : *reinterpret_cast<const loose_vb*>(rows[k] + i)) ^ mask;
    };
    vb v = bytes(0);
    for (std::int32_t k = 1; k < row_count; ++k) {
      const vb other = bytes(k);
      v = v > other ? v : other;
    }
    store_bytes(to + i, v, left < kPositions ? left : kPositions);
  }
}

void lookup(const std::uint8_t* table, const std::uint8_t* x, std::int64_t count, std::uint8_t* y) {
  std::int64_t i = 0;
#if defined(SPARSEPIPE_TABLE)
  const Table held(table);
  const auto bytes = [](const std::uint8_t* p) { return *reinterpret_cast<const loose_vb*>(p); };
  for (; i + 2 * kPositions <= count; i += 2 * kPositions) {
    const vb first = held.of(bytes(x + i)), second = held.of(bytes(x + i + kPositions));
    *reinterpret_cast<loose_vb*>(y + i) = first;
    *reinterpret_cast<loose_vb*>(y + i + kPositions) = second;
  }
#endif
  for (; i < count; ++i) y[i] = table[x[i]];
}

// R sums of a block row of one input vector: an entry's bytes of x meet the weights of R outputs side by side.
template <int R>
SPARSEPIPE_INLINE void vector_of(const std::uint8_t* x, const char* data, const std::uint32_t* row_start,
                                 std::int64_t row_begin, std::int64_t row_end, std::int32_t* sums) {
  const auto* entries = reinterpret_cast<const QEntry<R>*>(data);
  constexpr int C = 4;  // chains
  for (std::int64_t row = row_begin; row < row_end; ++row) {
    const QEntry<R>* e = entries + row_start[row];
    const QEntry<R>* const end = entries + row_start[row + 1];
    Sums<R> sum[C] = {};
    for (; end - e >= C; e += C) {
      SPARSEPIPE_UNROLL
      for (int c = 0; c < C; ++c) sum[c].add(x + e[c].offset, e[c].weights);
    }
    for (; e != end; ++e) sum[0].add(x + e->offset, e->weights);
    SPARSEPIPE_UNROLL
    for (int r = 0; r < R; ++r) {
      const std::uint32_t total = sum[0].of(r) + sum[1].of(r) + sum[2].of(r) + sum[3].of(r);
      sums[(row - row_begin) * R + r] = static_cast<std::int32_t>(total);
    }
  }
}

void vector(const std::uint8_t* x, const char* entries, const std::uint32_t* row_start, std::int64_t row_begin,
            std::int64_t row_end, int block, std::int32_t* sums) {
  switch (block) {
    case 1:
      return vector_of<1>(x, entries, row_start, row_begin, row_end, sums);
    case 2:
      return vector_of<2>(x, entries, row_start, row_begin, row_end, sums);
    default:
      return vector_of<4>(x, entries, row_start, row_begin, row_end, sums);
  }
}

void requantize(const std::int32_t* sums, std::int64_t first, std::int64_t count, const Requantize& q,
                std::uint8_t* y) {
  const vf least = broadcast(q.least), most = broadcast(q.most);
  for (std::int64_t i = 0; i < count; i += kPositions) {
    alignas(64) std::int32_t sum[kPositions] = {}, bias[kPositions] = {};
    alignas(64) float scale[kPositions] = {};
    const std::int64_t n = count - i < kPositions ? count - i : kPositions;
    for (std::int64_t k = 0; k < n; ++k) {
      sum[k] = sums[i + k];
      bias[k] = q.bias[first + i + k];
      scale[k] = q.scale[first + i + k];
    }
    vi result[4];
    SPARSEPIPE_UNROLL
    for (int t = 0; t < 4; ++t) {
      const vi total = add(load(sum + t * kLanes), load(bias + t * kLanes));
      result[t] = rounded(to_float(total) * reinterpret_cast<vf>(load(scale + t * kLanes)), least, most);
    }
    alignas(64) std::uint8_t bytes[kPositions];
    *reinterpret_cast<loose_vb*>(bytes) = limited(to_bytes(result[0], result[1], result[2], result[3], q.shift), q);
    copy_bytes(bytes, y + i, n);
  }
}

void add_bytes(const std::uint8_t* q, const std::uint8_t* residual, std::int64_t count, const Requantize& how,
               std::uint8_t* y) {
  const vi flip = broadcast(std::int32_t{how.flip});
  const vf far = broadcast(65536.0f);
  for (std::int64_t i = 0; i < count; i += kPositions) {
    const std::int64_t n = count - i < kPositions ? count - i : kPositions;
    const std::uint8_t *one = q + i, *other = residual + i;
    alignas(64) std::uint8_t held[2][kPositions];
    if (n < kPositions) {
      *reinterpret_cast<vb*>(held[0]) = load_bytes(one, n);
      *reinterpret_cast<vb*>(held[1]) = load_bytes(other, n);
      one = held[0];
      other = held[1];
    }
    vi result[4];
    SPARSEPIPE_UNROLL
    for (int t = 0; t < 4; ++t) {
      const vf a = to_float((from_bytes(one + t * kLanes) ^ flip) - flip);  // flipped twice: the sign extended
      const vf b = to_float((from_bytes(other + t * kLanes) ^ flip) - flip);
      const vf v = multiply_add(a, broadcast(how.sum_ratio),
                                multiply_add(b, broadcast(how.residual_ratio), broadcast(how.fixed)));
      result[t] = rounded(v, -far, far);
    }
    store_bytes(y + i, limited(to_bytes(result[0], result[1], result[2], result[3], how.shift), how), n);
  }
}

}  // namespace SPARSEPIPE_NAMESPACE
}  // namespace
}  // namespace sparsepipe::kernels

#define SPARSEPIPE_DEFINE_QISA(variable, text, x_is_signed, check)                                            \
  namespace sparsepipe::kernels {                                                                             \
  extern const QIsa variable;                                                                                 \
  const QIsa variable = {text,                                                                                \
                         SPARSEPIPE_LANES,                                                                    \
                         {0, SPARSEPIPE_NAMESPACE::most_vectors<1>(), SPARSEPIPE_NAMESPACE::most_vectors<2>(), \
                          0, SPARSEPIPE_NAMESPACE::most_vectors<4>()},                                        \
                         SPARSEPIPE_NAMESPACE::kWords == 2,                                                   \
                         x_is_signed,                                                                         \
                         check,                                                                               \
                         SPARSEPIPE_NAMESPACE::rows,                                                          \
                         SPARSEPIPE_NAMESPACE::strip,                                                         \
                         SPARSEPIPE_NAMESPACE::pack,                                                          \
                         SPARSEPIPE_NAMESPACE::fill,                                                          \
                         SPARSEPIPE_NAMESPACE::largest,                                                       \
                         SPARSEPIPE_NAMESPACE::lookup,                                                        \
                         SPARSEPIPE_NAMESPACE::vector,                                                        \
                         SPARSEPIPE_NAMESPACE::requantize,                                                    \
                         SPARSEPIPE_NAMESPACE::add_bytes};                                                    \
  }
