// SparseLinear: Y = activation(X W^T + B + residual) with a sparse W of [N, K], for X of [..., K].
//
// Two ways, by the number of rows of X or by the attribute 'mode':
//   vector  row by row, matrix times vector, entry by entry; one to three rows
//   tiles   the rows are transposed to tiles of vectors over rows of X, so that an entry of W multiplies a whole tile,
//           as a convolution does with positions; more rows
#include <algorithm>

#include "ops/ops.h"
#include "ops/plan_cache.h"
#include "ops/sharing.h"
#include "ops/window.h"

namespace sparsepipe {
namespace {

using kernels::Isa;

enum class Mode : int { kChoose = 0, kVector = 1, kTiles = 2 };

constexpr std::int64_t kFewRows = 3;       // up to here row by row
constexpr std::int64_t kManyRows = 16;     // from here in tiles, whatever the mode: it was chosen for another batch
constexpr std::int64_t kOutputGroup = 64;  // outputs that are transposed back at once
constexpr std::int64_t kAnyVectors = 1 << 20;  // for a plan for any number of vectors that is more than two tiles

struct Plan {
  TileLayout layout;
  Blocking tile;  // of the widest
  std::shared_ptr<const PackedWeight> weight;
};

class SparseLinear final : public Kernel {
 public:
  SparseLinear(const abi::Functions& functions, const Node& node, const Isa& isa) : Kernel(functions), isa_(isa) {
    in_ = node.integer("in_features", std::nullopt, 1, kMaxChannels);
    out_ = node.integer("out_features", std::nullopt, 1, kMaxChannels);
    mode_ = static_cast<Mode>(node.integer("mode", 0, 0, static_cast<int>(Mode::kTiles)));
    epilogue_ = read_epilogue(node, {"none", "relu", "clip", "gelu"});
    weight_ = read_weight(node, out_, in_);
    bias_ = read_bias(node, 3, out_);
    epilogue_.bias = bias_.empty() ? nullptr : bias_.data();
  }

  void compute(const Call& call) override {
    const std::optional<Tensor> x = call.input(0);
    if (!x || x->type != abi::kFloat) throw Error("input 'X' must be a float32 tensor");
    if (x->dims.empty() || x->dims.back() != in_) {
      throw Error("the last dimension of input 'X' must be " + std::to_string(in_) + "; its shape is " +
                  shape_text(x->dims));
    }
    const std::int64_t rows = x->size() / in_;
    std::vector<std::int64_t> dims = x->dims;
    dims.back() = out_;
    product(dims);
    const std::optional<Tensor> added = call.input(4);
    if (added && (added->type != abi::kFloat || added->dims != dims)) {
      throw Error("input 'residual' must be float32 of the output's shape " + shape_text(dims) + ", not " +
                  shape_text(added->dims));
    }
    const float* residual = added ? static_cast<const float*>(added->data) : nullptr;
    float* y = call.output(dims);
    if (rows == 0) return;
    const auto* data = static_cast<const float*>(x->data);
    const bool few = mode_ == Mode::kChoose ? rows <= kFewRows : mode_ == Mode::kVector && rows < kManyRows;
    if (few) return by_row(call, data, rows, residual, y);
    // Row counts that fill more than two tiles share a plan, which therefore knows nothing of their number.
    const std::int64_t vectors = ceil_div(rows, isa_.lanes);
    const std::int64_t threads = helpers_.threads();
    const bool any = is_any(vectors);
    const auto make = [&] { return any ? make_plan(kAnyVectors, 1) : make_plan(vectors, threads); };
    const std::shared_ptr<const Plan> plan = plans_.plan({any ? kAnyVectors : vectors, any ? 1 : threads}, make);
    by_tile(call, *plan, data, rows, residual, y);
  }

 private:
  bool is_any(std::int64_t vectors) const { return vectors > 2 * isa_.max_vectors[weight_.block]; }

  void by_row(const Call& call, const float* x, std::int64_t rows, const float* residual, float* y) const {
    const std::int64_t chunks = row_chunks(weight_.rows / kLeastRows, 1, 2.0 * weight_.entries());
    call.parallel(static_cast<std::size_t>(chunks * rows), [&](std::size_t task) {
      const std::int64_t row = static_cast<std::int64_t>(task) % rows;
      const std::int64_t chunk = static_cast<std::int64_t>(task) / rows;
      isa_.vector(x + row * in_, weight_.column16.empty() ? nullptr : weight_.column16.data(),
                  weight_.column16.empty() ? weight_.column32.data() : nullptr, weight_.values.data(),
                  weight_.row_start.data(), range(chunk, chunks), range(chunk + 1, chunks), weight_.block, epilogue_,
                  residual ? residual + row * out_ : nullptr, y + row * out_);
    });
  }

  std::int64_t range(std::int64_t chunk, std::int64_t chunks) const {
    return row_bound(weight_.row_start, kRowEntries, chunk, chunks);
  }

