// Calls one operator on fixed inputs, for a tool that counts instructions.
//
//     instruction_test CASE ROUNDS    one call of each size; the first round plans, what the others cost is the kernel's
#include <cstdio>
#include <cstdlib>
#include <string>

#include "fake_onnxruntime.h"

using namespace sparsepipe::abi;

extern "C" Status* RegisterCustomOps(SessionOptions*, const ApiBase*);

namespace {

// The same numbers with every compiler and library.
struct Numbers {
  std::uint32_t state = 1;
  float next() {
    state = state * 1664525u + 1013904223u;
    return static_cast<float>(state >> 8) / 16777216.0f - 0.5f;
  }
};

struct Case {
  const char* name;
  bool linear;
  std::int64_t out, in, kernel, size, block, every;  // one block of `every` is kept; `size`: side of the map, or rows
  std::int64_t sizes = 1;  // called one after the other
};

const Case kCases[] = {
    {"conv1x1", false, 128, 128, 1, 28, 1, 20},   {"conv1x1-4x1", false, 128, 128, 1, 28, 4, 10},
    {"conv3x3", false, 64, 64, 3, 28, 1, 20},     {"conv3x3-4x1", false, 64, 64, 3, 28, 4, 10},
    {"conv3x3-small", false, 128, 128, 3, 7, 1, 20}, {"linear", true, 512, 512, 1, 64, 1, 20},
    {"linear-4x1", true, 512, 512, 1, 64, 4, 10}, {"linear-vector", true, 1024, 1024, 1, 1, 1, 20},
    {"conv3x3-sizes", false, 128, 128, 3, 6, 1, 20, 8}, {"linear-sizes", true, 512, 512, 1, 16, 1, 5, 12},
};

int run(const SessionOptions& options, const Case& c, int rounds) {
  Numbers numbers;
  const std::int64_t columns = c.in * c.kernel * c.kernel;
  std::vector<float> values;
  std::vector<std::uint16_t> deltas;
  std::int64_t before = 0;
  for (std::int64_t b = 0; b < c.out / c.block * columns; ++b) {
    numbers.next();
    if ((numbers.state >> 16) % static_cast<std::uint32_t>(c.every) != 0) continue;
    deltas.push_back(static_cast<std::uint16_t>(b - before));
    before = b;
    for (std::int64_t r = 0; r < c.block; ++r) values.push_back(numbers.next());
  }
  const auto count = static_cast<std::int64_t>(deltas.size());
  const Value kept = Value::of<float>(kFloat, {count, c.block}, values.data());
  const Value index = Value::of<std::uint16_t>(kUint16, {count}, deltas.data());
  std::vector<Value> inputs;
  for (std::int64_t i = 0; i < c.sizes; ++i) {
    const std::int64_t side = c.size + i, rows = c.size + 8 * i;
    inputs.push_back(Value::of<float>(kFloat, c.linear ? std::vector<std::int64_t>{rows, c.in}
                                                       : std::vector<std::int64_t>{1, c.in, side, side}));
    for (std::size_t f = 0; f < inputs.back().size(); ++f) inputs.back().floats()[f] = numbers.next();
  }
  const Value bias = Value::of<float>(kFloat, {c.out});
  for (std::size_t i = 0; i < bias.size(); ++i) bias.floats()[i] = numbers.next();

  KernelInfo info;
  info.name = "node";
  info.op = c.linear ? "SparseLinearRelu" : "SparseConvRelu";
  info.attributes = {{"block", c.block}, {"activation", std::string("relu")}};
  if (c.linear) {
    info.attributes["in_features"] = c.in;
    info.attributes["out_features"] = c.out;
  } else {
    using List = std::vector<std::int64_t>;
    const std::int64_t pad = c.kernel / 2;
    info.attributes["in_channels"] = c.in;
    info.attributes["out_channels"] = c.out;
    info.attributes["kernel_shape"] = List{c.kernel, c.kernel};
    info.attributes["strides"] = List{1, 1};
    info.attributes["dilations"] = List{1, 1};
    info.attributes["pads"] = List{pad, pad, pad, pad};
  }
  info.inputs = {nullptr, &kept, &index, &bias};
  info.constant = {false, true, true, true};
  for (const CustomOp* op : options.domain->operators) {
    if (info.op != op->name(op)) continue;
    void* kernel = nullptr;
    Status* status = op->create_kernel_v2(op, fake::api(kApiVersion), &info, &kernel);
    for (std::int64_t i = 0; status == nullptr && i < rounds * c.sizes; ++i) {
      info.inputs[0] = &inputs[static_cast<std::size_t>(i % c.sizes)];
      KernelContext context{&info, 1, false, {}};
      status = op->compute_v2(kernel, &context);
    }
    if (status != nullptr) return std::printf("%s\n", status->message.c_str()), 1;
    op->destroy(kernel);
    return 0;
  }
  return std::printf("there is no operator %s\n", info.op.c_str()), 1;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    for (const Case& c : kCases) std::printf("%s\n", c.name);
    return 0;
  }
  const ApiBase base{fake::api, +[]() -> const char* { return "none"; }};
  SessionOptions options{};
  if (RegisterCustomOps(&options, &base) != nullptr) return std::printf("cannot register\n"), 1;
  for (const Case& c : kCases) {
    if (std::string(argv[1]) == c.name) return run(options, c, std::atoi(argv[2]));
  }
  return std::printf("there is no case %s\n", argv[1]), 1;
}
