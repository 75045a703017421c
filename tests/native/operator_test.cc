// The operators on random cases against plain loops in double precision, on every instruction set that this CPU runs.
// Needs no onnxruntime, so it also runs under an emulator of another architecture.
//
//     operator_test CASES SEED     prints one line per instruction set; exits 1 where a case differs
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <tuple>

#include "fake_onnxruntime.h"

using namespace sparsepipe::abi;

extern "C" Status* RegisterCustomOps(SessionOptions*, const ApiBase*);

namespace {

std::mt19937_64 generator;

std::int64_t between(std::int64_t low, std::int64_t high) {
  return std::uniform_int_distribution<std::int64_t>(low, high)(generator);
}
bool coin() { return between(0, 1) == 1; }
float number() { return std::normal_distribution<float>()(generator); }

Value random_tensor(std::vector<std::int64_t> dims) {
  Value v = Value::of<float>(kFloat, std::move(dims));
  for (std::size_t i = 0; i < v.size(); ++i) v.floats()[i] = number();
  return v;
}

// A weight [rows, columns] with about that density in blocks of rows; its second block row is empty.
std::vector<float> random_weight(std::int64_t rows, std::int64_t columns, std::int64_t block, double density) {
  std::vector<float> w(static_cast<std::size_t>(rows * columns));
  const double scale = 1 / std::sqrt(std::max(1.0, density * static_cast<double>(columns)));
  for (std::int64_t b = 0; b < rows / block; ++b) {
    for (std::int64_t k = 0; k < columns; ++k) {
      const bool kept = std::uniform_real_distribution<>()(generator) < density && (b != 1 || density == 1);
      for (std::int64_t r = b * block; kept && r < (b + 1) * block; ++r) {
        w[static_cast<std::size_t>(r * columns + k)] = static_cast<float>(scale) * number();
      }
    }
  }
  return w;
}

// The inputs `values` and `deltas` as sparsepipe/native/operators.py describes them.
std::pair<Value, Value> encode(const std::vector<float>& w, std::int64_t rows, std::int64_t columns,
                               std::int64_t block) {
  std::vector<float> values;
  std::vector<std::uint16_t> deltas;
  const bool narrow = coin();
  const std::int64_t most = narrow ? 255 : 65535;
  std::int64_t before = 0;
  for (std::int64_t b = 0; b < rows / block; ++b) {
    for (std::int64_t k = 0; k < columns; ++k) {
      const auto at = [&](std::int64_t r) { return w[static_cast<std::size_t>((b * block + r) * columns + k)]; };
      bool any = false;
      for (std::int64_t r = 0; r < block; ++r) any = any || at(r) != 0;
      if (!any) continue;
      const std::int64_t index = b * columns + k;
      for (; index - before > most; before += most) {
        deltas.push_back(static_cast<std::uint16_t>(most));
        values.insert(values.end(), static_cast<std::size_t>(block), 0.0f);
      }
      deltas.push_back(static_cast<std::uint16_t>(index - before));
      before = index;
      for (std::int64_t r = 0; r < block; ++r) values.push_back(at(r));
    }
  }
  const auto count = static_cast<std::int64_t>(deltas.size());
  const std::vector<std::uint8_t> bytes(deltas.begin(), deltas.end());
  return {Value::of<float>(kFloat, {count, block}, values.data()),
          narrow ? Value::of<std::uint8_t>(kUint8, {count}, bytes.data())
                 : Value::of<std::uint16_t>(kUint16, {count}, deltas.data())};
}

double activated(double x, const std::string& name, double low, double high) {
  if (name == "relu") return std::max(x, 0.0);
  if (name == "clip") return std::min(std::max(x, low), high);
  if (name == "hardswish") return x * std::min(std::max(x / 6 + 0.5, 0.0), 1.0);
  if (name == "silu") return x / (1 + std::exp(-x));
  if (name == "gelu") return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0)));
  return x;
}

std::string numbers(const std::vector<std::int64_t>& list) {
  std::string text = "[";
  for (std::int64_t i : list) text += std::to_string(i) + " ";
  return text + "]";
}