  struct Choice {
    TileLayout layout;
    Blocking blocking;
    double cycles = 0;  // until all is done

    // For `all` vectors.
    Tiling tiling(std::int64_t all) const {
      const auto last = static_cast<int>((all - 1) % layout.vectors + 1);
      return {layout.vectors, last, layout.groups, blocking.block_channels};
    }
  };

  // The tiles that `threads` threads are done with first, of all or of those that give the same bits as `like`.
  Choice cheapest(std::int64_t all, std::int64_t threads, const Choice* like) const {
    const int widest = isa_.max_vectors[weight_.block];
    Choice best;
    std::int64_t before = 0;
    for (int most = widest; most >= 1; --most) {
      const std::int64_t tiles = ceil_div(all, most);
      Choice choice;
      choice.layout.vectors = static_cast<int>(ceil_div(all, tiles));
      if (choice.layout.vectors == before) continue;
      before = choice.layout.vectors;
      choice.layout.channels = in_;
      choice.layout.tap = {0};
      Cost cost;
      cost.pack_channel = 8.0 * choice.layout.vectors;
      cost.finish = 10;
      Blocking& blocking = choice.blocking = best_blocking(weight_, choice.layout, cost, isa_.lanes);
      const std::int64_t stride = static_cast<std::int64_t>(widest) * isa_.lanes;
      blocking.block_channels = std::min(blocking.block_channels, kMostFloats / stride);  // offsets are 32-bit
      choice.layout.channel_stride = pitch(choice.layout.vectors, blocking.block_channels) * isa_.lanes;
      if (like && !same_order(weight_.block, like->tiling(all), choice.tiling(all))) continue;
      choice.cycles = share(weight_, choice.layout, tiles, blocking, threads, isa_.lanes, true).cycles;
      if (best.cycles == 0 || choice.cycles < best.cycles) best = choice;
    }
    return best;
  }

  // Vectors between features. Where there is no room for a weight for each width of tiles, several read the same: that of
  // the widest tile of which a block stays in the L1 cache, or of the widest of all.
  std::int64_t pitch(std::int64_t vectors, std::int64_t block_channels) const {
    const auto widest = static_cast<std::size_t>(isa_.max_vectors[weight_.block]);
    if (widest * weight_.packed_bytes() <= plans_.most_bytes(weight_.dense_bytes())) return vectors;
    const auto near = static_cast<std::size_t>(vectors_in_l1(block_channels, isa_.lanes));
    return static_cast<std::int64_t>(near < static_cast<std::size_t>(vectors) ? widest : std::min(near, widest));
  }

  Plan make_plan(std::int64_t all, std::int64_t threads) {
    Choice choice = cheapest(all, 1, nullptr);
    if (threads > 1) choice = cheapest(all, threads, &choice);
    const TileLayout& layout = choice.layout;
    const std::int64_t channels = choice.blocking.block_channels;
    return {layout, choice.blocking,
            plans_.weight(PackedWeight::key(layout, channels), [&] { return PackedWeight(weight_, layout, channels); })};
  }

  // The vectors of a tile (the last one has what is left), and how threads share the tiles.
  struct Division {
    std::int64_t size;
    Sharing sharing;
  };

  // All numbers of threads give the same bits: tiles become smaller only where sums are added in turn before and after.
  Division divide(const Plan& plan, std::int64_t vectors, std::int64_t threads) const {
    const std::int64_t fewest = ceil_div(vectors, plan.layout.vectors);
    const auto even = [&](std::int64_t tiles) { return ceil_div(vectors, tiles); };
    const auto divided = [&](std::int64_t size) {
      const double part = static_cast<double>(size) / plan.layout.vectors;
      const Blocking tile{0, part * plan.tile.cycles, part * plan.tile.fetch};
      return Division{size, share(weight_, plan.layout, ceil_div(vectors, size), tile, threads, isa_.lanes, true)};
    };
    Division best = divided(is_any(vectors) ? even(fewest) : plan.layout.vectors);
    if (threads == 1) return {best.size, share_to_learn(weight_, fewest, plan.tile.cycles)};
    const auto in_turn = [&](std::int64_t each) {
      return ((vectors - 1) % each + 1) * weight_.block >= kernels::kSumsForOneChain;
    };
    const std::int64_t finer = even(ceil_div(fewest, threads) * threads);
    if (is_any(vectors) && in_turn(best.size) && in_turn(finer)) {
      const Division other = divided(finer);
      if (other.sharing.cycles < best.sharing.cycles) best = other;
    }
    return best;
  }

