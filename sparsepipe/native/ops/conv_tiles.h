// How a convolution is cut into tiles of the output, and how the input is packed for them.
//
// Every output tile is a few vectors of positions of all output channels. Per nonzero of the weight the kernel
// multiplies one tile of the input, shifted by the kernel position, so the input is packed so that each shift starts
// at a cache line (or its sums are shifted):
//   direct   1x1, stride 1, planes of whole vectors: the tensor itself is read
//   flat     1x1, stride 1: runs of the plane are copied, the last one zero-padded
//   rows     output rows padded to whole vectors; one copy per kernel column, rows shared by the kernel rows
//   shift    output rows padded to whole vectors, in one copy; the sums of a kernel column move by a position before
//            those of the column to its left are added
//   columns  one copy per kernel position of the tile's positions, without padding between rows
//   depthwise  1x1 over the output of a depthwise convolution, which is computed tile by tile: whole rows of the plane,
//            one after the other
// The attribute 'mode' asks for one of them by its number in `Mode`. Where that does not fit the window or the planes,
// and for 0, the plan takes the cheapest by its model of cycles.
//
// In `rows`, `shift` and `depthwise` a tile may be packed for several turns of the kernel: rows of the input between two
// output rows are then read once for both. The turns cut a tile between output rows in `shift`, anywhere in the others.
#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>
#include <vector>

#include "ops/depthwise.h"
#include "ops/plan.h"
#include "ops/window.h"

namespace sparsepipe {

enum class Mode : int { kChoose = 0, kDirect = 1, kFlat = 2, kRows = 3, kColumns = 4, kShift = 5, kDepthwise = 6 };

struct Attributes : Window {
  std::int64_t in, out;
  Mode mode;
  const Depthwise* depthwise = nullptr;  // kDepthwise, whose window this is then
};

// One way to cut the output into tiles and to pack the input for them.
struct Geometry {
  Mode mode;
  std::int64_t height, width, out_height, out_width;
  int lanes;
  int vectors;                          // of a tile, packed together
  int at_once = 0;                      // of these, in a turn of the kernel
  std::int64_t tiles = 0;               // of an image
  std::int64_t tile_rows = 0;           // by_rows, kDepthwise: output rows of a tile
  std::int64_t pitch = 0;               // by_rows: floats from one row of a tile to the next
  std::int64_t column_tiles = 1;        // by_rows: tiles side by side
  std::int64_t tile_positions = 0;      // of the plane that a tile holds, where not by_rows
  double filled = 1;                    // cycles of all tiles, in times of as many whole ones
  std::vector<std::int64_t> slot_row;   // input row of each stage row, relative to that of output row 0, position 0
  std::int64_t phase_stride = 0;        // floats of one column phase of a stage row
  std::int64_t stage_pitch = 0;         // floats of a stage row
  TileLayout layout;
  Cost cost;

  bool by_rows() const { return mode == Mode::kRows || mode == Mode::kShift; }
  // Vectors of the turn of the kernel that begins at the tile's vector `from`.
  int turn_of(std::int64_t tile, int from) const { return std::min(at_once, vectors_of(tile) - from); }
  // The fewest in a turn of any tile.
  int least() const {
    const auto left = [&](int all) { return (all - 1) % at_once + 1; };
    return std::min(left(vectors), left(vectors_of(tiles - 1)));
  }
  std::int64_t tile_floats() const { return static_cast<std::int64_t>(vectors) * lanes; }
  // by_rows, kDepthwise: output rows of one tile.
  std::int64_t rows_of(std::int64_t tile) const {
    return std::min(tile_rows, out_height - tile / column_tiles * tile_rows);
  }
  // Not by_rows: the first position of the plane behind a tile.
  std::int64_t end_of(std::int64_t tile) const { return std::min((tile + 1) * tile_positions, out_height * out_width); }
  // Vectors of one tile: fewer in the last one.
  int vectors_of(std::int64_t tile) const {
    if (by_rows()) return static_cast<int>(ceil_div(rows_of(tile) * pitch, lanes));
    return static_cast<int>(ceil_div(end_of(tile) - tile * tile_positions, lanes));
  }
};

// The place of input row `row` among those that a tile needs.
std::int64_t slot_of(const Geometry& g, std::int64_t row);

// Place of kernel column k at output column 0 within a stage row.
std::int64_t stage_column(const Attributes& a, const Geometry& g, std::int64_t k);

// Every candidate geometry with at most `most` vectors in a turn, or those of the mode that the attribute asks for where
// it fits. `shape` holds the sizes of the planes and the lanes.
void candidates(const Attributes& a, const Geometry& shape, int most,
                const std::function<void(const Geometry&)>& consider);

}  // namespace sparsepipe
