// The int8 kernels of every instruction set that this CPU runs, against plain loops, to the bit; kernel_test.cc calls it.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "kernels/qkernel.h"

using namespace sparsepipe::kernels;

namespace {

std::mt19937 generator(1);

int choice(int most) { return static_cast<int>(generator() % static_cast<unsigned>(most)); }

int byte() { return choice(4) ? choice(256) : 255 * choice(2); }

struct Case {
  int block, rows, groups, width;
  std::vector<std::uint32_t> row_start{0};
  std::vector<int> group;
  std::vector<int> values;  // [entries][block][4]
  std::vector<std::int32_t> bias;
  std::vector<float> scale;
  Requantize q{};
};

Case random_case(int block, int width) {
  Case c;
  c.block = block;
  c.rows = 1 + choice(5);
  c.groups = 1 + choice(30);
  c.width = width;
  for (int r = 0; r < c.rows; ++r) {
    for (int g = 0; g < c.groups; ++g) {
      if (r == 1 || choice(3)) continue;
      c.group.push_back(g);
      for (int k = 0; k < block * kQuad; ++k) c.values.push_back(choice(5) ? choice(256) - 128 : 127);
    }
    c.row_start.push_back(static_cast<std::uint32_t>(c.group.size()));
  }
  for (int i = 0; i < c.rows * block; ++i) {
    c.bias.push_back(choice(20000) - 10000);
    c.scale.push_back(static_cast<float>(1 + choice(1000)) * 1e-6f);
  }
  const bool is_int8 = choice(2), bounded = choice(2);
  const int least = is_int8 ? -128 : 0, zero_point = least + byte();
  c.q.bias = c.bias.data();
  c.q.scale = c.scale.data();
  c.q.plain = !is_int8 && !bounded;
  c.q.least = static_cast<float>(least - zero_point);
  c.q.most = static_cast<float>(least + 255 - zero_point);
  c.q.shift = zero_point - least;
  c.q.low = bounded ? 30 : 0;
  c.q.high = bounded ? 200 : 255;
  c.q.flip = is_int8 ? 0x80 : 0;
  c.q.zero_point = static_cast<float>(zero_point);
  c.q.sum_ratio = 0.7f;
  c.q.residual_ratio = 0.37f;
  c.q.fixed = 3.25f;
  return c;
}

// The entries as `isa` reads them; `step` bytes between the groups of x.
std::vector<char> entries_of(const Case& c, const QIsa& isa, int step) {
  std::vector<char> bytes;
  const auto append = [&](const auto& value) {
    const auto* from = reinterpret_cast<const char*>(&value);
    bytes.insert(bytes.end(), from, from + sizeof value);
  };
  for (std::size_t e = 0; e < c.group.size(); ++e) {
    append(static_cast<std::int32_t>(c.group[e] * step));
    for (int r = 0; r < c.block; ++r) {
      const int* w = c.values.data() + (e * static_cast<std::size_t>(c.block) + static_cast<std::size_t>(r)) * kQuad;
      if (isa.wide) {
        for (int k : {0, 2, 1, 3}) append(static_cast<std::int16_t>(w[k]));
      } else {
        for (int k = 0; k < kQuad; ++k) append(static_cast<std::int8_t>(w[k]));
      }
    }
  }
  bytes.push_back(0);
  return bytes;
}

int value_of(std::uint8_t x, const QIsa& isa) { return isa.is_signed ? static_cast<std::int8_t>(x) : x; }

std::int64_t sum_of(const Case& c, const QIsa& isa, const std::vector<std::uint8_t>& x, int step, int row, int r, int p) {
  std::int64_t sum = 0;
  for (std::uint32_t e = c.row_start[static_cast<std::size_t>(row)]; e < c.row_start[static_cast<std::size_t>(row) + 1]; ++e) {
    for (int k = 0; k < kQuad; ++k) {
      const std::uint8_t in = x[static_cast<std::size_t>(c.group[e] * step + p * kQuad + k)];
      sum += value_of(in, isa) * c.values[(e * static_cast<std::size_t>(c.block) + static_cast<std::size_t>(r)) * kQuad + static_cast<std::size_t>(k)];
    }
  }
  return sum;
}

double bounded(double x, double low, double high) { return std::fmin(std::fmax(x, low), high); }

std::uint8_t expected_byte(const Case& c, int channel, std::int64_t sum, const std::uint8_t* residual) {
  const Requantize& q = c.q;
  const int least = q.flip ? -128 : 0;
  const float product = static_cast<float>(sum + c.bias[static_cast<std::size_t>(channel)]) * c.scale[static_cast<std::size_t>(channel)];
  double value = std::nearbyint(bounded(product, q.least, q.most));
  if (residual) {
    const int other = q.flip ? static_cast<std::int8_t>(*residual) : *residual;
    const float inner = static_cast<float>(value) + q.zero_point;
    value = std::nearbyint(std::fma(inner, q.sum_ratio, std::fma(static_cast<float>(other), q.residual_ratio, q.fixed))) - least;
  } else {
    value += q.shift;
  }
  value = bounded(bounded(value, 0, 255), q.low, q.high);
  return static_cast<std::uint8_t>(static_cast<std::uint8_t>(value) ^ q.flip);
}

bool rows_agree(const QIsa& isa, int block, int vectors) {
  const int width = vectors * isa.lanes;
  Case c = random_case(block, width);
  const bool adds = choice(2);
  if (adds) c.q.shift = c.q.flip ? 128 : 0;
  const int step = width * kQuad + 4 * choice(9);
  std::vector<std::uint8_t> x(static_cast<std::size_t>(c.groups * step + 64));
  for (auto& v : x) v = static_cast<std::uint8_t>(byte());
  const std::vector<char> entries = entries_of(c, isa, step);
  std::vector<std::uint8_t> y(static_cast<std::size_t>(c.rows * block * (width + 7))), residual(y.size());
  for (auto& v : y) v = static_cast<std::uint8_t>(byte());
  for (auto& v : residual) v = static_cast<std::uint8_t>(byte());
  const std::vector<std::uint8_t> before = y;
  // The whole tile, its start, or pieces of it.
  std::vector<Run> runs;
  if (choice(3) == 0) {
    for (int from = choice(3), to = 0; from < width;) {
      const int count = std::min(1 + choice(20), width - from);
      runs.push_back({from, to, count});
      from += count + choice(3);
      to += count;
    }
  } else {
    runs.push_back({0, 0, choice(2) ? width : 1 + choice(width)});
  }
  QRowsArgs a{};
  a.x = x.data();
  a.entries = entries.data();
  a.row_start = c.row_start.data();
  a.row_end = c.rows;
  a.y = y.data();
  a.residual = adds ? residual.data() : nullptr;
  a.y_stride = width + 7;
  a.runs = runs.data();
  a.run_count = static_cast<std::int32_t>(runs.size());
  a.requantize = c.q;
  isa.rows(a, block, vectors);
  std::vector<std::uint8_t> expected = before;
  for (int row = 0; row < c.rows; ++row) {
    for (int r = 0; r < block; ++r) {
      for (const Run& run : runs) {
        for (int i = 0; i < run.count; ++i) {
          const auto at = static_cast<std::size_t>((row * block + r) * a.y_stride + run.to + i);
          const std::int64_t sum = sum_of(c, isa, x, step, row, r, run.from + i);
          expected[at] = expected_byte(c, row * block + r, sum, adds ? &residual[at] : nullptr);
        }
      }
    }
  }
  return y == expected;
}

bool strip_agrees(const QIsa& isa) {
  const int whole = 4 * isa.lanes, count = 1 + choice(5 * whole), width = (count + whole - 1) / whole * whole;
  const Case c = random_case(1, width);
  const int step = width * kQuad + 4 * choice(9), row = choice(c.rows);
  std::vector<std::uint8_t> x(static_cast<std::size_t>(c.groups * step + 64)), stage(static_cast<std::size_t>(width));
  for (auto& v : x) v = static_cast<std::uint8_t>(byte());
  const std::vector<char> entries = entries_of(c, isa, step);
  std::vector<std::uint8_t> y(stage.size(), 77);
  std::vector<Run> runs;
  for (int from = choice(3), to = 0; from < count;) {
    const int length = std::min(1 + choice(40), count - from);
    runs.push_back({from, to, length});
    from += length + choice(3);
    to += length;
  }
  QRowsArgs a{};
  a.x = x.data();
  a.entries = entries.data();
  a.row_start = c.row_start.data();
  a.row_begin = row;
  a.y = y.data();
  a.runs = runs.data();
  a.run_count = static_cast<std::int32_t>(runs.size());
  a.requantize = c.q;
  isa.strip(a, count, stage.data());
  std::vector<std::uint8_t> expected(y.size(), 77);
  for (const Run& run : runs) {
    for (int i = 0; i < run.count; ++i) {
      expected[static_cast<std::size_t>(run.to + i)] =
          expected_byte(c, row, sum_of(c, isa, x, step, row, 0, run.from + i), nullptr);
    }
  }
  return y == expected;
}

bool vector_agrees(const QIsa& isa, int block) {
  const Case c = random_case(block, 1);
  std::vector<std::uint8_t> x(static_cast<std::size_t>(c.groups * kQuad)), y(static_cast<std::size_t>(c.rows * block));
  for (auto& v : x) v = static_cast<std::uint8_t>(byte());
  const std::vector<char> entries = entries_of(c, isa, kQuad);
  std::vector<std::int32_t> sums(y.size());
  isa.vector(x.data(), entries.data(), c.row_start.data(), 0, c.rows, block, sums.data());
  isa.requantize(sums.data(), 0, static_cast<std::int64_t>(sums.size()), c.q, y.data());
  for (int row = 0; row < c.rows; ++row) {
    for (int r = 0; r < block; ++r) {
      const std::int64_t sum = sum_of(c, isa, x, kQuad, row, r, 0);
      const auto at = static_cast<std::size_t>(row * block + r);
      if (sums[at] != sum || y[at] != expected_byte(c, row * block + r, sum, nullptr)) return false;
    }
  }
  return true;
}

bool sums_agree(const QIsa& isa) {
  Case c = random_case(1, 1);
  c.q.shift = c.q.flip ? 128 : 0;
  const int count = 1 + choice(200), least = c.q.flip ? -128 : 0;
  std::vector<std::uint8_t> product(static_cast<std::size_t>(count)), residual(product.size()), y(product.size() + 9, 77);
  for (auto& v : product) v = static_cast<std::uint8_t>(byte());
  for (auto& v : residual) v = static_cast<std::uint8_t>(byte());
  const auto number = [&](std::uint8_t v) { return static_cast<float>(c.q.flip ? static_cast<std::int8_t>(v) : v); };
  isa.add(product.data(), residual.data(), count, c.q, y.data());
  for (std::size_t i = 0; i < y.size(); ++i) {
    if (i >= product.size()) {
      if (y[i] != 77) return false;
      continue;
    }
    const float total = std::fma(number(product[i]), c.q.sum_ratio, std::fma(number(residual[i]), c.q.residual_ratio, c.q.fixed));
    const double value = bounded(bounded(std::nearbyint(total) - least, 0, 255), c.q.low, c.q.high);
    if (y[i] != static_cast<std::uint8_t>(static_cast<std::uint8_t>(value) ^ c.q.flip)) return false;
  }
  return true;
}

bool packs_agree(const QIsa& isa) {
  const int channels = 1 + choice(9), count = 1 + choice(300), groups = (channels + 3) / 4;
  const int out_stride = (count + 15) / 16 * 64;
  std::vector<std::uint8_t> x(static_cast<std::size_t>(channels * count)), out(static_cast<std::size_t>(groups * out_stride));
  for (auto& v : x) v = static_cast<std::uint8_t>(byte());
  const auto flip = static_cast<std::uint8_t>(choice(2) * 0x80);
  isa.pack(x.data(), count, channels, count, flip, out.data(), out_stride);
  for (int c = 0; c < channels; ++c) {
    for (int i = 0; i < count; ++i) {
      const std::uint8_t expected = x[static_cast<std::size_t>(c * count + i)] ^ flip;
      if (out[static_cast<std::size_t>(c / 4 * out_stride + i * 4 + c % 4)] != expected) return false;
    }
  }
  const int step = 1 + choice(3), wanted = 1 + choice(70);
  std::vector<std::uint8_t> plane(static_cast<std::size_t>((wanted - 1) * step + 1)), stage(80, 1);
  for (auto& v : plane) v = static_cast<std::uint8_t>(byte());
  const QStageRow row{0, 3, wanted};
  isa.fill(plane.data(), &row, 1, step, stage.data());
  for (int i = 0; i < 80; ++i) {
    const bool inside = i >= 3 && i < 3 + wanted;
    if (stage[static_cast<std::size_t>(i)] != (inside ? plane[static_cast<std::size_t>((i - 3) * step)] : 1)) return false;
  }
  return true;
}

bool largest_agrees(const QIsa& isa) {
  const int rows = 1 + choice(5), count = 1 + choice(150);
  std::vector<std::vector<std::uint8_t>> x(static_cast<std::size_t>(rows), std::vector<std::uint8_t>(static_cast<std::size_t>(count)));
  std::vector<const std::uint8_t*> from;
  for (auto& row : x) {
    for (auto& v : row) v = static_cast<std::uint8_t>(byte());
    from.push_back(row.data());
  }
  const auto flip = static_cast<std::uint8_t>(choice(2) * 0x80);
  std::vector<std::uint8_t> to(static_cast<std::size_t>(count + 9), 77);
  isa.largest(from.data(), rows, count, flip, to.data());
  for (std::size_t i = 0; i < to.size(); ++i) {
    int expected = i < static_cast<std::size_t>(count) ? 0 : 77;
    for (int k = 0; k < rows && i < static_cast<std::size_t>(count); ++k) expected = std::max(expected, x[static_cast<std::size_t>(k)][i] ^ flip);
    if (to[i] != expected) return false;
  }
  return true;
}

bool lookup_agrees(const QIsa& isa) {
  const int count = choice(600);
  std::vector<std::uint8_t> table(256), x(static_cast<std::size_t>(count)), y(x.size() + 9, 77);
  for (auto& v : table) v = static_cast<std::uint8_t>(choice(256));
  for (auto& v : x) v = static_cast<std::uint8_t>(choice(256));
  isa.lookup(table.data(), x.data(), count, y.data());
  for (std::size_t i = 0; i < y.size(); ++i) {
    if (y[i] != (i < x.size() ? table[x[i]] : 77)) return false;
  }
  return true;
}

}  // namespace

// Prints one line per set; false where one differs.
bool quantized_kernels_agree() {
  bool good = true;
  for (const QIsa* const* isa = compiled_quantized(); *isa; ++isa) {
    if (!(*isa)->supported()) {
      std::printf("int8 %s: not on this CPU\n", (*isa)->name);
      continue;
    }
    bool passed = true;
    for (int repeat = 0; repeat < 60; ++repeat) {
      for (int block : {1, 2, 4}) {
        for (int t = 1; t <= (*isa)->most_vectors[block]; ++t) passed = passed && rows_agree(**isa, block, t);
        passed = passed && vector_agrees(**isa, block);
      }
      passed = passed && strip_agrees(**isa) && sums_agree(**isa) && packs_agree(**isa) && largest_agrees(**isa) && lookup_agrees(**isa);
    }
    std::printf("int8 %s: %s\n", (*isa)->name, passed ? "passed" : "FAILED");
    good = good && passed;
  }
  return good;
}
