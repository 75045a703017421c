// SparseQLinear: Y = activation(X W^T + B + residual) on bytes, with a sparse W of [N, K] and X of [..., K], requantised.
//
// Four consecutive features of a row of X lie in four bytes already. One to three rows: matrix times vector, block by
// block. More: these words are transposed to tiles of vectors over rows, as positions of a convolution.
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

using kernels::Isa;
using kernels::kQuad;
using kernels::QIsa;
using kernels::Run;

constexpr std::int64_t kFewRows = 3;        // up to here row by row
constexpr std::int64_t kOutputGroup = 64;   // outputs that are transposed back at once
constexpr std::int64_t kSlack = 2048;       // bytes behind packed data that a tile may read

struct Plan {
  std::int64_t width;  // rows of X in a tile
  std::shared_ptr<const PackedQWeight> weight;
  std::int64_t chunks;  // of rows, where work is split further than tiles
};

bool is_aligned(const void* p) { return reinterpret_cast<std::uintptr_t>(p) % sizeof(float) == 0; }

class SparseQLinear final : public Kernel {
 public:
  SparseQLinear(const abi::Functions& functions, const Node& node, const Isa& isa, const QIsa& q)
      : Kernel(functions), isa_(isa), q_(q) {
    in_ = node.integer("in_features", std::nullopt, 1, kMaxChannels);
    out_ = node.integer("out_features", std::nullopt, 1, kMaxChannels);
    weight_ = read_qweight(node, out_, in_, 1);
    adds_ = node.has_input(kQResidual);
    quantization_ = std::make_unique<Quantization>(node, weight_, out_, adds_);
    requantize_ = sum_ = quantization_->requantize(q);
    if (adds_) requantize_ = quantization_->product();
  }

  void compute(const Call& call) override {
    const std::optional<Tensor> x = call.input(kX);
    if (!x || x->type != quantization_->type) {
      throw Error("input 'X' must be a tensor of " + std::string(quantization_->type_name()));
    }
    if (x->dims.empty() || x->dims.back() != in_) {
      throw Error("the last dimension of input 'X' must be " + std::to_string(in_) + "; its shape is " +
                  shape_text(x->dims));
    }
    const std::int64_t rows = x->size() / in_;
    std::vector<std::int64_t> dims = x->dims;
    dims.back() = out_;
    product(dims);
    const std::optional<Tensor> residual = adds_ ? call.input(kQResidual) : std::nullopt;
    if (adds_ && (!residual || residual->type != quantization_->type || residual->dims != dims)) {
      throw Error("input 'residual' must be a tensor of " + std::string(quantization_->type_name()) + " of shape " +
                  shape_text(dims));
    }
    const auto* added = residual ? static_cast<const std::uint8_t*>(residual->data) : nullptr;
    auto* y = static_cast<std::uint8_t*>(call.output_data(dims));
    if (rows == 0) return;
    const auto* data = static_cast<const std::uint8_t*>(x->data);
    if (rows <= kFewRows) return by_row(call, data, rows, added, y);
    const std::shared_ptr<const Plan> plan = plans_.plan({rows}, [&] {
      const int vectors = best_qvectors(weight_, q_, rows);
      const std::int64_t width = static_cast<std::int64_t>(vectors) * q_.lanes;
      if (weight_.groups > kMostFloats / (kQuad * width)) throw Error("the weight has too many columns");
      const std::int64_t tiles = ceil_div(rows, width);
      return make_plan(width, row_chunks(weight_.rows / 4, tiles, qtile_cycles(weight_, vectors)));
    });
    by_tile(call, *plan, data, rows, added, y);
  }

 private:
  Plan make_plan(std::int64_t width, std::int64_t chunks) {
    const std::vector<std::int32_t> tap{0};
    std::shared_ptr<const PackedQWeight> weight = plans_.weight(
        PackedQWeight::key(kQuad * width, tap), [&] { return PackedQWeight(weight_, kQuad * width, tap, q_.wide); });
    return {width, std::move(weight), chunks};
  }

  void flip(std::uint8_t* data, std::int64_t count) const {
    const std::uint8_t mask = quantization_->input_flip(q_);
    if (mask == 0) return;
    for (std::int64_t i = 0; i < count; ++i) data[i] ^= mask;
  }

