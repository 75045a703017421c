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

// Bytes of T vectors of sums of one channel. `residual`: of the same positions, where there is one.
template <int T, bool kAdds>
SPARSEPIPE_INLINE void requantized(const vi (&sum)[T], const Requantize& q, std::int64_t channel,
                                   const std::uint8_t* residual, vb (&bytes)[(T + 3) / 4]) {
  constexpr int kWhole = (T + 3) / 4 * 4;
  const vf scale = broadcast(q.scale[channel]), least = broadcast(q.least), most = broadcast(q.most);
  vi result[kWhole] = {};
  SPARSEPIPE_UNROLL
  for (int t = 0; t < T; ++t) {
    result[t] = rounded(to_float(sum[t]) * scale, least, most);
    if constexpr (kAdds) {
      // Saturated here, too: the output of the product is a byte before it meets the residual.
      const vf inner = at_least(to_float(result[t]), least) + broadcast(q.zero_point);
      const vi flip = broadcast(std::int32_t{q.flip});
      const vf other = to_float((from_bytes(residual + t * kLanes) ^ flip) - flip);  // flipped twice: the sign extended
      const vf total = multiply_add(inner, broadcast(q.sum_ratio),
                                    multiply_add(other, broadcast(q.residual_ratio), broadcast(q.fixed)));
      result[t] = rounded(total, broadcast(-65536.0f), broadcast(65536.0f));
    }
  }
  SPARSEPIPE_UNROLL
  for (int i = 0; i < kWhole / 4; ++i) {
    bytes[i] = limited(to_bytes(result[4 * i], result[4 * i + 1], result[4 * i + 2], result[4 * i + 3], q.shift), q);
  }
}

// `a` must not be what the loop over the entries reads: constants of this would stay in registers that it needs.
template <int R, int T, bool kAdds>
SPARSEPIPE_INLINE void finish(const vi (&sum)[R][T], const QRowsArgs& a, std::int64_t row) {
  constexpr int kVectors = (T + 3) / 4;
  const std::int64_t shift = (row - a.row_begin) * R * a.y_stride;
  const Run& first = a.runs[0];
  const bool one = a.run_count == 1;
  SPARSEPIPE_UNROLL
  for (int r = 0; r < R; ++r) {
    std::uint8_t* y = a.y + shift + r * a.y_stride;
    alignas(64) std::uint8_t stage[kVectors * kPositions];
    const std::uint8_t* residual = nullptr;
    if constexpr (kAdds) {
      const std::uint8_t* from = a.residual + shift + r * a.y_stride;
      residual = from + first.to;
      if (!one || first.count < T * kLanes) {
        for (std::int32_t i = 0; i < a.run_count; ++i) {
          copy_bytes(from + a.runs[i].to, stage + a.runs[i].from, a.runs[i].count);
        }
        residual = stage;
      }
    }
    vb bytes[kVectors];
    requantized<T, kAdds>(sum[r], a.requantize, row * R + r, residual, bytes);
    if (one) {
      std::int64_t left = first.count;
      SPARSEPIPE_UNROLL
      for (int i = 0; i < kVectors; ++i, left -= kPositions) {
        if (left > 0) store_bytes(y + first.to + i * kPositions, bytes[i], left < kPositions ? left : kPositions);
      }
    } else {
      SPARSEPIPE_UNROLL
      for (int i = 0; i < kVectors; ++i) *reinterpret_cast<vb*>(stage + i * kPositions) = bytes[i];
      for (std::int32_t i = 0; i < a.run_count; ++i) {
        copy_bytes(stage + a.runs[i].from, y + a.runs[i].to, a.runs[i].count);
      }
    }
  }
}

// Independent sums: enough to hide the latency of the products even for small tiles.
template <int R, int T>
constexpr int kChains = R * T >= 8 ? 1 : (R * T >= 4 ? 2 : 4);

template <int R, int T, bool kAdds>
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
    if constexpr (C > 1) {
      for (; end - e >= C; e += C) {
        SPARSEPIPE_UNROLL
        for (int c = 0; c < C; ++c) multiply<R, T>(sum[c], e[c], a.x);
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
    finish<R, T, kAdds>(sum[0], *hidden, row);
  }
}

