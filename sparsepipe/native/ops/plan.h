// How a sparse product runs for one shape: the tiles, the blocks of input channels, the weight laid out for them.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
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
  int vectors = 0;
};

// Rough costs in cycles.
struct Cost {
  double pack_channel = 0;  // packing one channel of one tile
  double load = 1;          // loading one vector of a tile that is in the L1 cache: 2 where it straddles lines
  double finish = 0.8;      // storing one vector of the output
  double shift = 0;         // moving one vector of sums from a group of kernel positions to the next
};

struct Blocking {
  std::int64_t block_channels = 0;  // input channels whose tiles are in use at once
  double cycles = 0;                // of one tile
};

struct Caches {
  double l1, l2;  // bytes
};
const Caches& caches();

// The cheapest split of the input channels for one tile, and what it costs.
Blocking best_blocking(const SparseWeight& weight, const TileLayout& layout, const Cost& cost, int lanes);

// The weight in the order in which the kernels read it: for each block of input channels, row by row, group by group.
class PackedWeight {
 public:
  PackedWeight(const SparseWeight& weight, const TileLayout& layout, std::int64_t block_channels);

  std::int64_t blocks() const { return blocks_; }
  std::int64_t first_channel(std::int64_t block) const { return block * block_channels_; }
  std::int64_t last_channel(std::int64_t block) const;
  const char* entries() const { return entries_.data(); }
  int groups() const { return groups_; }
  const std::uint32_t* row_start(std::int64_t block) const {
    return row_start_.data() + block * (rows_ * groups_ + 1);
  }

 private:
  std::int64_t rows_, channels_, block_channels_, blocks_;
  int groups_;
  std::vector<char> entries_;
  std::vector<std::uint32_t> row_start_;
};

// Splits the block rows into `chunks` ranges of about equal work; returns chunks + 1 bounds.
std::vector<std::int64_t> split_rows(const SparseWeight& weight, std::int64_t chunks);

// Chunks of rows so that a few threads find work even where the tiles are few; 1 where splitting does not pay.
std::int64_t row_chunks(const SparseWeight& weight, std::int64_t tiles, double tile_cycles);

// Learns from the calls of one kernel whether the session has more threads than the caller's.
class Helpers {
 public:
  // Whether to split work further than tiles do. Asks again from time to time.
  bool expected();
  void saw(bool other_thread);

 private:
  std::atomic<int> alone_{0};
};

// The last few plans of a kernel, by shape. A plan is immutable once it is in here.
template <typename Plan>
class PlanCache {
 public:
  std::shared_ptr<const Plan> get(const std::vector<std::int64_t>& key,
                                  const std::function<std::shared_ptr<const Plan>()>& make) {
    const std::lock_guard<std::mutex> lock(mutex_);
    for (auto& [shape, plan] : plans_) {
      if (shape == key) return plan;
    }
    if (plans_.size() >= kMost) plans_.erase(plans_.begin());
    plans_.emplace_back(key, make());
    return plans_.back().second;
  }

 private:
  static constexpr std::size_t kMost = 4;
  std::mutex mutex_;
  std::vector<std::pair<std::vector<std::int64_t>, std::shared_ptr<const Plan>>> plans_;
};

// Memory of one thread, kept between calls: it is warm in the caches.
struct Scratch {
  Buffer tile, partial, stage, out;
  Buffer shared;  // of the thread that entered the kernel, read by its helpers
};
Scratch& scratch();

}  // namespace sparsepipe
