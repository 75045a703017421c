// SparseConv: Y = activation(conv(X, W) + B + residual) with a sparse W, on NCHW tensors. ops/conv_tiles.h says how.
#include <algorithm>

#include "ops/conv_pack.h"
#include "ops/ops.h"

namespace sparsepipe {
namespace {

using kernels::Isa;

// What a tile of several turns of the kernel may take, or what is packed to learn of other threads: 4 MB. Tiles that do
// not stay in the caches take twice the time (NOTES.md).
constexpr std::int64_t kTileFloats = 1 << 20;

struct Plan {
  Geometry geometry;
  PackedWeight weight;
  std::vector<std::int64_t> row_bounds;  // of the chunks of rows, where work is split further than tiles
};

class SparseConv final : public Kernel {
 public:
  SparseConv(const abi::Functions& functions, const Node& node, const Isa& isa) : Kernel(functions), isa_(isa) {
    static_cast<Window&>(a_) = read_window(node);
    if (node.integer("group", 1, 1, 1 << 30) != 1) throw Error("attribute 'group' must be 1");
    a_.in = node.integer("in_channels", std::nullopt, 1, kMaxChannels);
    a_.out = node.integer("out_channels", std::nullopt, 1, kMaxChannels);
    a_.mode = static_cast<Mode>(node.integer("mode", 0, 0, static_cast<int>(Mode::kShift)));
    const std::int64_t columns = product({a_.in, a_.kernel_h, a_.kernel_w});
    if (columns >= kMostFloats) throw Error("the weight has too many columns");
    epilogue_ = read_epilogue(node, {"none", "relu", "clip", "hardswish", "silu"});
    weight_ = read_weight(node, a_.out, columns);
    bias_ = read_bias(node, 3, a_.out);
    epilogue_.bias = bias_.empty() ? nullptr : bias_.data();
  }

  void compute(const Call& call) override {
    const std::optional<Tensor> x = call.input(0);
    if (!x) throw Error("input 'X' is missing");
    const Planes p = read_planes(a_, *x, a_.in, a_.out);
    const std::vector<std::int64_t>& dims = p.out_dims;
    const std::optional<Tensor> residual = call.input(4);
    if (residual && (residual->type != abi::kFloat || residual->dims != dims)) {
      throw Error("input 'residual' must be float32 of the output's shape " + shape_text(dims) + ", not " +
                  shape_text(residual->dims));
    }
    float* y = call.output(dims);
    if (p.batch == 0) return;
    const std::int64_t threads = helpers_.threads();
    const auto make = [&] {
      Geometry shape{};
      shape.height = p.height;
      shape.width = p.width;
      shape.out_height = p.out_height;
      shape.out_width = p.out_width;
      shape.lanes = isa_.lanes;
      return make_plan(shape, p.batch, threads);
    };
    const std::shared_ptr<const Plan> plan = plans_.get({p.height, p.width, p.batch == 1}, make, threads);
    run(call, *plan, static_cast<const float*>(x->data), p.batch,
        residual ? static_cast<const float*>(residual->data) : nullptr, y);
  }

