// A sparse weight as the file holds it, checked and decoded.
#pragma once

#include <cstdint>
#include <vector>

#include "ops/support.h"

namespace sparsepipe {

// Rows of blocks: block row i is the output channels [i * block, (i + 1) * block); an entry is the column of the
// flattened weight and `block` values, one per channel. Blocks that hold only zeros (fillers) are left out.
struct SparseWeight {
  std::int64_t rows = 0;     // out / block
  std::int64_t columns = 0;  // in * kernel positions
  int block = 1;
  std::vector<std::uint32_t> row_start;  // [rows + 1]
  // Column of each entry: 16 bits where they suffice.
  std::vector<std::uint16_t> column16;
  std::vector<std::uint32_t> column32;
  std::vector<float> values;  // [entries][block]

  std::uint32_t column(std::uint32_t entry) const { return column16.empty() ? column32[entry] : column16[entry]; }
  std::uint32_t entries() const { return row_start.back(); }
  // Of the weight laid out for the kernels (its rows aside), and as a dense one.
  std::size_t packed_bytes() const { return std::size_t{entries()} * (sizeof(std::int32_t) + block * sizeof(float)); }
  std::size_t dense_bytes() const { return static_cast<std::size_t>(rows * block * columns) * sizeof(float); }
};

constexpr std::int64_t kMaxChannels = 1 << 24;

// Decodes inputs `values` (the one at `first`) and `deltas` (the next) of a node for a weight of [out, columns].
SparseWeight read_weight(const Node& node, std::int64_t out, std::int64_t columns, std::size_t first = 1);
// The largest block that divides so many outputs.
int largest_block(std::int64_t out);
// A dense weight of [out, columns] with all of its zeros, in the largest blocks that divide the outputs.
SparseWeight full_weight(const std::vector<float>& values, std::int64_t out, std::int64_t columns);
// The numbers of a float32 tensor, input `name`; Error where one is not finite.
std::vector<float> finite(const Tensor& tensor, const char* name);
// The bias, input `index`: empty where absent.
std::vector<float> read_bias(const Node& node, std::size_t index, std::int64_t out, const std::string& name = "B");

}  // namespace sparsepipe
