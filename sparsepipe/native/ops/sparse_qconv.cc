// SparseQConv: the QLinearConv of a sparse weight on NCHW bytes, with a fused activation and a fused sum.
//
// The input is packed so that four channels of a position lie in four bytes. A tile is a few vectors of consecutive
// positions:
//   flat     1x1, stride 1: runs of the plane, packed tile by tile
//   window   all else: the padded plane, or a band of it, is packed once for many tiles, split by the phases of the
//            stride. A kernel position is an offset in it. Positions are those of rows of `pitch` columns, wider than
//            the output: what lies beyond its columns is computed and dropped.
#include <algorithm>
#include <cstring>

#include "ops/ops.h"
#include "ops/plan_cache.h"
#include "ops/qplan.h"
#include "ops/quantized.h"
#include "ops/sharing.h"
#include "ops/window.h"

namespace sparsepipe {
namespace {

using kernels::kQuad;
using kernels::QIsa;
using kernels::QStageRow;
using kernels::Run;

constexpr std::int64_t kTasks = 16;
constexpr std::int64_t kSlack = 2048;  // bytes behind packed data that a tile may read

struct Phase {
  std::int64_t row, column;
};

struct Geometry {
  std::int64_t batch, height, width, out_height, out_width;
  int vectors = 1;                  // of a tile
  std::int64_t width_of_tile = 0;   // positions
  std::int64_t pitch = 0;           // positions of a packed row
  std::int64_t positions = 0;       // of an image
  std::int64_t tiles = 0;           // of an image
  std::int64_t more_rows = 0;       // packed rows below that of an output that it reads
  std::vector<Phase> phases;
  std::int64_t band_tiles = 1, band_rows = 1, bands = 1;
  std::int64_t group_bytes = 0;     // packed bytes of four channels
  std::vector<std::int32_t> tap;    // byte offset of each kernel position

  std::int64_t first_position(std::int64_t band) const { return band * band_tiles * width_of_tile; }
};

struct Plan {
  Geometry geometry;
  std::shared_ptr<const PackedQWeight> weight;
  std::int64_t chunks;  // of rows, where work is split further than tiles
};

class SparseQConv final : public Kernel {
 public:
  SparseQConv(const abi::Functions& functions, const Node& node, const QIsa& isa)
      : Kernel(functions), isa_(isa), window_(read_window(node)) {
    if (node.integer("group", 1, 1, 1 << 30) != 1) throw Error("attribute 'group' must be 1");
    in_ = node.integer("in_channels", std::nullopt, 1, kMaxChannels);
    out_ = node.integer("out_channels", std::nullopt, 1, kMaxChannels);
    const std::int64_t positions = window_.kernel_h * window_.kernel_w;
    if (product({in_, positions}) >= kMostFloats) throw Error("the weight has too many columns");
    weight_ = read_qweight(node, out_, in_, positions);
    adds_ = node.has_input(kQResidual);
    quantization_ = std::make_unique<Quantization>(node, weight_, out_, adds_);
    requantize_ = quantization_->requantize(isa);
    flat_ = positions == 1 && window_.stride_h == 1 && window_.stride_w == 1 &&
            window_.top + window_.left + window_.bottom + window_.right == 0;
  }

  void compute(const Call& call) override {
    const std::optional<Tensor> x = call.input(kX);
    if (!x) throw Error("input 'X' is missing");
    const Planes p = read_planes(window_, *x, in_, out_, quantization_->type, quantization_->type_name());
    const std::optional<Tensor> residual = adds_ ? call.input(kQResidual) : std::nullopt;
    if (adds_ && (!residual || residual->type != quantization_->type || residual->dims != p.out_dims)) {
      throw Error("input 'residual' must be " + std::string(quantization_->type_name()) + " of the output's shape " +
                  shape_text(p.out_dims) + (residual ? ", not " + shape_text(residual->dims) : ""));
    }
    auto* y = static_cast<std::uint8_t*>(call.output_data(p.out_dims));
    if (p.batch == 0) return;
    const std::shared_ptr<const Plan> plan =
        plans_.plan({p.batch, p.height, p.width}, [&] { return make_plan(p); });
    run(call, *plan, static_cast<const std::uint8_t*>(x->data),
        residual ? static_cast<const std::uint8_t*>(residual->data) : nullptr, y);
  }

