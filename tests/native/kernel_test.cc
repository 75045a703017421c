// The kernels of every instruction set that this CPU runs, against plain loops. Needs no onnxruntime, so it also runs
// under an emulator of another architecture. Prints one line per set; exits 1 where one differs.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "kernels/kernel.h"

using namespace sparsepipe::kernels;

bool quantized_kernels_agree();  // quantized_kernel_test.cc

namespace {

std::mt19937 generator(1);

float number() { return std::uniform_real_distribution<float>(-1.0f, 1.0f)(generator); }

int choice(int most) { return static_cast<int>(generator() % static_cast<unsigned>(most)); }

bool close(double expected, double actual, double scale) { return std::fabs(expected - actual) <= 1e-5 * scale + 1e-6; }

double activated(double x, const Epilogue& e) {
  switch (e.activation) {
    case Activation::kRelu:
      return std::fmax(x, 0);
    case Activation::kClip:
      return std::fmin(std::fmax(x, e.low), e.high);
    case Activation::kHardSwish:
      return x * std::fmin(std::fmax(x / 6 + 0.5, 0), 1);
    case Activation::kSilu:
      return x / (1 + std::exp(-x));
    case Activation::kGelu:
      return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0)));
    case Activation::kNone:
      break;
  }
  return x;
}

struct Case {
  int block, rows, channels;
  std::vector<std::uint32_t> row_start{0};
  std::vector<int> column;
  std::vector<float> values, bias;
  Epilogue epilogue;
};

Case random_case(int block, double density) {
  Case c{block, 1 + choice(9), 1 + choice(40), {0}, {}, {}, {}, {}};
  for (int r = 0; r < c.rows; ++r) {
    for (int k = 0; k < c.channels; ++k) {
      if (r == 1 || std::fabs(number()) > density) continue;
      c.column.push_back(k);
      for (int b = 0; b < block; ++b) c.values.push_back(number());
    }
    c.row_start.push_back(static_cast<std::uint32_t>(c.column.size()));
  }
  for (int i = 0; i < c.rows * block; ++i) c.bias.push_back(number());
  c.epilogue = {c.bias.data(), static_cast<Activation>(choice(6)), -0.25f, 0.5f};
  return c;
}

bool rows_agree(const Isa& isa, int block, int vectors) {
  const Case c = random_case(block, 0.4);
  const int width = vectors * isa.lanes;
  std::vector<float> x(static_cast<std::size_t>(c.channels * width)), y(static_cast<std::size_t>(c.rows * block * width));
  std::vector<float> residual(y.size());
  for (float& v : x) v = number();
  for (float& v : residual) v = number();
  const std::size_t size = 4 + 4 * static_cast<std::size_t>(block);
  std::vector<char> entries(c.column.size() * size + 1);
  for (std::size_t e = 0; e < c.column.size(); ++e) {
    const std::int32_t offset = c.column[e] * width;
    std::memcpy(entries.data() + e * size, &offset, 4);
    std::memcpy(entries.data() + e * size + 4, c.values.data() + e * static_cast<std::size_t>(block), size - 4);
  }
  // All lanes of all vectors but the last, which stores some.
  std::vector<std::int32_t> target, count;
  const bool whole = choice(2) == 0;
  for (int t = 0; t < vectors; ++t) {
    target.push_back(t * isa.lanes);
    count.push_back(whole || t + 1 < vectors ? isa.lanes : choice(isa.lanes));
  }
  RowsArgs a{};
  a.x = x.data();
  a.entries = entries.data();
  a.row_start = c.row_start.data();
  a.row_end = c.rows;
  a.first = a.last = true;
  a.y = y.data();
  const bool adds = choice(2) == 0;
  a.residual = adds ? residual.data() : nullptr;
  a.y_stride = width;
  a.target = target.data();
  a.count = count.data();
  a.whole = whole;
  a.epilogue = c.epilogue;
  a.prefetch_output = choice(2) == 0;
  isa.rows(a, block, vectors);
  for (int r = 0; r < c.rows; ++r) {
    for (int b = 0; b < block; ++b) {
      for (int p = 0; p < width; ++p) {
        const std::size_t at = static_cast<std::size_t>((r * block + b) * width + p);
        double sum = c.bias[static_cast<std::size_t>(r * block + b)];
        for (std::uint32_t e = c.row_start[static_cast<std::size_t>(r)]; e < c.row_start[static_cast<std::size_t>(r) + 1]; ++e) {
          sum += double(c.values[e * static_cast<std::size_t>(block) + static_cast<std::size_t>(b)]) *
                 x[static_cast<std::size_t>(c.column[e] * width + p)];
        }
        const bool stored = p % isa.lanes < count[static_cast<std::size_t>(p / isa.lanes)];
        const double expected = stored ? activated(sum + (adds ? residual[at] : 0), c.epilogue) : 0;
        if (!close(expected, y[at], 4)) return false;
      }
    }
  }
  return true;
}

