// What an instruction set provides: the inner loops, behind plain structs and function pointers.
//
// Every implementation is kernels/template.h compiled with its own flags. Nothing here may define an
// inline function or a template: the linker could pick the copy that was compiled for another CPU.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sparsepipe::kernels {

enum class Activation : std::int32_t { kNone, kRelu, kClip, kHardSwish, kSilu, kGelu };

struct Epilogue {
  const float* bias;  // one per output channel, or nullptr
  Activation activation;
  float low, high;  // kClip
};

// One tile: `vectors` vectors of output positions, for the block rows [row_begin, row_end).
// A block row is `block` consecutive output channels. An entry of the weight is an int32 offset (in floats,
// from x) followed by `block` floats; the entries of block row i are [row_start[i * groups], row_start[(i + 1) *
// groups]), group by group. Between two groups all sums move down by one position (zero moves into the last one), so
// that kernel columns share one copy of the input.
struct RowsArgs {
  const float* x;
  const char* entries;
  const std::uint32_t* row_start;
  std::int64_t row_begin, row_end;
  std::int32_t groups;
  float* partial;  // [row_end - row_begin][block][vectors * lanes] sums between blocks of input channels
  bool first, last;  // of those blocks
  float* y;                // channel `row_begin * block` of the output tile
  const float* residual;   // the same position in the residual, or nullptr
  std::int64_t y_stride;   // floats between channels of y and of residual
  const std::int32_t* target;  // [vectors] offset in y of each vector ...
  const std::int32_t* count;   // ... and how many of its lanes are stored
  bool whole;                  // all lanes are stored, one vector after the other
  // Where pitch > 0, a row of output positions takes `pitch` floats of the sums instead of whole vectors: `positions`
  // are stored of each of `position_rows` rows, one after the other from target[0] on.
  std::int32_t pitch, positions, position_rows;
  Epilogue epilogue;           // bias points to channel 0
  bool prefetch_output;  // y and residual do not fit the L2 cache
  // Planes of the tile after this one, to prefetch while this one computes: so many with each row.
  const float* next;
  std::int64_t next_stride, next_channels, next_channels_per_row;
};

struct StageRow {
  std::int32_t source, target, count;  // a row of the plane; its place in the stage; floats
};
struct Copy {
  std::int32_t source, target;  // from the stage to the packed tile, `PackArgs::copy_floats` each
};

// Packs a tile of each of `channels` planes: the rows that it needs go to a small zero-padded stage, split by
// column phase where the column stride is above 1; from there runs of `copy_floats` floats are copied to the tile.
struct PackArgs {
  const float* input;
  std::int64_t input_stride;  // floats between planes
  std::int64_t channels;
  float* output;
  std::int64_t output_stride;  // floats between the tiles of consecutive planes
  // Channel c uses the stage at stage + c % stage_count * stage_stride; the padding is zero already.
  float* stage;
  std::int64_t stage_stride, stage_count;
  const StageRow* rows;
  std::int32_t row_count;
  std::int32_t step;          // column stride
  std::int32_t lead;          // padding before the first column
  std::int32_t phase_stride;  // floats between the phases of a stage row
  const Copy* copies;
  std::int32_t copy_count;
  std::int32_t copy_floats;  // a copy may write up to the next multiple of 4, 8 or lanes
};

// Packs a tile of each of `channels` planes of one padded copy: `copy_floats` floats (whole vectors) for each of `rows`,
// at its target: `lead` zeros, `count` floats of the plane, zeros; zeros only where the row's own count is 0.
struct PackRowsArgs {
  const float* input;
  std::int64_t input_stride, channels;
  float* output;
  std::int64_t output_stride;
  const StageRow* rows;
  std::int32_t row_count, lead, count, copy_floats;
};

// `rows` output rows of one channel of a depthwise convolution, from a stage that pack_stage filled.
struct DepthwiseArgs {
  const float* stage;
  std::int64_t pitch;  // floats between stage rows
  std::int32_t kernel_h, kernel_w, row_step, row_dilation;
  const std::int32_t* column;  // [kernel_w] place of each kernel column in a stage row
  const float* weights;        // [kernel_h][kernel_w]
  float bias;
  float* y;  // first of the rows
  std::int64_t rows, columns;
  Epilogue epilogue;  // without its bias
};

