// QDepthwiseConv: the QLinearConv of one dense filter per channel, on NCHW bytes.
//
// Not sparse itself: it stands between the sparse 1x1 layers of a MobileNet, where onnxruntime's own operator costs a
// change of layout before and after. Four rows of a window take the place of the four channels of a sparse layer: they
// are interleaved, so that a kernel column is one product for each position. A band of rows of the output is one plane
// of `pitch` columns, as in SparseQConv.
#include <algorithm>
#include <cstring>
#include <vector>

#include "ops/ops.h"
#include "ops/plan.h"
#include "ops/plan_cache.h"
#include "ops/qplan.h"
#include "ops/quantized.h"
#include "ops/window.h"

namespace sparsepipe {
namespace {

using kernels::kQuad;
using kernels::QIsa;
using kernels::QStageRow;
using kernels::Run;

constexpr std::int64_t kTasks = 16;
constexpr std::int64_t kBandBytes = 12288;  // packed, for each four rows of the window: it stays in the L1 cache
constexpr std::int64_t kSlack = 2048;       // bytes behind packed data that a tile may read
constexpr std::size_t kWeight = 3;          // the input W

struct Band {
  std::int64_t first, rows;       // of the output
  std::int64_t positions;         // of these rows, each `pitch` wide
  std::vector<QStageRow> copies;  // rows of the input that lie in the plane
  std::vector<Run> runs;          // where the positions go, from the first of these rows on
};

struct Geometry {
  std::int64_t pitch, positions;  // positions: of the largest band
  std::int64_t phases, phase;     // of columns; bytes of each in a stage plane
  std::int64_t staged_rows;       // of a stage plane
  std::int64_t stage_planes, stage_bytes;
  std::int64_t quad_step;    // bytes of the stage between the rows of a quad
  std::int64_t group_bytes;  // packed
  std::vector<Band> bands;
};

struct Plan {
  Geometry geometry;
  std::shared_ptr<const PackedQWeight> weight;
};

class QDepthwiseConv final : public Kernel {
 public:
  QDepthwiseConv(const abi::Functions& functions, const Node& node, const QIsa& isa)
      : Kernel(functions), isa_(isa), window_(read_window(node)) {
    channels_ = node.integer("channels", std::nullopt, 1, kMaxChannels);
    const Window& w = window_;
    const std::optional<Tensor> tensor = node.constant(kWeight, "W");
    std::vector<std::int64_t> dims{channels_, 1};
    if (!w.flat) dims.push_back(w.kernel_h);
    dims.push_back(w.kernel_w);
    if (!tensor || tensor->type != abi::kInt8 || tensor->dims != dims) {
      throw Error("input 'W' must be int8 of shape " + shape_text(dims));
    }
    // As a sparse weight: a block row for each channel, rows of the window in groups of four.
    weight_.rows = channels_;
    weight_.groups = ceil_div(w.kernel_h, kQuad);
    weight_.positions = w.kernel_w;
    const auto* values = static_cast<const std::int8_t*>(tensor->data);
    weight_.row_start.push_back(0);
    for (std::int64_t c = 0; c < channels_; ++c, values += w.kernel_h * w.kernel_w) {
      for (std::int64_t g = 0; g < weight_.groups; ++g) {
        for (std::int64_t j = 0; j < w.kernel_w; ++j) {
          weight_.column.push_back(static_cast<std::uint32_t>(g * w.kernel_w + j));
          for (std::int64_t i = g * kQuad; i < (g + 1) * kQuad; ++i) {
            weight_.values.push_back(i < w.kernel_h ? values[i * w.kernel_w + j] : std::int8_t{0});
          }
        }
      }
      weight_.row_start.push_back(static_cast<std::uint32_t>(weight_.column.size()));
    }
    quantization_ = std::make_unique<Quantization>(node, weight_, channels_, false, 1);
    requantize_ = quantization_->requantize(isa);
  }

