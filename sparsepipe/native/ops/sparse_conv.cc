// SparseConv: Y = activation(conv(X, W) + B + residual) with a sparse W, on NCHW tensors. ops/conv_tiles.h says how.
//
// SparseSeparableConv: the same with a 1x1 W, of a depthwise convolution with an activation of its own in place of X. What
// that computes is never whole in memory: a tile of it is what other convolutions pack.
#include <algorithm>

#include "ops/conv_pack.h"
#include "ops/ops.h"
#include "ops/plan_cache.h"
#include "ops/sharing.h"

namespace sparsepipe {
namespace {

using kernels::Isa;

// What a tile of several turns of the kernel may take, or what is packed to learn of other threads: 4 MB. Tiles that do
// not stay in the caches take twice the time (NOTES.md).
constexpr std::int64_t kTileFloats = 1 << 20;
// What is packed at once for several threads.
constexpr std::int64_t kSharedFloats = 4 * kTileFloats;
constexpr std::int64_t kFewTiles = 4;  // of an image: so few may not tell of other threads, nor occupy them
constexpr std::int64_t kSlack = 64;    // floats behind packed data that a tile may read

struct Plan {
  Geometry geometry;
  std::shared_ptr<const PackedWeight> weight;
  Sharing sharing;
};

std::int64_t packed_floats(const Geometry& g) {
  return g.mode == Mode::kDirect ? 0 : g.layout.channels * g.layout.channel_stride;
}

class SparseConv final : public Kernel {
 public:
  // `residual`: its input. `depthwise`: of SparseSeparableConv, whose window is that of the attributes.
  SparseConv(const abi::Functions& functions, const Node& node, const Isa& isa, const Attributes& attributes,
             SparseWeight weight, std::vector<float> bias, std::size_t residual,
             std::optional<Depthwise> depthwise = std::nullopt)
      : Kernel(functions),
        isa_(isa),
        residual_(residual),
        depthwise_(std::move(depthwise)),
        a_(attributes),
        weight_(std::move(weight)),
        bias_(std::move(bias)) {
    if (depthwise_) a_.depthwise = &*depthwise_;
    epilogue_ = read_epilogue(node, {"none", "relu", "clip", "hardswish", "silu"});
    epilogue_.bias = bias_.empty() ? nullptr : bias_.data();
  }

  void compute(const Call& call) override {
    const std::optional<Tensor> x = call.input(0);
    if (!x) throw Error("input 'X' is missing");
    const Planes p = read_planes(a_, *x, a_.in, a_.out);
    const std::vector<std::int64_t>& dims = p.out_dims;
    const std::optional<Tensor> residual = call.input(residual_);
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
    const std::shared_ptr<const Plan> plan = plans_.plan({p.height, p.width, p.batch, threads}, make);
    run({*plan, static_cast<const float*>(x->data), p.batch,
         residual ? static_cast<const float*>(residual->data) : nullptr, y},
        call);
  }

 private:
  struct Choice {
    Geometry geometry{};
    Blocking blocking;
    double cycles = 0;  // until all is done; 0: there is none
  };

  static Tiling tiling(const Geometry& g, const Blocking& blocking) {
    const std::int64_t pitch = g.by_rows() ? g.pitch : g.tile_positions;
    return {g.at_once, g.least(), g.layout.groups, blocking.block_channels, g.vectors, pitch};
  }

  // The way that `threads` threads are done with first, of all or of those that give the same bits as `like`.
  Choice cheapest(const Geometry& shape, std::int64_t batch, std::int64_t threads, const Choice* like) const {
    Choice best;
    candidates(a_, shape, isa_.max_vectors[weight_.block], [&](const Geometry& g) {
      const bool packs = g.mode != Mode::kDirect;
      if (packs && g.layout.channel_stride * 8 > kMostFloats) return;
      if (like && g.mode != like->geometry.mode) return;
      Blocking blocking = best_blocking(weight_, g.layout, g.cost, g.lanes);
      if (packs) {  // offsets are 32-bit
        // A row of a depthwise convolution is never divided: where it is long, blocks have few channels.
        const bool one_row = g.mode == Mode::kDepthwise && g.tile_rows == 1;
        const std::int64_t floats = one_row ? kTileFloats : kMostFloats;
        const std::int64_t most = std::max<std::int64_t>(1, floats / g.layout.channel_stride);
        blocking.block_channels = std::min(blocking.block_channels, most);
        if (g.layout.turns > 1 && !one_row && is_large(g, blocking.block_channels)) return;
      }
      if (like && !same_order(weight_.block, tiling(like->geometry, like->blocking), tiling(g, blocking))) return;
      const double cycles = share_tiles(g, batch, blocking, threads).cycles * g.filled + read_again(g);
      if (best.cycles == 0 || cycles < best.cycles) best = {g, blocking, cycles};
    });
    return best;
  }

