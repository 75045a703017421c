// What the quantised operators read from a node: the weight, and the scales and zero points.
#pragma once

#include <cstdint>
#include <vector>

#include "kernels/qkernel.h"
#include "ops/support.h"

namespace sparsepipe {

// Inputs of the quantised operators, by position. The first nine are those of QLinearConv with the weight as two.
enum QInput : std::size_t {
  kX, kXScale, kXZeroPoint, kValues, kDeltas, kWScale, kYScale, kYZeroPoint, kBias,
  kQResidual, kResidualScale, kResidualZeroPoint, kSumScale, kSumZeroPoint
};

// Rows of blocks: block row i is the output channels [i * block, (i + 1) * block); an entry is a group of four input
// channels at one kernel position, column = group * positions + position, and `block` x 4 values.
struct QWeight {
  std::int64_t rows = 0;       // out / block
  std::int64_t groups = 0;     // of four input channels, the last one padded
  std::int64_t positions = 1;  // of the kernel
  int block = 1;
  std::vector<std::uint32_t> row_start;  // [rows + 1]
  std::vector<std::uint32_t> column;     // [entries]
  std::vector<std::int8_t> values;       // [entries][block][4]

  std::uint32_t entries() const { return row_start.back(); }
};

// Decodes inputs `values` and `deltas` of a node for a weight of [out, in, positions]. Blocks that hold only zeros
// (fillers) are left out.
QWeight read_qweight(const Node& node, std::int64_t out, std::int64_t in, std::int64_t positions);

// The instruction set for int8.
const kernels::QIsa& quantized_isa();

// Scales, zero points, bias and activation of a node. `weight_inputs`: 2, or 1 where the weight is one tensor, and the
// inputs after it stand one place further to the front.
class Quantization {
 public:
  Quantization(const Node& node, const QWeight& weight, std::int64_t out, bool residual, std::size_t weight_inputs = 2);

  int type;  // of the input and the output, kUint8 or kInt8
  const char* type_name() const;
  // What x is flipped with when it is packed, and the byte of its zero point before that.
  std::uint8_t input_flip(const kernels::QIsa& isa) const;
  std::uint8_t padding() const { return static_cast<std::uint8_t>(x_zero_point_); }
  // The bias for inputs as `isa` sees them. Points into this object.
  kernels::Requantize requantize(const kernels::QIsa& isa);
  // With a residual: of the product alone, as it is before it meets that. After requantize().
  kernels::Requantize product() const;

 private:
  std::int32_t x_zero_point_ = 0;
  bool is_small() const;

  std::vector<std::int64_t> weight_sum_, weight_size_;  // sizes: of the absolute values
  std::vector<std::int32_t> bias_, folded_;
  std::vector<float> scale_;
  kernels::Requantize requantize_{};
};

}  // namespace sparsepipe