std::string described(const KernelInfo& info) {
  std::string text = info.op;
  for (const auto& [name, value] : info.attributes) {
    if (const auto* integer = std::get_if<std::int64_t>(&value)) text += " " + name + " " + std::to_string(*integer);
    if (const auto* list = std::get_if<std::vector<std::int64_t>>(&value)) text += " " + name + " " + numbers(*list);
  }
  for (const Value* input : info.inputs) text += " " + (input ? numbers(input->dims) : "-");
  return text;
}

// Runs the node twice, the second time by the plan of the first, and compares; says what differs.
bool agrees(const SessionOptions& options, KernelInfo& info, const std::vector<double>& linear, bool inplace) {
  const auto& ops = options.domain->operators;
  const auto op = std::find_if(ops.begin(), ops.end(), [&](const CustomOp* o) { return info.op == o->name(o); });
  if (op == ops.end()) return std::printf("there is no operator %s\n", info.op.c_str()), false;
  const auto& name = std::get<std::string>(info.attributes["activation"]);
  const double low = -0.5, high = 0.75;
  info.attributes["min"] = static_cast<float>(low);
  info.attributes["max"] = static_cast<float>(high);
  void* kernel = nullptr;
  Status* status = (*op)->create_kernel_v2(*op, fake::api(kApiVersion), &info, &kernel);
  bool good = status == nullptr;
  // A call in place overwrites the residual.
  const Value residual = inplace ? *info.inputs.back() : Value{};
  const Value saved = inplace ? Value::of<float>(kFloat, residual.dims, residual.floats()) : Value{};
  for (int call = 0; good && call < 2; ++call) {
    if (inplace) std::memcpy(residual.data.get(), saved.data.get(), saved.size() * sizeof(float));
    KernelContext context{&info, static_cast<unsigned>(between(1, 3)), inplace, {}};
    status = (*op)->compute_v2(kernel, &context);
    good = status == nullptr && context.output.size() == linear.size();
    double scale = 1e-6, worst = 0;
    for (std::size_t i = 0; good && i < linear.size(); ++i) {
      const double expected = activated(linear[i], name, low, high);
      // What a curve leaves of a sum below zero is small beside the rounding of that sum.
      const bool curved = name == "hardswish" || name == "silu" || name == "gelu";
      scale = std::max({scale, std::fabs(expected), curved ? std::fabs(linear[i]) : 0.0});
      const double difference = std::fabs(expected - context.output.floats()[i]);
      if (!std::isfinite(difference)) std::printf("%zu is not finite\n", i), good = false;
      worst = std::max(worst, difference);
    }
    if (good && worst > 1e-5 * scale) {
      std::printf("relative error %g\n", worst / scale);
      good = false;
    }
  }
  if (kernel) (*op)->destroy(kernel);
  if (!good) std::printf("%s: %s\n", described(info).c_str(), status ? status->message.c_str() : "");
  delete status;
  return good;
}

const double kDensities[] = {0, 0.05, 0.3, 1};
const std::int64_t kBlocks[] = {1, 2, 4};
const std::pair<const char*, const char*> kOfConv[] = {
    {"none", ""}, {"relu", "Relu"}, {"clip", "Clip"}, {"hardswish", "HardSwish"}, {"silu", "Silu"}};
const std::pair<const char*, const char*> kOfLinear[] = {
    {"none", ""}, {"relu", "Relu"}, {"clip", "Clip"}, {"gelu", "Gelu"}};

struct Window {
  std::int64_t kernel, stride, dilation, before, after, size;  // of one axis
  std::int64_t outputs() const { return (size + before + after - dilation * (kernel - 1) - 1) / stride + 1; }
};

Window random_window(bool point, bool plain) {
  Window w{point ? 1 : between(1, 5), 1, 1, 0, 0, 0};
  if (!plain) w = {w.kernel, between(1, 3), between(1, 3), between(0, 4), between(0, 4), 0};
  w.size = std::max<std::int64_t>(1, w.dilation * (w.kernel - 1) + 1 - w.before - w.after) + between(0, 40);
  return w;
}

