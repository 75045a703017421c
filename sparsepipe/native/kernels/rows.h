// Rows of a sparse weight times a tile of the input. Part of kernels/template.h, inside its namespaces.

template <int R>
struct Entry {
  std::int32_t offset;
  float value[R];
};

// Where the sums leave no room for the R weights of an entry, its T inputs and one weight at a time may fit.
template <int R, int T>
constexpr bool kInputsHeld = R * T + R + 1 > SPARSEPIPE_REGISTERS;

template <int R, int T>
SPARSEPIPE_INLINE void multiply(vf (&sum)[R][T], const Entry<R>& entry, const float* x) {
  const float* at = x + entry.offset;
  if constexpr (R == 1) {
    const vf w = broadcast(entry.value[0]);
    SPARSEPIPE_UNROLL
    for (int t = 0; t < T; ++t) sum[0][t] += w * load(at + t * kLanes);
  } else if constexpr (kInputsHeld<R, T>) {
    vf in[T];
    SPARSEPIPE_UNROLL
    for (int t = 0; t < T; ++t) in[t] = load(at + t * kLanes);
    SPARSEPIPE_UNROLL
    for (int r = 0; r < R; ++r) {
      const vf w = broadcast(entry.value[r]);
      SPARSEPIPE_UNROLL
      for (int t = 0; t < T; ++t) sum[r][t] += w * in[t];
    }
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

struct Limits {
  float low, high;
};
SPARSEPIPE_INLINE Limits limits_of(const Epilogue& e) {
  const bool clip = e.activation == Activation::kClip;
  const float low = clip ? e.low : (e.activation == Activation::kRelu ? 0.0f : -__builtin_inff());
  return {low, clip ? e.high : __builtin_inff()};
}
SPARSEPIPE_INLINE Bounds bounds_of(const Limits& limits) { return {broadcast(limits.low), broadcast(limits.high)}; }

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
constexpr int kChains = R * T >= kSumsForOneChain ? 1 : (R * T >= kSumsForTwoChains ? 2 : 4);

// Rows between the prefetch of an output and its use.
template <int R>
constexpr int kAhead = R == 1 ? 6 : (R == 2 ? 3 : 2);

// Vectors from the start of one cache line to that of the next.
constexpr int kLineVectors = kLanes < 16 ? 16 / kLanes : 1;

// The lines that a later row writes (and adds) are on their way while this one computes: planes lie pages apart, where
// the hardware does not prefetch.
template <int R, int T>
SPARSEPIPE_INLINE void prefetch_output(const RowsArgs& a, std::int64_t row) {
  const std::int64_t shift = ((row - a.row_begin) + kAhead<R>) * R * a.y_stride;
  SPARSEPIPE_UNROLL
  for (int r = 0; r < R; ++r) {
    float* y = a.y + shift + r * a.y_stride;
    SPARSEPIPE_UNROLL
    for (int t = 0; t < T; t += kLineVectors) __builtin_prefetch(y + a.target[t], 1, 3);
    if (a.residual) {
      const float* residual = a.residual + shift + r * a.y_stride;
      SPARSEPIPE_UNROLL
      for (int t = 0; t < T; t += kLineVectors) __builtin_prefetch(residual + a.target[t], 0, 3);
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
  // The loads of the input lead the hardware's prefetcher astray: it leaves the stream of entries to this.
  SPARSEPIPE_INLINE void multiply_all(const Entry<R>* e, const Entry<R>* end, const float* x) {
    constexpr int kAheadEntries = C > 1 ? 256 : 128;  // small tiles are through with an entry sooner
    if constexpr (C > 1) {
      for (; end - e >= C; e += C) {
        __builtin_prefetch(e + kAheadEntries, 0, 3);
        SPARSEPIPE_UNROLL
        for (int c = 0; c < C; ++c) multiply<R, T>(of[c], e[c], x);
      }
    } else {
      constexpr int kOfLine = static_cast<int>(64 / sizeof(Entry<R>));
      while (end - e > kOfLine) {
        __builtin_prefetch(e + kAheadEntries, 0, 3);
        for (const Entry<R>* const line = e + kOfLine; e != line; ++e) multiply<R, T>(of[0], *e, x);
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
SPARSEPIPE_INLINE void rows_of(const RowsArgs& a, const Limits& limits) {
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
      for (int t = 0; t < T; t += kLineVectors) __builtin_prefetch(line + t * kLanes, 0, 2);
    }
    sum.multiply_all(entries + start[0], entries + start[1], a.x);
    sum.join();
    if (a.last) {
      const Limits* hidden = &limits;  // or GCC keeps the bounds in registers and spills sums in the loop over entries
      __asm__("" : "+r"(hidden));
      finish<R, T>(sum.of[0], a, row, bounds_of(*hidden));
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
  const Limits limits = limits_of(a.epilogue);
  if (a.groups > 1) {
    rows_of<R, T, true>(a, limits);
  } else {
    rows_of<R, T, false>(a, limits);
  }
}

// Tiles that fit the register file: R * T sums, the R broadcast weights and, unless it is a memory operand, an input; or
// one weight and T inputs, where a product takes no register of its own.
template <int R>
constexpr int max_vectors() {
#if defined(__FMA__)
  constexpr int held = (SPARSEPIPE_REGISTERS - 1) / (R + 1);
#else
  constexpr int held = 0;
#endif
  constexpr int weights = (SPARSEPIPE_REGISTERS - 1 - R) / R;
  constexpr int fit = R == 1 ? SPARSEPIPE_REGISTERS - 2 : (weights > held ? weights : held);
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
