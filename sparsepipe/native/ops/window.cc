#include "ops/window.h"

namespace sparsepipe {

Window read_window(const Node& node) {
  const std::vector<std::int64_t> kernel = node.integers("kernel_shape", std::nullopt, std::nullopt, 1, 255);
  const std::size_t rank = kernel.size();
  if (rank != 1 && rank != 2) throw Error("attribute 'kernel_shape' must have 1 or 2 numbers");
  const auto strides = node.integers("strides", rank, 1, 1, 4096);
  const auto dilations = node.integers("dilations", rank, 1, 1, 4096);
  const auto pads = node.integers("pads", 2 * rank, 0, 0, 65535);
  Window w;
  w.flat = rank == 1;
  w.kernel_h = w.flat ? 1 : kernel[0];
  w.kernel_w = kernel.back();
  w.stride_h = w.flat ? 1 : strides[0];
  w.stride_w = strides.back();
  w.dilation_h = w.flat ? 1 : dilations[0];
  w.dilation_w = dilations.back();
  w.top = w.flat ? 0 : pads[0];
  w.left = pads[rank - 1];
  w.bottom = w.flat ? 0 : pads[2];
  w.right = pads.back();
  return w;
}

namespace {

std::int64_t extent(std::int64_t size, std::int64_t pads, std::int64_t kernel, std::int64_t dilation,
                    std::int64_t stride, const std::vector<std::int64_t>& dims) {
  const std::int64_t room = size + pads - (kernel - 1) * dilation - 1;
  if (size < 1 || room < 0) throw Error("input 'X' of shape " + shape_text(dims) + " is smaller than the kernel");
  return room / stride + 1;
}

}  // namespace

Planes read_planes(const Window& window, const Tensor& x, std::int64_t channels, std::int64_t out_channels, int type,
                   const char* type_name) {
  const std::size_t rank = window.flat ? 3 : 4;
  if (x.type != type) throw Error("input 'X' must be a " + std::string(type_name) + " tensor");
  if (x.dims.size() != rank || x.dims[1] != channels) {
    throw Error("input 'X' must have " + std::to_string(rank) + " dimensions and " + std::to_string(channels) +
                " channels, not shape " + shape_text(x.dims));
  }
  x.size();
  Planes p;
  p.batch = x.dims[0];
  p.height = window.flat ? 1 : x.dims[2];
  p.width = x.dims.back();
  if (product({p.height, p.width}) > kMostFloats) throw Error("input 'X' has too large planes");
  p.out_height = extent(p.height, window.top + window.bottom, window.kernel_h, window.dilation_h, window.stride_h, x.dims);
  p.out_width = extent(p.width, window.left + window.right, window.kernel_w, window.dilation_w, window.stride_w, x.dims);
  if (product({p.out_height, p.out_width}) > kMostFloats) throw Error("the output has too large planes");
  p.out_dims = {p.batch, out_channels};
  if (!window.flat) p.out_dims.push_back(p.out_height);
  p.out_dims.push_back(p.out_width);
  product(p.out_dims);
  return p;
}

}  // namespace sparsepipe