// A sparse or depthwise convolution on one or two axes.
bool convolution_agrees(const SessionOptions& options, bool depthwise) {
  const bool flat = between(0, 3) == 0, point = !depthwise && coin(), plain = point && coin();
  const std::int64_t block = depthwise ? 1 : kBlocks[between(0, 2)];
  const Window h = flat ? Window{1, 1, 1, 0, 0, 1} : random_window(point, plain), w = random_window(point, plain);
  const std::int64_t out = block * between(1, 6) * (between(0, 9) == 0 ? 8 : 1), in = depthwise ? out : between(1, 24);
  const std::int64_t taps = h.kernel * w.kernel, columns = (depthwise ? 1 : in) * taps, batch = between(1, 3);
  const std::int64_t rows = h.outputs(), width = w.outputs();
  const double density = depthwise ? 1 : kDensities[between(0, 3)];
  const std::vector<float> weight = random_weight(out, columns, block, density);
  // Of one axis or two.
  const auto both = [&](std::int64_t a, std::int64_t b) {
    return flat ? std::vector<std::int64_t>{b} : std::vector<std::int64_t>{a, b};
  };
  const auto shape = [&](std::int64_t first, std::int64_t channels, std::int64_t height, std::int64_t last) {
    std::vector<std::int64_t> dims{first, channels};
    for (std::int64_t d : both(height, last)) dims.push_back(d);
    return dims;
  };
  const Value x = random_tensor(shape(batch, in, h.size, w.size)), bias = random_tensor({out});
  const Value residual = random_tensor(shape(batch, out, rows, width));
  const bool has_bias = coin(), adds = !depthwise && coin();

  std::vector<double> expected(residual.size());
  for (std::int64_t n = 0; n < batch; ++n) {
    for (std::int64_t o = 0; o < out; ++o) {
      double* const y = expected.data() + (n * out + o) * rows * width;
      const float* const added = residual.floats() + (n * out + o) * rows * width;
      for (std::int64_t p = 0; p < rows * width; ++p) {
        y[p] = (has_bias ? double(bias.floats()[o]) : 0) + (adds ? double(added[p]) : 0);
      }
      for (std::int64_t k = 0; k < columns; ++k) {
        const double value = weight[static_cast<std::size_t>(o * columns + k)];
        if (value == 0) continue;
        const std::int64_t channel = depthwise ? o : k / taps, i = k % taps / w.kernel, j = k % w.kernel;
        const float* const plane = x.floats() + (n * in + channel) * h.size * w.size;
        for (std::int64_t r = 0; r < rows; ++r) {
          const std::int64_t row = r * h.stride - h.before + i * h.dilation;
          if (row < 0 || row >= h.size) continue;
          for (std::int64_t c = 0; c < width; ++c) {
            const std::int64_t column = c * w.stride - w.before + j * w.dilation;
            if (column >= 0 && column < w.size) y[r * width + c] += value * double(plane[row * w.size + column]);
          }
        }
      }
    }
  }

  const auto& [activation, suffix] = kOfConv[between(0, 4)];
  KernelInfo info;
  info.name = "node";
  info.op = std::string(depthwise ? "DepthwiseConv" : adds ? "SparseConvAdd" : "SparseConv") + suffix;
  auto pads = both(h.before, w.before);
  for (std::int64_t after : both(h.after, w.after)) pads.push_back(after);
  info.attributes = {{"kernel_shape", both(h.kernel, w.kernel)}, {"strides", both(h.stride, w.stride)},
                     {"dilations", both(h.dilation, w.dilation)}, {"pads", pads},
                     {"activation", std::string(activation)}};
  const Value* b = has_bias ? &bias : nullptr;
  if (depthwise) {
    info.attributes["channels"] = out;
    const Value dense = Value::of<float>(kFloat, shape(out, 1, h.kernel, w.kernel), weight.data());
    info.inputs = {&x, &dense, b};
    info.constant = {false, true, has_bias};
    return agrees(options, info, expected, false);
  }
  info.attributes["in_channels"] = in;
  info.attributes["out_channels"] = out;
  info.attributes["block"] = block;
  info.attributes["mode"] = between(0, 5);
  const auto [values, deltas] = encode(weight, out, columns, block);
  info.inputs = {&x, &values, &deltas, b, adds ? &residual : nullptr};
  info.constant = {false, true, true, has_bias, false};
  return agrees(options, info, expected, adds && coin());
}