// Tiles that fit the register file: R * T sums, the weights of a block and an input.
template <int R>
constexpr int most_vectors() {
  constexpr int fit = (SPARSEPIPE_REGISTERS - 2 - (R < 4 ? R : (SPARSEPIPE_REGISTERS > 16 ? 4 : 1)) * kWords) / R;
  constexpr int cap = R == 4 ? 6 : kMostQVectors;
  return fit < cap ? fit : cap;
}

template <int R, int T>
void rows_dispatch(const QRowsArgs& a, int vectors) {
  if constexpr (T <= most_vectors<R>()) {
    if (vectors != T) {
      rows_dispatch<R, T + 1>(a, vectors);
    } else if (a.residual) {
      rows_of<R, T, true>(a);
    } else {
      rows_of<R, T, false>(a);
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

void pack(const std::uint8_t* x, std::int64_t stride, std::int64_t channels, std::int64_t count, std::uint8_t flip,
          std::uint8_t* out, std::int64_t out_stride) {
  const vb mask = broadcast(flip);
  const std::int64_t whole = count / kPositions * kPositions;
  for (std::int64_t first = 0; first < channels; first += kQuad, out += out_stride) {
    const std::uint8_t* plane[kQuad];
    for (std::int64_t c = 0; c < kQuad; ++c) plane[c] = x + (first + c < channels ? first + c : first) * stride;
    const auto bytes = [&](const std::uint8_t* p) { return *reinterpret_cast<const loose_vb*>(p) ^ mask; };
    for (std::int64_t i = 0; i < whole; i += kPositions) {
      interleave(bytes(plane[0] + i), bytes(plane[1] + i), bytes(plane[2] + i), bytes(plane[3] + i), out + 4 * i);
    }
    if (whole < count) {
      alignas(64) std::uint8_t in[kQuad][kPositions] = {}, packed[kQuad * kPositions];
      for (int c = 0; c < kQuad; ++c) copy_bytes(plane[c] + whole, in[c], count - whole);
      interleave(bytes(in[0]), bytes(in[1]), bytes(in[2]), bytes(in[3]), packed);
      copy_bytes(packed, out + 4 * whole, 4 * (count - whole));
    }
  }
}

// 16 of 32 bytes: 0, 2, 4, ... or 1, 3, 5, ...
template <int kFirst>
SPARSEPIPE_INLINE bytes16 every_second(const std::uint8_t* from) {
  typedef std::uint16_t pairs __attribute__((vector_size(32), aligned(1), may_alias));
  typedef std::uint8_t bytes __attribute__((vector_size(16)));
  return __builtin_convertvector(*reinterpret_cast<const pairs*>(from) >> (8 * kFirst), bytes);
}

void fill(const std::uint8_t* plane, const QStageRow* rows, std::int32_t row_count, std::int32_t step,
          std::uint8_t* stage) {
  for (const QStageRow* row = rows; row != rows + row_count; ++row) {
    const std::uint8_t* from = plane + row->source;
    std::uint8_t* to = stage + row->target;
    if (step == 1) {
      copy_bytes(from, to, row->count);
      continue;
    }
    std::int32_t i = 0;
    if (step == 2 && row->count > 16) {
      for (; i + 16 < row->count; i += 16) *reinterpret_cast<bytes16*>(to + i) = every_second<0>(from + 2 * i);
      // The byte after the last one that is wanted may lie outside of the tensor: the last vector ends with that one.
      const std::int64_t last = row->count - 16;
      *reinterpret_cast<bytes16*>(to + last) = every_second<1>(from + 2 * last - 1);
      continue;
    }
    for (; i < row->count; ++i) to[i] = from[static_cast<std::int64_t>(i) * step];
  }
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
                         SPARSEPIPE_NAMESPACE::pack,                                                          \
                         SPARSEPIPE_NAMESPACE::fill,                                                          \
                         SPARSEPIPE_NAMESPACE::vector,                                                        \
                         SPARSEPIPE_NAMESPACE::requantize};                                                   \
  }