 private:
  std::shared_ptr<const Plan> make_plan(const Geometry& shape, std::int64_t batch, std::int64_t threads) const {
    double best = 0, tile_cycles = 0;
    Geometry chosen{};
    std::int64_t block_channels = 0;
    const auto choose = [&](std::int64_t count) {
      const auto tiling = [](const Geometry& g, std::int64_t channels) {
        return Tiling{g.at_once, g.least(), g.layout.groups, channels, g.vectors};
      };
      const Mode mode = chosen.mode;
      const Tiling alone = count > 1 ? tiling(chosen, block_channels) : Tiling{};
      best = 0;
      candidates(a_, shape, isa_.max_vectors[weight_.block], [&](const Geometry& g) {
        if (g.mode != Mode::kDirect && g.layout.channel_stride * 8 > kMostFloats) return;
        const Blocking blocking = best_blocking(weight_, g.layout, g.cost, g.lanes);
        if (g.layout.turns > 1 && floats_in_use(g, blocking.block_channels) > kTileFloats) return;
        if (count > 1 && g.mode != mode) return;
        if (count > 1 && !same_order(weight_.block, alone, tiling(g, blocking.block_channels))) return;
        const double cycles = makespan(weight_, g.layout, batch * g.tiles, blocking.cycles, count, g.lanes).least();
        if (best == 0 || cycles < best) {
          best = cycles;
          tile_cycles = blocking.cycles;
          chosen = g;
          block_channels = blocking.block_channels;
        }
      });
    };
    choose(1);
    if (threads > 1 && best > 0) choose(threads);  // among those that give the same bits
    if (best == 0) throw Error("stride, dilation and input are too large together");
    if (chosen.mode != Mode::kDirect) {  // offsets are 32-bit
      block_channels = std::min(block_channels, std::max<std::int64_t>(1, kMostFloats / chosen.layout.channel_stride));
    }
    const std::int64_t tiles = batch * chosen.tiles;
    const Makespan span = makespan(weight_, chosen.layout, tiles, tile_cycles, threads, chosen.lanes);
    // One thread splits to learn of others, unless that would pack much at once: a few tiles tell of them as well.
    const bool little = chosen.mode == Mode::kDirect || tiles * packed_floats(chosen) <= kTileFloats;
    const bool learns = threads == 1 && (little || tiles < 4);
    const bool split = learns || (threads > 1 && span.shared < span.whole);
    const std::int64_t chunks = split ? row_chunks(weight_.rows / kLeastRows, tiles, tile_cycles) : 1;
    return std::make_shared<const Plan>(Plan{chosen, PackedWeight(weight_, chosen.layout, block_channels),
                                             split_rows(weight_.row_start, kRowEntries, chunks)});
  }

  static std::int64_t packed_floats(const Geometry& g) { return g.layout.channels * g.layout.channel_stride; }

  // Packed, and kept of sums between blocks of channels, while a tile is multiplied.
  std::int64_t floats_in_use(const Geometry& g, std::int64_t block_channels) const {
    const bool blocks = block_channels < g.layout.channels;
    return block_channels * g.layout.channel_stride + (blocks ? a_.out * g.tile_floats() : 0);
  }

