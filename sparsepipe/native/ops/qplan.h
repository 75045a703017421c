// How a quantised sparse product runs for one shape: the tile's width, and the weight laid out for the kernels.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/qkernel.h"
#include "ops/quantized.h"

namespace sparsepipe {

// The weight as the kernels read it. Offsets: group * group_bytes + tap[position], in bytes.
class PackedQWeight {
 public:
  PackedQWeight(const QWeight& weight, std::int64_t group_bytes, const std::vector<std::int32_t>& tap, bool wide);
  // Two of one weight are the same where these numbers are.
  static std::vector<std::int64_t> key(std::int64_t group_bytes, const std::vector<std::int32_t>& tap);

  std::size_t bytes() const { return entries_.size() + row_start_.size() * sizeof(std::uint32_t); }
  std::size_t dense_bytes() const { return dense_bytes_; }  // as float32
  const char* entries() const { return entries_.data(); }
  const std::uint32_t* row_start() const { return row_start_.data(); }
  // The first row of range `chunk` of `chunks` ranges of about equal work; the number of rows for `chunk` = `chunks`.
  std::int64_t row_bound(std::int64_t chunk, std::int64_t chunks) const;

 private:
  std::size_t dense_bytes_;
  std::vector<char> entries_;
  std::vector<std::uint32_t> row_start_;
};

// Cycles of one tile of so many vectors, roughly.
double qtile_cycles(const QWeight& weight, int vectors);

// Vectors of a tile for `positions` positions: those of least cost, evened out over the tiles.
int best_qvectors(const QWeight& weight, const kernels::QIsa& isa, std::int64_t positions);

}  // namespace sparsepipe