// Output rows [first_row, first_row + rows) of planes of a 3 x 3 depthwise convolution: both strides 1 or 2, no dilation.
struct PlanesArgs {
  const float* x;         // [channels, height, width]
  const float* weights;   // [channels, 9]
  float* y;               // [channels, rows, out_width]
  std::int64_t y_stride;  // floats between channels of y; up to it, what follows the rows may be written
  std::int64_t channels, height, width, first_row, rows, out_width;
  std::int64_t top, left;  // padding
  std::int64_t ahead;      // floats from what is read to what to prefetch; 0: nothing
  Epilogue epilogue;       // its bias is that of the first channel
};

// A row of a convolution by Winograd's F(4, 4) (kernels/winograd.h), transformed.
struct WinogradInputArgs {
  const float* row;  // padded, 8 floats for each tile, in whole vectors of tiles and one more
  float* columns;    // as much memory again
  std::int64_t tiles;
  float *even, *odd;  // of point 0: [tiles], in whole vectors
  std::int64_t point_stride;
};

// Outputs of one channel from the sums of the seven points.
struct WinogradOutputArgs {
  const float* sums;  // [7][vectors of tiles], the points point_stride apart
  std::int64_t point_stride;
  int vectors;
  float bias;
  float* y;           // [vectors * lanes * 4]
  Epilogue epilogue;  // without its bias
};

// Rows of a MaxPool with strides of 2; what lies outside of the rows given is padding.
struct MaxPoolArgs {
  const float* x;  // whole vectors are read
  std::int64_t pitch, rows, width;
  std::int64_t top, lead;  // padding before the first window's rows and before the columns
  std::int64_t window_rows, window_columns;  // 2 or 3
  float* buffer;  // [out_rows][lead + width + 4 vectors]
  float* y;
  std::int64_t out_rows, out_width;
};

// A tile of fewer sums (block * vectors) keeps two, or else four, partial sums of each, to hide the latency of the FMA
// units: the number decides in which order the entries of a row are added.
constexpr int kSumsForOneChain = 6, kSumsForTwoChains = 4;

constexpr int kMaxVectors = 16;
constexpr int kBlocks[] = {1, 2, 4};

struct Isa {
  const char* name;
  std::int32_t lanes;
  std::int32_t max_vectors[5];  // by block size
  bool (*supported)();
  void (*rows)(const RowsArgs&, int block, int vectors);
  // Copies `count` floats of each plane, zero-filled up to output_stride.
  void (*pack_flat)(const float* input, std::int64_t input_stride, std::int64_t channels, std::int64_t count,
                    float* output, std::int64_t output_stride);
  void (*pack_stage)(const PackArgs&);
  void (*pack_rows)(const PackRowsArgs&);
  void (*depthwise)(const DepthwiseArgs&);
  void (*depthwise_planes)(const PlanesArgs&, int stride);  // nullptr without masked loads
  // output[column * output_stride + row] = input[row * input_stride + column].
  void (*transpose)(const float* input, std::int64_t input_stride, std::int64_t rows, std::int64_t columns,
                    float* output, std::int64_t output_stride);
  // y[o] = activation(sum of values * x[index] + bias[o] + residual[o]) for block rows; index16 or index32 is null, and
  // perhaps the residual, which may be y.
  void (*vector)(const float* x, const std::uint16_t* index16, const std::uint32_t* index32, const float* values,
                 const std::uint32_t* row_start, std::int64_t row_begin, std::int64_t row_end, int block,
                 const Epilogue&, const float* residual, float* y);
  void (*winograd_input)(const WinogradInputArgs&);
  void (*winograd_output)(const WinogradOutputArgs&);
  void (*max_pool)(const MaxPoolArgs&);
};

// The best one that the CPU runs, or the one that SPARSEPIPE_ISA names.
// Returns nullptr and fills `error` where that name is unknown or does not run here.
const Isa* select(char* error, std::size_t error_size);
// All that were compiled in, best first; ends with nullptr.
const Isa* const* compiled();

}  // namespace sparsepipe::kernels
