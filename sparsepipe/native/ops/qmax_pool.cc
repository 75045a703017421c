// QMaxPool: the largest byte of each window, on NCHW.
//
// Not sparse itself: onnxruntime's MaxPool of uint8 takes 4 ms for the first pooling of ResNet-50, as long as all its
// sparse layers at 80% together, and between them only NCHW comes without changes of layout.
#include <algorithm>
#include <cstring>
#include <vector>

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
constexpr std::int64_t kBandBytes = 16384;  // of rows that stay in the L1 cache

class QMaxPool final : public Kernel {
 public:
  QMaxPool(const abi::Functions& functions, const Node& node, const QIsa& isa)
      : Kernel(functions), isa_(isa), window_(read_window(node)) {
    const Window& w = window_;
    // As onnxruntime asks. A dilated window may still lie in the padding alone: its output is the least byte.
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
    // Windows that never reach into the next plane, one after the other: many planes are as one high one.
    const Window& w = window_;
    const bool stacked = w.top + w.bottom == 0 && (w.kernel_h - 1) * w.dilation_h < w.stride_h &&
                         p.height == p.out_height * w.stride_h;
    call.parallel(static_cast<std::size_t>(tasks), [&](std::size_t task) {
      const auto index = static_cast<std::int64_t>(task);
      const std::int64_t last = planes * (index + 1) / tasks;
      for (std::int64_t plane = planes * index / tasks; plane < last;) {
        const std::int64_t together = stacked ? last - plane : 1;
        Planes high = p;
        high.height *= together;
        high.out_height *= together;
        pool(high, data + plane * p.height * p.width, flip, y + plane * p.out_height * p.out_width);
        plane += together;
      }
    });
  }

 private:
  // The largest of each column of a window's rows, for all rows of the output, between paddings of the least byte; then
  // the largest of its columns, over all these rows at once: their pitch is a multiple of the stride.
  void pool(const Planes& p, const std::uint8_t* x, std::uint8_t flip, std::uint8_t* y) const {
    const Window& w = window_;
    const std::int64_t reach = (w.kernel_w - 1) * w.dilation_w;
    const std::int64_t wide = std::max(w.left + p.width, (p.out_width - 1) * w.stride_w + reach + 1);
    const std::int64_t pitch = ceil_div(wide, w.stride_w) * w.stride_w;
    const std::int64_t some = std::clamp<std::int64_t>(kBandBytes / pitch, 1, p.out_height);
    const std::int64_t steps = pitch / w.stride_w;
    std::uint8_t* const rows = scratch().stage.bytes(some * (pitch + 2 * steps) + reach);
    std::uint8_t* const column = rows + some * pitch + reach;
    std::uint8_t* const largest = column + some * steps;
    if (pitch > p.width) std::memset(rows, 0, static_cast<std::size_t>(some * pitch));
    std::memset(rows + some * pitch, 0, static_cast<std::size_t>(reach));
    for (std::int64_t first = 0; first < p.out_height; first += some) {
      const std::int64_t count = std::min(some, p.out_height - first);
      for (std::int64_t i = 0; i < count; ++i) {
        rows_of_window(p, x, flip, (first + i) * w.stride_h - w.top, rows + i * pitch + w.left);
      }
      const bool direct = steps == p.out_width;
      std::uint8_t* const to = direct ? y + first * p.out_width : largest;
      const std::int64_t positions = (count - 1) * steps + p.out_width;
      for (std::int64_t k = 0; k < w.kernel_w; ++k) {
        const QStageRow all{static_cast<std::int32_t>(k * w.dilation_w), 0, static_cast<std::int32_t>(positions)};
        isa_.fill(rows, &all, 1, static_cast<std::int32_t>(w.stride_w), k == 0 ? to : column);
        const std::uint8_t* const both[] = {to, column};
        if (k > 0) isa_.largest(both, 2, positions, 0, to);
      }
      for (std::int64_t i = 0; !direct && i < count; ++i) {
        std::memcpy(y + (first + i) * p.out_width, largest + i * steps, static_cast<std::size_t>(p.out_width));
      }
    }
    for (std::int64_t j = 0; flip != 0 && j < p.out_height * p.out_width; ++j) y[j] ^= flip;
  }

  void rows_of_window(const Planes& p, const std::uint8_t* x, std::uint8_t flip, std::int64_t from,
                      std::uint8_t* to) const {
    thread_local std::vector<const std::uint8_t*> rows;
    rows.clear();
    for (std::int64_t k = 0; k < window_.kernel_h; ++k) {
      const std::int64_t row = from + k * window_.dilation_h;
      if (row >= 0 && row < p.height) rows.push_back(x + row * p.width);
    }
    if (rows.empty()) {
      std::memset(to, 0, static_cast<std::size_t>(p.width));
    } else {
      isa_.largest(rows.data(), static_cast<std::int32_t>(rows.size()), p.width, flip, to);
    }
  }

  const QIsa& isa_;
  Window window_;
};

}  // namespace

std::unique_ptr<Kernel> make_qmax_pool(const abi::Functions& ort, const Node& node, const kernels::Isa&) {
  return std::make_unique<QMaxPool>(ort, node, quantized_isa());
}

}  // namespace sparsepipe
