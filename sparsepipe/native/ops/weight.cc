#include "ops/weight.h"

#include <algorithm>
#include <cmath>

namespace sparsepipe {

SparseWeight read_weight(const Node& node, std::int64_t out, std::int64_t columns, std::size_t first) {
  const std::int64_t block = node.integer("block", 1, 1, 4);
  if (block == 3) throw Error("attribute 'block' must be 1, 2 or 4, not 3");
  if (out % block != 0) {
    throw Error("the number of outputs, " + std::to_string(out) + ", is not a multiple of the block, " +
                std::to_string(block));
  }
  const auto values = node.constant(first, "values");
  const auto deltas = node.constant(first + 1, "deltas");
  if (!values || !deltas) throw Error("inputs 'values' and 'deltas' are needed");
  if (values->type != abi::kFloat) throw Error("input 'values' must be float32");
  if (deltas->type != abi::kUint8 && deltas->type != abi::kUint16) {
    throw Error("input 'deltas' must be uint8 or uint16");
  }
  if (deltas->dims.size() != 1) throw Error("input 'deltas' must have one dimension, not " + shape_text(deltas->dims));
  const std::int64_t count = deltas->dims[0];
  if (values->dims != std::vector<std::int64_t>{count, block}) {
    throw Error("input 'values' must have shape " + shape_text({count, block}) + " for " + std::to_string(count) +
                " deltas, not " + shape_text(values->dims));
  }

  SparseWeight weight;
  weight.rows = out / block;
  weight.columns = columns;
  weight.block = static_cast<int>(block);
  const std::int64_t total = product({weight.rows, columns});
  if (count > total || count >= (std::int64_t{1} << 31)) {
    throw Error(std::to_string(count) + " blocks are more than the weight of " + shape_text({out, columns}) + " has");
  }
  const bool narrow = columns <= 65536;
  const auto* floats = static_cast<const float*>(values->data);
  const auto* bytes = static_cast<const std::uint8_t*>(deltas->data);
  const auto* words = static_cast<const std::uint16_t*>(deltas->data);
  weight.row_start.assign(static_cast<std::size_t>(weight.rows) + 1, 0);
  std::int64_t column = 0, row = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t delta = deltas->type == abi::kUint8 ? bytes[i] : words[i];
    if (delta == 0 && i > 0) throw Error("delta " + std::to_string(i) + " is 0: the blocks must ascend");
    column += delta;
    if (column >= columns) {
      row += column / columns;
      column %= columns;
    }
    if (row >= weight.rows) {
      throw Error("block " + std::to_string(i) + " lies outside the weight of " + shape_text({out, columns}));
    }
    bool zero = true;
    for (std::int64_t r = 0; r < block; ++r) {
      const float value = floats[i * block + r];
      if (!std::isfinite(value)) throw Error("value " + std::to_string(i * block + r) + " is not finite");
      zero = zero && value == 0.0f;
    }
    if (zero) continue;
    ++weight.row_start[static_cast<std::size_t>(row) + 1];
    if (narrow) {
      weight.column16.push_back(static_cast<std::uint16_t>(column));
    } else {
      weight.column32.push_back(static_cast<std::uint32_t>(column));
    }
    weight.values.insert(weight.values.end(), floats + i * block, floats + (i + 1) * block);
  }
  for (std::size_t i = 1; i < weight.row_start.size(); ++i) weight.row_start[i] += weight.row_start[i - 1];
  weight.column16.shrink_to_fit();
  weight.column32.shrink_to_fit();
  weight.values.shrink_to_fit();
  return weight;
}

SparseWeight full_weight(const std::vector<float>& values, std::int64_t out, std::int64_t columns) {
  if (values.size() >= std::size_t{1} << 31) throw Error("input 'W' is too large");
  SparseWeight weight;
  weight.block = largest_block(out);
  weight.rows = out / weight.block;
  weight.columns = columns;
  for (std::int64_t row = 0; row <= weight.rows; ++row) {
    weight.row_start.push_back(static_cast<std::uint32_t>(row * columns));
  }
  for (std::int64_t row = 0; row < weight.rows; ++row) {
    for (std::int64_t column = 0; column < columns; ++column) {
      weight.column32.push_back(static_cast<std::uint32_t>(column));
      for (std::int64_t r = 0; r < weight.block; ++r) {
        weight.values.push_back(values[static_cast<std::size_t>((row * weight.block + r) * columns + column)]);
      }
    }
  }
  return weight;
}

int largest_block(std::int64_t out) {
  int largest = 1;
  for (const int block : kernels::kBlocks) {
    if (out % block == 0) largest = std::max(largest, block);
  }
  return largest;
}

std::vector<float> finite(const Tensor& tensor, const char* name) {
  const auto* data = static_cast<const float*>(tensor.data);
  std::vector<float> numbers(data, data + tensor.size());
  for (std::size_t i = 0; i < numbers.size(); ++i) {
    if (!std::isfinite(numbers[i])) throw Error("number " + std::to_string(i) + " of input '" + name + "' is not finite");
  }
  return numbers;
}

std::vector<float> read_bias(const Node& node, std::size_t index, std::int64_t out, const std::string& name) {
  const auto bias = node.constant(index, name.c_str());
  if (!bias) return {};
  if (bias->type != abi::kFloat) throw Error("input '" + name + "' must be float32");
  if (bias->dims != std::vector<std::int64_t>{out}) {
    throw Error("input '" + name + "' must have shape " + shape_text({out}) + ", not " + shape_text(bias->dims));
  }
  return finite(*bias, name.c_str());
}

}  // namespace sparsepipe
