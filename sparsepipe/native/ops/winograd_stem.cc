// StemConv: the first convolution of a network for images, dense, on a few channels. One of 7 x 7 with stride 2 is done
// here, by Winograd's algorithm along the rows (kernels/winograd.h), with the MaxPool behind it; others are SparseConvs
// of full blocks.
//
// A band of output rows is computed at once. Every input row that it needs is transformed: seven points of two phases
// (even and odd columns), a float for each tile of four outputs. For each point the channels, phases and kernel rows are
// the columns of a weight of full blocks, which the kernel of the sparse products multiplies; the tiles of all rows of
// the band are its positions, since those of rows two apart follow each other. What comes back, a sum for each point, becomes the outputs of a
// group of channels in a buffer, from which the pooling, or a copy, goes to the tensor.
#include <algorithm>
#include <array>
#include <cstring>

#include "ops/ops.h"
#include "ops/plan.h"
#include "ops/plan_cache.h"
#include "ops/sharing.h"
#include "ops/weight.h"
#include "ops/window.h"

namespace sparsepipe {
namespace {

using kernels::Isa;

constexpr std::int64_t kKernel = 7, kStride = 2, kTile = 4, kPoints = 7, kPhases = 2;
constexpr std::int64_t kMostStemChannels = 4;
constexpr std::int64_t kGroup = 16;     // output channels whose band is kept until it is pooled
constexpr std::int64_t kBandRows = 32;  // of the convolution, at most
constexpr std::int64_t kBands = 4;      // their number is a multiple of it, for as many threads
constexpr std::int64_t kSlack = 256;    // floats behind buffers that the vectors of a turn may read

// The point a, and what B^T leaves to the row of G: 1 / (2 a (a^2 - b^2) (a^2 - c^2)) with the other numbers b and c, for
// the even columns once more over a.
struct Point {
  double at, even, odd;
};
constexpr Point kPoint[kPoints] = {{0, 1, 0},
                                   {0.5, 32.0 / 45, 16.0 / 45},
                                   {-0.5, 32.0 / 45, -16.0 / 45},
                                   {1, -2.0 / 9, -2.0 / 9},
                                   {-1, -2.0 / 9, 2.0 / 9},
                                   {2, 1.0 / 90, 1.0 / 45},
                                   {-2, 1.0 / 90, -1.0 / 45}};

struct Pool {
  std::int64_t kernel_h, kernel_w, top, left, bottom, right;
};

// What depends on the shape of the input.
struct Shape {
  std::int64_t tiles;         // of four outputs in a row
  std::int64_t rows;          // of the output tensor
  std::int64_t columns;
  std::int64_t bands, band;   // output rows of a band
  std::int64_t conv_rows;     // of a band, at most
  std::int64_t plane;         // floats of the transformed rows of one parity, phase and channel
  std::int64_t point;         // floats from one point to the next
};

// The entries of all points, as the kernel reads them.
struct StemWeight {
  std::vector<char> entries;
  std::size_t dense;
  std::size_t bytes() const { return entries.size(); }
  std::size_t dense_bytes() const { return dense; }
};

struct Plan {
  Shape shape;
  std::shared_ptr<const StemWeight> weight;
};

class WinogradStem final : public Kernel {
 public:
  WinogradStem(const abi::Functions& functions, const Node& node, const Isa& isa, const Window& window, Tensor w,
               const std::optional<Pool>& pool)
      : Kernel(functions), isa_(isa), window_(window), pool_(pool), out_(w.dims[0]), in_(w.dims[1]) {
    epilogue_ = read_epilogue(node, {"none", "relu", "clip", "hardswish", "silu"});
    bias_ = read_bias(node, 2, out_);
    block_ = largest_block(out_);
    filters_ = finite(w, "W");
    std::int64_t entry = 0;
    for (std::int64_t point = 0; point < kPoints; ++point) {
      for (std::int64_t row = 0; row < out_ / block_; ++row, entry += in_ * phases(point) * kKernel) {
        row_start_.push_back(static_cast<std::uint32_t>(entry));
      }
    }
    row_start_.push_back(static_cast<std::uint32_t>(entry));
    at_once_ = isa_.max_vectors[block_];
    // Fewer would add the entries of a row in another order.
    least_ = std::min<int>(at_once_, static_cast<int>(ceil_div(kernels::kSumsForOneChain, block_)));
  }

