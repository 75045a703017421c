// Convolutions of 7 x 7 with stride 2 by Winograd's algorithm along the rows, and a MaxPool. Part of kernels/template.h,
// inside its namespaces.
//
// Even and odd columns of the input meet four and three columns of the kernel: two convolutions of stride 1, whose sums
// are added. Four outputs of the first take 7 products instead of 16, F(4, 4) at the points 0, 1/2, -1/2, 1, -1, 2, -2;
// those of the second 6 instead of 12, F(4, 3) at the same points without 0, so that both share their sums. With the
// signal d and the filter g, y = A^T ((G g) * (B^T d)) (arXiv 1509.09308). ops/winograd_stem.cc has G.

// The columns 0 to 7 of 8 kLanes numbers, in vectors: a table of so many rows, transposed.
SPARSEPIPE_INLINE void split_columns(const float* row, float* to, std::int64_t pitch) {
  vf even[4], odd[4];
  SPARSEPIPE_UNROLL
  for (int i = 0; i < 4; ++i) {
    const vf a = load(row + 2 * i * kLanes), b = load(row + (2 * i + 1) * kLanes);
    even[i] = evens<kLanes>(a, b);
    odd[i] = odds<kLanes>(a, b);
  }
  const auto split = [&](const vf (&of)[4], float* column) {  // 0, 2, 4 and 6, or 1, 3, 5 and 7
    const vf even0 = evens<kLanes>(of[0], of[1]), even1 = evens<kLanes>(of[2], of[3]);
    const vf odd0 = odds<kLanes>(of[0], of[1]), odd1 = odds<kLanes>(of[2], of[3]);
    store(column, evens<kLanes>(even0, even1));
    store(column + 2 * pitch, evens<kLanes>(odd0, odd1));
    store(column + 4 * pitch, odds<kLanes>(even0, even1));
    store(column + 6 * pitch, odds<kLanes>(odd0, odd1));
  };
  split(even, to);
  split(odd, to + pitch);
}

// B^T for a vector of tiles; d0, d1, ... lie 2 columns apart, those beyond the eighth column in the tile that follows. At
// the points a and -a, with the squares of the two other numbers in s = b^2 + c^2 and p = b^2 c^2, the row of B^T is the
// polynomial (x + a) (x^4 - s x^2 + p), for the even columns times x; what is left is in G.
template <int Phase>
SPARSEPIPE_INLINE void transform_input(const float* from, std::int64_t pitch, float* to, std::int64_t point_stride) {
  constexpr int kInputs = 7 - Phase, kFirst = 1 - Phase;
  vf d[kInputs];
  SPARSEPIPE_UNROLL
  for (int i = 0; i < kInputs; ++i) d[i] = load(from + (2 * i + Phase) % 8 * pitch + (2 * i + Phase) / 8);
  const auto pair = [&](int point, float a, float s, float p) {
    const auto quartic = [&](int i) { return d[i + 4] - broadcast(s) * d[i + 2] + broadcast(p) * d[i]; };
    const vf with = quartic(kFirst + 1), without = broadcast(a) * quartic(kFirst);
    store(to + point * point_stride, with + without);
    store(to + (point + 1) * point_stride, with - without);
  };
  if constexpr (Phase == 0) store(to, d[0] - d[6] + broadcast(5.25f) * (d[4] - d[2]));
  pair(1, 0.5f, 5, 4);
  pair(3, 1, 4.25f, 1);
  pair(5, 2, 1.25f, 0.25f);
}

void winograd_input(const WinogradInputArgs& a) {
  const std::int64_t tiles = (a.tiles + kLanes - 1) / kLanes * kLanes, pitch = tiles + kLanes;
  for (std::int64_t tile = 0; tile < pitch; tile += kLanes) split_columns(a.row + 8 * tile, a.columns + tile, pitch);
  for (std::int64_t tile = 0; tile < tiles; tile += kLanes) {
    transform_input<0>(a.columns + tile, pitch, a.even + tile, a.point_stride);
    transform_input<1>(a.columns + tile, pitch, a.odd + tile, a.point_stride);
  }
}

