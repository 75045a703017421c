#include "ops/quantized.h"

#include <cmath>

#include "ops/weight.h"

namespace sparsepipe {

using kernels::kQuad;

QWeight read_qweight(const Node& node, std::int64_t out, std::int64_t in, std::int64_t positions) {
  const std::int64_t block = node.integer("block", std::nullopt, 1, 4);
  if (block == 3) throw Error("attribute 'block' must be 1, 2 or 4, not 3");
  if (out % block != 0) {
    throw Error("the number of outputs, " + std::to_string(out) + ", is not a multiple of the block, " +
                std::to_string(block));
  }
  const auto values = node.constant(kValues, "values");
  const auto deltas = node.constant(kDeltas, "deltas");
  if (!values || !deltas) throw Error("inputs 'values' and 'deltas' are needed");
  if (values->type != abi::kInt8) throw Error("input 'values' must be int8");
  if (deltas->type != abi::kUint8 && deltas->type != abi::kUint16) {
    throw Error("input 'deltas' must be uint8 or uint16");
  }
  if (deltas->dims.size() != 1) throw Error("input 'deltas' must have one dimension, not " + shape_text(deltas->dims));
  const std::int64_t count = deltas->dims[0];
  if (values->dims != std::vector<std::int64_t>{count, block, kQuad}) {
    throw Error("input 'values' must have shape " + shape_text({count, block, kQuad}) + " for " +
                std::to_string(count) + " deltas, not " + shape_text(values->dims));
  }

  QWeight weight;
  weight.rows = out / block;
  weight.groups = (in + kQuad - 1) / kQuad;
  weight.positions = positions;
  weight.block = static_cast<int>(block);
  const std::int64_t columns = weight.groups * positions;
  const std::int64_t total = product({weight.rows, columns});
  if (count > total || count >= (std::int64_t{1} << 31)) {
    throw Error(std::to_string(count) + " blocks are more than the weight of " + shape_text({out, in, positions}) +
                " has");
  }
  const auto* bytes = static_cast<const std::int8_t*>(values->data);
  const auto* narrow = static_cast<const std::uint8_t*>(deltas->data);
  const auto* wide = static_cast<const std::uint16_t*>(deltas->data);
  const std::int64_t beyond = weight.groups * kQuad - in;  // channels of the last group that the input has not
  weight.row_start.assign(static_cast<std::size_t>(weight.rows) + 1, 0);
  std::int64_t column = 0, row = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const std::int64_t delta = deltas->type == abi::kUint8 ? narrow[i] : wide[i];
    if (delta == 0 && i > 0) throw Error("delta " + std::to_string(i) + " is 0: the blocks must ascend");
    column += delta;
    if (column >= columns) {
      row += column / columns;
      column %= columns;
    }
    if (row >= weight.rows) {
      throw Error("block " + std::to_string(i) + " lies outside the weight of " + shape_text({out, in, positions}));
    }
    const std::int8_t* const values_of = bytes + i * block * kQuad;
    bool zero = true;
    for (std::int64_t k = 0; k < block * kQuad; ++k) {
      zero = zero && values_of[k] == 0;
      if (values_of[k] != 0 && column / positions == weight.groups - 1 && k % kQuad >= kQuad - beyond) {
        throw Error("block " + std::to_string(i) + " has a value for an input channel beyond the " +
                    std::to_string(in) + " that there are");
      }
    }
    if (zero) continue;
    ++weight.row_start[static_cast<std::size_t>(row) + 1];
    weight.column.push_back(static_cast<std::uint32_t>(column));
    weight.values.insert(weight.values.end(), values_of, values_of + block * kQuad);
  }
  for (std::size_t i = 1; i < weight.row_start.size(); ++i) weight.row_start[i] += weight.row_start[i - 1];
  weight.column.shrink_to_fit();
  weight.values.shrink_to_fit();
  return weight;
}

const kernels::QIsa& quantized_isa() {
  const kernels::QIsa* const isa = kernels::select_quantized();
  if (isa == nullptr) throw Error("SPARSEPIPE_ISA names an instruction set that this CPU does not run, or none for int8");
  return *isa;
}