  // Cycles in which the tiles of a depthwise convolution after the first read the weight: the more it takes of the L2 cache
  // together with a tile, the more of it was pushed out.
  double read_again(const Geometry& g) const {
    constexpr double kLine = 40;  // all of it
    if (g.mode != Mode::kDepthwise) return 0;
    const auto weight = static_cast<double>(weight_.packed_bytes());
    const double share = std::min(1.0, (weight + 4.0 * static_cast<double>(packed_floats(g))) / caches().l2);
    return static_cast<double>(g.tiles - 1) * weight / 64 * kLine * share;
  }

  // Whether a tile takes too much of what is packed, and kept of sums between blocks of channels, while it is multiplied;
  // or all tiles do where they are so few that they are packed for several threads.
  bool is_large(const Geometry& g, std::int64_t channels) const {
    const std::int64_t sums = channels < g.layout.channels ? a_.out * g.tile_floats() : 0;
    if (channels * g.layout.channel_stride + sums > kTileFloats) return true;
    return g.tiles < kFewTiles && g.tiles * packed_floats(g) > kSharedFloats;
  }

  Plan make_plan(const Geometry& shape, std::int64_t batch, std::int64_t threads) {
    Choice choice = cheapest(shape, 1, 1, nullptr);  // whose order of sums holds for all batches and threads
    if (choice.cycles == 0) throw Error("stride, dilation and input are too large together");
    if (threads > 1) choice = cheapest(shape, batch, threads, &choice);
    const Geometry& g = choice.geometry;
    const std::int64_t tiles = batch * g.tiles;
    Sharing sharing = share_tiles(g, batch, choice.blocking, threads);
    // One thread splits to learn of others, unless that would pack much at once: a few tiles tell of them as well.
    if (threads == 1 && (tiles * packed_floats(g) <= kTileFloats || tiles < kFewTiles)) {
      sharing = share_to_learn(weight_, tiles, choice.blocking.cycles);
    }
    const std::int64_t channels = choice.blocking.block_channels;
    return {g,
            plans_.weight(PackedWeight::key(g.layout, channels),
                          [&] { return PackedWeight(weight_, g.layout, channels); }),
            sharing};
  }

  Sharing share_tiles(const Geometry& g, std::int64_t batch, const Blocking& tile, std::int64_t threads) const {
    const std::int64_t tiles = batch * g.tiles;
    return share(weight_, g.layout, tiles, tile, threads, g.lanes, tiles * packed_floats(g) <= kSharedFloats);
  }

  struct Work {
    const Plan& plan;
    const float* x;
    std::int64_t batch;
    const float* residual;
    float* y;
  };

  void run(const Work& work, const Call& call) const {
    const Geometry& g = work.plan.geometry;
    const Sharing& planned = work.plan.sharing;
    // A layer that is one task for one thread would never learn of others: it is packed in parts.
    const bool packs = g.mode != Mode::kDirect;
    const bool alone = planned.tasks() == 1 && packs && planned.threads == 1;
    const bool asks = (planned.chunks > 1 || alone) && helpers_.expected();
    const Sharing sharing = asks ? planned : Sharing{planned.tiles, planned.threads};
    std::atomic<std::uint64_t> seen{0};
    const float* shared = packs && (sharing.together || (alone && asks)) ? pack_all(work, call, seen) : nullptr;
    // Every other layer goes backwards: it begins with what the one before it left in the L2 cache.
    const bool backwards = scratch().backwards = !scratch().backwards;
    call.parallel(static_cast<std::size_t>(sharing.tasks()), [&](std::size_t index) {
      seen.fetch_or(scratch().bit, std::memory_order_relaxed);
      const Sharing::Task task = sharing.task(static_cast<std::int64_t>(index), backwards);
      multiply(work, shared, piece_of(g, task, sharing.by_turns), backwards);
    });
    if (sharing.tasks() > 1 || asks) helpers_.saw_threads(seen);
  }