// A first convolution of 7 x 7 with stride 2, and perhaps a pooling.
bool stem_agrees(const SessionOptions& options) {
  const std::int64_t in = between(1, 4), out = between(1, 40), batch = between(1, 2);
  Window w[2], pool[2];  // of rows and columns
  for (int i : {0, 1}) {
    w[i] = {7, 2, 1, between(0, 8), between(0, 8), 0};
    pool[i] = {between(2, 3), 2, 1, 0, 0, 0};
    pool[i].before = between(0, pool[i].kernel - 1), pool[i].after = between(0, pool[i].kernel - 1);
    w[i].size = std::max<std::int64_t>(1, 11 - w[i].before - w[i].after) + between(0, 70);
    pool[i].size = w[i].outputs();
  }
  const bool has_bias = coin(), pools = coin();
  const std::vector<float> weight = random_weight(out, in * 49, 1, 1);
  const Value x = random_tensor({batch, in, w[0].size, w[1].size}), bias = random_tensor({out});
  const auto& [activation, suffix] = kOfConv[between(0, 2)];  // those that a pooling may come before as well
  std::vector<double> expected;
  for (std::int64_t n = 0; n < batch; ++n) {
    for (std::int64_t o = 0; o < out; ++o) {
      std::vector<double> plane(static_cast<std::size_t>(pool[0].size * pool[1].size), has_bias ? bias.floats()[o] : 0.0);
      for (std::int64_t k = 0; k < in * 49; ++k) {
        const double value = weight[static_cast<std::size_t>(o * in * 49 + k)];
        const float* const from = x.floats() + (n * in + k / 49) * w[0].size * w[1].size;
        for (std::int64_t r = 0; r < pool[0].size; ++r) {
          const std::int64_t row = r * 2 - w[0].before + k % 49 / 7;
          if (row < 0 || row >= w[0].size) continue;
          for (std::int64_t c = 0; c < pool[1].size; ++c) {
            const std::int64_t column = c * 2 - w[1].before + k % 7;
            if (column < 0 || column >= w[1].size) continue;
            plane[static_cast<std::size_t>(r * pool[1].size + c)] += value * double(from[row * w[1].size + column]);
          }
        }
      }
      if (!pools) {
        expected.insert(expected.end(), plane.begin(), plane.end());
        continue;
      }
      for (std::int64_t r = 0; r < pool[0].outputs(); ++r) {
        for (std::int64_t c = 0; c < pool[1].outputs(); ++c) {
          double most = -1e300;
          for (std::int64_t i = 0; i < pool[0].kernel * pool[1].kernel; ++i) {
            const std::int64_t row = r * 2 - pool[0].before + i / pool[1].kernel;
            const std::int64_t column = c * 2 - pool[1].before + i % pool[1].kernel;
            if (row < 0 || row >= pool[0].size || column < 0 || column >= pool[1].size) continue;
            most = std::max(most, plane[static_cast<std::size_t>(row * pool[1].size + column)]);
          }
          expected.push_back(most);
        }
      }
    }
  }
  const Value dense = Value::of<float>(kFloat, {out, in, 7, 7}, weight.data());
  KernelInfo info;
  info.name = "node";
  info.op = std::string("StemConv") + suffix + (pools ? "MaxPool" : "");
  const auto both = [](std::int64_t a, std::int64_t b) { return std::vector<std::int64_t>{a, b}; };
  const auto pads = [](const Window* of) {
    return std::vector<std::int64_t>{of[0].before, of[1].before, of[0].after, of[1].after};
  };
  info.attributes = {{"kernel_shape", both(7, 7)}, {"strides", both(2, 2)}, {"dilations", both(1, 1)}, {"pads", pads(w)},
                     {"activation", std::string(activation)}};
  if (pools) {
    info.attributes["pool_shape"] = both(pool[0].kernel, pool[1].kernel);
    info.attributes["pool_strides"] = both(2, 2);
    info.attributes["pool_pads"] = pads(pool);
  }
  info.inputs = {&x, &dense, has_bias ? &bias : nullptr};
  info.constant = {false, true, has_bias};
  return agrees(options, info, expected, false);
}

// A SparseSeparableConv on random tensors, which the node refers to.
struct Separable {
  std::int64_t in, out, block, stride, batch;
  std::int64_t pads[4];  // top, left, bottom, right
  std::int64_t height, width;
  double density;
  std::vector<float> filters, weight;
  Value x, dense, first_bias, values, deltas, bias, residual;
  KernelInfo info;
  std::string first;  // the activation between the two convolutions

  std::int64_t rows() const { return (height + pads[0] + pads[2] - 3) / stride + 1; }
  std::int64_t columns() const { return (width + pads[1] + pads[3] - 3) / stride + 1; }

