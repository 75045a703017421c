// QMaxPool: the largest byte of each window, on NCHW.
//
// Not sparse itself: onnxruntime's MaxPool of uint8 takes 4 ms for the first pooling of ResNet-50, as long as all its
// sparse layers at 80% together, and between them only NCHW comes without changes of layout.
#include <algorithm>
#include <cstring>

#include "ops/ops.h"
#include "ops/plan.h"
#include "ops/quantized.h"
#include "ops/weight.h"
#include "ops/window.h"

namespace sparsepipe {
namespace {

using kernels::QIsa;
using kernels::QStageRow;

constexpr std::int64_t kTasks = 16;

class QMaxPool final : public Kernel {
 public:
  QMaxPool(const abi::Functions& functions, const Node& node, const QIsa& isa)
      : Kernel(functions), isa_(isa), window_(read_window(node)) {
    const Window& w = window_;
    // Else a window could lie in the padding alone.
    if (std::max(w.top, w.bottom) >= w.kernel_h || std::max(w.left, w.right) >= w.kernel_w) {
      throw Error("attribute 'pads' must be below 'kernel_shape'");
    }
  }

  void compute(const Call& call) override {
    const std::optional<Tensor> x = call.input(0);
    if (!x) throw Error("input 'X' is missing");
    if (x->dims.size() < 2) throw Error("input 'X' has no channels; its shape is " + shape_text(x->dims));
    const std::int64_t channels = x->dims[1];
    const int type = x->type == abi::kInt8 ? abi::kInt8 : abi::kUint8;
    const Planes p = read_planes(window_, *x, channels, channels, type, "uint8 or int8");
    auto* y = static_cast<std::uint8_t*>(call.output_data(p.out_dims));
    const auto* data = static_cast<const std::uint8_t*>(x->data);
    const std::uint8_t flip = type == abi::kInt8 ? 0x80 : 0;  // int8 is in the order of the flipped bytes
    const std::int64_t planes = product({p.batch, channels});
    const std::int64_t tasks = std::min(planes, kTasks);
    call.parallel(static_cast<std::size_t>(tasks), [&](std::size_t task) {
      const auto index = static_cast<std::int64_t>(task);
      for (std::int64_t plane = planes * index / tasks; plane < planes * (index + 1) / tasks; ++plane) {
        pool(p, data + plane * p.height * p.width, flip, y + plane * p.out_height * p.out_width);
      }
    });
  }

 private:
  void pool(const Planes& p, const std::uint8_t* x, std::uint8_t flip, std::uint8_t* y) const {
    const Window& w = window_;
    // The largest of each column of the window's rows, between paddings of the least byte; then one of its columns.
    const std::int64_t padded = w.left + p.width + w.right;
    auto* row = reinterpret_cast<std::uint8_t*>(
        scratch().stage.at_least(static_cast<std::size_t>(padded + p.out_width) / sizeof(float) + 1));
    std::uint8_t* const column = row + padded;
    for (std::int64_t i = 0; i < p.out_height; ++i, y += p.out_width) {
      std::memset(row, 0, static_cast<std::size_t>(padded));
      for (std::int64_t k = 0; k < w.kernel_h; ++k) {
        const std::int64_t from = i * w.stride_h + k * w.dilation_h - w.top;
        if (from >= 0 && from < p.height) larger(x + from * p.width, p.width, flip, row + w.left);
      }
      std::memset(y, 0, static_cast<std::size_t>(p.out_width));
      for (std::int64_t k = 0; k < w.kernel_w; ++k) {
        const QStageRow all{static_cast<std::int32_t>(k * w.dilation_w), 0, static_cast<std::int32_t>(p.out_width)};
        isa_.fill(row, &all, 1, static_cast<std::int32_t>(w.stride_w), column);
        larger(column, p.out_width, 0, y);
      }
      for (std::int64_t j = 0; flip != 0 && j < p.out_width; ++j) y[j] ^= flip;
    }
  }

  static void larger(const std::uint8_t* from, std::int64_t count, std::uint8_t flip, std::uint8_t* to) {
    for (std::int64_t j = 0; j < count; ++j) to[j] = std::max(to[j], static_cast<std::uint8_t>(from[j] ^ flip));
  }

  const QIsa& isa_;
  Window window_;
};

}  // namespace

std::unique_ptr<Kernel> make_qmax_pool(const abi::Functions& ort, const Node& node, const kernels::Isa&) {
  return std::make_unique<QMaxPool>(ort, node, quantized_isa());
}

}  // namespace sparsepipe