  // Packs all tiles, one after the other, each by all threads together.
  const float* pack_all(const Work& work, const Call& call, std::atomic<std::uint64_t>& seen) const {
    const Geometry& g = work.plan.geometry;
    const std::int64_t tiles = work.batch * g.tiles, tile_size = packed_floats(g);
    float* shared = scratch().shared.at_least(static_cast<std::size_t>(tiles * tile_size + kSlack));
    const std::int64_t parts = std::min<std::int64_t>(g.layout.channels, 8);
    call.parallel(static_cast<std::size_t>(tiles * parts), [&](std::size_t task) {
      seen.fetch_or(scratch().bit, std::memory_order_relaxed);
      const std::int64_t index = static_cast<std::int64_t>(task) / parts;
      const std::int64_t part = static_cast<std::int64_t>(task) % parts;
      const std::int64_t first = g.layout.channels * part / parts;
      const std::int64_t last = g.layout.channels * (part + 1) / parts;
      thread_local TilePacking packing;
      packing.prepare(isa_, a_, g, index % g.tiles, 0, g.vectors_of(index % g.tiles));
      packing.pack(work.x + index / g.tiles * a_.in * g.height * g.width, first, last,
                   shared + index * tile_size + first * g.layout.channel_stride);
    });
    std::fill_n(shared + tiles * tile_size, g.lanes, 0.0f);
    return shared;
  }

  // What a task multiplies: block rows and vectors of a tile of all images.
  struct Piece {
    std::int64_t tile, row_begin, row_end;
    int from, to;
  };

  Piece piece_of(const Geometry& g, const Sharing::Task& task, bool by_turns) const {
    const int vectors = g.vectors_of(task.tile % g.tiles);
    if (!by_turns || task.chunks == 1) {
      const auto bound = [&](std::int64_t chunk) { return row_bound(weight_.row_start, kRowEntries, chunk, task.chunks); };
      return {task.tile, bound(task.chunk), bound(task.chunk + 1), 0, vectors};
    }
    const std::int64_t turns = ceil_div(vectors, g.at_once);
    const auto bound = [&](std::int64_t chunk) {
      return static_cast<int>(std::min<std::int64_t>(vectors, turns * chunk / task.chunks * g.at_once));
    };
    return {task.tile, 0, weight_.rows, bound(task.chunk), bound(task.chunk + 1)};
  }

  // The input lies in `shared` where that is given.
  void multiply(const Work& work, const float* shared, const Piece& piece, bool backwards) const {
    const auto [index, row_begin, row_end, from_vector, to_vector] = piece;
    if (row_begin >= row_end || from_vector >= to_vector) return;  // one row may be most of the weight
    const Geometry& g = work.plan.geometry;
    const PackedWeight& weight = *work.plan.weight;
    const bool packs = g.mode != Mode::kDirect;
    const std::int64_t in_plane = g.height * g.width;
    const std::int64_t out_plane = g.out_height * g.out_width;
    const std::int64_t image = index / g.tiles;
    const std::int64_t tile = index % g.tiles;
    const double most_cached = 0.75 * caches().l2 / sizeof(float);
    const bool prefetch_input = static_cast<double>(a_.in * in_plane) > most_cached;
    kernels::RowsArgs args{};
    args.row_begin = row_begin;
    args.row_end = row_end;
    args.entries = weight.entries();
    args.groups = weight.groups();
    args.y_stride = out_plane;
    const std::int64_t shift = (image * a_.out + row_begin * weight_.block) * out_plane;
    args.y = work.y + shift;
    args.residual = work.residual ? work.residual + shift : nullptr;
    args.epilogue = epilogue_;
    args.prefetch_output = static_cast<double>(a_.out * out_plane) * (work.residual ? 2 : 1) > most_cached;
    Scratch& mine = scratch();
    const std::int64_t blocks = weight.blocks();
    const std::int64_t outputs = (row_end - row_begin) * weight_.block;
    float* partial = nullptr;
    if (blocks > 1) partial = mine.partial.at_least(static_cast<std::size_t>(outputs * g.tile_floats()));
    const float* source = work.x + image * a_.in * in_plane;
    thread_local TilePacking packing;
    if (packs && !shared) packing.prepare(isa_, a_, g, tile, from_vector, to_vector);
    for (std::int64_t b = 0; b < blocks; ++b) {
      const std::int64_t first = weight.first_channel(b);
      const std::int64_t last = weight.last_channel(b);
      if (!packs) {
        args.x = source + first * in_plane + tile * g.tile_floats();
        const std::int64_t next = backwards ? tile - 1 : tile + 1;
        if (prefetch_input && next >= 0 && next < g.tiles) {
          args.next = source + first * in_plane + next * g.tile_floats();
          args.next_stride = in_plane;
          args.next_channels = last - first;
          args.next_channels_per_row = ceil_div(last - first, row_end - row_begin);
        }
      } else if (shared) {
        args.x = shared + index * packed_floats(g) + first * g.layout.channel_stride;
      } else {
        const std::int64_t floats = (last - first) * g.layout.channel_stride;
        float* packed = mine.tile.at_least(static_cast<std::size_t>(floats + kSlack));
        packing.pack(source, first, last, packed);
        std::fill_n(packed + floats, g.lanes, 0.0f);  // what follows the last row
        args.x = packed;
      }
      args.row_start = weight.row_start(b);
      args.first = b == 0;
      args.last = b + 1 == blocks;
      const float* begin = args.x;
      for (int from = from_vector; from < to_vector; from += g.at_once) {
        const Targets where = targets_of(g, tile, from);
        where.fill(args);
        args.x = begin + from * g.lanes;
        args.partial = blocks > 1 ? partial + outputs * from * g.lanes : nullptr;
        isa_.rows(args, weight_.block, g.turn_of(tile, from));
      }
    }
  }