  void fill(bool has_bias, bool adds) {
    filters = random_weight(in, 9, 1, 1);
    weight = random_weight(out, in, block, density);
    x = random_tensor({batch, in, height, width});
    dense = Value::of<float>(kFloat, {in, 1, 3, 3}, filters.data());
    first_bias = random_tensor({in});
    bias = random_tensor({out});
    residual = random_tensor({batch, out, rows(), columns()});
    std::tie(values, deltas) = encode(weight, out, in, block);
    const std::int64_t infixes = between(0, 4), same = infixes ? infixes : between(0, 4);
    const auto& [infix_name, infix] = kOfConv[infixes];
    const auto& [name, suffix] = kOfConv[adds || coin() ? 0 : same];
    first = infix_name;
    info.name = "node";
    info.op = std::string("SparseSeparable") + infix + "Conv" + (adds ? "Add" : "") + suffix;
    info.attributes = {{"kernel_shape", std::vector<std::int64_t>{3, 3}},
                       {"strides", std::vector<std::int64_t>(2, stride)},
                       {"dilations", std::vector<std::int64_t>{1, 1}},
                       {"pads", std::vector<std::int64_t>(pads, pads + 4)},
                       {"in_channels", in}, {"out_channels", out}, {"block", block},
                       {"depthwise_activation", first}, {"activation", std::string(name)},
                       {"depthwise_min", -0.25f}, {"depthwise_max", 1.0f}};
    info.inputs = {&x, &dense, &first_bias, &values, &deltas, has_bias ? &bias : nullptr, adds ? &residual : nullptr};
    info.constant = {false, true, true, true, true, has_bias, false};
  }

  // One channel of an image behind the depthwise convolution.
  std::vector<double> depthwise(std::int64_t image, std::int64_t channel) const {
    std::vector<double> y;
    const float* const plane = x.floats() + (image * in + channel) * height * width;
    for (std::int64_t r = 0; r < rows(); ++r) {
      for (std::int64_t c = 0; c < columns(); ++c) {
        double sum = first_bias.floats()[channel];
        for (std::int64_t tap = 0; tap < 9; ++tap) {
          const std::int64_t row = r * stride - pads[0] + tap / 3, column = c * stride - pads[1] + tap % 3;
          if (row < 0 || row >= height || column < 0 || column >= width) continue;
          sum += double(filters[static_cast<std::size_t>(channel * 9 + tap)]) * double(plane[row * width + column]);
        }
        y.push_back(activated(sum, first, -0.25, 1.0));
      }
    }
    return y;
  }

  std::vector<double> expected() const {
    const std::int64_t plane = rows() * columns();
    std::vector<double> y(residual.size());
    for (std::int64_t n = 0; n < batch; ++n) {
      for (std::int64_t o = 0; o < out; ++o) {
        for (std::int64_t p = 0; p < plane; ++p) {
          const std::int64_t at = (n * out + o) * plane + p;
          y[at] = (info.inputs[5] ? double(bias.floats()[o]) : 0) + (info.inputs[6] ? double(residual.floats()[at]) : 0);
        }
      }
      for (std::int64_t c = 0; c < in; ++c) {
        const std::vector<double> between = depthwise(n, c);
        for (std::int64_t o = 0; o < out; ++o) {
          const double value = weight[static_cast<std::size_t>(o * in + c)];
          for (std::int64_t p = 0; value != 0 && p < plane; ++p) y[(n * out + o) * plane + p] += value * between[p];
        }
      }
    }
    return y;
  }
};

Separable random_separable() {
  Separable s{};
  s.block = kBlocks[between(0, 2)];
  s.in = between(1, 24);
  s.out = s.block * between(1, 6) * (between(0, 9) == 0 ? 8 : 1);
  s.stride = between(1, 2);
  s.batch = between(1, 3);
  for (std::int64_t& pad : s.pads) pad = coin() ? 1 : between(0, 4);
  s.height = std::max<std::int64_t>(1, 3 - s.pads[0] - s.pads[2]) + (coin() ? between(0, 8) : between(0, 40));
  s.width = std::max<std::int64_t>(1, 3 - s.pads[1] - s.pads[3]) + (coin() ? between(0, 20) : between(0, 120));
  s.density = kDensities[between(0, 3)];
  return s;
}

