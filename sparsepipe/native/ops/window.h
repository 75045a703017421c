// The window of a convolution: kernel, strides, dilations and padding of a node.
#pragma once

#include <cstdint>
#include <vector>

#include "ops/support.h"

namespace sparsepipe {

constexpr std::int64_t kMostFloats = std::int64_t{1} << 30;  // of a plane, a stage or a packed channel: offsets are int32

struct Window {
  bool flat = false;  // [N, C, W]: a 1-D convolution, run as one row
  std::int64_t kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w;
  std::int64_t top, left, bottom, right;
};

Window read_window(const Node& node);

// Shapes of one call, checked: input [N, channels, height, width] and the output planes.
struct Planes {
  std::int64_t batch, height, width, out_height, out_width;
  std::vector<std::int64_t> out_dims;
};
Planes read_planes(const Window& window, const Tensor& x, std::int64_t channels, std::int64_t out_channels,
                   int type = abi::kFloat, const char* type_name = "float32");

inline std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

}  // namespace sparsepipe
