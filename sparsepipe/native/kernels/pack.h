// Packing tiles of the input. Part of kernels/template.h, inside its namespaces.

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

// 0, 2, 4, ... and 1, 3, 5, ... of two vectors of L floats.
template <int L>
SPARSEPIPE_INLINE void split_pairs(const float* from, float* even, float* odd) {
  const auto a = load<L>(from), b = load<L>(from + L);
  store<L>(even, evens<L>(a, b));
  store<L>(odd, odds<L>(a, b));
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