bool separable_agrees(const SessionOptions& options) {
  Separable s = random_separable();
  const bool adds = coin();
  s.fill(coin(), adds);
  return agrees(options, s.info, s.expected(), adds && coin());
}

bool linear_agrees(const SessionOptions& options) {
  const std::int64_t rows = coin() ? between(1, 4) : between(5, 130), in = between(1, 300);
  const std::int64_t block = kBlocks[between(0, 2)], out = block * between(1, 40);
  const std::vector<float> weight = random_weight(out, in, block, kDensities[between(0, 3)]);
  const Value x = random_tensor({rows, in}), bias = random_tensor({out}), residual = random_tensor({rows, out});
  const bool has_bias = coin(), adds = coin();
  std::vector<double> expected;
  for (std::int64_t n = 0; n < rows; ++n) {
    for (std::int64_t o = 0; o < out; ++o) {
      double sum = (has_bias ? double(bias.floats()[o]) : 0) + (adds ? double(residual.floats()[n * out + o]) : 0);
      for (std::int64_t k = 0; k < in; ++k) {
        sum += double(weight[static_cast<std::size_t>(o * in + k)]) * double(x.floats()[n * in + k]);
      }
      expected.push_back(sum);
    }
  }
  const auto [values, deltas] = encode(weight, out, in, block);
  const auto& [activation, suffix] = kOfLinear[between(0, 3)];
  KernelInfo info;
  info.name = "node";
  info.op = std::string(adds ? "SparseLinearAdd" : "SparseLinear") + suffix;
  info.attributes = {
      {"in_features", in}, {"out_features", out}, {"block", block}, {"activation", std::string(activation)}};
  info.inputs = {&x, &values, &deltas, has_bias ? &bias : nullptr, adds ? &residual : nullptr};
  info.constant = {false, true, true, has_bias, false};
  return agrees(options, info, expected, adds && coin());
}

// A kernel of a node, for several calls.
class Made {
 public:
  Made(const SessionOptions& options, KernelInfo& info) : info_(info) {
    for (const CustomOp* op : options.domain->operators) {
      if (info.op == op->name(op)) op_ = op;
    }
    if (Status* status = op_->create_kernel_v2(op_, fake::api(kApiVersion), &info_, &kernel_)) {
      std::printf("%s: %s\n", described(info_).c_str(), status->message.c_str()), std::exit(1);
    }
  }
  ~Made() { op_->destroy(kernel_); }
  Made(const Made&) = delete;
  Made& operator=(const Made&) = delete;

  // The output of the last of so many calls, which all of the threads work on.
  std::vector<float> called(unsigned threads, int calls = 1) {
    Value y;
    for (int i = 0; i < calls; ++i) {
      KernelContext context{&info_, threads, false, {}, true};
      if (Status* status = op_->compute_v2(kernel_, &context)) {
        std::printf("%s: %s\n", described(info_).c_str(), status->message.c_str()), std::exit(1);
      }
      y = context.output;
      tasks = context.tasks;
    }
    return {y.floats(), y.floats() + y.size()};
  }

  std::size_t tasks = 0;  // of the last loop over tasks in the last call

 private:
  KernelInfo& info_;
  const CustomOp* op_ = nullptr;
  void* kernel_ = nullptr;
};

KernelInfo convolution_3x3(std::int64_t out, std::int64_t in, std::int64_t block) {
  const auto list = [](std::int64_t each, std::size_t size) { return std::vector<std::int64_t>(size, each); };
  KernelInfo info;
  info.name = "node";
  info.op = "SparseConv";
  info.attributes = {{"kernel_shape", list(3, 2)}, {"strides", list(1, 2)}, {"dilations", list(1, 2)},
                     {"pads", list(1, 4)}, {"activation", std::string("none")}, {"block", block},
                     {"in_channels", in}, {"out_channels", out}};
  return info;
}

