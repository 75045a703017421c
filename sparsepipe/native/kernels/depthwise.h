// Depthwise convolutions: part of kernels/template.h, inside its namespaces.

// R output rows of a 3 x 3 depthwise convolution with row step S: an input row is loaded once for all that use it.
template <int R, int S>
SPARSEPIPE_INLINE void depthwise3x3(const DepthwiseArgs& a, const vf (&w)[9], std::int64_t row) {
  const Epilogue epilogue = a.epilogue;  // copies: the compiler cannot know that stores leave them alone
  const std::int64_t pitch = a.pitch, columns = a.columns;
  const float* from[3] = {a.stage + row * S * pitch + a.column[0], a.stage + row * S * pitch + a.column[1],
                          a.stage + row * S * pitch + a.column[2]};
  float* y = a.y + row * columns;
  const vf bias = broadcast(a.bias);
  for (std::int64_t column = 0; column < columns; column += kLanes) {
    vf sum[R];
    SPARSEPIPE_UNROLL
    for (int r = 0; r < R; ++r) sum[r] = bias;
    SPARSEPIPE_UNROLL
    for (int i = 0; i < (R - 1) * S + 3; ++i) {
      SPARSEPIPE_UNROLL
      for (int j = 0; j < 3; ++j) {
        const vf x = load(from[j] + i * pitch + column);
        SPARSEPIPE_UNROLL
        for (int r = 0; r < R; ++r) {
          if (i - r * S >= 0 && i - r * S < 3) sum[r] += w[(i - r * S) * 3 + j] * x;
        }
      }
    }
    const std::int64_t left = columns - column;
    SPARSEPIPE_UNROLL
    for (int r = 0; r < R; ++r) {
      const vf v = activate(sum[r], epilogue);
      if (left >= kLanes) {
        store(y + r * columns + column, v);
      } else {
        store_some(y + r * columns + column, v, static_cast<int>(left));
      }
    }
  }
}

template <int S>
void depthwise3x3_rows(const DepthwiseArgs& a) {
  vf w[9];
  for (int i = 0; i < 9; ++i) w[i] = broadcast(a.weights[i]);
  std::int64_t row = 0;
  if constexpr (SPARSEPIPE_REGISTERS >= 32) {
    for (; row + 4 <= a.rows; row += 4) depthwise3x3<4, S>(a, w, row);
  }
  for (; row + 2 <= a.rows; row += 2) depthwise3x3<2, S>(a, w, row);
  if (row < a.rows) depthwise3x3<1, S>(a, w, row);
}

void depthwise(const DepthwiseArgs& a) {
  if (a.kernel_h == 3 && a.kernel_w == 3 && a.row_dilation == 1 && a.row_step <= 2) {
    return a.row_step == 1 ? depthwise3x3_rows<1>(a) : depthwise3x3_rows<2>(a);
  }
  for (std::int64_t row = 0; row < a.rows; ++row) {
    for (std::int64_t c = 0; c < a.columns; c += kLanes) {
      vf sum = broadcast(a.bias);
      for (std::int32_t i = 0; i < a.kernel_h; ++i) {
        const float* from = a.stage + (row * a.row_step + i * a.row_dilation) * a.pitch + c;
        for (std::int32_t j = 0; j < a.kernel_w; ++j) {
          sum += broadcast(a.weights[i * a.kernel_w + j]) * load(from + a.column[j]);
        }
      }
      float* y = a.y + row * a.columns + c;
      const vf v = activate(sum, a.epilogue);
      if (a.columns - c >= kLanes) {
        store(y, v);
      } else {
        store_some(y, v, static_cast<int>(a.columns - c));
      }
    }
  }
}

// Planes without a stage: three or four loads for each row of the input, masked where they reach beyond it. Only where masks are
// in the instruction set. A Strip is a vector of neighbouring output columns: it reads the inputs of the three kernel
// columns for them from a row, and stores them.
#if defined(__AVX512F__) && SPARSEPIPE_LANES == 16
constexpr bool kPlanes = true;
constexpr bool kMasksAreFree = true;  // others would only be more code

SPARSEPIPE_INLINE vf load_masked(const float* p, __mmask16 mask) {
  return reinterpret_cast<vf>(_mm512_maskz_loadu_ps(mask, p));
}