  // y may be the residual: the product's bytes stand elsewhere until they meet it.
  void by_row(const Call& call, const std::uint8_t* x, std::int64_t rows, const std::uint8_t* residual,
              std::uint8_t* y) {
    const std::shared_ptr<const Plan> plan =
        plans_.plan({0}, [&] { return make_plan(1, row_chunks(weight_.rows / 4, 1, 2.0 * weight_.entries())); });
    const std::int64_t padded = weight_.groups * kQuad;
    std::uint8_t* packed = scratch().shared.bytes(rows * padded);
    for (std::int64_t row = 0; row < rows; ++row) {
      std::memcpy(packed + row * padded, x + row * in_, static_cast<std::size_t>(in_));
    }
    flip(packed, rows * padded);
    const std::int64_t chunks = plan->chunks;
    call.parallel(static_cast<std::size_t>(chunks * rows), [&](std::size_t task) {
      const std::int64_t row = static_cast<std::int64_t>(task) % rows;
      const std::int64_t chunk = static_cast<std::int64_t>(task) / rows;
      const std::int64_t begin = plan->weight->row_bound(chunk, chunks), end = plan->weight->row_bound(chunk + 1, chunks);
      const std::int64_t first = begin * weight_.block, count = (end - begin) * weight_.block;
      auto* sums = reinterpret_cast<std::int32_t*>(scratch().out.at_least(static_cast<std::size_t>(count) + 1));
      q_.vector(packed + row * padded, plan->weight->entries(), plan->weight->row_start(), begin, end, weight_.block, sums);
      std::uint8_t* const to = y + row * out_ + first;
      if (residual == nullptr) {
        q_.requantize(sums, first, count, requantize_, to);
      } else {
        std::uint8_t* const bytes_of = scratch().stage.bytes(count);
        q_.requantize(sums, first, count, requantize_, bytes_of);
        q_.add(bytes_of, residual + row * out_ + first, count, sum_, to);
      }
    });
  }

  // Features [4 * first, 4 * last) of `rows` rows of x as words of consecutive rows.
  void pack(const std::uint8_t* x, std::int64_t rows, std::int64_t first, std::int64_t last, std::int64_t width,
            std::uint8_t* to) const {
    const std::int64_t begin = first * kQuad, count = std::min(last * kQuad, in_) - begin;
    const std::uint8_t* from = x + begin;
    std::int64_t stride = in_;
    if (in_ % kQuad != 0 || !is_aligned(x)) {
      stride = (last - first) * kQuad;
      std::uint8_t* copy = scratch().stage.bytes(rows * stride);
      for (std::int64_t row = 0; row < rows; ++row) {
        std::memcpy(copy + row * stride, from + row * in_, static_cast<std::size_t>(count));
      }
      from = copy;
    }
    isa_.transpose(reinterpret_cast<const float*>(from), stride / kQuad, rows, last - first, reinterpret_cast<float*>(to),
                   width);
    flip(to, (last - first) * width * kQuad);
  }

  // `outputs` rows of `rows` bytes (pitch apart) to columns of y, whose rows are `stride` apart.
  void unpack(const std::uint8_t* out, std::int64_t pitch, std::int64_t outputs, std::int64_t rows, std::int64_t stride,
              std::uint8_t* y) const {
    std::int64_t o = 0;
    if (stride % kQuad == 0 && is_aligned(y)) {
      const std::int64_t words = outputs / kQuad;
      std::uint8_t* packed = scratch().partial.bytes(words * pitch * kQuad);
      q_.pack(out, pitch, words * kQuad, pitch, 0, packed, pitch * kQuad);
      isa_.transpose(reinterpret_cast<const float*>(packed), pitch, words, rows, reinterpret_cast<float*>(y),
                     stride / kQuad);
      o = words * kQuad;
    }
    for (; o < outputs; ++o) {
      for (std::int64_t row = 0; row < rows; ++row) y[row * stride + o] = out[o * pitch + row];
    }
  }