  const Isa& isa_;
  const std::size_t residual_;  // its input
  const std::optional<Depthwise> depthwise_;
  Attributes a_;
  const SparseWeight weight_;
  const std::vector<float> bias_;
  kernels::Epilogue epilogue_{};
  PlanCache<Plan, PackedWeight> plans_;
  mutable Helpers helpers_;
};

Attributes read_attributes(const Node& node) {
  if (node.integer("group", 1, 1, 1 << 30) != 1) throw Error("attribute 'group' must be 1");
  return {read_window(node), node.integer("in_channels", std::nullopt, 1, kMaxChannels),
          node.integer("out_channels", std::nullopt, 1, kMaxChannels), Mode::kChoose};
}

}  // namespace

std::unique_ptr<Kernel> make_sparse_conv(const abi::Functions& ort, const Node& node, const Isa& isa) {
  Attributes a = read_attributes(node);
  a.mode = static_cast<Mode>(node.integer("mode", 0, 0, static_cast<int>(Mode::kShift)));
  const std::int64_t columns = product({a.in, a.kernel_h, a.kernel_w});
  if (columns >= kMostFloats) throw Error("the weight has too many columns");
  SparseWeight weight = read_weight(node, a.out, columns);
  return std::make_unique<SparseConv>(ort, node, isa, a, std::move(weight), read_bias(node, 3, a.out), 4);
}

std::unique_ptr<Kernel> make_sparse_separable_conv(const abi::Functions& ort, const Node& node, const Isa& isa) {
  Attributes a = read_attributes(node);
  if (a.flat || a.kernel_h != 3 || a.kernel_w != 3) throw Error("attribute 'kernel_shape' must be 3 x 3");
  if (a.stride_h != a.stride_w || a.stride_w > 2) throw Error("attribute 'strides' must be 1 x 1 or 2 x 2");
  if (a.dilation_h != 1 || a.dilation_w != 1) throw Error("attribute 'dilations' must be 1 x 1");
  a.mode = Mode::kDepthwise;
  Depthwise depthwise = read_depthwise(node, a, a.in, "depthwise_");
  SparseWeight weight = read_weight(node, a.out, a.in, 3);
  return std::make_unique<SparseConv>(ort, node, isa, a, std::move(weight), read_bias(node, 5, a.out), 6,
                                      std::move(depthwise));
}

std::unique_ptr<Kernel> make_full_conv(const abi::Functions& ort, const Node& node, const Isa& isa, const Window& window,
                                       const Tensor& weight) {
  const Attributes a{window, weight.dims[1], weight.dims[0], Mode::kChoose};
  const std::int64_t columns = product({a.in, a.kernel_h, a.kernel_w});
  SparseWeight full = full_weight(finite(weight, "W"), a.out, columns);
  return std::make_unique<SparseConv>(ort, node, isa, a, std::move(full), read_bias(node, 2, a.out), 4);
}

}  // namespace sparsepipe