  void compute(const Call& call) override {
    const std::optional<Tensor> x = call.input(kX);
    if (!x) throw Error("input 'X' is missing");
    const Planes p = read_planes(window_, *x, channels_, channels_, quantization_->type, quantization_->type_name());
    auto* y = static_cast<std::uint8_t*>(call.output_data(p.out_dims));
    if (p.batch == 0) return;
    const std::shared_ptr<const Plan> plan = plans_.plan({p.height, p.width}, [&] {
      Geometry g = lay_out(p);
      std::vector<std::int32_t> tap;
      for (std::int64_t j = 0; j < window_.kernel_w; ++j) {
        const std::int64_t column = j * window_.dilation_w;
        tap.push_back(static_cast<std::int32_t>((column % window_.stride_w * g.phase + column / window_.stride_w) * kQuad));
      }
      std::shared_ptr<const PackedQWeight> weight =
          plans_.weight(PackedQWeight::key(g.group_bytes, tap),
                        [&] { return PackedQWeight(weight_, g.group_bytes, tap, isa_.wide); });
      return Plan{std::move(g), std::move(weight)};
    });
    const auto* data = static_cast<const std::uint8_t*>(x->data);
    const std::int64_t groups = std::min(channels_, ceil_div(kTasks, p.batch));
    call.parallel(static_cast<std::size_t>(p.batch * groups), [&](std::size_t task) {
      const std::int64_t image = static_cast<std::int64_t>(task) / groups;
      const std::int64_t group = static_cast<std::int64_t>(task) % groups;
      run(*plan, p, image * channels_, channels_ * group / groups, channels_ * (group + 1) / groups, data, y);
    });
  }

 private:
  // One row after the other of the input serves all four rows of a quad where the window moves by one row; else each
  // row of the window has a plane of its own.
  bool shared_rows() const { return window_.stride_h == 1 && window_.dilation_h == 1; }

  Geometry lay_out(const Planes& p) const {
    const Window& w = window_;
    Geometry g{};
    g.pitch = p.out_width + (w.kernel_w - 1) * w.dilation_w / w.stride_w;
    const std::int64_t most = std::max<std::int64_t>(1, kBandBytes / kQuad / g.pitch);
    const std::int64_t count = ceil_div(p.out_height, most);
    const std::int64_t rows = ceil_div(p.out_height, count);
    g.phases = std::min(w.stride_w, (w.kernel_w - 1) * w.dilation_w + 1);
    g.positions = (rows - 1) * g.pitch + p.out_width;
    g.staged_rows = shared_rows() ? rows + weight_.groups * kQuad - 1 : rows;
    g.stage_planes = shared_rows() ? 1 : weight_.groups * kQuad;
    if (g.pitch > kMostFloats / (g.stage_planes * g.staged_rows * g.phases * kQuad)) {
      throw Error("stride, dilation and input are too large together");
    }
    g.phase = g.staged_rows * g.pitch;
    g.quad_step = shared_rows() ? g.pitch : g.phases * g.phase;
    g.stage_bytes = g.stage_planes * g.phases * g.phase;
    // Of the phases of a group: one behind the other, as the stage has them.
    g.group_bytes = ceil_div(g.phases * g.phase * kQuad, 64) * 64;
    if (weight_.groups > (kMostFloats - kSlack) / g.group_bytes) {
      throw Error("stride, dilation and input are too large together");
    }
    for (std::int64_t first = 0; first < p.out_height; first += rows) {
      Band band{first, std::min(rows, p.out_height - first), 0, {}, {}};
      band.positions = (band.rows - 1) * g.pitch + p.out_width;
      list_copies(p, g, band);
      band.runs = runs_of(band.rows, g.pitch, p.out_width);
      g.bands.push_back(std::move(band));
    }
    return g;
  }

