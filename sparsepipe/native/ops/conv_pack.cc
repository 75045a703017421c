#include "ops/conv_pack.h"

#include <cstring>

namespace sparsepipe {

using kernels::Copy;
using kernels::StageRow;

namespace {

// The copies from the stage to the tile, each of as many floats as are returned.
std::int64_t list_copies(const Attributes& a, const Geometry& g, std::int64_t tile,
                         const std::vector<std::int64_t>& needed, std::vector<Copy>& copies) {
  const auto slots = static_cast<std::int64_t>(g.slot_row.size());
  const auto add = [&](std::int64_t from, std::int64_t to) {
    copies.push_back({static_cast<std::int32_t>(from), static_cast<std::int32_t>(to)});
  };
  if (g.mode == Mode::kShift) {
    for (std::int64_t phase = 0; phase < std::min(a.stride_w, a.kernel_w); ++phase) {
      for (const std::int64_t s : needed) {
        add(s * g.stage_pitch + phase * g.phase_stride, (phase * slots + s) * g.pitch);
      }
    }
    return g.pitch;
  }
  if (g.mode == Mode::kRows) {
    for (std::int64_t j = 0; j < a.kernel_w; ++j) {
      for (const std::int64_t s : needed) {
        add(s * g.stage_pitch + stage_column(a, g, j), (j * slots + s) * g.pitch);
      }
    }
    return g.pitch;
  }
  const std::int64_t first = tile * g.tile_floats();
  const std::int64_t end = std::min(first + g.tile_floats(), g.out_height * g.out_width);
  std::size_t tap = 0;
  for (std::int64_t i = 0; i < a.kernel_h; ++i) {
    const std::int64_t slot = slot_of(g, i * a.dilation_h);
    for (std::int64_t j = 0; j < a.kernel_w; ++j, ++tap) {
      const std::int64_t column = stage_column(a, g, j);
      for (std::int64_t p = first; p < end;) {
        const std::int64_t row = p / g.out_width;
        // A tile may start inside a row; runs longer than a tile do not occur, a tile of a wide row is one run.
        add((slot + row - first / g.out_width) * g.stage_pitch + column + p % g.out_width,
            g.layout.tap[tap] + (p - first));
        p = std::min(end, (row + 1) * g.out_width);
      }
    }
  }
  return std::min(g.out_width, g.tile_floats());
}

// The slots that the vectors [from, to) of a tile read.
void list_needed(const Attributes& a, const Geometry& g, std::int64_t tile, int from, int to,
                 std::vector<std::int64_t>& needed) {
  needed.clear();
  // Rows of half a vector are read with the slot behind them.
  const bool all = !g.by_rows() || g.pitch % g.lanes || (from == 0 && to == g.vectors_of(tile));
  const std::int64_t first = all ? 0 : from * g.lanes / g.pitch;
  const std::int64_t last = all ? 0 : ceil_div(std::int64_t{to} * g.lanes, g.pitch);
  const auto reads = [&](std::int64_t input_row) {
    for (std::int64_t k = 0; k < a.kernel_h; ++k) {
      const std::int64_t row = input_row - k * a.dilation_h;
      if (row % a.stride_h == 0 && row >= first * a.stride_h && row < last * a.stride_h) return true;
    }
    return false;
  };
  for (std::size_t s = 0; s < g.slot_row.size(); ++s) {
    if (all || reads(g.slot_row[s])) needed.push_back(static_cast<std::int64_t>(s));
  }
}

}  // namespace

void TilePacking::prepare(const kernels::Isa& isa, const Attributes& a, const Geometry& g, std::int64_t tile,
                          int from_vector, int to_vector) {
  isa_ = &isa;
  g_ = &g;
  tile_ = tile;
  if (g.mode == Mode::kFlat) return;
  if (g.mode == Mode::kDepthwise) return prepare_depthwise(*a.depthwise, from_vector, to_vector);
  staged_ = g.mode != Mode::kShift || a.stride_w > 1;
  const std::int64_t first_row =
      g.by_rows() ? tile / g.column_tiles * g.tile_rows : tile * g.tile_floats() / g.out_width;
  const std::int64_t first_column = g.by_rows() ? tile % g.column_tiles * g.pitch : 0;
  const std::int64_t from = first_column * a.stride_w - a.left;  // input column of stage column 0
  const std::int64_t source = std::max<std::int64_t>(from, 0);
  const std::int64_t lead = source - from;
  const auto slots = static_cast<std::int64_t>(g.slot_row.size());
  // Input columns that some kernel position reads.
  const std::int64_t columns = g.by_rows() ? g.pitch : g.out_width;
  const std::int64_t span = (columns - 1) * a.stride_w + (a.kernel_w - 1) * a.dilation_w + 1;
  const std::int64_t count = std::max<std::int64_t>(0, std::min(g.width - source, span - lead));
  row_floats_ = static_cast<std::int32_t>(std::min(count, columns - lead));
  rows_.clear();
  copies_.clear();
  list_needed(a, g, tile, from_vector, to_vector, needed_);
  for (const std::int64_t s : needed_) {
    const std::int64_t row = first_row * a.stride_h - a.top + g.slot_row[static_cast<std::size_t>(s)];
    const bool inside = row >= 0 && row < g.height;
    if (!staged_) {  // straight to the tile, zeros included
      rows_.push_back({static_cast<std::int32_t>(inside ? row * g.width : 0), static_cast<std::int32_t>(s * columns),
                       inside ? row_floats_ : 0});
    } else if (inside && count > 0) {  // the others stay zero
      rows_.push_back({static_cast<std::int32_t>(row * g.width + source),
                       static_cast<std::int32_t>(s * g.stage_pitch), static_cast<std::int32_t>(count)});
    }
  }
  args_.rows = rows_.data();
  args_.row_count = static_cast<std::int32_t>(rows_.size());
  args_.lead = static_cast<std::int32_t>(lead);
  args_.output_stride = g.layout.channel_stride;
  args_.input_stride = g.height * g.width;
  if (!staged_) {
    args_.copy_floats = static_cast<std::int32_t>(columns);
    return;
  }
  const std::int64_t copy_floats = list_copies(a, g, tile, needed_, copies_);
  // With room for a copy that is rounded up to vectors.
  const auto stage_floats = static_cast<std::size_t>(slots * g.stage_pitch + copy_floats + 4 * g.lanes);
  args_.stage = scratch().stage.at_least(stage_floats);
  std::memset(args_.stage, 0, stage_floats * sizeof(float));
  args_.stage_stride = 0;
  args_.stage_count = 1;
  args_.step = static_cast<std::int32_t>(a.stride_w);
  args_.phase_stride = static_cast<std::int32_t>(g.phase_stride);
  args_.copies = copies_.data();
  args_.copy_count = static_cast<std::int32_t>(copies_.size());
  args_.copy_floats = static_cast<std::int32_t>(copy_floats);
}

// The rows that the vectors lie in.
void TilePacking::prepare_depthwise(const Depthwise& depthwise, int from_vector, int to_vector) {
  const Geometry& g = *g_;
  const std::int64_t first = std::int64_t{from_vector} * g.lanes / g.out_width;
  const std::int64_t last = std::min(g.rows_of(tile_), ceil_div(std::int64_t{to_vector} * g.lanes, g.out_width));
  first_position_ = first * g.out_width;
  positions_ = (last - first) * g.out_width;
  depthwise_.prepare(*isa_, depthwise, g.height, g.width, g.out_width, tile_ * g.tile_rows + first, last - first, true);
}

void TilePacking::compute_depthwise(const float* image, std::int64_t first, std::int64_t last, float* to) {
  const std::int64_t stride = g_->layout.channel_stride, end = first_position_ + positions_;
  // Of the last vector, what is multiplied but not stored: nothing that slows products down.
  const std::int64_t padding = ceil_div(end, g_->lanes) * g_->lanes - end;
  for (std::int64_t c = 0; padding > 0 && c < last - first; ++c) std::fill_n(to + c * stride + end, padding, 0.0f);
  depthwise_.compute(image, first, last, to + first_position_, stride);
}

void TilePacking::pack(const float* image, std::int64_t first, std::int64_t last, float* to) {
  const kernels::Isa& isa = *isa_;
  if (g_->mode == Mode::kDepthwise) return compute_depthwise(image, first, last, to);
  const std::int64_t plane = g_->height * g_->width;
  if (g_->mode == Mode::kFlat) {
    const std::int64_t position = tile_ * g_->tile_floats();
    isa.pack_flat(image + first * plane + position, plane, last - first,
                  std::min(g_->tile_floats(), plane - position), to, g_->layout.channel_stride);
  } else if (!staged_) {
    isa.pack_rows({image + first * plane, plane, last - first, to, args_.output_stride, args_.rows, args_.row_count,
                   args_.lead, row_floats_, args_.copy_floats});
  } else {
    args_.input = image + first * plane;
    args_.channels = last - first;
    args_.output = to;
    isa.pack_stage(args_);
  }
}

void Targets::fill(kernels::RowsArgs& args) const {
  args.target = target;
  args.count = count;
  args.whole = whole;
  args.pitch = pitch;
  args.positions = positions;
  args.position_rows = position_rows;
}

Targets targets_of(const Geometry& g, std::int64_t tile, int from) {
  Targets t;
  if (g.by_rows() && g.pitch % g.lanes) {
    t.pitch = static_cast<std::int32_t>(g.pitch);
    t.positions = static_cast<std::int32_t>(g.out_width);
    const std::int64_t first = from * g.lanes / g.pitch, rows = std::int64_t{g.at_once} * g.lanes / g.pitch;
    t.position_rows = static_cast<std::int32_t>(std::min(rows, g.rows_of(tile) - first));
    std::fill_n(t.target, g.at_once, static_cast<std::int32_t>((tile * g.tile_rows + first) * g.out_width));
    return t;
  }
  t.whole = true;
  for (int i = 0; i < g.turn_of(tile, from); ++i) {
    const int v = from + i;
    std::int64_t position, count;
    if (g.by_rows()) {
      const std::int64_t row_vectors = g.pitch / g.lanes;
      const std::int64_t row = tile / g.column_tiles * g.tile_rows + v / row_vectors;
      const std::int64_t column = (tile % g.column_tiles * row_vectors + v % row_vectors) * g.lanes;
      position = row * g.out_width + column;
      count = row < g.out_height ? g.out_width - column : 0;
    } else {
      position = tile * g.tile_positions + static_cast<std::int64_t>(v) * g.lanes;
      count = g.end_of(tile) - position;
    }
    count = std::clamp<std::int64_t>(count, 0, g.lanes);
    t.target[i] = static_cast<std::int32_t>(count > 0 ? position : 0);
    t.count[i] = static_cast<std::int32_t>(count);
    t.whole = t.whole && count == g.lanes && t.target[i] == t.target[0] + i * g.lanes;
  }
  return t;
}

}  // namespace sparsepipe
