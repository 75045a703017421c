// What an instruction set provides for int8: the inner loops of the sparse quantised operators.
//
// Every implementation is kernels/qtemplate.h compiled with its own flags. As in kernel.h, nothing here may define an
// inline function or a template.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sparsepipe::kernels {

constexpr int kMostQVectors = 8;
constexpr int kQuad = 4;  // input channels of a block

// How a sum of int32 becomes a byte. Bytes are uint8; int8 tensors are those with the top bit flipped.
struct Requantize {
  const std::int32_t* bias;  // per output channel: bias - zero point of the input * sum of the weights (mod 2^32)
  const float* scale;        // per output channel: x_scale * w_scale / y_scale
  bool plain;  // uint8 without bounds of an activation, and sums far from the limits of int32
  float least, most;         // bounds of scale * sum before it is rounded: the type's, without the zero point
  std::int32_t shift;        // added after the (last) rounding: the zero point as uint8; with a residual 0 or 128
  std::uint8_t low, high;    // bounds of the fused activation, as uint8
  std::uint8_t flip;         // 0x80 where the tensors are int8
  // With a residual: round(q * sum_ratio + (residual * residual_ratio + fixed)), q the rounded output of the product.
  float zero_point;  // of q
  float sum_ratio, residual_ratio, fixed;
};

struct Run {
  std::int32_t from, to, count;  // positions of the tile that go to consecutive bytes of y
};

// One tile: `vectors` vectors of output positions, for the block rows [row_begin, row_end).
// A block row is `block` consecutive output channels. An entry of the weight is an int32 offset (in bytes, from x),
// followed by four weights for each of the `block` outputs (words as Isa's `wide` says). x holds four consecutive
// channels of a position in four bytes.
struct QRowsArgs {
  const std::uint8_t* x;
  const char* entries;
  const std::uint32_t* row_start;  // entries of row i: [row_start[i], row_start[i + 1])
  std::int64_t row_begin, row_end;
  std::uint8_t* y;               // channel row_begin * block
  const std::uint8_t* residual;  // the same channel, or nullptr
  std::int64_t y_stride;         // bytes between channels of y and of residual
  const Run* runs;               // where the tile's positions go, ascending
  std::int32_t run_count;
  Requantize requantize;
};

// Rows of planes that a convolution's tiles read, copied to a stage that holds the padding already.
struct QStageRow {
  std::int32_t source, target, count;  // in the plane; in the stage; bytes
};

struct QIsa {
  const char* name;
  std::int32_t lanes;                // int32 lanes of a vector
  std::int32_t most_vectors[5];      // by block size
  bool wide;                         // weights as int16, (w0, w2) and then (w1, w3) of an output
  bool is_signed;                    // x is int8 (the kernel flips uint8 when it packs), not uint8
  bool (*supported)();
  void (*rows)(const QRowsArgs&, int block, int vectors);
  // As rows, for the block row row_begin of one output and `count` positions that follow one another: its bytes come to
  // stage, in whole vectors, and from there go to y as the runs say. Nothing is added.
  void (*strip)(const QRowsArgs&, std::int64_t count, std::uint8_t* stage);
  // out[group * out_stride + 4 * i + c] = x[(4 * group + c) * stride + i] ^ flip for i < count; where the last group has
  // fewer than four channels, the others' bytes are any, and so are those up to the next multiple of a vector.
  void (*pack)(const std::uint8_t* x, std::int64_t stride, std::int64_t channels, std::int64_t count,
               std::uint8_t flip, std::uint8_t* out, std::int64_t out_stride);
  // Every step-th byte of each row.
  void (*fill)(const std::uint8_t* plane, const QStageRow* rows, std::int32_t row_count, std::int32_t step,
               std::uint8_t* stage);
  // to[i] = the largest of rows[k][i] ^ flip for k < row_count, at least 1.
  void (*largest)(const std::uint8_t* const* rows, std::int32_t row_count, std::int64_t count, std::uint8_t flip,
                  std::uint8_t* to);
  // y[i] = table[x[i]], of 256 bytes.
  void (*lookup)(const std::uint8_t* table, const std::uint8_t* x, std::int64_t count, std::uint8_t* y);
  // `block` sums for each block row of one input vector x: sums[(row - row_begin) * block + r], without bias.
  void (*vector)(const std::uint8_t* x, const char* entries, const std::uint32_t* row_start, std::int64_t row_begin,
                 std::int64_t row_end, int block, std::int32_t* sums);
  // The bytes of `count` sums of consecutive channels, from `first` on.
  void (*requantize)(const std::int32_t* sums, std::int64_t first, std::int64_t count, const Requantize&,
                     std::uint8_t* y);
  // y[i] = the byte of the sum of the product's byte q[i] and residual[i], any of which y may be.
  void (*add)(const std::uint8_t* q, const std::uint8_t* residual, std::int64_t count, const Requantize&,
              std::uint8_t* y);
};

// The best one that the CPU runs, or the one that goes with SPARSEPIPE_ISA; never nullptr where select() is not.
const QIsa* select_quantized();
// All that were compiled in, best first; ends with nullptr.
const QIsa* const* compiled_quantized();

}  // namespace sparsepipe::kernels