 private:
  Plan make_plan(const Planes& p) {
    Geometry g{};
    g.batch = p.batch;
    g.height = p.height;
    g.width = p.width;
    g.out_height = p.out_height;
    g.out_width = p.out_width;
    if (flat_) {
      g.positions = p.height * p.width;
    } else {
      g.pitch = p.out_width + (window_.kernel_w - 1) * window_.dilation_w / window_.stride_w;
      g.positions = product({p.out_height - 1, g.pitch}) + p.out_width;
      g.more_rows = (window_.kernel_h - 1) * window_.dilation_h / window_.stride_h;
    }
    g.vectors = best_qvectors(weight_, isa_, g.positions);
    g.width_of_tile = static_cast<std::int64_t>(g.vectors) * isa_.lanes;
    g.tiles = ceil_div(g.positions, g.width_of_tile);
    if (flat_) {
      g.bands = g.tiles;
      g.group_bytes = kQuad * g.width_of_tile;
      g.tap = {0};
    } else {
      lay_out(g);
    }
    if (weight_.groups > (kMostFloats - kSlack) / g.group_bytes) {
      throw Error("stride, dilation and input are too large together");
    }
    const double tile_cycles = qtile_cycles(weight_, g.vectors);
    const std::int64_t chunks = row_chunks(weight_.rows / 4, g.batch * g.tiles, tile_cycles);
    std::shared_ptr<const PackedQWeight> weight =
        plans_.weight(PackedQWeight::key(g.group_bytes, g.tap),
                      [&] { return PackedQWeight(weight_, g.group_bytes, g.tap, isa_.wide); });
    return {std::move(g), std::move(weight), chunks};
  }

  // Phases, bands and taps of the packed planes.
  void lay_out(Geometry& g) const {
    const Window& w = window_;
    struct Tap {
      std::int64_t phase, row, column;
    };
    std::vector<Tap> taps;
    for (std::int64_t i = 0; i < w.kernel_h; ++i) {
      for (std::int64_t j = 0; j < w.kernel_w; ++j) {
        const Phase phase{i * w.dilation_h % w.stride_h, j * w.dilation_w % w.stride_w};
        std::int64_t at = 0;
        const auto count = static_cast<std::int64_t>(g.phases.size());
        while (at < count && (g.phases[static_cast<std::size_t>(at)].row != phase.row ||
                              g.phases[static_cast<std::size_t>(at)].column != phase.column)) {
          ++at;
        }
        if (at == count) g.phases.push_back(phase);
        taps.push_back({at, i * w.dilation_h / w.stride_h, j * w.dilation_w / w.stride_w});
      }
    }
    const auto phases = static_cast<std::int64_t>(g.phases.size());
    const auto rows_of = [&](std::int64_t tiles) {
      return std::min((tiles * g.width_of_tile + g.pitch - 2) / g.pitch + 1, g.out_height) + g.more_rows;
    };
    // The largest band that fits half of the L2 cache.
    const double most = 0.5 * caches().l2;
    g.band_tiles = g.tiles;
    const auto bytes_of = [&](std::int64_t tiles) {
      return static_cast<double>(rows_of(tiles)) * static_cast<double>(g.pitch * kQuad * phases * weight_.groups);
    };
    while (g.band_tiles > 1 && bytes_of(g.band_tiles) > most) g.band_tiles = (g.band_tiles + 1) / 2;
    g.bands = ceil_div(g.tiles, g.band_tiles);
    g.band_tiles = ceil_div(g.tiles, g.bands);
    g.bands = ceil_div(g.tiles, g.band_tiles);
    g.band_rows = rows_of(g.band_tiles);
    const std::int64_t rows = phases * g.band_rows;
    if (g.pitch > kMostFloats / (kQuad * rows)) throw Error("stride, dilation and input are too large together");
    // An odd number of cache lines: consecutive groups fall into different sets of the cache.
    g.group_bytes = (ceil_div(rows * g.pitch * kQuad, 64) | 1) * 64;
    for (const Tap& tap : taps) {
      g.tap.push_back(static_cast<std::int32_t>(((tap.phase * g.band_rows + tap.row) * g.pitch + tap.column) * kQuad));
    }
  }

