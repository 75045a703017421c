// How a sparse product runs for one shape: the tiles, the blocks of input channels, the weight laid out for them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels/kernel.h"
#include "ops/weight.h"

namespace sparsepipe {

// Where the kernels read a tile of the input from.
struct TileLayout {
  std::int64_t channels = 0;        // input channels (features of a linear layer)
  std::int64_t channel_stride = 0;  // floats between the tiles of consecutive channels
  std::vector<std::int32_t> tap;    // offset of each kernel position within a channel's tile
  std::vector<std::int32_t> group;  // of each kernel position: sums move one position between groups; empty: one group
  int groups = 1;
  int vectors = 0;                  // that the kernel multiplies at once
  int turns = 1;                    // of the kernel for all of a tile
  std::int64_t turn_floats = 0;     // of a channel's tile that are read in a turn, where there are several
};

// Rough costs in cycles.
struct Cost {
  double pack_channel = 0;  // packing one channel of one tile
  double load = 1;          // loading a vector of a tile, in times of an aligned load: 2 where all straddle lines
  double finish = 1;        // storing a vector of the output, in times of an aligned store of a whole one
  double shift = 0;         // moving one vector of sums from a group of kernel positions to the next
  double output_channels = 0;  // above 0 where the input is read in place: how many planes of its stride are written
};

struct Blocking {
  std::int64_t block_channels = 0;  // input channels whose tiles are in use at once
  double cycles = 0;                // of one tile
  double fetch = 0;                 // of these, to pack it or to read it from memory: not less for some of its rows
};

struct Caches {
  double l1, l2;  // bytes
};
const Caches& caches();

// The cheapest split of the input channels for one tile, and what it costs.
Blocking best_blocking(const SparseWeight& weight, const TileLayout& layout, const Cost& cost, int lanes);

// The vectors of the widest tile of which so many channels are read from the L1 cache.
std::int64_t vectors_in_l1(std::int64_t channels, int lanes);

// The weight in the order in which the kernels read it: for each block of input channels, row by row, group by group.
class PackedWeight {
 public:
  PackedWeight(const SparseWeight& weight, const TileLayout& layout, std::int64_t block_channels);
  // Two of one weight are the same where these numbers are.
  static std::vector<std::int64_t> key(const TileLayout& layout, std::int64_t block_channels);

  std::size_t bytes() const { return entries_.size() + row_start_.size() * sizeof(std::uint32_t); }
  std::size_t dense_bytes() const { return dense_bytes_; }
  std::int64_t blocks() const { return blocks_; }
  std::int64_t first_channel(std::int64_t block) const { return block * block_channels_; }
  std::int64_t last_channel(std::int64_t block) const;
  const char* entries() const { return entries_.data(); }
  int groups() const { return groups_; }
  const std::uint32_t* row_start(std::int64_t block) const {
    return row_start_.data() + block * (rows_ * groups_ + 1);
  }

 private:
  template <int B>
  void lay_out(const SparseWeight& weight, const TileLayout& layout);

  std::int64_t rows_, channels_, block_channels_, blocks_;
  int groups_;
  std::size_t dense_bytes_;
  std::vector<char> entries_;
  std::vector<std::uint32_t> row_start_;
};

// A way to cut the work into tiles, as far as it decides in which order the entries of a row are added.
struct Tiling {
  int vectors = 0, least_vectors = 0;  // that are multiplied at once, mostly and where the fewest are left
  int groups = 1;
  std::int64_t block_channels = 0;
  int tile_vectors = 0;  // of all turns of the kernel
  std::int64_t pitch = 0;  // floats of a row, where a tile is made of padded rows; otherwise positions of a tile
};
// Whether both give the same bits.
bool same_order(int block, const Tiling& a, const Tiling& b);

// Memory of one thread, kept between calls: it is warm in the caches.
struct Scratch {
  Buffer tile, partial, stage, out;
  Buffer shared;  // of the thread that entered the kernel, read by its helpers
  std::uint64_t bit = 0;  // one of 64, in turn
  bool backwards = false;  // the direction in which the last layer went through its tiles
};
Scratch& scratch();

}  // namespace sparsepipe
