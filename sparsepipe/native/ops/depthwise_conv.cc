// DepthwiseConv: one dense filter per channel, on NCHW tensors.
//
// Not sparse itself: it stands between the sparse 1x1 layers of a MobileNet, where onnxruntime's own operator costs a
// change of layout before and after (NOTES.md).
#include <algorithm>
#include <cstring>

#include "ops/ops.h"
#include "ops/plan.h"
#include "ops/weight.h"
#include "ops/window.h"

namespace sparsepipe {
namespace {

using kernels::Isa;
using kernels::StageRow;

constexpr std::int64_t kStageFloats = 4096;  // a band's stage stays in the L1 cache
constexpr std::int64_t kTasks = 16;

class DepthwiseConv final : public Kernel {
 public:
  DepthwiseConv(const abi::Functions& functions, const Node& node, const Isa& isa)
      : Kernel(functions), isa_(isa), window_(read_window(node)) {
    channels_ = node.integer("channels", std::nullopt, 1, kMaxChannels);
    epilogue_ = read_epilogue(node, {"none", "relu", "clip", "hardswish", "silu"});
    const std::optional<Tensor> w = node.constant(1, "W");
    std::vector<std::int64_t> dims{channels_, 1};
    if (!window_.flat) dims.push_back(window_.kernel_h);
    dims.push_back(window_.kernel_w);
    if (!w || w->type != abi::kFloat || w->dims != dims) {
      throw Error("input 'W' must be float32 of shape " + shape_text(dims));
    }
    weight_ = finite(*w, "W");
    bias_ = read_bias(node, 2, channels_);
  }