  void list_copies(const Planes& p, const Geometry& g, Band& band) const {
    const Window& w = window_;
    const std::int64_t planes = shared_rows() ? 1 : w.kernel_h;
    const std::int64_t rows = shared_rows() ? band.rows + w.kernel_h - 1 : band.rows;
    for (std::int64_t k = 0; k < planes; ++k) {
      for (std::int64_t f = 0; f < g.phases; ++f) {
        // Columns of the staged row that lie in the plane: input column = i * stride + shift.
        const std::int64_t shift = f - w.left;
        const std::int64_t from = shift < 0 ? ceil_div(-shift, w.stride_w) : 0;
        const std::int64_t to = shift < p.width ? std::min(g.pitch, (p.width - 1 - shift) / w.stride_w + 1) : 0;
        if (to <= from) continue;
        for (std::int64_t r = 0; r < rows; ++r) {
          const std::int64_t row = (band.first + r) * w.stride_h + k * w.dilation_h - w.top;
          if (row < 0 || row >= p.height) continue;
          band.copies.push_back({static_cast<std::int32_t>(row * p.width + from * w.stride_w + shift),
                                 static_cast<std::int32_t>((k * g.phases + f) * g.phase + r * g.pitch + from),
                                 static_cast<std::int32_t>(to - from)});
        }
      }
    }
  }

  // Where the positions of a band go in an output plane.
  static std::vector<Run> runs_of(std::int64_t rows, std::int64_t pitch, std::int64_t out_width) {
    if (pitch == out_width) return {{0, 0, static_cast<std::int32_t>(rows * out_width)}};
    std::vector<Run> runs;
    for (std::int64_t row = 0; row < rows; ++row) {
      runs.push_back({static_cast<std::int32_t>(row * pitch), static_cast<std::int32_t>(row * out_width),
                      static_cast<std::int32_t>(out_width)});
    }
    return runs;
  }

  // Channels [first, last) of the image whose first channel is `origin`.
  void run(const Plan& plan, const Planes& p, std::int64_t origin, std::int64_t first, std::int64_t last,
           const std::uint8_t* x, std::uint8_t* y) const {
    const Geometry& g = plan.geometry;
    const std::uint8_t flip = quantization_->input_flip(isa_);
    std::uint8_t* const stage = scratch().stage.bytes(g.stage_bytes + kSlack);
    std::uint8_t* const packed = scratch().tile.bytes(weight_.groups * g.group_bytes + kSlack);
    std::uint8_t* const out = scratch().out.bytes(g.positions + kSlack);
    kernels::QRowsArgs args{};
    args.entries = plan.weight->entries();
    args.row_start = plan.weight->row_start();
    args.x = packed;
    args.requantize = requantize_;
    for (const Band& band : g.bands) {
      std::memset(stage, quantization_->padding(), static_cast<std::size_t>(g.stage_bytes));
      args.runs = band.runs.data();
      args.run_count = static_cast<std::int32_t>(band.runs.size());
      for (std::int64_t c = first; c < last; ++c) {
        isa_.fill(x + (origin + c) * p.height * p.width, band.copies.data(), static_cast<std::int32_t>(band.copies.size()),
                  static_cast<std::int32_t>(window_.stride_w), stage);
        for (std::int64_t group = 0; group < weight_.groups; ++group) {
          const std::uint8_t* const from = stage + group * kQuad * g.quad_step;
          for (std::int64_t f = 0; f < g.phases; ++f) {
            isa_.pack(from + f * g.phase, g.quad_step, kQuad, band.rows * g.pitch, flip,
                      packed + group * g.group_bytes + f * g.phase * kQuad, 0);
          }
        }
        args.row_begin = c;
        args.y = y + ((origin + c) * p.out_height + band.first) * p.out_width;
        isa_.strip(args, band.positions, out);
      }
    }
  }

  const QIsa& isa_;
  Window window_;
  std::int64_t channels_;
  QWeight weight_;
  std::unique_ptr<Quantization> quantization_;
  kernels::Requantize requantize_{};
  PlanCache<Plan, PackedQWeight> plans_;
};

}  // namespace

std::unique_ptr<Kernel> make_qdepthwise_conv(const abi::Functions& ort, const Node& node, const kernels::Isa&) {
  return std::make_unique<QDepthwiseConv>(ort, node, quantized_isa());
}

}  // namespace sparsepipe