  // Packs groups [first, last) of a band of one image.
  void pack(const Geometry& g, const std::uint8_t* image, std::int64_t band, std::int64_t first, std::int64_t last,
            std::uint8_t* to) const {
    const std::int64_t plane = g.height * g.width;
    const std::uint8_t flip = quantization_->input_flip(isa_);
    const std::int64_t begin = g.first_position(band);
    if (flat_) {
      isa_.pack(image + first * kQuad * plane + begin, plane, std::min(last * kQuad, in_) - first * kQuad,
                std::min(g.width_of_tile, g.positions - begin), flip, to, g.group_bytes);
      return;
    }
    const Window& w = window_;
    const std::int64_t end = std::min(g.positions, begin + g.band_tiles * g.width_of_tile);
    const std::int64_t first_row = begin / g.pitch;
    const std::int64_t rows = (end - 1) / g.pitch + 1 + g.more_rows - first_row;
    const auto phases = static_cast<std::int64_t>(g.phases.size());
    const std::int64_t stage_plane = phases * g.band_rows * g.pitch;
    thread_local std::vector<QStageRow> list;
    list.clear();
    for (std::int64_t f = 0; f < phases; ++f) {
      const Phase& phase = g.phases[static_cast<std::size_t>(f)];
      // Columns of the packed row that lie in the plane: input column = i * stride + shift.
      const std::int64_t shift = phase.column - w.left;
      const std::int64_t from = shift < 0 ? ceil_div(-shift, w.stride_w) : 0;
      const std::int64_t to_column = shift < g.width ? std::min(g.pitch, (g.width - 1 - shift) / w.stride_w + 1) : 0;
      if (to_column <= from) continue;
      for (std::int64_t r = 0; r < rows; ++r) {
        const std::int64_t row = (first_row + r) * w.stride_h + phase.row - w.top;
        if (row < 0 || row >= g.height) continue;
        list.push_back({static_cast<std::int32_t>(row * g.width + from * w.stride_w + shift),
                        static_cast<std::int32_t>((f * g.band_rows + r) * g.pitch + from),
                        static_cast<std::int32_t>(to_column - from)});
      }
    }
    std::uint8_t* stage = scratch().stage.bytes(kQuad * stage_plane);
    std::memset(stage, quantization_->padding(), static_cast<std::size_t>(kQuad * stage_plane));
    for (std::int64_t group = first; group < last; ++group, to += g.group_bytes) {
      const std::int64_t channels = std::min<std::int64_t>(kQuad, in_ - group * kQuad);
      for (std::int64_t c = 0; c < channels; ++c) {
        isa_.fill(image + (group * kQuad + c) * plane, list.data(), static_cast<std::int32_t>(list.size()),
                  static_cast<std::int32_t>(w.stride_w), stage + c * stage_plane);
      }
      isa_.pack(stage, stage_plane, channels, stage_plane, flip, to, 0);
    }
  }

  // Where the positions of a tile go in an output plane.
  static void list_runs(const Geometry& g, std::int64_t tile, std::vector<Run>& runs) {
    runs.clear();
    const std::int64_t begin = tile * g.width_of_tile;
    const std::int64_t end = std::min(g.positions, begin + g.width_of_tile);
    if (g.pitch == 0 || g.pitch == g.out_width) {
      runs.push_back({0, static_cast<std::int32_t>(begin), static_cast<std::int32_t>(end - begin)});
      return;
    }
    for (std::int64_t row = begin / g.pitch; row * g.pitch < end; ++row) {
      const std::int64_t first = std::max(begin, row * g.pitch);
      const std::int64_t last = std::min(end, row * g.pitch + g.out_width);
      if (last <= first) continue;
      runs.push_back({static_cast<std::int32_t>(first - begin),
                      static_cast<std::int32_t>(row * g.out_width + first - row * g.pitch),
                      static_cast<std::int32_t>(last - first)});
    }
  }