bool vector_agrees(const Isa& isa, int block) {
  const Case c = random_case(block, 0.5);
  std::vector<float> x(static_cast<std::size_t>(c.channels)), y(static_cast<std::size_t>(c.rows * block));
  for (float& v : x) v = number();
  const std::vector<std::uint16_t> narrow(c.column.begin(), c.column.end());
  const std::vector<std::uint32_t> wide(c.column.begin(), c.column.end());
  const bool is_narrow = choice(2) == 0, adds = choice(2) == 0;
  std::vector<float> residual(y.size());
  for (float& v : residual) v = number();
  isa.vector(x.data(), is_narrow ? narrow.data() : nullptr, is_narrow ? nullptr : wide.data(), c.values.data(),
             c.row_start.data(), 0, c.rows, block, c.epilogue, adds ? residual.data() : nullptr, y.data());
  if (is_narrow && narrow.empty()) return true;
  for (int r = 0; r < c.rows; ++r) {
    for (int b = 0; b < block; ++b) {
      double sum = c.bias[static_cast<std::size_t>(r * block + b)];
      for (std::uint32_t e = c.row_start[static_cast<std::size_t>(r)]; e < c.row_start[static_cast<std::size_t>(r) + 1]; ++e) {
        sum += double(c.values[e * static_cast<std::size_t>(block) + static_cast<std::size_t>(b)]) * x[wide[e]];
      }
      const auto at = static_cast<std::size_t>(r * block + b);
      if (!close(activated(sum + (adds ? residual[at] : 0.0f), c.epilogue), y[at], 4)) return false;
    }
  }
  return true;
}

bool transpose_agrees(const Isa& isa) {
  const int rows = 1 + choice(40), columns = 1 + choice(40);
  std::vector<float> in(static_cast<std::size_t>(rows * columns)), out(in.size());
  for (float& v : in) v = number();
  isa.transpose(in.data(), columns, rows, columns, out.data(), rows);
  for (int r = 0; r < rows; ++r) {
    for (int c = 0; c < columns; ++c) {
      if (in[static_cast<std::size_t>(r * columns + c)] != out[static_cast<std::size_t>(c * rows + r)]) return false;
    }
  }
  return true;
}

}  // namespace

int main() {
  bool good = true;
  for (const Isa* const* isa = compiled(); *isa; ++isa) {
    if (!(*isa)->supported()) {
      std::printf("%s: not on this CPU\n", (*isa)->name);
      continue;
    }
    bool passed = true;
    for (int repeat = 0; repeat < 20; ++repeat) {
      for (int block : kBlocks) {
        for (int t = 1; t <= (*isa)->max_vectors[block]; ++t) passed = passed && rows_agree(**isa, block, t);
        passed = passed && vector_agrees(**isa, block);
      }
      passed = passed && transpose_agrees(**isa);
    }
    std::printf("%s: %s\n", (*isa)->name, passed ? "passed" : "FAILED");
    good = good && passed;
  }
  good = quantized_kernels_agree() && good;
  return good ? 0 : 1;
}
