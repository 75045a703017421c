#include "ops/depthwise.h"

#include <algorithm>
#include <cstring>

#include "ops/plan.h"
#include "ops/weight.h"

namespace sparsepipe {

namespace {
constexpr std::int64_t kSmallPlane = 2048;  // floats; a few of these fill the L1 cache
}  // namespace

bool Depthwise::in_place(const kernels::Isa& isa) const {
  const Window& w = window;
  return isa.depthwise_planes && w.kernel_h == 3 && w.kernel_w == 3 && w.dilation_h == 1 && w.dilation_w == 1 &&
         w.stride_h == w.stride_w && w.stride_w <= 2;
}

Depthwise read_depthwise(const Node& node, const Window& window, std::int64_t channels, const std::string& prefix) {
  const kernels::Epilogue epilogue = read_epilogue(node, {"none", "relu", "clip", "hardswish", "silu"}, prefix);
  const std::string name = prefix + "W";
  const std::optional<Tensor> w = node.constant(1, name.c_str());
  std::vector<std::int64_t> dims{channels, 1};
  if (!window.flat) dims.push_back(window.kernel_h);
  dims.push_back(window.kernel_w);
  if (!w || w->type != abi::kFloat || w->dims != dims) {
    throw Error("input '" + name + "' must be float32 of shape " + shape_text(dims));
  }
  return {window, channels, finite(*w, name.c_str()), read_bias(node, 2, channels, prefix + "B"), epilogue};
}

StageShape stage_shape(const Window& w, std::int64_t out_width, std::int64_t lanes, std::int64_t least_rows) {
  StageShape s;
  s.shift = w.stride_w == 1 ? ceil_div(w.left, lanes) * lanes - w.left : 0;
  s.phase = ceil_div(s.shift + out_width + (w.kernel_w - 1) * w.dilation_w / w.stride_w + 2 * lanes, lanes) * lanes;
  s.pitch = s.phase * w.stride_w;
  s.fixed_rows = (w.kernel_h - 1) * w.dilation_h + 1;
  if (s.pitch > kMostFloats || s.rows(w, least_rows) > kMostFloats / s.pitch) {
    throw Error("stride, dilation and input are too large together");
  }
  return s;
}

void DepthwiseRows::prepare(const kernels::Isa& isa, const Depthwise& depthwise, std::int64_t height,
                            std::int64_t width, std::int64_t out_width, std::int64_t first_row, std::int64_t rows,
                            bool tiled) {
  const Window& w = depthwise.window;
  const std::int64_t lanes = isa.lanes;
  isa_ = &isa;
  depthwise_ = &depthwise;
  plane_ = height * width;
  in_place_ = depthwise.in_place(isa);
  if (in_place_) {
    // Of a tile, the same rows of the next channel; otherwise the next rows.
    const std::int64_t next_rows = plane_ <= kSmallPlane ? 0 : 4 * w.stride_h * width;
    const std::int64_t ahead = tiled ? plane_ : next_rows;
    planes_ = {nullptr, nullptr, nullptr, 0, 0, height, width, first_row, rows, out_width, w.top, w.left, ahead,
               depthwise.epilogue};
    return;
  }
  const StageShape shape = stage_shape(w, out_width, lanes, rows);
  column_.clear();
  for (std::int64_t j = 0; j < w.kernel_w; ++j) {
    const std::int64_t at = j * w.dilation_w;
    column_.push_back(static_cast<std::int32_t>(at % w.stride_w * shape.phase + at / w.stride_w + shape.shift));
  }
  const std::int64_t span = (out_width - 1) * w.stride_w + (w.kernel_w - 1) * w.dilation_w + 1;
  const std::int64_t count = std::max<std::int64_t>(0, std::min(width, span - w.left));
  const std::int64_t stage_rows = shape.rows(w, rows);
  rows_.clear();
  for (std::int64_t r = 0; r < stage_rows && count > 0; ++r) {
    const std::int64_t row = first_row * w.stride_h - w.top + r;
    if (row < 0 || row >= height) continue;
    rows_.push_back({static_cast<std::int32_t>(row * width), static_cast<std::int32_t>(r * shape.pitch),
                     static_cast<std::int32_t>(count)});
  }
  const std::int64_t floats = stage_rows * shape.pitch + 4 * lanes;
  const std::int64_t together = std::clamp<std::int64_t>(kStageFloats / floats, 1, 8);  // channels
  float* stage = scratch().stage.at_least(static_cast<std::size_t>(together * floats));
  std::memset(stage, 0, static_cast<std::size_t>(together * floats) * sizeof(float));
  pack_ = {};
  pack_.stage = stage;
  pack_.stage_stride = floats;
  pack_.stage_count = together;
  pack_.input_stride = plane_;
  pack_.rows = rows_.data();
  pack_.row_count = static_cast<std::int32_t>(rows_.size());
  pack_.step = static_cast<std::int32_t>(w.stride_w);
  pack_.lead = static_cast<std::int32_t>(w.left + shape.shift);
  pack_.phase_stride = static_cast<std::int32_t>(shape.phase);
  args_ = {};
  args_.pitch = shape.pitch;
  args_.kernel_h = static_cast<std::int32_t>(w.kernel_h);
  args_.kernel_w = static_cast<std::int32_t>(w.kernel_w);
  args_.row_step = static_cast<std::int32_t>(w.stride_h);
  args_.row_dilation = static_cast<std::int32_t>(w.dilation_h);
  args_.column = column_.data();
  args_.rows = rows;
  args_.columns = out_width;
  args_.epilogue = depthwise.epilogue;
}

void DepthwiseRows::compute(const float* image, std::int64_t first, std::int64_t last, float* y,
                            std::int64_t y_stride) {
  if (!in_place_) return compute_staged(image, first, last, y, y_stride);
  planes_.x = image + first * plane_;
  planes_.weights = depthwise_->weight.data() + first * 9;
  planes_.y = y;
  planes_.y_stride = y_stride;
  planes_.channels = last - first;
  planes_.epilogue.bias = depthwise_->bias.empty() ? nullptr : depthwise_->bias.data() + first;
  isa_->depthwise_planes(planes_, static_cast<int>(depthwise_->window.stride_w));
}

void DepthwiseRows::compute_staged(const float* image, std::int64_t first, std::int64_t last, float* y,
                                   std::int64_t y_stride) {
  const std::int64_t taps = std::int64_t{args_.kernel_h} * args_.kernel_w;
  for (std::int64_t c = first; c < last; c += pack_.stage_count) {
    pack_.channels = std::min(pack_.stage_count, last - c);
    pack_.input = image + c * plane_;
    isa_->pack_stage(pack_);
    for (std::int64_t i = 0; i < pack_.channels; ++i) {
      args_.stage = pack_.stage + i * pack_.stage_stride;
      args_.weights = depthwise_->weight.data() + (c + i) * taps;
      args_.bias = depthwise_->bias.empty() ? 0.0f : depthwise_->bias[static_cast<std::size_t>(c + i)];
      args_.y = y + (c + i - first) * y_stride;
      isa_->depthwise(args_);
    }
  }
}

}  // namespace sparsepipe