namespace {

// The numbers of a constant scale: one, or `many`.
std::vector<float> read_scales(const Node& node, std::size_t index, const char* name, std::int64_t many) {
  const auto tensor = node.constant(index, name);
  if (!tensor) throw Error("input '" + std::string(name) + "' is missing");
  if (tensor->type != abi::kFloat) throw Error("input '" + std::string(name) + "' must be float32");
  const std::int64_t size = tensor->size();
  if (tensor->dims.size() > 1 || (size != 1 && size != many)) {
    throw Error("input '" + std::string(name) + "' must be a scalar" +
                (many > 1 ? " or have shape " + shape_text({many}) : "") + ", not of shape " + shape_text(tensor->dims));
  }
  const auto* data = static_cast<const float*>(tensor->data);
  for (std::int64_t i = 0; i < size; ++i) {
    if (!(data[i] > 0) || !std::isfinite(data[i])) {
      throw Error("input '" + std::string(name) + "' must be positive and finite; number " + std::to_string(i) +
                  " is " + std::to_string(data[i]));
    }
  }
  return {data, data + size};
}

std::int32_t read_zero_point(const Node& node, std::size_t index, const char* name, int& type) {
  const auto tensor = node.constant(index, name);
  if (!tensor) throw Error("input '" + std::string(name) + "' is missing");
  if (tensor->type != abi::kUint8 && tensor->type != abi::kInt8) {
    throw Error("input '" + std::string(name) + "' must be uint8 or int8");
  }
  if (type == abi::kUndefined) type = tensor->type;
  if (tensor->type != type) throw Error("input '" + std::string(name) + "' must have the type of 'x_zero_point'");
  if (tensor->dims.size() > 1 || tensor->size() != 1) {
    throw Error("input '" + std::string(name) + "' must be a scalar, not of shape " + shape_text(tensor->dims));
  }
  return type == abi::kUint8 ? *static_cast<const std::uint8_t*>(tensor->data)
                             : *static_cast<const std::int8_t*>(tensor->data);
}

float ratio(float scale, float other, const char* name) {
  const float value = scale / other;
  if (!std::isfinite(value)) throw Error("the scales are too far apart: " + std::string(name) + " overflows");
  return value;
}

}  // namespace