  void by_tile(const Call& call, const Plan& plan, const std::uint8_t* x, std::int64_t rows, const std::uint8_t* residual,
               std::uint8_t* y) const {
    const std::int64_t width = plan.width;
    const std::int64_t tiles = ceil_div(rows, width);
    const std::int64_t tile_bytes = weight_.groups * width * kQuad;
    const std::int64_t chunks = plan.chunks > 1 && helpers_.expected() ? plan.chunks : 1;
    const auto rows_of = [&](std::int64_t tile) { return std::min(width, rows - tile * width); };
    std::uint8_t* shared = nullptr;
    if (chunks > 1) {
      shared = scratch().shared.bytes(tiles * tile_bytes + kSlack);
      const std::int64_t parts = std::min<std::int64_t>(8, weight_.groups);
      call.parallel(static_cast<std::size_t>(tiles * parts), [&](std::size_t task) {
        const std::int64_t tile = static_cast<std::int64_t>(task) / parts;
        const std::int64_t part = static_cast<std::int64_t>(task) % parts;
        const std::int64_t first = weight_.groups * part / parts, last = weight_.groups * (part + 1) / parts;
        pack(x + tile * width * in_, rows_of(tile), first, last, width, shared + tile * tile_bytes + first * width * kQuad);
      });
    }
    std::atomic<bool> helped{false};
    const void* const caller = &scratch();
    call.parallel(static_cast<std::size_t>(tiles * chunks), [&](std::size_t task) {
      Scratch& mine = scratch();
      if (&mine != caller) helped.store(true, std::memory_order_relaxed);
      const std::int64_t tile = static_cast<std::int64_t>(task) % tiles;
      const std::int64_t chunk = static_cast<std::int64_t>(task) / tiles;
      const std::int64_t begin = plan.weight->row_bound(chunk, chunks), end = plan.weight->row_bound(chunk + 1, chunks);
      kernels::QRowsArgs args{};
      if (shared) {
        args.x = shared + tile * tile_bytes;
      } else {
        std::uint8_t* packed = mine.tile.bytes(tile_bytes + kSlack);
        pack(x + tile * width * in_, rows_of(tile), 0, weight_.groups, width, packed);
        args.x = packed;
      }
      const auto vectors = static_cast<int>(ceil_div(rows_of(tile), q_.lanes));
      args.entries = plan.weight->entries();
      args.row_start = plan.weight->row_start();
      args.y_stride = static_cast<std::int64_t>(vectors) * q_.lanes;
      args.requantize = requantize_;
      const Run run{0, 0, static_cast<std::int32_t>(args.y_stride)};
      args.runs = &run;
      args.run_count = 1;
      std::uint8_t* out = mine.out.bytes(kOutputGroup * width);
      args.y = out;
      const std::int64_t step = kOutputGroup / weight_.block;
      for (std::int64_t row = begin; row < end; row += step) {
        args.row_begin = row;
        args.row_end = std::min(end, row + step);
        q_.rows(args, weight_.block, vectors);
        const std::int64_t outputs = (args.row_end - row) * weight_.block;
        const std::int64_t first = tile * width * out_ + row * weight_.block;
        if (residual == nullptr) {
          unpack(out, args.y_stride, outputs, rows_of(tile), out_, y + first);
          continue;
        }
        std::uint8_t* const bytes_of = mine.stage.bytes(rows_of(tile) * kOutputGroup);
        unpack(out, args.y_stride, outputs, rows_of(tile), kOutputGroup, bytes_of);
        for (std::int64_t i = 0; i < rows_of(tile); ++i) {
          q_.add(bytes_of + i * kOutputGroup, residual + first + i * out_, outputs, sum_, y + first + i * out_);
        }
      }
    });
    if (chunks > 1) helpers_.saw(helped);
  }

  const Isa& isa_;
  const QIsa& q_;
  std::int64_t in_, out_;
  QWeight weight_;
  std::unique_ptr<Quantization> quantization_;
  kernels::Requantize requantize_{}, sum_{};  // of the product, and of its sum with the residual
  bool adds_;
  PlanCache<Plan, PackedQWeight> plans_;
  mutable Helpers helpers_;
};

}  // namespace

std::unique_ptr<Kernel> make_sparse_qlinear(const abi::Functions& ort, const Node& node, const kernels::Isa& isa) {
  return std::make_unique<SparseQLinear>(ort, node, isa, quantized_isa());
}

}  // namespace sparsepipe