template <int S>
struct Strip {
  std::int64_t column, first;  // the first output, and the first input
  __mmask16 mask[3], stored;

  Strip() = default;
  Strip(const PlanesArgs& a, std::int64_t column) : column(column), first(column * S - a.left) {
    stored = lanes_between(0, a.out_width - column);
    for (int j = 0; j < 3; ++j) {
      const std::int64_t from = first + (S == 1 ? j : 16 * j);
      mask[j] = lanes_between(-from, a.width - from);
    }
  }

  template <bool>
  SPARSEPIPE_INLINE void read(const float* row, bool inside, vf (&x)[3]) const {
    const float* p = row + first;
    const auto masked = [&](int j) { return inside ? mask[j] : static_cast<__mmask16>(0); };
    if constexpr (S == 1) {
      for (int j = 0; j < 3; ++j) x[j] = load_masked(p + j, masked(j));
    } else {
      const vf a = load_masked(p, masked(0)), b = load_masked(p + 16, masked(1));
      const vf c = load_masked(p + 32, static_cast<__mmask16>(masked(2) & 1));
      x[0] = __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
      x[1] = __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
      x[2] = next_lanes(x[0], c);
    }
  }

  SPARSEPIPE_INLINE void write(float* row, vf v, const float*) const {
    _mm512_mask_storeu_ps(row + column, stored, reinterpret_cast<__m512>(v));
  }
};
#elif defined(__AVX2__) && SPARSEPIPE_LANES == 8
constexpr bool kPlanes = true;
constexpr bool kMasksAreFree = false;

template <int S>
struct Strip {
  static constexpr int kLoads = S == 1 ? 3 : 4;
  std::int64_t column, first;  // the first output, and the first input
  bool whole;                  // no input lies beyond the row
  __m256i mask[kLoads];

  Strip() = default;
  // The last strip of a row reaches back, since stores of parts of vectors are slow.
  Strip(const PlanesArgs& a, std::int64_t from)
      : column(a.out_width < kLanes ? 0 : (a.out_width - kLanes < from ? a.out_width - kLanes : from)),
        first(column * S - a.left) {
    whole = first >= 0 && first + offset(kLoads - 1) + kLanes <= a.width;
    const auto lanes = [](std::int64_t n) { return static_cast<int>(n < 0 ? 0 : (n > kLanes ? kLanes : n)); };
    for (int i = 0; i < kLoads; ++i) {
      const std::int64_t start = first + offset(i);
      mask[i] = lanes_between(lanes(-start), lanes(a.width - start));
    }
  }

  // Of load i. With stride 2 the even and odd ones of [0, 16), and the even ones of [2, 18).
  static constexpr std::int64_t offset(int i) { return S == 1 ? i : i % 2 * kLanes + i / 2 * 2; }

  template <bool Masked>
  SPARSEPIPE_INLINE void read(const float* row, bool, vf (&x)[3]) const {
    const float* p = row + first;
    const auto input = [&](int i) {
      if constexpr (!Masked) return load(p + offset(i));
      return reinterpret_cast<vf>(_mm256_maskload_ps(p + offset(i), mask[i]));
    };
    if constexpr (S == 1) {
      for (int i = 0; i < 3; ++i) x[i] = input(i);
    } else {  // within halves of a vector, which is one instruction; `write` puts the sums in order
      const vf a = input(0), b = input(1), c = input(2), d = input(3);
      x[0] = __builtin_shufflevector(a, b, 0, 2, 8, 10, 4, 6, 12, 14);
      x[1] = __builtin_shufflevector(a, b, 1, 3, 9, 11, 5, 7, 13, 15);
      x[2] = __builtin_shufflevector(c, d, 0, 2, 8, 10, 4, 6, 12, 14);
    }
  }

  // What a narrow plane stores beyond its row lies in rows that are stored later, or beyond `end`.
  SPARSEPIPE_INLINE void write(float* row, vf v, const float* end) const {
    if constexpr (S == 2) v = __builtin_shufflevector(v, v, 0, 1, 4, 5, 2, 3, 6, 7);
    const std::int64_t left = end - (row + column);
    if (left >= kLanes) {
      store(row + column, v);
    } else {
      store_some(row + column, v, static_cast<int>(left));
    }
  }
};
#else
constexpr bool kPlanes = false;
#endif