Quantization::Quantization(const Node& node, const QWeight& weight, std::int64_t out, bool residual,
                           std::size_t weight_inputs)
    : type(abi::kUndefined), weight_sum_(static_cast<std::size_t>(out), 0), weight_size_(weight_sum_) {
  const std::size_t fewer = 2 - weight_inputs;
  x_zero_point_ = read_zero_point(node, kXZeroPoint, "x_zero_point", type);
  const float x_scale = read_scales(node, kXScale, "x_scale", 1)[0];
  std::vector<float> w_scale = read_scales(node, kWScale - fewer, "w_scale", out);
  w_scale.resize(static_cast<std::size_t>(out), w_scale[0]);
  float y_scale = read_scales(node, kYScale - fewer, "y_scale", 1)[0];
  std::int32_t zero_point = read_zero_point(node, kYZeroPoint - fewer, "y_zero_point", type);
  for (float scale : w_scale) scale_.push_back(ratio(x_scale * scale, y_scale, "x_scale * w_scale / y_scale"));

  bias_.assign(static_cast<std::size_t>(out), 0);
  if (const auto bias = node.constant(kBias - fewer, "B")) {
    if (bias->type != abi::kInt32) throw Error("input 'B' must be int32");
    if (bias->dims != std::vector<std::int64_t>{out}) {
      throw Error("input 'B' must have shape " + shape_text({out}) + ", not " + shape_text(bias->dims));
    }
    const auto* data = static_cast<const std::int32_t*>(bias->data);
    bias_.assign(data, data + out);
  }
  for (std::int64_t row = 0; row < weight.rows; ++row) {
    for (std::uint32_t e = weight.row_start[static_cast<std::size_t>(row)];
         e < weight.row_start[static_cast<std::size_t>(row) + 1]; ++e) {
      const std::int8_t* value = weight.values.data() + static_cast<std::size_t>(e) * weight.block * kQuad;
      for (int k = 0; k < weight.block * kQuad; ++k) {
        const auto o = static_cast<std::size_t>(row * weight.block + k / kQuad);
        weight_sum_[o] += value[k];
        weight_size_[o] += std::abs(value[k]);
      }
    }
  }

  const std::int32_t least = type == abi::kUint8 ? 0 : -128, most = least + 255;
  kernels::Requantize& q = requantize_;
  q.least = static_cast<float>(least - zero_point);
  q.most = static_cast<float>(most - zero_point);
  q.flip = type == abi::kUint8 ? 0 : 0x80;
  q.shift = zero_point - least;
  if (residual) {
    const float residual_scale = read_scales(node, kResidualScale, "residual_scale", 1)[0];
    const std::int32_t residual_zero_point = read_zero_point(node, kResidualZeroPoint, "residual_zero_point", type);
    const float sum_scale = read_scales(node, kSumScale, "sum_scale", 1)[0];
    const std::int32_t sum_zero_point = read_zero_point(node, kSumZeroPoint, "sum_zero_point", type);
    q.zero_point = static_cast<float>(zero_point);
    q.sum_ratio = ratio(y_scale, sum_scale, "y_scale / sum_scale");
    q.residual_ratio = ratio(residual_scale, sum_scale, "residual_scale / sum_scale");
    // Rounded where onnxruntime's QLinearAdd does: one of the products is not.
    const float of_residual = q.residual_ratio * static_cast<float>(residual_zero_point);
    q.fixed = static_cast<float>(sum_zero_point) - std::fma(q.sum_ratio, q.zero_point, of_residual);
    if (!std::isfinite(q.fixed)) throw Error("the scales of the sum are too far apart");
    q.shift = -least;
    zero_point = sum_zero_point;
  }

  const std::string activation = node.text("activation", "none");
  std::int64_t low = least, high = most;
  if (activation == "relu") {
    low = zero_point;
  } else if (activation == "clip") {
    low = node.integer("min", std::nullopt, least, most);
    high = node.integer("max", std::nullopt, least, most);
    if (low > high) throw Error("attribute 'min' must not be above 'max'");
  } else if (activation != "none") {
    throw Error("attribute 'activation' is '" + activation.substr(0, 40) + "'; known are none, relu, clip");
  }
  q.low = static_cast<std::uint8_t>(low - least);
  q.high = static_cast<std::uint8_t>(high - least);
}

const char* Quantization::type_name() const { return type == abi::kUint8 ? "uint8" : "int8"; }

std::uint8_t Quantization::input_flip(const kernels::QIsa& isa) const {
  return (type == abi::kInt8) == isa.is_signed ? 0 : 0x80;
}

// Whether no rounded number comes near the limits of int32: the kernels need not bound them then.
bool Quantization::is_small() const {
  constexpr double kLimit = 1 << 22;
  const kernels::Requantize& q = requantize_;
  bool small = 256.0 * (q.sum_ratio + q.residual_ratio) + std::fabs(q.fixed) < kLimit;
  for (std::size_t o = 0; o < scale_.size(); ++o) {
    const double most = 255.0 * static_cast<double>(weight_size_[o]) + std::fabs(static_cast<double>(bias_[o]));
    small = small && most < 2147483648.0 && most * scale_[o] < kLimit;
  }
  return small;
}

kernels::Requantize Quantization::requantize(const kernels::QIsa& isa) {
  const std::int64_t shift = isa.is_signed == (type == abi::kInt8) ? 0 : (isa.is_signed ? -128 : 128);
  folded_.clear();
  for (std::size_t o = 0; o < bias_.size(); ++o) {
    // Modulo 2^32, as the sums are.
    const std::int64_t folded = bias_[o] - (x_zero_point_ + shift) * weight_sum_[o];
    folded_.push_back(static_cast<std::int32_t>(static_cast<std::uint32_t>(static_cast<std::uint64_t>(folded))));
  }
  requantize_.bias = folded_.data();
  requantize_.scale = scale_.data();
  requantize_.plain = type == abi::kUint8 && requantize_.low == 0 && requantize_.high == 255 && is_small();
  return requantize_;
}

kernels::Requantize Quantization::product() const {
  kernels::Requantize q = requantize_;
  q.shift = static_cast<std::int32_t>(q.zero_point) - (type == abi::kUint8 ? 0 : -128);
  q.low = 0;
  q.high = 255;
  q.plain = type == abi::kUint8 && is_small();
  return q;
}

}  // namespace sparsepipe