  void compute(const Call& call) override {
    const std::optional<Tensor> input = call.input(0);
    if (!input) throw Error("input 'X' is missing");
    const Planes p = read_planes(window_, *input, channels_, channels_);
    float* y = call.output(p.out_dims);
    if (p.batch == 0) return;
    const auto* x = static_cast<const float*>(input->data);

    const Window& w = window_;
    if (isa_.depthwise_planes && w.kernel_h == 3 && w.kernel_w == 3 && w.dilation_h == 1 && w.dilation_w == 1 &&
        w.stride_h == w.stride_w && w.stride_w <= 2) {
      return by_planes(call, p, x, y);
    }
    const std::int64_t lanes = isa_.lanes;
    // Where rows are copied as they are, their first column goes to the start of a vector: stores are aligned.
    const std::int64_t shift = w.stride_w == 1 ? ceil_div(w.left, lanes) * lanes - w.left : 0;
    const std::int64_t phase =
        ceil_div(shift + p.out_width + (w.kernel_w - 1) * w.dilation_w / w.stride_w + 2 * lanes, lanes) * lanes;
    const std::int64_t pitch = phase * w.stride_w;
    const std::int64_t fixed_rows = (w.kernel_h - 1) * w.dilation_h + 1;
    const std::int64_t band = std::clamp<std::int64_t>((kStageFloats / pitch - fixed_rows) / w.stride_h + 1,
                                                       std::min<std::int64_t>(4, p.out_height), p.out_height);
    const std::int64_t stage_rows = (band - 1) * w.stride_h + fixed_rows;
    if (pitch > kMostFloats || stage_rows > kMostFloats / pitch) {
      throw Error("stride, dilation and input are too large together");
    }
    std::vector<std::int32_t> column;
    for (std::int64_t j = 0; j < w.kernel_w; ++j) {
      const std::int64_t at = j * w.dilation_w;
      column.push_back(static_cast<std::int32_t>(at % w.stride_w * phase + at / w.stride_w + shift));
    }
    const std::int64_t span = (p.out_width - 1) * w.stride_w + (w.kernel_w - 1) * w.dilation_w + 1;
    const std::int64_t count = std::max<std::int64_t>(0, std::min(p.width, span - w.left));

    const std::int64_t bands = ceil_div(p.out_height, band);
    const std::int64_t groups = std::min(channels_, ceil_div(kTasks, p.batch * bands));
    call.parallel(static_cast<std::size_t>(p.batch * bands * groups), [&](std::size_t task) {
      const std::int64_t index = static_cast<std::int64_t>(task);
      const std::int64_t image = index / (bands * groups);
      const std::int64_t group = index / bands % groups;
      const std::int64_t first_row = index % bands * band;
      thread_local std::vector<StageRow> rows;
      rows.clear();
      for (std::int64_t r = 0; r < stage_rows && count > 0; ++r) {
        const std::int64_t row = first_row * w.stride_h - w.top + r;
        if (row < 0 || row >= p.height) continue;
        rows.push_back({static_cast<std::int32_t>(row * p.width), static_cast<std::int32_t>(r * pitch),
                        static_cast<std::int32_t>(count)});
      }
      const std::int64_t floats = stage_rows * pitch + 4 * lanes;
      const std::int64_t together = std::clamp<std::int64_t>(kStageFloats / floats, 1, 8);  // channels
      float* stage = scratch().stage.at_least(static_cast<std::size_t>(together * floats));
      std::memset(stage, 0, static_cast<std::size_t>(together * floats) * sizeof(float));
      kernels::PackArgs pack{};
      pack.stage = stage;
      pack.stage_stride = floats;
      pack.stage_count = together;
      pack.input_stride = p.height * p.width;
      pack.rows = rows.data();
      pack.row_count = static_cast<std::int32_t>(rows.size());
      pack.step = static_cast<std::int32_t>(w.stride_w);
      pack.lead = static_cast<std::int32_t>(w.left + shift);
      pack.phase_stride = static_cast<std::int32_t>(phase);
      kernels::DepthwiseArgs args{};
      args.pitch = pitch;
      args.kernel_h = static_cast<std::int32_t>(w.kernel_h);
      args.kernel_w = static_cast<std::int32_t>(w.kernel_w);
      args.row_step = static_cast<std::int32_t>(w.stride_h);
      args.row_dilation = static_cast<std::int32_t>(w.dilation_h);
      args.column = column.data();
      args.rows = std::min(band, p.out_height - first_row);
      args.columns = p.out_width;
      args.epilogue = epilogue_;
      const std::int64_t end = channels_ * (group + 1) / groups;
      for (std::int64_t first = channels_ * group / groups; first < end; first += together) {
        const std::int64_t last = std::min(end, first + together);
        pack.input = x + (image * channels_ + first) * pack.input_stride;
        pack.channels = last - first;
        isa_.pack_stage(pack);
        for (std::int64_t c = first; c < last; ++c) {
          args.stage = stage + (c - first) * floats;
          args.weights = weight_.data() + c * w.kernel_h * w.kernel_w;
          args.bias = bias_.empty() ? 0.0f : bias_[static_cast<std::size_t>(c)];
          args.y = y + ((image * channels_ + c) * p.out_height + first_row) * p.out_width;
          isa_.depthwise(args);
        }
      }
    });
  }

 private:
  void by_planes(const Call& call, const Planes& p, const float* x, float* y) const {
    const std::int64_t groups = std::min(channels_, ceil_div(kTasks, p.batch));
    call.parallel(static_cast<std::size_t>(p.batch * groups), [&](std::size_t task) {
      const std::int64_t image = static_cast<std::int64_t>(task) / groups;
      const std::int64_t group = static_cast<std::int64_t>(task) % groups;
      const std::int64_t first = channels_ * group / groups;
      const std::int64_t at = image * channels_ + first;
      kernels::PlanesArgs args{x + at * p.height * p.width, weight_.data() + first * 9,
                               y + at * p.out_height * p.out_width, channels_ * (group + 1) / groups - first,
                               p.height, p.width, p.out_height, p.out_width, window_.top, window_.left, epilogue_};
      args.epilogue.bias = bias_.empty() ? nullptr : bias_.data() + first;
      isa_.depthwise_planes(args, static_cast<int>(window_.stride_w));
    });
  }

  const Isa& isa_;
  Window window_;
  std::int64_t channels_;
  std::vector<float> weight_, bias_;
  kernels::Epilogue epilogue_{};
};

}  // namespace

std::unique_ptr<Kernel> make_depthwise_conv(const abi::Functions& ort, const Node& node, const Isa& isa) {
  return std::make_unique<DepthwiseConv>(ort, node, isa);
}

}  // namespace sparsepipe