// A convolution in 4x1 blocks is divided once there are several threads, and all of them give the same bits.
bool threads_are_found(const SessionOptions& options, std::int64_t in, std::int64_t out, double density,
                       std::int64_t mode, unsigned threads) {
  const auto [values, deltas] = encode(random_weight(out, in * 9, 4, density), out, in * 9, 4);
  const Value x = random_tensor({1, in, 32, 32});
  KernelInfo info = convolution_3x3(out, in, 4);
  info.attributes["mode"] = mode;
  info.inputs = {&x, &values, &deltas, nullptr, nullptr};
  info.constant = {false, true, true, false, false};
  Made alone(options, info), helped(options, info);
  const bool same = alone.called(1, 9) == helped.called(threads, 9);
  if (!same) std::printf("SparseConv, mode %d, gives other bits on %u threads\n", int(mode), threads);
  if (helped.tasks < 2) std::printf("SparseConv, mode %d, is one task for %u threads\n", int(mode), threads);
  return same && helped.tasks >= 2;
}

// A convolution whose bits are to be those of one thread.
struct Shared {
  std::int64_t in, block, rows, kernel, dilation, height, width;  // `rows` of blocks of outputs
  std::vector<std::int64_t> strides;
  std::int64_t mode, batch;
  unsigned threads;
};

Shared random_shared() {
  const std::int64_t width = coin() ? between(10, 70) : between(1, 4) * 8 - 1;  // rows that share their padding
  return {between(24, 64), kBlocks[between(0, 2)], between(8, 20), coin() ? 3 : between(1, 5), coin() ? 1 : between(1, 2),
          between(10, 70), width, {between(1, 2), between(1, 2)}, between(0, 5), between(1, 3),
          static_cast<unsigned>(between(2, 7))};
}

// In the memory in which this thread packs.
void leave_nan(const SessionOptions& options) {
  const Value x = Value::of<float>(kFloat, {1, 256, 9, 17}, std::vector<float>(256 * 9 * 17, NAN).data());
  const auto [values, deltas] = encode(random_weight(64, 256, 1, 0.5), 64, 256, 1);
  KernelInfo info = convolution_3x3(64, 256, 1);
  info.attributes["kernel_shape"] = std::vector<std::int64_t>(2, 1);
  info.attributes["pads"] = std::vector<std::int64_t>(4, 0);
  info.inputs = {&x, &values, &deltas, nullptr, nullptr};
  info.constant = {false, true, true, false, false};
  Made(options, info).called(1, 9);  // until no other thread is expected
}

// However the tiles that are left over are divided, and whatever lies in the memory of a thread.
bool convolution_keeps_bits(const SessionOptions& options, const Shared& c) {
  const std::int64_t out = c.block * c.rows, columns = c.in * c.kernel * c.kernel;
  const auto weight = random_weight(out, columns, c.block, c.kernel == 1 ? 0.5 : 0.2);
  const auto [values, deltas] = encode(weight, out, columns, c.block);
  const Value x = random_tensor({c.batch, c.in, c.height, c.width});
  KernelInfo info = convolution_3x3(out, c.in, c.block);
  info.attributes["kernel_shape"] = std::vector<std::int64_t>(2, c.kernel);
  info.attributes["strides"] = c.strides;
  info.attributes["dilations"] = std::vector<std::int64_t>(2, c.dilation);
  info.attributes["pads"] = std::vector<std::int64_t>(4, c.kernel == 1 ? 0 : c.kernel / 2 * c.dilation);
  info.attributes["mode"] = c.mode;
  info.inputs = {&x, &values, &deltas, nullptr, nullptr};
  info.constant = {false, true, true, false, false};
  Made alone(options, info), helped(options, info);
  const std::vector<float> expected = alone.called(1);
  helped.called(c.threads, 9);
  leave_nan(options);
  const bool same = helped.called(c.threads) == expected;
  if (!same) std::printf("%s on %u threads: other bits\n", described(info).c_str(), c.threads);
  return same;
}

// Whichever rows of its depthwise part are computed together.
bool separable_keeps_bits(const SessionOptions& options) {
  Separable s = random_separable();
  s.in = between(24, 64);
  s.out = s.block * between(8, 20);
  s.density = 0.5;
  s.fill(coin(), coin());
  Made alone(options, s.info), helped(options, s.info);
  const std::vector<float> expected = alone.called(1);
  const auto threads = static_cast<unsigned>(between(2, 7));
  helped.called(threads, 9);
  leave_nan(options);
  const bool same = helped.called(threads) == expected;
  if (!same) std::printf("%s on %u threads: other bits\n", described(s.info).c_str(), threads);
  return same;
}