#if (defined(__AVX512F__) && SPARSEPIPE_LANES == 16) || (defined(__AVX2__) && SPARSEPIPE_LANES == 8)
// R output rows of a strip.
template <int R, int S, bool Masked>
SPARSEPIPE_INLINE void plane_rows(const PlanesArgs& a, const float* plane, const vf (&w)[9], vf bias, float* y,
                                  const float* end, std::int64_t row, const Strip<S>& strip, const Bounds& bounds) {
  const std::int64_t top = (a.first_row + row) * S - a.top;  // of the rows that are read
  vf sum[R];
  SPARSEPIPE_UNROLL
  for (int r = 0; r < R; ++r) sum[r] = bias;
  if (a.ahead != 0) {  // without those that it shares with the rows before
    const float* ahead = plane + a.ahead + (top + 3 - S) * a.width + strip.column * S;
    SPARSEPIPE_UNROLL
    for (int i = 0; i < R * S; ++i) {
      SPARSEPIPE_UNROLL
      for (int j = 0; j < S; ++j) __builtin_prefetch(ahead + i * a.width + j * kLanes, 0, 3);
    }
  }
  SPARSEPIPE_UNROLL
  for (int i = 0; i < (R - 1) * S + 3; ++i) {
    const std::int64_t in = top + i;
    const bool inside = in >= 0 && in < a.height;
    if (!kMasksAreFree && !inside) continue;
    vf x[3];
    strip.template read<Masked>(plane + in * a.width, inside, x);
    SPARSEPIPE_UNROLL
    for (int r = 0; r < R; ++r) {
      if (i - r * S < 0 || i - r * S > 2) continue;
      SPARSEPIPE_UNROLL
      for (int j = 0; j < 3; ++j) sum[r] += w[(i - r * S) * 3 + j] * x[j];
    }
  }
  SPARSEPIPE_UNROLL
  for (int r = 0; r < R; ++r) strip.write(y + (row + r) * a.out_width, bounds(sum[r]), end);
}

// A few rows at a time from left to right: planes larger than the L1 cache are read in the order in which they lie there.
template <int S>
void planes_of(const PlanesArgs& a) {
  const Bounds bounds = bounds_of(limits_of(a.epilogue));
  const bool curved = a.epilogue.activation > Activation::kClip;
  const float* const end = a.y + a.channels * a.y_stride;
  constexpr int kStrips = 8;
  Strip<S> strip[kStrips];
  for (std::int64_t begin = 0; begin < a.out_width; begin += kStrips * kLanes) {
    int strips = 0;
    for (std::int64_t column = begin; strips < kStrips && column < a.out_width; ++strips, column += kLanes) {
      strip[strips] = Strip<S>(a, column);
    }
    for (std::int64_t c = 0; c < a.channels; ++c) {
      const float* plane = a.x + c * a.height * a.width;
      float* y = a.y + c * a.y_stride;
      vf w[9];
      for (int i = 0; i < 9; ++i) w[i] = broadcast(a.weights[c * 9 + i]);
      const vf bias = broadcast(a.epilogue.bias ? a.epilogue.bias[c] : 0.0f);
      std::int64_t row = 0;
      const auto next = [&](auto rows) {
        constexpr int R = decltype(rows)::value;
        for (; row + R <= a.rows; row += R) {
          for (int s = 0; s < strips; ++s) {
            if constexpr (!kMasksAreFree) {
              if (strip[s].whole) {
                plane_rows<R, S, false>(a, plane, w, bias, y, end, row, strip[s], bounds);
                continue;
              }
            }
            plane_rows<R, S, true>(a, plane, w, bias, y, end, row, strip[s], bounds);
          }
        }
      };
      next(Number<4>{});
      next(Number<2>{});
      next(Number<1>{});
      // Curves are no part of the loop: their constants would take its registers.
      const bool last = begin + kStrips * kLanes >= a.out_width;
      if (curved && last) curve(y, a.rows * a.out_width, a.epilogue);
    }
  }
}

void depthwise_planes(const PlanesArgs& a, int stride) { return stride == 1 ? planes_of<1>(a) : planes_of<2>(a); }
#else
void depthwise_planes(const PlanesArgs&, int) {}
#endif
