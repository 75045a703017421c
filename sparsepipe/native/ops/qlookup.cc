// QLookup: the byte that a table of 256 has for each byte, which is any elementwise function between quantised tensors.
#include <algorithm>
#include <array>
#include <cstring>

#include "ops/ops.h"
#include "ops/quantized.h"
#include "ops/window.h"

namespace sparsepipe {
namespace {

using kernels::QIsa;

constexpr std::int64_t kTasks = 16;
constexpr std::int64_t kTaskBytes = 16384;  // a task of fewer is not worth a thread
constexpr std::size_t kTable = 1;           // the input

class QLookup final : public Kernel {
 public:
  QLookup(const abi::Functions& functions, const Node& node, const QIsa& isa) : Kernel(functions), isa_(isa) {
    const std::optional<Tensor> table = node.constant(kTable, "table");
    if (!table) throw Error("input 'table' is missing");
    if (table->type != abi::kUint8 && table->type != abi::kInt8) throw Error("input 'table' must be uint8 or int8");
    if (table->dims != std::vector<std::int64_t>{std::int64_t{256}}) {
      throw Error("input 'table' must have shape [256], not " + shape_text(table->dims));
    }
    type_ = table->type;
    std::memcpy(table_.data(), table->data, table_.size());
  }

  void compute(const Call& call) override {
    const std::optional<Tensor> x = call.input(0);
    if (!x || x->type != type_) {
      throw Error(std::string("input 'X' must be a tensor of ") + (type_ == abi::kUint8 ? "uint8" : "int8"));
    }
    const std::int64_t count = x->size();
    auto* y = static_cast<std::uint8_t*>(call.output_data(x->dims));
    if (count == 0) return;
    const auto* data = static_cast<const std::uint8_t*>(x->data);
    const std::int64_t tasks = std::min(kTasks, ceil_div(count, kTaskBytes));
    call.parallel(static_cast<std::size_t>(tasks), [&](std::size_t task) {
      const auto index = static_cast<std::int64_t>(task);
      const std::int64_t first = count / tasks * index, last = index + 1 < tasks ? first + count / tasks : count;
      isa_.lookup(table_.data(), data + first, last - first, y + first);
    });
  }

 private:
  const QIsa& isa_;
  int type_;
  std::array<std::uint8_t, 256> table_;  // by the bits of X
};

}  // namespace

std::unique_ptr<Kernel> make_qlookup(const abi::Functions& ort, const Node& node, const kernels::Isa&) {
  return std::make_unique<QLookup>(ort, node, quantized_isa());
}

}  // namespace sparsepipe
