// A depthwise convolution, one dense filter per channel: some rows of its output at a time.
#pragma once

#include <vector>

#include "kernels/kernel.h"
#include "ops/window.h"

namespace sparsepipe {

struct Depthwise {
  Window window;
  std::int64_t channels = 0;
  std::vector<float> weight;  // [channels, kernel_h, kernel_w]
  std::vector<float> bias;    // [channels], or empty
  kernels::Epilogue epilogue{};  // without its bias

  // Whether the kernel takes planes as they lie; otherwise their rows go to a padded stage first.
  bool in_place(const kernels::Isa& isa) const;
};

// The inputs `W` (1) and `B` (2) of a node, with `prefix` before their names and those of the attributes of the activation.
Depthwise read_depthwise(const Node& node, const Window& window, std::int64_t channels, const std::string& prefix = "");

// What the stage of a band of output rows looks like.
struct StageShape {
  std::int64_t shift = 0;  // columns before the padding, so that stores of rows that are copied as they are are aligned
  std::int64_t phase = 0, pitch = 0;  // floats of a column phase, of a row
  std::int64_t fixed_rows = 0;        // that one output row reads

  std::int64_t rows(const Window& w, std::int64_t out_rows) const { return (out_rows - 1) * w.stride_h + fixed_rows; }
};
// Error where `least_rows` output rows take more than offsets can say.
StageShape stage_shape(const Window& window, std::int64_t out_width, std::int64_t lanes, std::int64_t least_rows);

constexpr std::int64_t kStageFloats = 4096;  // a band's stage stays in the L1 cache

// Rows of the output; what they need is the same for all channels.
class DepthwiseRows {
 public:
  // For `rows` output rows from `first_row` on, of planes of these sizes. `tiled`: not all rows of a plane follow.
  void prepare(const kernels::Isa& isa, const Depthwise& depthwise, std::int64_t height, std::int64_t width,
               std::int64_t out_width, std::int64_t first_row, std::int64_t rows, bool tiled);

  // Those of channels [first, last) of an image, `y_stride` floats apart from channel to channel of y. Writes nothing
  // beyond y + (last - first) * y_stride.
  void compute(const float* image, std::int64_t first, std::int64_t last, float* y, std::int64_t y_stride);

 private:
  void compute_staged(const float* image, std::int64_t first, std::int64_t last, float* y, std::int64_t y_stride);

  const kernels::Isa* isa_ = nullptr;
  const Depthwise* depthwise_ = nullptr;
  bool in_place_ = false;
  kernels::PlanesArgs planes_{};  // in place
  std::vector<kernels::StageRow> rows_;  // otherwise
  std::vector<std::int32_t> column_;
  kernels::PackArgs pack_{};
  kernels::DepthwiseArgs args_{};
  std::int64_t plane_ = 0;  // floats of the input
};

}  // namespace sparsepipe