  void compute(const Call& call) override {
    const std::optional<Tensor> x = call.input(0);
    if (!x) throw Error("input 'X' is missing");
    Planes p = read_planes(window_, *x, in_, out_);
    if (pool_) {
      p.out_dims[2] = pooled(p.out_height, pool_->kernel_h, pool_->top + pool_->bottom, x->dims);
      p.out_dims[3] = pooled(p.out_width, pool_->kernel_w, pool_->left + pool_->right, x->dims);
    }
    float* y = call.output(p.out_dims);
    if (p.batch == 0) return;
    const std::int64_t threads = helpers_.threads();
    const auto make = [&] { return make_plan(p, threads); };
    const std::shared_ptr<const Plan> plan = plans_.plan({p.height, p.width, threads}, make);
    std::atomic<std::uint64_t> seen{0};
    call.parallel(static_cast<std::size_t>(p.batch * plan->shape.bands), [&](std::size_t task) {
      seen.fetch_or(scratch().bit, std::memory_order_relaxed);
      const auto index = static_cast<std::int64_t>(task);
      band(*plan, p, static_cast<const float*>(x->data), y, index / plan->shape.bands, index % plan->shape.bands);
    });
    helpers_.saw_threads(seen);
  }

 private:
  // Odd columns have no product at the point 0.
  static std::int64_t phases(std::int64_t point) { return point == 0 ? 1 : kPhases; }

  static std::int64_t pooled(std::int64_t size, std::int64_t kernel, std::int64_t pads,
                             const std::vector<std::int64_t>& dims) {
    const std::int64_t room = size + pads - kernel;
    if (room < 0) throw Error("input 'X' of shape " + shape_text(dims) + " is smaller than the kernel and the pooling");
    return room / kStride + 1;
  }

  Plan make_plan(const Planes& p, std::int64_t threads) {
    Shape s{};
    s.tiles = ceil_div(p.out_width, kTile);
    s.rows = p.out_dims[2];
    s.columns = p.out_dims[3];
    const std::int64_t step = pool_ ? kStride : 1, overlap = pool_ ? pool_->kernel_h - kStride : 0;
    const std::int64_t most = std::max<std::int64_t>(1, (kBandRows - overlap) / step);
    const std::int64_t even = std::max(kBands, threads);
    s.bands = std::min(s.rows, ceil_div(ceil_div(s.rows, most), even) * even);
    s.band = ceil_div(s.rows, s.bands);
    s.bands = ceil_div(s.rows, s.band);
    s.conv_rows = std::min(p.out_height, s.band * step + overlap);
    // Rows of one parity: those of the band, and three more for the kernel.
    s.plane = ceil_div((s.conv_rows + kKernel / kStride) * s.tiles + kSlack, isa_.lanes) * isa_.lanes;
    s.point = in_ * kPhases * 2 * s.plane;
    if (product({kPoints, s.point}) > kMostFloats || product({kGroup, s.conv_rows * s.tiles * kTile}) > kMostFloats) {
      throw Error("input 'X' is too wide");
    }
    return {s, plans_.weight({s.plane, s.tiles}, [&] { return lay_out(s); })};
  }

  StemWeight lay_out(const Shape& s) const {
    const std::size_t size = sizeof(std::int32_t) + static_cast<std::size_t>(block_) * sizeof(float);
    StemWeight weight;
    weight.dense = filters_.size() * sizeof(float);
    weight.entries.resize(row_start_.back() * size);
    char* at = weight.entries.data();
    for (std::int64_t point = 0; point < kPoints; ++point) {
      for (std::int64_t row = 0; row < out_ / block_; ++row) {
        for (std::int64_t c = 0; c < in_; ++c) {
          for (std::int64_t phase = 0; phase < phases(point); ++phase) {
            for (std::int64_t k = 0; k < kKernel; ++k, at += size) {
              const auto offset = static_cast<std::int32_t>(((c * kPhases + phase) * 2 + k % 2) * s.plane + k / 2 * s.tiles);
              std::memcpy(at, &offset, sizeof offset);
              for (int r = 0; r < block_; ++r) {
                const float value = filter(row * block_ + r, c, k, phase, point);
                std::memcpy(at + sizeof offset + static_cast<std::size_t>(r) * sizeof value, &value, sizeof value);
              }
            }
          }
        }
      }
    }
    return weight;
  }

