// How the tiles of a convolution are packed, and where their sums go.
#pragma once

#include "ops/conv_tiles.h"
#include "ops/depthwise.h"

namespace sparsepipe {

// Packs the input for a tile of a convolution; what that needs is the same for all channels.
class TilePacking {
 public:
  // For the vectors [from_vector, to_vector) of a tile of an image, which `pack` may then be called for.
  void prepare(const kernels::Isa& isa, const Attributes& a, const Geometry& g, std::int64_t tile, int from_vector,
               int to_vector);

  // Packs channels [first, last) of an image, with zeros for what lies outside of it.
  void pack(const float* image, std::int64_t first, std::int64_t last, float* to);

 private:
  void prepare_depthwise(const Depthwise& depthwise, int from_vector, int to_vector);
  void compute_depthwise(const float* image, std::int64_t first, std::int64_t last, float* to);

  const kernels::Isa* isa_ = nullptr;
  const Geometry* g_ = nullptr;
  std::int64_t tile_ = 0;
  bool staged_ = false;
  std::vector<std::int64_t> needed_;  // slots that the vectors read
  std::vector<kernels::StageRow> rows_;
  std::vector<kernels::Copy> copies_;
  kernels::PackArgs args_{};
  std::int32_t row_floats_ = 0;  // where not staged: of a row of the plane that are read
  DepthwiseRows depthwise_;
  std::int64_t first_position_ = 0, positions_ = 0;  // kDepthwise: of the tile, that `depthwise_` computes
};

// Where the vectors of a turn of the kernel go in an output plane.
struct Targets {
  std::int32_t pitch = 0, positions = 0, position_rows = 0;
  std::int32_t target[kernels::kMaxVectors] = {};
  std::int32_t count[kernels::kMaxVectors] = {};
  bool whole = false;

  // Has `args` point here.
  void fill(kernels::RowsArgs& args) const;
};
// For the turn that begins at the tile's vector `from`.
Targets targets_of(const Geometry& g, std::int64_t tile, int from);

}  // namespace sparsepipe
