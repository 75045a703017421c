#include "ops/qplan.h"

#include <algorithm>
#include <cstring>

#include "ops/sharing.h"

namespace sparsepipe {

using kernels::kQuad;

PackedQWeight::PackedQWeight(const QWeight& weight, std::int64_t group_bytes, const std::vector<std::int32_t>& tap,
                             bool wide)
    : dense_bytes_(static_cast<std::size_t>(weight.rows * weight.block * weight.groups * kQuad * weight.positions) *
                   sizeof(float)),
      row_start_(weight.row_start) {
  const auto block = static_cast<std::size_t>(weight.block);
  const std::size_t size = sizeof(std::int32_t) + block * kQuad * (wide ? 2 : 1);
  entries_.resize(weight.entries() * size);
  char* to = entries_.data();
  const std::int8_t* values = weight.values.data();
  for (const std::uint32_t column : weight.column) {
    const auto offset = static_cast<std::int32_t>(column / weight.positions * group_bytes +
                                                  tap[static_cast<std::size_t>(column % weight.positions)]);
    std::memcpy(to, &offset, sizeof offset);
    to += sizeof offset;
    for (std::size_t r = 0; r < block; ++r, values += kQuad) {
      if (wide) {
        const std::int16_t words[kQuad] = {values[0], values[2], values[1], values[3]};
        std::memcpy(to, words, sizeof words);
        to += sizeof words;
      } else {
        std::memcpy(to, values, kQuad);
        to += kQuad;
      }
    }
  }
}

std::vector<std::int64_t> PackedQWeight::key(std::int64_t group_bytes, const std::vector<std::int32_t>& tap) {
  std::vector<std::int64_t> key{group_bytes};
  key.insert(key.end(), tap.begin(), tap.end());
  return key;
}

std::int64_t PackedQWeight::row_bound(std::int64_t chunk, std::int64_t chunks) const {
  return sparsepipe::row_bound(row_start_, 8, chunk, chunks);
}

double qtile_cycles(const QWeight& weight, int vectors) {
  // Measured on AVX-512 VNNI (NOTES.md), for all instruction sets: two products a cycle, the end of a row is mispredicted.
  constexpr double kProduct = 0.5, kLeast = 2.5, kRow = 22, kBytes = 3.2;
  const double sums = static_cast<double>(weight.block) * vectors;
  const double entry = std::max(kLeast, kProduct * sums);
  const double requantized = kBytes * weight.block * (vectors + 1);
  return static_cast<double>(weight.entries()) * entry + static_cast<double>(weight.rows) * (kRow + requantized);
}

int best_qvectors(const QWeight& weight, const kernels::QIsa& isa, std::int64_t positions) {
  const std::int64_t all = (positions + isa.lanes - 1) / isa.lanes;
  int best = 1;
  double least = 0;
  for (std::int64_t most = isa.most_vectors[weight.block]; most >= 1; --most) {
    const std::int64_t tiles = (all + most - 1) / most;
    const auto vectors = static_cast<int>((all + tiles - 1) / tiles);
    const double cycles = qtile_cycles(weight, vectors) * static_cast<double>(tiles);
    if (least == 0 || cycles < least) {
      least = cycles;
      best = vectors;
    }
  }
  return best;
}

}  // namespace sparsepipe
