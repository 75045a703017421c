// DepthwiseConv: one dense filter per channel, on NCHW tensors.
//
// Not sparse itself: it stands between the sparse 1x1 layers of a MobileNet, where onnxruntime's own operator costs a
// change of layout before and after (NOTES.md).
#include "ops/depthwise.h"

#include <algorithm>

#include "ops/ops.h"
#include "ops/weight.h"

namespace sparsepipe {
namespace {

using kernels::Isa;

constexpr std::int64_t kTasks = 16;

class DepthwiseConv final : public Kernel {
 public:
  DepthwiseConv(const abi::Functions& functions, const Node& node, const Isa& isa) : Kernel(functions), isa_(isa) {
    const Window window = read_window(node);
    const std::int64_t channels = node.integer("channels", std::nullopt, 1, kMaxChannels);
    depthwise_ = read_depthwise(node, window, channels);
  }

  void compute(const Call& call) override {
    const std::optional<Tensor> input = call.input(0);
    if (!input) throw Error("input 'X' is missing");
    const Window& w = depthwise_.window;
    const std::int64_t channels = depthwise_.channels;
    const Planes p = read_planes(w, *input, channels, channels);
    float* y = call.output(p.out_dims);
    if (p.batch == 0) return;
    const auto* x = static_cast<const float*>(input->data);

    const std::int64_t band = depthwise_.in_place(isa_) ? p.out_height : staged_band(p);
    const std::int64_t bands = ceil_div(p.out_height, band);
    const std::int64_t groups = std::min(channels, ceil_div(kTasks, p.batch * bands));
    call.parallel(static_cast<std::size_t>(p.batch * bands * groups), [&](std::size_t task) {
      const std::int64_t index = static_cast<std::int64_t>(task);
      const std::int64_t image = index / (bands * groups);
      const std::int64_t group = index / bands % groups;
      const std::int64_t first_row = index % bands * band;
      const std::int64_t first = channels * group / groups, last = channels * (group + 1) / groups;
      thread_local DepthwiseRows rows;
      rows.prepare(isa_, depthwise_, p.height, p.width, p.out_width, first_row,
                   std::min(band, p.out_height - first_row), false);
      rows.compute(x + image * channels * p.height * p.width, first, last,
                   y + ((image * channels + first) * p.out_height + first_row) * p.out_width,
                   p.out_height * p.out_width);
    });
  }

 private:
  // Output rows whose stage stays in the L1 cache; four where it does not.
  std::int64_t staged_band(const Planes& p) const {
    const Window& w = depthwise_.window;
    const std::int64_t least = std::min<std::int64_t>(4, p.out_height);
    const StageShape shape = stage_shape(w, p.out_width, isa_.lanes, least);
    return std::clamp<std::int64_t>((kStageFloats / shape.pitch - shape.fixed_rows) / w.stride_h + 1, least,
                                    p.out_height);
  }

  const Isa& isa_;
  Depthwise depthwise_;
};

}  // namespace

std::unique_ptr<Kernel> make_depthwise_conv(const abi::Functions& ort, const Node& node, const Isa& isa) {
  return std::make_unique<DepthwiseConv>(ort, node, isa);
}

}  // namespace sparsepipe