  void by_tile(const Call& call, const Plan& plan, const float* x, std::int64_t rows, const float* residual,
               float* y) const {
    const std::int64_t width = plan.layout.channel_stride;  // rows of x in a tile, at most
    const Division division = divide(plan, ceil_div(rows, isa_.lanes), helpers_.threads());
    const std::int64_t size = division.size * isa_.lanes;
    const std::int64_t tiles = ceil_div(rows, size);
    const bool splits = division.sharing.chunks > 1 && helpers_.expected();
    const Sharing sharing = splits ? division.sharing : Sharing{tiles, division.sharing.threads};
    const auto rows_of = [&](std::int64_t tile) { return std::min(size, rows - tile * size); };
    const auto pack = [&](std::int64_t tile, std::int64_t first, std::int64_t last, float* to) {
      isa_.transpose(x + tile * size * in_ + first, in_, rows_of(tile), last - first, to, width);
    };

    float* shared = nullptr;
    if (sharing.together) {
      shared = scratch().shared.at_least(static_cast<std::size_t>(tiles * in_ * width));
      const std::int64_t parts = std::min<std::int64_t>(8, ceil_div(in_, isa_.lanes));
      const std::int64_t step = ceil_div(ceil_div(in_, parts), isa_.lanes) * isa_.lanes;
      call.parallel(static_cast<std::size_t>(tiles * parts), [&](std::size_t task) {
        const std::int64_t tile = static_cast<std::int64_t>(task) / parts;
        const std::int64_t first = std::min(in_, static_cast<std::int64_t>(task) % parts * step);
        const std::int64_t last = std::min(in_, first + step);
        pack(tile, first, last, shared + (tile * in_ + first) * width);
      });
    }

    std::atomic<std::uint64_t> seen{0};
    call.parallel(static_cast<std::size_t>(sharing.tasks()), [&](std::size_t index) {
      Scratch& mine = scratch();
      seen.fetch_or(mine.bit, std::memory_order_relaxed);
      const auto [tile, chunk, chunks] = sharing.task(static_cast<std::int64_t>(index), false);
      const std::int64_t begin = range(chunk, chunks), end = range(chunk + 1, chunks);
      if (begin == end) return;  // one row may be most of the weight
      const std::int64_t block = weight_.block;
      const std::int64_t blocks = plan.weight->blocks();
      kernels::RowsArgs args{};
      args.entries = plan.weight->entries();
      args.groups = 1;
      args.y_stride = width;
      args.whole = true;
      std::int32_t target[kernels::kMaxVectors];
      for (int v = 0; v < kernels::kMaxVectors; ++v) target[v] = v * isa_.lanes;
      args.target = target;
      args.epilogue = epilogue_;
      float* partial = nullptr;
      if (blocks > 1) partial = mine.partial.at_least(static_cast<std::size_t>((end - begin) * block * width));
      float* out = mine.out.at_least(static_cast<std::size_t>(2 * kOutputGroup * width));
      float* added = out + kOutputGroup * width;
      const auto vectors = static_cast<int>(ceil_div(rows_of(tile), isa_.lanes));
      args.y_stride = static_cast<std::int64_t>(vectors) * isa_.lanes;
      for (std::int64_t b = 0; b < blocks; ++b) {
        const std::int64_t first = plan.weight->first_channel(b);
        const std::int64_t last = plan.weight->last_channel(b);
        if (shared) {
          args.x = shared + (tile * in_ + first) * width;
        } else {
          float* packed = mine.tile.at_least(static_cast<std::size_t>((last - first) * width));
          pack(tile, first, last, packed);
          args.x = packed;
        }
        args.row_start = plan.weight->row_start(b);
        args.first = b == 0;
        args.last = b + 1 == blocks;
        const std::int64_t step = args.last ? kOutputGroup / block : end - begin;
        for (std::int64_t row = begin; row < end; row += step) {
          args.row_begin = row;
          args.row_end = std::min(end, row + step);
          args.partial = partial ? partial + (row - begin) * block * args.y_stride : nullptr;
          args.y = out;
          const std::int64_t first_output = tile * size * out_ + row * block;
          if (args.last && residual) {
            isa_.transpose(residual + first_output, out_, rows_of(tile), (args.row_end - row) * block, added,
                           args.y_stride);
            args.residual = added;
          }
          isa_.rows(args, weight_.block, vectors);
          if (args.last) {
            isa_.transpose(out, args.y_stride, (args.row_end - row) * block, rows_of(tile),
                           y + first_output, out_);
          }
        }
      }
    });
    if (sharing.tasks() > 1) helpers_.saw_threads(seen);
  }

  const Isa& isa_;
  std::int64_t in_, out_;
  Mode mode_;
  SparseWeight weight_;
  std::vector<float> bias_;
  kernels::Epilogue epilogue_{};
  PlanCache<Plan, PackedWeight> plans_;
  mutable Helpers helpers_;
};

}  // namespace

std::unique_ptr<Kernel> make_sparse_linear(const abi::Functions& ort, const Node& node, const Isa& isa) {
  return std::make_unique<SparseLinear>(ort, node, isa);
}

}  // namespace sparsepipe