// A batch is divided as if it were the first, whatever was packed together for that.
bool batches_are_divided_anew(const SessionOptions& options) {
  const auto [values, deltas] = encode(random_weight(64, 64 * 9, 1, 0.3), 64, 64 * 9, 1);
  const Value few = random_tensor({2, 64, 14, 14}), many = random_tensor({40, 64, 14, 14});
  KernelInfo info = convolution_3x3(64, 64, 1);
  info.inputs = {&few, &values, &deltas, nullptr, nullptr};
  info.constant = {false, true, true, false, false};
  Made fresh(options, info), used(options, info);
  used.called(1);
  info.inputs[0] = &many;
  const bool same = fresh.called(1) == used.called(1);
  if (!same) std::printf("SparseConv gives other bits after another batch\n");
  if (used.tasks != fresh.tasks) std::printf("%zu tasks after another batch, not %zu\n", used.tasks, fresh.tasks);
  return same && used.tasks == fresh.tasks;
}

// What a linear layer computes for so many rows depends neither on calls before nor on the number of threads.
bool bits_are_kept(const SessionOptions& options) {
  const std::int64_t in = 256, out = 64, block = kBlocks[between(0, 2)];
  const auto [values, deltas] = encode(random_weight(out, in, block, 0.1), out, in, block);
  const Value few = random_tensor({between(17, 500), in}), many = random_tensor({between(17, 500), in});
  KernelInfo info;
  info.name = "node";
  info.op = "SparseLinear";
  info.attributes = {
      {"in_features", in}, {"out_features", out}, {"block", block}, {"activation", std::string("none")}};
  info.inputs = {&few, &values, &deltas, nullptr, nullptr};
  info.constant = {false, true, true, false, false};
  Made fresh(options, info), used(options, info), helped(options, info);
  info.inputs[0] = &many;
  used.called(1);
  const unsigned threads = static_cast<unsigned>(between(2, 5));
  helped.called(threads, 9);
  info.inputs[0] = &few;
  const std::vector<float> expected = fresh.called(1);
  const bool same = used.called(1) == expected && helped.called(threads, 9) == expected;
  if (!same) {
    std::printf("block %d, %d rows after %d: other bits\n", int(block), int(few.dims[0]), int(many.dims[0]));
  }
  return same;
}

// Whether the library takes SPARSEPIPE_ISA as it is now: a node without attributes is refused for another reason.
bool runs_here(const SessionOptions& options) {
  const CustomOp* op = options.domain->operators.front();
  KernelInfo info;
  void* kernel = nullptr;
  Status* status = op->create_kernel_v2(op, fake::api(kApiVersion), &info, &kernel);
  const bool refused = status != nullptr && status->message.find("SPARSEPIPE_ISA") != std::string::npos;
  delete status;
  return !refused;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) return std::fprintf(stderr, "operator_test CASES SEED\n"), 2;
  const int cases = std::atoi(argv[1]);
  const ApiBase base{fake::api, +[]() -> const char* { return "none"; }};
  SessionOptions options{};
  if (RegisterCustomOps(&options, &base) != nullptr) return std::printf("cannot register\n"), 1;
  bool good = true;
  for (const char* isa : {"avx512", "avx2", "sse4", "neon", "portable"}) {
    setenv("SPARSEPIPE_ISA", isa, 1);
    if (!runs_here(options)) continue;
    generator.seed(static_cast<std::uint64_t>(std::atoll(argv[2])));
    int failures = 0;
    for (int i = 0; i < cases; ++i) {
      failures += !(i % 7 == 6   ? stem_agrees(options)
                    : i % 3 == 0 ? linear_agrees(options)
                                 : convolution_agrees(options, i % 3 == 1));
      if (i % 3 == 2) failures += !separable_agrees(options);
    }
    std::printf("%s: %d of %d cases differ\n", isa, failures, cases);
    good = good && failures == 0;
    good = threads_are_found(options, 16, 16, 0.05, 0, 2) && good;  // one task for one thread
    good = threads_are_found(options, 32, 128, 0.1, 3, 12) && good;  // in rows: as wide as for one thread
    good = batches_are_divided_anew(options) && good;
    for (int i = 0; i < cases / 4; ++i) {
      good = bits_are_kept(options) && convolution_keeps_bits(options, random_shared()) && good;
      if (i % 2 == 0) good = separable_keeps_bits(options) && good;
    }
  }
  return good ? 0 : 1;
}
