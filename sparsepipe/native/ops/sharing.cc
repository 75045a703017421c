#include "ops/sharing.h"

#include <algorithm>
#include <numeric>

#include "ops/window.h"

namespace sparsepipe {

std::int64_t row_bound(const std::vector<std::uint32_t>& row_start, double row_entries, std::int64_t chunk,
                       std::int64_t chunks) {
  const auto rows = static_cast<std::int64_t>(row_start.size()) - 1;
  if (chunk == chunks) return rows;
  const auto work = [&](std::int64_t row) {
    return static_cast<double>(row_start[static_cast<std::size_t>(row)]) + row_entries * static_cast<double>(row);
  };
  const double goal = work(rows) * static_cast<double>(chunk) / static_cast<double>(chunks);
  std::int64_t low = 0, high = rows;
  while (low < high) {
    const std::int64_t middle = (low + high) / 2;
    if (work(middle) < goal) {
      low = middle + 1;
    } else {
      high = middle;
    }
  }
  return low;
}

std::int64_t row_chunks(std::int64_t most, std::int64_t tiles, double tile_cycles, std::int64_t tasks) {
  constexpr double kLeastCycles = 40000;  // about 10 us: what a task must weigh to be worth handing over
  if (tiles >= tasks) return 1;
  const auto affordable = static_cast<std::int64_t>(tile_cycles / kLeastCycles);
  return std::max<std::int64_t>(1, std::min({ceil_div(tasks, tiles), affordable, most}));
}

namespace {

std::int64_t turned_in_part(std::int64_t index, std::int64_t tasks, std::int64_t threads) {
  constexpr std::int64_t kMostParts = 8;
  const std::int64_t parts = std::min({threads, tasks, kMostParts});
  const std::int64_t size = tasks / parts;  // the last part has the rest
  const std::int64_t part = std::min(index / size, parts - 1);
  const std::int64_t first = part * size, last = part == parts - 1 ? tasks - 1 : first + size - 1;
  return last - (index - first);
}

}  // namespace

Sharing::Task Sharing::task(std::int64_t index, bool backwards) const {
  if (backwards) index = turned_in_part(index, tasks(), threads);
  if (chunks == 1) return {index, 0, 1};
  const std::int64_t rest = this->rest(), of_a_thread = whole + rest * chunks / threads;
  std::int64_t piece = index;
  if (whole > 0) {
    const std::int64_t thread = index / of_a_thread, place = index % of_a_thread;
    if (place < whole) return {thread * whole + place, 0, 1};
    piece = thread * (of_a_thread - whole) + place - whole;
  }
  // A thread reads few ranges of the weight, and writes channels of its own: not the same cache lines as another one.
  return {whole * threads + piece % rest, piece / rest, chunks};
}

Sharing share(const SparseWeight& weight, const TileLayout& layout, std::int64_t tiles, const Blocking& tile,
              std::int64_t threads, int lanes, bool together) {
  // Cycles of a line that no thread has read yet (from L3), and of one that lies in another core's cache.
  constexpr double kWeightLine = 10, kPackedLine = 20;
  constexpr double kHandOver = 20000;    // a second round of tasks
  constexpr double kLeastPiece = 10000;  // of a tile that only some threads would have
  constexpr double kPart = 1.1;          // turns of one large tile take longer than tiles of their own (NOTES.md)
  Sharing best{tiles, threads};
  if (threads == 1) {
    best.cycles = static_cast<double>(tiles) * tile.cycles;
    return best;
  }
  const auto n = static_cast<double>(threads);
  const double lines = weight.entries() * (4.0 + 4.0 * weight.block) / 64 * kWeightLine;
  best.cycles = static_cast<double>(ceil_div(tiles, threads)) * tile.cycles + lines;
  const auto consider = [&](const Sharing& other) {
    if (other.cycles < best.cycles) best = other;
  };
  const std::int64_t most = weight.rows / kLeastRows, whole = tiles / threads, rest = tiles % threads;
  const std::int64_t chunks = threads / std::gcd(threads, rest);  // so that each thread has as many
  if (rest > 0 && tile.cycles / static_cast<double>(chunks) >= kLeastPiece) {
    const double wholes = static_cast<double>(whole) * tile.cycles;
    const auto pieces = static_cast<double>(rest * chunks / threads);
    const double turns = static_cast<double>(ceil_div(layout.turns, chunks)) / layout.turns;
    if (layout.turns >= chunks) {
      consider({tiles, threads, whole, chunks, false, true, wholes + pieces * turns * kPart * tile.cycles + lines});
    }
    if (chunks <= most) {
      const double piece = tile.fetch + (tile.cycles - tile.fetch) / static_cast<double>(chunks);
      consider({tiles, threads, whole, chunks, false, false, wholes + pieces * piece + (whole > 0 ? lines : lines / n)});
    }
  }
  const std::int64_t ranges = row_chunks(most, tiles, tile.cycles, 2 * threads);
  if (together && ranges > 1) {
    // Of a plane that is read in place, the part of the tile.
    const bool one_turn = layout.tap.size() == 1 && layout.turns == 1;
    const double floats = one_turn ? layout.vectors * lanes : static_cast<double>(layout.channel_stride);
    const double packed = static_cast<double>(tiles * layout.channels) * floats / 16 * kPackedLine;
    consider({tiles, threads, 0, ranges, true, false,
              (static_cast<double>(tiles) * tile.cycles + lines) / n + packed * (1 - 1 / n) + kHandOver});
  }
  return best;
}

Sharing share_to_learn(const SparseWeight& weight, std::int64_t tiles, double tile_cycles) {
  const std::int64_t chunks = row_chunks(weight.rows / kLeastRows, tiles, tile_cycles);
  return {tiles, 1, 0, chunks, chunks > 1};
}

namespace {
constexpr int kConvinced = 4;   // calls without a helper after which none is expected
constexpr int kAskAgain = 256;  // calls after which to try again
}  // namespace

bool Helpers::expected() {
  const int alone = alone_.load(std::memory_order_relaxed);
  if (alone < kConvinced) return true;
  if (alone >= kAskAgain) {
    alone_.store(kConvinced - 1, std::memory_order_relaxed);
    return true;
  }
  alone_.store(alone + 1, std::memory_order_relaxed);
  return false;
}

void Helpers::saw_threads(std::uint64_t seen) {
  const std::int64_t threads = __builtin_popcountll(seen);
  std::int64_t most = threads_.load(std::memory_order_relaxed);
  while (threads > most && !threads_.compare_exchange_weak(most, threads, std::memory_order_relaxed)) {
  }
  if (threads > 1) {
    alone_.store(0, std::memory_order_relaxed);
  } else if (alone_.load(std::memory_order_relaxed) < kConvinced) {
    alone_.fetch_add(1, std::memory_order_relaxed);
  }
}

}  // namespace sparsepipe