  // G times the columns of one phase of a row of the kernel.
  float filter(std::int64_t o, std::int64_t c, std::int64_t row, std::int64_t phase, std::int64_t point) const {
    const float* w = filters_.data() + ((o * in_ + c) * kKernel + row) * kKernel;
    double sum = 0, power = phase == 0 ? kPoint[point].even : kPoint[point].odd;
    for (std::int64_t tap = phase; tap < kKernel; tap += kPhases, power *= kPoint[point].at) sum += power * w[tap];
    return static_cast<float>(sum);
  }

  // Output rows [first, last) of a band, and the rows of the convolution that they need.
  void band(const Plan& plan, const Planes& p, const float* x, float* y, std::int64_t image, std::int64_t index) const {
    const Shape& s = plan.shape;
    const std::int64_t first = index * s.band, last = std::min(s.rows, first + s.band);
    if (first >= last) return;
    const std::int64_t from = pool_ ? std::max<std::int64_t>(0, first * kStride - pool_->top) : first;
    const std::int64_t to =
        pool_ ? std::min(p.out_height, (last - 1) * kStride - pool_->top + pool_->kernel_h) : last;
    Scratch& mine = scratch();
    float* transformed = mine.tile.at_least(static_cast<std::size_t>(kPoints * s.point + kSlack));
    transform(s, p, x + image * in_ * p.height * p.width, from, to, transformed);
    const std::int64_t pitch = s.tiles * kTile;
    float* buffer = mine.stage.at_least(static_cast<std::size_t>(s.band * (p.out_width + kStride + 4 * isa_.lanes)));
    float* rows = mine.out.at_least(static_cast<std::size_t>(kGroup * channel_floats(s)));
    for (std::int64_t o = 0; o < out_; o += kGroup) {
      const std::int64_t channels = std::min(kGroup, out_ - o);
      multiply(plan, transformed, (to - from) * s.tiles, o, channels, rows);
      for (std::int64_t c = 0; c < channels; ++c) {
        const float* conv = rows + c * channel_floats(s);
        float* out = y + ((image * out_ + o + c) * s.rows + first) * s.columns;
        if (pool_) {
          isa_.max_pool({conv, pitch, to - from, p.out_width, from - (first * kStride - pool_->top), pool_->left,
                         pool_->kernel_h, pool_->kernel_w, buffer, out, last - first, s.columns});
          continue;
        }
        for (std::int64_t r = 0; r < last - first; ++r, out += s.columns) {
          std::memcpy(out, conv + r * pitch, static_cast<std::size_t>(s.columns) * sizeof(float));
        }
      }
    }
  }

  // Of one output channel of a band, in whole vectors of tiles of which the last turn may take a few more.
  std::int64_t channel_floats(const Shape& s) const {
    return s.conv_rows * s.tiles * kTile + kTile * kernels::kMaxVectors * isa_.lanes;
  }

  // The transformed input rows for the rows [from, to) of the convolution.
  void transform(const Shape& s, const Planes& p, const float* image, std::int64_t from, std::int64_t to,
                 float* transformed) const {
    const std::int64_t width = 8 * (ceil_div(s.tiles, isa_.lanes) + 1) * isa_.lanes;
    float* row = scratch().stage.at_least(static_cast<std::size_t>(2 * width));
    const std::int64_t count = std::clamp<std::int64_t>(width - window_.left, 0, p.width);
    std::memset(row, 0, static_cast<std::size_t>(width) * sizeof(float));
    for (std::int64_t c = 0; c < in_; ++c) {
      for (std::int64_t r = kStride * from; r < kStride * (to - 1) + kKernel; ++r) {
        const std::int64_t in = r - window_.top;
        float* even = transformed + (c * kPhases * 2 + r % 2) * s.plane + (r / 2 - from) * s.tiles;
        float* odd = even + 2 * s.plane;
        if (in < 0 || in >= p.height) {
          for (std::int64_t point = 0; point < kPoints; ++point) {
            std::fill_n(even + point * s.point, s.tiles, 0.0f);
            if (phases(point) > 1) std::fill_n(odd + point * s.point, s.tiles, 0.0f);
          }
          continue;
        }
        const float* source = image + (c * p.height + in) * p.width;
        std::memcpy(row + window_.left, source, static_cast<std::size_t>(count) * sizeof(float));
        // A vector may write beyond a row: the rows below are written after it.
        isa_.winograd_input({row, row + width, s.tiles, even, odd, s.point});
      }
    }
  }