  void run(const Call& call, const Plan& plan, const std::uint8_t* x, const std::uint8_t* residual,
           std::uint8_t* y) const {
    const Geometry& g = plan.geometry;
    const std::int64_t in_image = in_ * g.height * g.width;
    const std::int64_t out_plane = g.out_height * g.out_width;
    const std::int64_t band_bytes = weight_.groups * g.group_bytes;
    const std::int64_t all_bands = g.batch * g.bands;
    // Few bands: all threads pack together, and then share the tiles, and the rows of tiles.
    const bool split = all_bands < kTasks && helpers_.expected();
    std::uint8_t* shared = nullptr;
    if (split) {
      shared = scratch().shared.bytes(all_bands * band_bytes + kSlack);
      const std::int64_t parts = std::min<std::int64_t>(weight_.groups, 8);
      call.parallel(static_cast<std::size_t>(all_bands * parts), [&](std::size_t task) {
        const std::int64_t index = static_cast<std::int64_t>(task) / parts;
        const std::int64_t part = static_cast<std::int64_t>(task) % parts;
        const std::int64_t first = weight_.groups * part / parts, last = weight_.groups * (part + 1) / parts;
        pack(g, x + index / g.bands * in_image, index % g.bands, first, last,
             shared + index * band_bytes + first * g.group_bytes);
      });
    }
    const std::int64_t chunks = split ? plan.chunks : 1;
    const std::int64_t tiles_of_task = split ? 1 : g.band_tiles;
    const std::int64_t groups_of_tiles = ceil_div(g.tiles, tiles_of_task);
    std::atomic<bool> helped{false};
    const void* const caller = &scratch();
    const std::int64_t all_groups = g.batch * groups_of_tiles;
    call.parallel(static_cast<std::size_t>(all_groups * chunks), [&](std::size_t task) {
      Scratch& mine = scratch();
      if (&mine != caller) helped.store(true, std::memory_order_relaxed);
      const std::int64_t chunk = static_cast<std::int64_t>(task) / all_groups;
      const std::int64_t index = static_cast<std::int64_t>(task) % all_groups;
      const std::int64_t image = index / groups_of_tiles;
      const std::int64_t first_tile = index % groups_of_tiles * tiles_of_task;
      const std::int64_t band = first_tile / g.band_tiles;
      const std::uint8_t* packed = nullptr;
      if (split) {
        packed = shared + (image * g.bands + band) * band_bytes;
      } else {
        std::uint8_t* to = mine.tile.bytes(band_bytes + kSlack);
        pack(g, x + image * in_image, band, 0, weight_.groups, to);
        packed = to;
      }
      kernels::QRowsArgs args{};
      args.entries = plan.weight->entries();
      args.row_start = plan.weight->row_start();
      args.row_begin = plan.weight->row_bound(chunk, chunks);
      args.row_end = plan.weight->row_bound(chunk + 1, chunks);
      const std::int64_t shift = (image * out_ + args.row_begin * weight_.block) * out_plane;
      args.y = y + shift;
      args.residual = residual ? residual + shift : nullptr;
      args.y_stride = out_plane;
      args.requantize = requantize_;
      thread_local std::vector<Run> runs;
      const std::int64_t origin = flat_ ? g.first_position(band) : g.first_position(band) / g.pitch * g.pitch;
      const std::int64_t last_tile = std::min({g.tiles, first_tile + tiles_of_task, (band + 1) * g.band_tiles});
      for (std::int64_t tile = first_tile; tile < last_tile; ++tile) {
        list_runs(g, tile, runs);
        if (runs.empty()) continue;
        args.runs = runs.data();
        args.run_count = static_cast<std::int32_t>(runs.size());
        args.x = packed + (tile * g.width_of_tile - origin) * kQuad;
        const std::int64_t end = std::min(g.positions - tile * g.width_of_tile, g.width_of_tile);
        isa_.rows(args, weight_.block, static_cast<int>(ceil_div(end, isa_.lanes)));
      }
    });
    if (split) helpers_.saw(helped);
  }

  const QIsa& isa_;
  Window window_;
  std::int64_t in_, out_;
  bool adds_, flat_;
  QWeight weight_;
  std::unique_ptr<Quantization> quantization_;
  kernels::Requantize requantize_{};
  PlanCache<Plan, PackedQWeight> plans_;
  mutable Helpers helpers_;
};

}  // namespace

std::unique_ptr<Kernel> make_sparse_qconv(const abi::Functions& ort, const Node& node, const kernels::Isa&) {
  return std::make_unique<SparseQConv>(ort, node, quantized_isa());
}

}  // namespace sparsepipe
