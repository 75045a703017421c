#include "ops/plan.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <numeric>
#include <utility>

namespace sparsepipe {

const Caches& caches() {
  static const Caches sizes = [] {
    long l1 = 0, l2 = 0;
#ifdef _SC_LEVEL1_DCACHE_SIZE
    l1 = sysconf(_SC_LEVEL1_DCACHE_SIZE);
    l2 = sysconf(_SC_LEVEL2_CACHE_SIZE);
#endif
    return Caches{l1 > 0 ? static_cast<double>(l1) : 32768.0, l2 > 0 ? static_cast<double>(l2) : 524288.0};
  }();
  return sizes;
}

namespace {

// Cycles of one operation of the inner loop, measured (NOTES.md).
struct Core {
  double fma;             // of a vector, with the broadcast weight of a block
  double l1, l2, beyond;  // loading a vector of the tile from there
  double entry;           // reading the offset and the weight of an entry
  double least;           // an entry costs at least this: sums wait for one another
  double row;             // mostly its mispredicted end
  double group;           // of kernel positions of a row after its first: its end is mispredicted too
  double partial;         // loading and storing a vector of sums between blocks of channels
  double store;
  // Tiles that take this share of the L2 cache are read from there, and so is a falling part of those up to 1 + `fade`
  // times as large.
  double l2_share, fade;
  double page;            // an entry whose page is not among those that the core has at hand
};

// Vectors of 16 bytes (SSE4, NEON, portable) have the numbers of Zen 4's halves: unmeasured.
const Core& core(int lanes) {
  static constexpr Core kFull = {0.65, 0.85, 1.5, 2.3, 0.8, 1.7, 28, 20, 1.3, 0.8, 0.7, 0, 1.7};
  static constexpr Core kHalf = {1.0, 1.0, 2.2, 3.5, 0.8, 1.7, 28, 20, 1.3, 0.8, 0.7, 0, 1.7};
  static constexpr Core kAvx2 = {0.56, 0.88, 1.5, 2.9, 0.65, 1.8, 20, 20, 1.1, 1.7, 0.4, 1, 1.9};
#if defined(SPARSEPIPE_X86)
  // Zen 4 (of this family the one with AVX-512) takes two cycles for a vector of 512 bits.
  static const bool half = __builtin_cpu_is("amdfam19h");
  if (half && lanes == 16) return kHalf;
#endif
  return lanes == 4 ? kHalf : (lanes == 8 ? kAvx2 : kFull);
}

constexpr double kL1Share = 0.9;     // of the L1 cache, that a tile may take to be read from there
constexpr double kPageBytes = 4096;  // also the bytes of one way of the L1 cache: the addresses that share a set
constexpr double kPages = 64;        // that the core has at hand (first-level TLB)
constexpr double kLine = 64;
constexpr double kLineCycles = 10;   // that a line takes which comes from beyond the L2 cache

// The part of a cache in which the tile of a plane may lie, where planes of `stride` bytes are read in place: those that
// lie a multiple of a large power of two apart fall into the same few sets. In L2, too, where the sets depend on the
// place of a page in memory otherwise.
double spread(double stride, double run) {
  const auto step = static_cast<double>(std::gcd(static_cast<std::int64_t>(stride), static_cast<std::int64_t>(kPageBytes)));
  return std::min(1.0, std::ceil(run / kLine) * kLine / step);
}

// How much of what takes `bytes` does not fit into `size`.
double outside(double bytes, double size, double fade) {
  if (bytes <= size) return 0;
  return fade > 0 ? std::min(1.0, (bytes / size - 1) / fade) : 1.0;
}

}  // namespace

Blocking best_blocking(const SparseWeight& weight, const TileLayout& layout, const Cost& cost, int lanes) {
  const Core& c = core(lanes);
  const double entries = weight.entries();
  const double rows = static_cast<double>(weight.rows);
  const double vectors = layout.vectors;
  const double sums = weight.block * vectors;
  const bool in_place = cost.output_channels > 0;
  const double stride = 4.0 * static_cast<double>(layout.channel_stride);
  // Only what is read of a tile counts: gaps between the channels of a plane do not fill the cache.
  const double turns = layout.turns;
  const double run = layout.tap.size() == 1 ? 4.0 * vectors * lanes
                                            : (layout.turns > 1 ? 4.0 * static_cast<double>(layout.turn_floats) : stride);
  // A turn finds its part of a tile where the packing left it, which is L2 where there are several.
  const double first_loads = static_cast<double>(layout.channels) * run / (4.0 * lanes * std::max(1.0, entries * vectors));
  const double cold = layout.turns > 1 ? std::min(1.0, first_loads) : 0.0;
  const double kept = layout.turns > 1 ? stride : run;  // bytes of a channel in L2
  const double sets = in_place ? spread(stride, run) : 1.0;
  Blocking best;
  for (std::int64_t blocks = 1;; blocks *= 2) {
    const std::int64_t channels = (layout.channels + blocks - 1) / blocks;
    const auto used = static_cast<double>(channels);
    const double far = std::max(cold, outside(used * run / sets, kL1Share * caches().l1, 0));
    const double farther = outside((used + cost.output_channels) * kept / sets, c.l2_share * caches().l2, c.fade);
    const double load = c.l1 + far * (c.l2 - c.l1) + farther * (c.beyond - c.l2);
    // Half of the pages at hand are for what is written, and for the weight.
    const double pages = in_place ? used * std::min(1.0, stride / kPageBytes) : 0;
    const double miss = c.page * std::clamp(pages / kPages - 0.5, 0.0, 1.0);
    const double row = c.row + (blocks > 1 ? c.partial * sums : 0.0) + (layout.groups - 1) * (c.group + cost.shift * sums);
    const double entry = std::max(c.least, c.entry + std::max(sums * c.fma, vectors * cost.load * load)) + miss;
    const double turn = entries * entry + rows * (static_cast<double>(blocks) * row + cost.finish * c.store * sums);
    const auto all = static_cast<double>(layout.channels);
    const double pack = all * cost.pack_channel;
    const double cycles = turns * turn + pack;
    const double fetch = in_place ? std::min(cycles / 2, all * std::ceil(run / kLine) * kLineCycles) : pack;
    if (best.cycles == 0 || cycles < best.cycles) best = {channels, cycles, fetch};
    if (channels <= 8 || (far == cold && farther == 0 && miss == 0)) return best;
  }
}

std::int64_t vectors_in_l1(std::int64_t channels, int lanes) {
  return static_cast<std::int64_t>(kL1Share * caches().l1 / (4.0 * static_cast<double>(channels * lanes)));
}

PackedWeight::PackedWeight(const SparseWeight& weight, const TileLayout& layout, std::int64_t block_channels)
    : rows_(weight.rows),
      channels_(layout.channels),
      block_channels_(block_channels),
      blocks_((layout.channels + block_channels - 1) / block_channels),
      groups_(layout.groups),
      dense_bytes_(weight.dense_bytes()) {
  entries_.resize(weight.packed_bytes());
  row_start_.resize(static_cast<std::size_t>(blocks_ * (rows_ * groups_ + 1)));
  const auto lay_out = weight.block == 1   ? &PackedWeight::lay_out<1>
                       : weight.block == 2 ? &PackedWeight::lay_out<2>
                                           : &PackedWeight::lay_out<4>;
  (this->*lay_out)(weight, layout);
}

template <int B>
void PackedWeight::lay_out(const SparseWeight& weight, const TileLayout& layout) {
  struct Entry {
    std::int32_t offset;
    float values[B];
  };
  struct Place {
    std::int32_t offset;
    std::uint32_t group;
  };
  const auto taps = static_cast<std::uint32_t>(layout.tap.size());
  const auto write = [&](std::uint32_t to, std::int32_t offset, std::uint32_t from) {
    Entry entry;
    entry.offset = offset;
    std::memcpy(entry.values, weight.values.data() + std::size_t{from} * B, sizeof entry.values);
    std::memcpy(entries_.data() + to * sizeof entry, &entry, sizeof entry);
  };
  std::vector<std::uint32_t> cursor(weight.row_start.begin(), weight.row_start.end() - 1);
  std::vector<std::uint32_t> next(static_cast<std::size_t>(groups_));
  std::vector<Place> places;
  std::uint32_t written = 0;
  std::uint32_t* start = row_start_.data();
  for (std::int64_t block = 0; block < blocks_; ++block) {
    const std::int64_t first = first_channel(block), end = last_channel(block) * taps;
    const auto place = [&](std::uint32_t entry) {
      const std::uint32_t column = weight.column(entry), channel = column / taps, tap = column % taps;
      const auto offset = static_cast<std::int32_t>((channel - first) * layout.channel_stride + layout.tap[tap]);
      return Place{offset, groups_ > 1 ? static_cast<std::uint32_t>(layout.group[tap]) : 0};
    };
    for (std::size_t row = 0; row < cursor.size(); ++row) {
      const std::uint32_t from = cursor[row];
      std::uint32_t to = from;
      while (to < weight.row_start[row + 1] && weight.column(to) < end) ++to;
      cursor[row] = to;
      if (groups_ == 1) {
        *start++ = written;
        for (std::uint32_t e = from; e < to; ++e) write(written++, place(e).offset, e);
        continue;
      }
      // Group by group, in each in the order of the weight.
      places.clear();
      std::fill(next.begin(), next.end(), 0);
      for (std::uint32_t e = from; e < to; ++e) ++next[places.emplace_back(place(e)).group];
      for (std::uint32_t& of_group : next) {
        *start++ = written;
        written += std::exchange(of_group, written);
      }
      for (std::uint32_t e = from; e < to; ++e) {
        const Place& at = places[e - from];
        write(next[at.group]++, at.offset, e);
      }
    }
    *start++ = written;
  }
}

std::vector<std::int64_t> PackedWeight::key(const TileLayout& layout, std::int64_t block_channels) {
  std::vector<std::int64_t> key{block_channels, layout.channel_stride, layout.groups};
  key.insert(key.end(), layout.tap.begin(), layout.tap.end());
  key.insert(key.end(), layout.group.begin(), layout.group.end());
  return key;
}

std::int64_t PackedWeight::last_channel(std::int64_t block) const {
  return std::min(channels_, (block + 1) * block_channels_);
}

bool same_order(int block, const Tiling& a, const Tiling& b) {
  const auto chains = [&](int vectors) {
    const int sums = block * vectors;
    return sums >= kernels::kSumsForOneChain ? 1 : (sums >= kernels::kSumsForTwoChains ? 2 : 4);
  };
  const int all = chains(a.vectors);
  const bool even = chains(a.least_vectors) == all && chains(b.vectors) == all && chains(b.least_vectors) == all;
  const bool alike = a.vectors == b.vectors && a.tile_vectors == b.tile_vectors && a.pitch == b.pitch;
  if (a.groups != b.groups || (!even && !alike)) return false;
  const bool in_turn = even && all == 1 && a.groups == 1;  // then blocks of channels change nothing
  return in_turn || a.block_channels == b.block_channels;
}

Scratch& scratch() {
  static std::atomic<unsigned> threads{0};
  thread_local Scratch mine;
  if (mine.bit == 0) mine.bit = std::uint64_t{1} << (threads.fetch_add(1, std::memory_order_relaxed) % 64);
  return mine;
}

}  // namespace sparsepipe