  // Rows of `channels` outputs from `first` on, at the given positions (tiles of all rows of the band).
  void multiply(const Plan& plan, const float* transformed, std::int64_t positions, std::int64_t first,
                std::int64_t channels, float* rows) const {
    const Shape& s = plan.shape;
    const std::int64_t lanes = isa_.lanes;
    const auto all = static_cast<int>(ceil_div(positions, lanes));
    float* sums = scratch().partial.at_least(static_cast<std::size_t>(kPoints * channels * kernels::kMaxVectors * lanes));
    kernels::RowsArgs args{};
    args.entries = plan.weight->entries.data();
    args.row_begin = first / block_;
    args.row_end = (first + channels) / block_;
    args.groups = 1;
    args.first = true;  // but not the last of the blocks of channels: sums are kept as they are
    for (int from = 0; from < all; from += at_once_) {
      const int vectors = std::max(least_, std::min(at_once_, all - from));
      const std::int64_t turn = vectors * lanes, point = channels * turn;
      for (std::int64_t k = 0; k < kPoints; ++k) {
        args.x = transformed + k * s.point + from * lanes;
        args.row_start = row_start_.data() + k * (out_ / block_);
        args.partial = sums + k * point;
        isa_.rows(args, block_, vectors);
      }
      for (std::int64_t c = 0; c < channels; ++c) {
        const float bias = bias_.empty() ? 0.0f : bias_[static_cast<std::size_t>(first + c)];
        isa_.winograd_output({sums + c * turn, point, vectors, bias, rows + c * channel_floats(s) + from * lanes * kTile,
                              epilogue_});
      }
    }
  }

  const Isa& isa_;
  Window window_;
  std::optional<Pool> pool_;
  std::int64_t out_, in_;
  int block_ = 1, at_once_ = 1, least_ = 1;
  std::vector<float> filters_, bias_;
  std::vector<std::uint32_t> row_start_;
  kernels::Epilogue epilogue_{};
  PlanCache<Plan, StemWeight> plans_;
  Helpers helpers_;
};

// The MaxPool that the node's attributes name.
Pool read_pool(const Node& node) {
  const auto shape = node.integers("pool_shape", 2, std::nullopt, 2, 3);
  const auto strides = node.integers("pool_strides", 2, 1, kStride, kStride);
  const auto pads = node.integers("pool_pads", 4, 0, 0, 2);
  for (std::size_t i = 0; i < 4; ++i) {
    if (pads[i] >= shape[i % 2]) throw Error("attribute 'pool_pads' must be smaller than the window");
  }
  return {shape[0], shape[1], pads[0], pads[1], pads[2], pads[3]};
}

std::unique_ptr<Kernel> make_stem(const abi::Functions& ort, const Node& node, const Isa& isa, bool pools) {
  const Window w = read_window(node);
  const std::optional<Tensor> weight = node.constant(1, "W");
  if (!weight || weight->type != abi::kFloat) throw Error("input 'W' must be float32");
  const std::vector<std::int64_t>& dims = weight->dims;
  std::vector<std::int64_t> expected{dims.empty() ? 0 : dims[0], dims.size() < 2 ? 0 : dims[1]};
  if (!w.flat) expected.push_back(w.kernel_h);
  expected.push_back(w.kernel_w);
  if (dims != expected || dims[0] < 1 || dims[0] > kMaxChannels || dims[1] < 1 || dims[1] > kMostStemChannels) {
    throw Error("input 'W' must have 1 to " + std::to_string(kMostStemChannels) +
                " input channels and the size of 'kernel_shape', not shape " + shape_text(dims));
  }
  const bool is_winograd = !w.flat && w.kernel_h == kKernel && w.kernel_w == kKernel && w.stride_h == kStride &&
                           w.stride_w == kStride && w.dilation_h == 1 && w.dilation_w == 1;
  if (is_winograd) {
    return std::make_unique<WinogradStem>(ort, node, isa, w, *weight,
                                          pools ? std::optional<Pool>(read_pool(node)) : std::nullopt);
  }
  if (pools) throw Error("a pooling needs a window of 7 x 7 with strides of 2 and no dilations");
  return make_full_conv(ort, node, isa, w, *weight);
}

}  // namespace

std::unique_ptr<Kernel> make_stem_conv(const abi::Functions& ort, const Node& node, const Isa& isa) {
  return make_stem(ort, node, isa, false);
}

std::unique_ptr<Kernel> make_pooled_stem_conv(const abi::Functions& ort, const Node& node, const Isa& isa) {
  return make_stem(ort, node, isa, true);
}

}  // namespace sparsepipe