// Lanes of a and b in turn: the lower halves for Half 0, the upper ones for Half 1.
template <int Half>
SPARSEPIPE_INLINE vf interleave(vf a, vf b) {
  constexpr int h = Half * kLanes / 2;
#if SPARSEPIPE_LANES == 16
  return __builtin_shufflevector(a, b, h, h + 16, h + 1, h + 17, h + 2, h + 18, h + 3, h + 19, h + 4, h + 20, h + 5, h + 21,
                                 h + 6, h + 22, h + 7, h + 23);
#elif SPARSEPIPE_LANES == 8
  return __builtin_shufflevector(a, b, h, h + 8, h + 1, h + 9, h + 2, h + 10, h + 3, h + 11);
#else
  return __builtin_shufflevector(a, b, h, h + 4, h + 1, h + 5);
#endif
}

// A^T, bias and activation for one channel.
void winograd_output(const WinogradOutputArgs& a) {
  const Bounds bounds = bounds_of(limits_of(a.epilogue));
  const auto c = [](float number) { return broadcast(number); };
  const vf bias = c(a.bias);
  for (int v = 0; v < a.vectors; ++v) {
    const float* from = a.sums + v * kLanes;
    const auto sum = [&](int point) { return load(from + point * a.point_stride); };
    const vf half = sum(1) + sum(2), one = sum(3) + sum(4), two = sum(5) + sum(6);
    const vf half_odd = sum(1) - sum(2), one_odd = sum(3) - sum(4), two_odd = sum(5) - sum(6);
    const vf y0 = bounds(bias + sum(0) + half + one + two);
    const vf y1 = bounds(bias + one_odd + c(0.5f) * half_odd + c(2) * two_odd);
    const vf y2 = bounds(bias + one + c(0.25f) * half + c(4) * two);
    const vf y3 = bounds(bias + one_odd + c(0.125f) * half_odd + c(8) * two_odd);
    const vf low02 = interleave<0>(y0, y2), high02 = interleave<1>(y0, y2);
    const vf low13 = interleave<0>(y1, y3), high13 = interleave<1>(y1, y3);
    float* y = a.y + v * 4 * kLanes;
    store(y, interleave<0>(low02, low13));
    store(y + kLanes, interleave<1>(low02, low13));
    store(y + 2 * kLanes, interleave<0>(high02, high13));
    store(y + 3 * kLanes, interleave<1>(high02, high13));
  }
  if (a.epilogue.activation > Activation::kClip) curve(a.y, a.vectors * 4 * kLanes, a.epilogue);
}

SPARSEPIPE_INLINE vf larger(vf a, vf b) { return a > b ? a : b; }

// The largest numbers of windows of 2 or 3 columns, two columns and two rows apart. Columns are compared when the rows
// of all windows have been: a load that spans two numbers just stored would wait for them.
void max_pool(const MaxPoolArgs& a) {
  const std::int64_t pitch = a.lead + (a.width + kLanes - 1) / kLanes * kLanes + 3 * kLanes;
  for (std::int64_t r = 0; r < a.out_rows; ++r) {
    const std::int64_t first = r * 2 - a.top;
    const std::int64_t from = first < 0 ? 0 : first, to = first + a.window_rows < a.rows ? first + a.window_rows : a.rows;
    const float* x = a.x + from * a.pitch;
    float* row = a.buffer + r * pitch;
    for (std::int64_t i = 0; i < a.lead; ++i) row[i] = -__builtin_inff();
    for (std::int64_t i = 0; i < a.width; i += kLanes) {
      vf most = load(x + i);
      for (std::int64_t k = 1; k < to - from; ++k) most = larger(load(x + k * a.pitch + i), most);
      store(row + a.lead + i, most);
    }
    for (int i = 0; i < 3; ++i) store(row + a.lead + a.width + i * kLanes, broadcast(-__builtin_inff()));
  }
  for (std::int64_t r = 0; r < a.out_rows; ++r) {
    float* y = a.y + r * a.out_width;
    for (std::int64_t i = 0; i < a.out_width; i += kLanes) {
      const float* from = a.buffer + r * pitch + 2 * i;
      const vf x = load(from), next = load(from + kLanes);
      vf most = larger(evens<kLanes>(x, next), odds<kLanes>(x, next));
      if (a.window_columns == 3) most = larger(evens<kLanes>(load(from + 2), load(from + kLanes + 2)), most);
      if (a.out_width - i >= kLanes) {
        store(y + i, most);
      } else {
        store_some(y + i, most, static_cast<int>(a.out_width - i));
      }
    }
  }
}