  void run(const Call& call, const Plan& plan, const float* x, std::int64_t batch, const float* residual,
           float* y) const {
    const Geometry& g = plan.geometry;
    const std::int64_t in_plane = g.height * g.width;
    const std::int64_t out_plane = g.out_height * g.out_width;
    const std::int64_t tile_size = packed_floats(g);
    const bool packs = g.mode != Mode::kDirect;
    const std::int64_t tiles = batch * g.tiles;
    const auto all_chunks = static_cast<std::int64_t>(plan.row_bounds.size()) - 1;
    // A layer that is one task for one thread would never learn of others: it is packed in parts.
    const bool alone = tiles == 1 && all_chunks == 1 && packs && helpers_.threads() == 1;
    const bool asks = (all_chunks > 1 || alone) && helpers_.expected();
    const std::int64_t chunks = asks ? all_chunks : 1;
    std::atomic<std::uint64_t> seen{0};
    const double most_cached = 0.75 * caches().l2 / sizeof(float);
    const bool prefetch_input = static_cast<double>(a_.in * in_plane) > most_cached;
    const bool prefetch_output = static_cast<double>(a_.out * out_plane) * (residual ? 2 : 1) > most_cached;

    // Split rows need the packed input at once; it is packed first, by all threads together.
    float* shared = nullptr;
    constexpr std::int64_t kSlack = 64;
    if (asks && packs) {
      shared = scratch().shared.at_least(static_cast<std::size_t>(tiles * tile_size + kSlack));
      const std::int64_t parts = std::min<std::int64_t>(g.layout.channels, 8);
      call.parallel(static_cast<std::size_t>(tiles * parts), [&](std::size_t task) {
        seen.fetch_or(scratch().bit, std::memory_order_relaxed);
        const std::int64_t index = static_cast<std::int64_t>(task) / parts;
        const std::int64_t part = static_cast<std::int64_t>(task) % parts;
        const std::int64_t first = g.layout.channels * part / parts;
        const std::int64_t last = g.layout.channels * (part + 1) / parts;
        thread_local TilePacking packing;
        packing.prepare(a_, g, index % g.tiles);
        packing.pack(isa_, x + index / g.tiles * a_.in * in_plane, first, last,
                     shared + index * tile_size + first * g.layout.channel_stride);
      });
      std::fill_n(shared + tiles * tile_size, g.lanes, 0.0f);
    }

    // Every other layer goes backwards: it begins with what the one before it left in the L2 cache.
    const bool backwards = scratch().backwards = !scratch().backwards;
    const std::int64_t tasks = tiles * chunks;
    call.parallel(static_cast<std::size_t>(tasks), [&](std::size_t position) {
      Scratch& mine = scratch();
      seen.fetch_or(mine.bit, std::memory_order_relaxed);
      const std::int64_t task = backwards ? tasks - 1 - static_cast<std::int64_t>(position)
                                          : static_cast<std::int64_t>(position);
      const std::int64_t index = task / chunks;
      const std::int64_t chunk = task % chunks;
      const std::int64_t image = index / g.tiles;
      const std::int64_t tile = index % g.tiles;
      kernels::RowsArgs args{};
      args.row_begin = chunks > 1 ? plan.row_bounds[static_cast<std::size_t>(chunk)] : 0;
      args.row_end = chunks > 1 ? plan.row_bounds[static_cast<std::size_t>(chunk) + 1] : weight_.rows;
      if (args.row_begin == args.row_end) return;  // one row is most of the weight
      args.entries = plan.weight.entries();
      args.groups = plan.weight.groups();
      args.y_stride = out_plane;
      const std::int64_t shift = (image * a_.out + args.row_begin * weight_.block) * out_plane;
      args.y = y + shift;
      args.residual = residual ? residual + shift : nullptr;
      args.epilogue = epilogue_;
      args.prefetch_output = prefetch_output;
      const std::int64_t blocks = plan.weight.blocks();
      const std::int64_t outputs = (args.row_end - args.row_begin) * weight_.block;
      float* partial = nullptr;
      if (blocks > 1) partial = mine.partial.at_least(static_cast<std::size_t>(outputs * g.tile_floats()));
      const float* source = x + image * a_.in * in_plane;
      thread_local TilePacking packing;
      if (packs && !shared) packing.prepare(a_, g, tile);
      for (std::int64_t b = 0; b < blocks; ++b) {
        const std::int64_t first = plan.weight.first_channel(b);
        const std::int64_t last = plan.weight.last_channel(b);
        if (!packs) {
          args.x = source + first * in_plane + tile * g.tile_floats();
          const std::int64_t next = backwards ? tile - 1 : tile + 1;
          if (prefetch_input && next >= 0 && next < g.tiles) {
            args.next = source + first * in_plane + next * g.tile_floats();
            args.next_stride = in_plane;
            args.next_channels = last - first;
            args.next_channels_per_row = ceil_div(last - first, args.row_end - args.row_begin);
          }
        } else if (shared) {
          args.x = shared + index * tile_size + first * g.layout.channel_stride;
        } else {
          float* packed =
              mine.tile.at_least(static_cast<std::size_t>((last - first) * g.layout.channel_stride + kSlack));
          packing.pack(isa_, source, first, last, packed);
          std::fill_n(packed + (last - first) * g.layout.channel_stride, g.lanes, 0.0f);  // what follows the last row
          args.x = packed;
        }
        args.row_start = plan.weight.row_start(b);
        args.first = b == 0;
        args.last = b + 1 == blocks;
        const float* begin = args.x;
        for (int from = 0; from < g.vectors_of(tile); from += g.at_once) {
          const Targets where = targets_of(g, tile, from);
          where.fill(args);
          args.x = begin + from * g.lanes;
          args.partial = blocks > 1 ? partial + outputs * from * g.lanes : nullptr;
          isa_.rows(args, weight_.block, g.turn_of(tile, from));
        }
      }
    });
    if (tiles * chunks > 1 || asks) helpers_.saw_threads(seen);
  }

  const Isa& isa_;
  Attributes a_{};
  SparseWeight weight_;
  std::vector<float> bias_;
  kernels::Epilogue epilogue_{};
  PlanCache<Plan> plans_;
  mutable Helpers helpers_;
};

}  // namespace

std::unique_ptr<Kernel> make_sparse_conv(const abi::Functions& ort, const Node& node, const Isa& isa) {
  return std::make_unique<SparseConv>(ort, node, isa);
}

}  // namespace sparsepipe
