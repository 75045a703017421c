// Transposing, and a matrix times one vector. Part of kernels/template.h, inside its namespaces.

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

// A band of kLanes columns after the other: what is written of a band lies together, and few lines of an input whose rows
// are a multiple of 4 kB long compete for the same set of the L1 cache.
void transpose(const float* input, std::int64_t input_stride, std::int64_t rows, std::int64_t columns,
               float* output, std::int64_t output_stride) {
  const std::int64_t whole = rows / kLanes * kLanes;
  std::int64_t j = 0;
  for (; j + kLanes <= columns; j += kLanes) {
    for (std::int64_t i = 0; i < whole; i += kLanes) {
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
  }
  for (; j < columns; ++j) {
    for (std::int64_t i = 0; i < whole; ++i) output[j * output_stride + i] = input[i * input_stride + j];
  }
  for (j = 0; j < columns && whole < rows; ++j) {
    for (std::int64_t i = whole; i < rows; ++i) output[j * output_stride + i] = input[i * input_stride + j];
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
