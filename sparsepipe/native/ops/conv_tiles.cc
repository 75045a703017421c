#include "ops/conv_tiles.h"

namespace sparsepipe {

std::int64_t slot_of(const Geometry& g, std::int64_t row) {
  return std::find(g.slot_row.begin(), g.slot_row.end(), row) - g.slot_row.begin();
}

std::int64_t stage_column(const Attributes& a, const Geometry& g, std::int64_t k) {
  const std::int64_t shift = k * a.dilation_w;
  return shift % a.stride_w * g.phase_stride + shift / a.stride_w;
}

namespace {

// The input rows (relative to the first output row of a tile) that `rows` output rows read, in an order in which the
// rows of one kernel position are consecutive: by phase of the stride, then ascending.
std::vector<std::int64_t> needed_rows(const Attributes& a, std::int64_t rows) {
  std::vector<std::pair<std::int64_t, std::int64_t>> needed;
  for (std::int64_t k = 0; k < a.kernel_h; ++k) {
    for (std::int64_t r = 0; r < rows; ++r) {
      const std::int64_t row = r * a.stride_h + k * a.dilation_h;
      needed.emplace_back(row % a.stride_h, row / a.stride_h);
    }
  }
  std::sort(needed.begin(), needed.end());
  needed.erase(std::unique(needed.begin(), needed.end()), needed.end());
  std::vector<std::int64_t> list;
  list.reserve(needed.size());
  for (const auto& [phase, index] : needed) list.push_back(index * a.stride_h + phase);
  return list;
}

void size_stage(const Attributes& a, Geometry& g, std::int64_t rows, std::int64_t columns) {
  g.slot_row = needed_rows(a, rows);
  // A copy of `columns` floats from any phase stays inside, and so does one that is rounded up to a vector.
  g.phase_stride = ceil_div(columns + (a.kernel_w - 1) * a.dilation_w / a.stride_w + 2 * g.lanes, g.lanes) * g.lanes;
  g.stage_pitch = g.phase_stride * a.stride_w;
  if (g.stage_pitch * static_cast<std::int64_t>(g.slot_row.size()) > kMostFloats) {
    throw Error("stride, dilation and input are too large together");
  }
}

// Of one channel, in the largest tile that is tried: planning takes time and memory with it.
constexpr std::int64_t kChannelFloats = 1 << 16;

// Cycles in which packing loads and stores a vector: 64 bytes at once come no faster from L2 than 32 bytes twice.
double move(int lanes) { return lanes == 8 ? 1.5 : 2.5; }

Geometry flat_geometry(const Attributes& a, Geometry g, int vectors) {
  const std::int64_t plane = g.out_height * g.out_width;
  const std::int64_t all = ceil_div(plane, g.lanes);
  g.vectors = g.at_once = vectors;
  g.tile_positions = g.tile_floats();
  g.tiles = ceil_div(all, vectors);
  g.layout.channels = a.in;
  g.layout.vectors = vectors;
  g.layout.tap = {0};
  if (g.mode == Mode::kDirect) {
    g.layout.channel_stride = plane;
    // Sets and pages say all of it on Zen 3; of the factor for other vectors it is not known how much is left.
    g.cost.load = g.lanes == 8 ? 1.0 : 1.3;
    g.cost.output_channels = static_cast<double>(a.out);
  } else {
    g.layout.channel_stride = g.tile_floats();
    g.cost.pack_channel = 4 + (g.lanes == 8 ? move(g.lanes) : 6.0) * vectors;
  }
  return g;
}

Geometry columns_geometry(const Attributes& a, Geometry g, int vectors) {
  const std::int64_t plane = g.out_height * g.out_width;
  g.vectors = g.at_once = vectors;
  g.tile_positions = g.tile_floats();
  g.tiles = ceil_div(ceil_div(plane, g.lanes), vectors);
  const std::int64_t taps = a.kernel_h * a.kernel_w;
  // A copy always moves a whole output row, rounded up; the last one of a tile may reach beyond the tile.
  const std::int64_t run = std::min(g.out_width, g.tile_floats());
  const std::int64_t step = run <= 4 ? 4 : (run <= 8 ? 8 : g.lanes);
  const std::int64_t moved = ceil_div(run, step) * step;
  const bool inside = g.tiles == 1 && plane - g.out_width + moved <= g.tile_floats();
  const std::int64_t slot = g.tile_floats() + (inside ? 0 : ceil_div(moved, g.lanes) * g.lanes);
  const std::int64_t rows = std::min(g.out_height, (g.tile_floats() - 1) / g.out_width + 2);
  size_stage(a, g, rows, g.out_width + g.lanes);
  g.layout.channels = a.in;
  g.layout.vectors = vectors;
  g.layout.channel_stride = taps * slot;
  for (std::int64_t t = 0; t < taps; ++t) g.layout.tap.push_back(static_cast<std::int32_t>(t * slot));
  const double pieces = static_cast<double>(std::min(g.out_height, rows));
  const double row_cost = move(g.lanes) * static_cast<double>(ceil_div(g.out_width, g.lanes)) + 1;
  g.cost.pack_channel = 10 + static_cast<double>(g.slot_row.size()) * (4 + row_cost) +
                        static_cast<double>(taps) * pieces * row_cost;
  return g;
}

// The turns of the kernel for a tile, of at most `most` vectors. `part`: a turn is a multiple of so many.
void take_turns(const Attributes& a, Geometry& g, std::int64_t part, std::int64_t most) {
  const std::int64_t parts = ceil_div(g.vectors, part);
  const std::int64_t turns = ceil_div(parts, std::max<std::int64_t>(1, most / part));
  g.at_once = static_cast<int>(std::min<std::int64_t>(g.vectors, ceil_div(parts, turns) * part));
  g.layout.vectors = g.at_once;
  g.layout.turns = static_cast<int>(ceil_div(g.vectors, g.at_once));
  // The rows of the other kernel rows, too; what two turns share is read by each.
  const std::int64_t row = ceil_div(g.pitch, g.lanes);
  g.layout.turn_floats = (g.at_once + (a.kernel_h - 1) * std::min<std::int64_t>(g.at_once, row)) * g.lanes;
}

Geometry rows_geometry(const Attributes& a, Geometry g, std::int64_t tile_rows, std::int64_t row_vectors,
                       std::int64_t most) {
  g.tile_rows = tile_rows;
  g.pitch = row_vectors * g.lanes;
  g.vectors = static_cast<int>(tile_rows * row_vectors);
  g.column_tiles = ceil_div(ceil_div(g.out_width, g.lanes), row_vectors);
  g.tiles = ceil_div(g.out_height, tile_rows) * g.column_tiles;
  const std::int64_t columns = row_vectors * g.lanes;
  size_stage(a, g, tile_rows, columns);
  const auto slots = static_cast<std::int64_t>(g.slot_row.size());
  g.layout.channels = a.in;
  take_turns(a, g, 1, most);
  g.layout.turn_floats *= a.kernel_w;
  g.layout.channel_stride = a.kernel_w * slots * columns;
  for (std::int64_t i = 0; i < a.kernel_h; ++i) {
    for (std::int64_t j = 0; j < a.kernel_w; ++j) {
      g.layout.tap.push_back(static_cast<std::int32_t>((j * slots + slot_of(g, i * a.dilation_h)) * columns));
    }
  }
  const auto wide = static_cast<double>(row_vectors);
  g.cost.pack_channel = 10 + static_cast<double>(slots) * (4 + move(g.lanes) * wide * static_cast<double>(a.stride_w)) +
                        static_cast<double>(a.kernel_w * slots) * (1 + move(g.lanes) * wide);
  g.cost.finish = 1.9;
  return g;
}

// The floats that a row of sums needs, with the positions that move into it: whole vectors, or half of one where the
// map is small. The last of these positions may be the first of the next row, where both are padding.
std::int64_t shift_pitch(const Attributes& a, const Geometry& shape) {
  const std::int64_t shared = a.stride_w == 1 && a.left > 0 && a.right > 0 && a.kernel_w > 1;
  const std::int64_t needed = shape.out_width + (a.kernel_w - 1) / a.stride_w - shared;
  const std::int64_t half = shape.lanes / 2;
  return needed <= half && half >= 8 ? half : ceil_div(needed, shape.lanes) * shape.lanes;
}

// The sums of kernel column k belong k / stride positions further left, in column phase k % stride.
Geometry shift_geometry(const Attributes& a, Geometry g, std::int64_t tile_rows, std::int64_t pitch,
                        std::int64_t most) {
  g.tile_rows = tile_rows;
  g.pitch = pitch;
  g.vectors = static_cast<int>(ceil_div(tile_rows * pitch, g.lanes));
  g.tiles = ceil_div(g.out_height, tile_rows);
  size_stage(a, g, tile_rows, pitch);
  const auto slots = static_cast<std::int64_t>(g.slot_row.size());
  const std::int64_t phases = std::min(a.stride_w, a.kernel_w);
  const std::int64_t most_shift = (a.kernel_w - 1) / a.stride_w;
  g.layout.channels = a.in;
  take_turns(a, g, ceil_div(pitch, g.lanes), most);  // whole rows, or pairs of rows of half a vector
  g.layout.turn_floats *= phases;
  g.layout.channel_stride = phases * slots * pitch;
  g.layout.groups = static_cast<int>(most_shift + 1);
  for (std::int64_t i = 0; i < a.kernel_h; ++i) {
    for (std::int64_t j = 0; j < a.kernel_w; ++j) {
      const std::int64_t slot = j % a.stride_w * slots + slot_of(g, i * a.dilation_h);
      g.layout.tap.push_back(static_cast<std::int32_t>(slot * pitch));
      g.layout.group.push_back(static_cast<std::int32_t>(most_shift - j / a.stride_w));
    }
  }
  const double moves = move(g.lanes) * static_cast<double>(ceil_div(pitch, g.lanes));  // of a row
  const auto rows = static_cast<double>(slots);
  g.cost.pack_channel = 10 + rows * (2 + moves);
  if (a.stride_w > 1) {
    g.cost.pack_channel += rows * (2 + moves * static_cast<double>(a.stride_w - 1)) +
                           static_cast<double>(phases) * rows * (1 + moves);
  }
  if (pitch % g.lanes) g.cost.load = 1 + 0.7 * static_cast<double>(a.kernel_h / 2) / static_cast<double>(a.kernel_h);
  g.cost.finish = pitch % g.lanes ? 5 : 1.9;
  g.cost.shift = 1;
  return g;
}

// Cycles of a channel of a depthwise convolution, which computes four rows of a vector at once, then two, then one.
double depthwise_cost(const Attributes& a, std::int64_t rows, std::int64_t strips) {
  constexpr double kChannel = 25, kRead = 10, kComputed = 5;  // a channel, a vector that is read, a vector of the output
  const std::int64_t groups = rows / 4 + rows % 4 / 2 + rows % 2;
  const std::int64_t read = (rows * a.stride_h + groups * (a.kernel_h - a.stride_h)) * a.stride_w;
  return kChannel + static_cast<double>(strips) * (kRead * static_cast<double>(read) + kComputed * static_cast<double>(rows));
}

Geometry depthwise_geometry(const Attributes& a, Geometry g, std::int64_t tile_rows, std::int64_t most) {
  g.tile_rows = tile_rows;
  g.tile_positions = tile_rows * g.out_width;
  g.vectors = static_cast<int>(ceil_div(g.tile_positions, g.lanes));
  g.tiles = ceil_div(g.out_height, tile_rows);
  // The last tile may be much smaller; its rows of the weight end as often.
  constexpr double kFixed = 0.25;
  const double last = static_cast<double>(g.vectors_of(g.tiles - 1)) / g.vectors;
  g.filled = 1 - (1 - kFixed) * (1 - last) / static_cast<double>(g.tiles);
  g.layout.channels = a.in;
  g.layout.tap = {0};
  g.layout.channel_stride = g.tile_floats();
  take_turns(a, g, 1, most);
  // The larger the tile, the more it pushes the rows that the next one reads, too, out of the L2 cache: cycles of a vector
  // for a tile that fills it.
  constexpr double kPushedOut = 32;
  const double share = 4.0 * static_cast<double>(a.in * g.layout.channel_stride) / caches().l2;
  g.cost.pack_channel = depthwise_cost(a, tile_rows, ceil_div(g.out_width, g.lanes)) + kPushedOut * share * g.vectors;
  if (g.tile_positions % g.lanes) g.cost.finish = 1.9;
  return g;
}

// All heights of one turn of the kernel, and some of several.
void depthwise_candidates(const Attributes& a, Geometry g, int most,
                          const std::function<void(const Geometry&)>& consider) {
  g.mode = Mode::kDepthwise;
  const std::int64_t of_a_turn = std::max<std::int64_t>(1, most * g.lanes / g.out_width);
  const std::int64_t largest = std::max<std::int64_t>(1, kChannelFloats / g.out_width);
  for (std::int64_t rows = std::min(g.out_height, largest); rows >= 1;) {
    consider(depthwise_geometry(a, g, rows, most));
    rows = rows > of_a_turn ? std::max(of_a_turn, rows * 3 / 4) : rows - 1;
  }
}

}  // namespace

void candidates(const Attributes& a, const Geometry& shape, int most,
                const std::function<void(const Geometry&)>& consider) {
  if (a.mode == Mode::kDepthwise) return depthwise_candidates(a, shape, most, consider);
  const bool point = a.kernel_h == 1 && a.kernel_w == 1 && a.stride_h == 1 && a.stride_w == 1 &&
                     a.top + a.left + a.bottom + a.right == 0;
  const std::int64_t all = ceil_div(shape.out_height * shape.out_width, shape.lanes);
  const auto each_size = [&](Mode mode, const auto& make) {
    Geometry g = shape;
    g.mode = mode;
    std::int64_t before = 0;
    for (int most_vectors = most; most_vectors >= 1; --most_vectors) {
      const std::int64_t tiles = ceil_div(all, most_vectors);
      const auto vectors = static_cast<int>(ceil_div(all, tiles));
      if (vectors != before) consider(make(a, g, vectors));
      before = vectors;
    }
  };
  if (point) {
    const bool whole = shape.height * shape.width % shape.lanes == 0 && a.in * shape.height * shape.width < kMostFloats;
    if (whole && a.mode != Mode::kFlat) each_size(Mode::kDirect, flat_geometry);
    if (!whole || a.mode != Mode::kDirect) each_size(Mode::kFlat, flat_geometry);
    return;
  }
  // Tiles of several turns, then all of one turn.
  const auto each_height = [&](Mode mode, std::int64_t row_floats, std::int64_t pitch, const auto& make) {
    Geometry g = shape;
    g.mode = mode;
    const std::int64_t of_a_turn = most * shape.lanes / row_floats;
    std::int64_t tiles = std::min(shape.out_height, ceil_div(shape.out_height * row_floats, kChannelFloats));
    for (std::int64_t rows = ceil_div(shape.out_height, tiles);; rows = ceil_div(shape.out_height, tiles)) {
      consider(make(a, g, rows, pitch, most));
      if (rows == 1) return;
      const std::int64_t fewer = ceil_div(shape.out_height, rows - 1);
      tiles = rows > of_a_turn ? std::min(shape.out_height, std::max(fewer, tiles + tiles / 3)) : fewer;
    }
  };
  const std::int64_t pitch = shift_pitch(a, shape);
  const bool shifts = a.dilation_w == 1 && pitch <= most * shape.lanes;
  const bool any = a.mode != Mode::kRows && a.mode != Mode::kColumns && !(a.mode == Mode::kShift && shifts);
  if (any || a.mode == Mode::kRows) {
    const std::int64_t wide = ceil_div(shape.out_width, shape.lanes);
    const std::int64_t narrow = ceil_div(wide, ceil_div(wide, most));
    if (wide * shape.lanes <= kChannelFloats) each_height(Mode::kRows, wide * shape.lanes, wide, rows_geometry);
    if (narrow < wide) each_height(Mode::kRows, narrow * shape.lanes, narrow, rows_geometry);
  }
  if (shifts && (any || a.mode == Mode::kShift)) each_height(Mode::kShift, pitch, pitch, shift_geometry);
  if (any || a.mode == Mode::kColumns) each_size(Mode::kColumns, columns_geometry);
}

}  // namespace sparsepipe
