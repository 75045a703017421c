// How the work of a call is shared among the threads of the session.
//
// onnxruntime divides the tasks of a loop into a part for each of up to 8 threads, and a thread begins with its own part.
// So tasks are numbered thread by thread, and in every layer alike: what a thread reads is mostly what it has written.
#pragma once

#include <atomic>
#include <cstdint>
#include <vector>

#include "ops/plan.h"

namespace sparsepipe {

constexpr double kRowEntries = 4;         // that a block row costs besides its own
constexpr std::int64_t kLeastRows = 8;    // of a range of rows that is a task

// The first row of range `chunk` of `chunks` ranges of about equal work, a row costing its entries and `row_entries`
// more; the number of rows for `chunk` = `chunks`.
std::int64_t row_bound(const std::vector<std::uint32_t>& row_start, double row_entries, std::int64_t chunk,
                       std::int64_t chunks);

// Ranges of rows, at most `most`, so that there are `tasks` tasks even where the tiles are few; 1 where splitting does
// not pay.
std::int64_t row_chunks(std::int64_t most, std::int64_t tiles, double tile_cycles, std::int64_t tasks = 16);

// The tasks of a call: `whole` tiles for each thread, and each of the other tiles in `chunks` ranges: of turns of the
// kernel where there are enough of them, or else of rows of the weight.
struct Sharing {
  std::int64_t tiles = 0, threads = 1;
  std::int64_t whole = 0;
  std::int64_t chunks = 1;
  bool together = false;  // what is packed is packed by all threads before they multiply, not by each for itself
  bool by_turns = false;
  double cycles = 0;      // until all threads are done

  struct Task {
    std::int64_t tile, chunk, chunks;
  };
  std::int64_t rest() const { return tiles - whole * threads; }
  std::int64_t tasks() const { return whole * threads + rest() * chunks; }
  // `backwards`: each thread goes through its part from the end.
  Task task(std::int64_t index, bool backwards) const;
};

// The sharing with which `threads` threads are done first with `tiles` tiles. `together`: whether it may be.
Sharing share(const SparseWeight& weight, const TileLayout& layout, std::int64_t tiles, const Blocking& tile,
              std::int64_t threads, int lanes, bool together);

// The sharing with which one thread learns of others.
Sharing share_to_learn(const SparseWeight& weight, std::int64_t tiles, double tile_cycles);

// Learns from the calls of one kernel whether the session has more threads than the caller's.
class Helpers {
 public:
  // Whether to split work further than tiles do. Asks again from time to time.
  bool expected();
  // The most threads that were seen to work on one call.
  std::int64_t threads() const { return threads_.load(std::memory_order_relaxed); }
  void saw(bool other_thread) { saw_threads(other_thread ? std::uint64_t{3} : std::uint64_t{1}); }
  void saw_threads(std::uint64_t seen);  // a bit for each (`Scratch::bit`)

 private:
  std::atomic<int> alone_{0};
  std::atomic<std::int64_t> threads_{1};
};

}  // namespace sparsepipe
