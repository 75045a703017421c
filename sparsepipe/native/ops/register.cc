// The entry point: registers the operators of domain `sparsepipe`, version 1.
#include <cstring>
#include <mutex>
#include <new>
#include <utility>
#include <vector>

#include "ops/ops.h"
#include "ops/quantized.h"

namespace sparsepipe {
namespace {

// Of SparseConv and SparseLinear, and of SparseSeparableConv; of those for int8 it is kQResidual.
constexpr int kResidual = 4, kSeparableResidual = 6;

using Make = std::unique_ptr<Kernel> (*)(const abi::Functions&, const Node&, const kernels::Isa&);

// What the operators of one family share.
struct Family {
  const char* name;
  std::vector<int> types;  // of the inputs; kUndefined: any
  std::size_t required;    // of them
  int output;
  Make make;
  std::size_t residual;  // the input that is added; 0: none
  const char* last = "";  // what it does after the activation, at the end of its name
};

struct Op : abi::CustomOp {
  std::string text;
  const Family* family;
  const char* activation;
  const char* depthwise_activation;  // of a SparseSeparableConv
  bool residual;
};

// The kernel goes by the attributes and inputs, the fallback body by the name: they must say the same.
void agree(const Op& op, const Node& node) {
  const auto check_activation = [&](const char* attribute, const char* expected) {
    const std::string activation = node.text(attribute, "none");
    if (activation == expected) return;
    throw Error("attribute '" + std::string(attribute) + "' is '" + activation.substr(0, 40) + "', but the operator " +
                op.text + " has " + attribute + " '" + expected + "'");
  };
  check_activation("activation", op.activation);
  if (op.depthwise_activation) check_activation("depthwise_activation", op.depthwise_activation);
  if (op.family->residual == 0 || node.has_input(op.family->residual) == op.residual) return;
  throw Error("input 'residual' is " + std::string(op.residual ? "missing" : "given") + ", but the operator " + op.text +
              (op.residual ? " adds one" : " adds none"));
}

abi::Status* create(const abi::CustomOp* self, abi::Api* api, const abi::KernelInfo* info, void** out) {
  const auto& op = *static_cast<const Op*>(self);
  const abi::Functions ort(api);
  std::string where = "sparsepipe." + op.text;
  return guarded(ort, where, [&] {
    const Node node(ort, info);
    where += " node '" + node.name() + "'";
    char error[200] = "";
    const kernels::Isa* const isa = kernels::select(error, sizeof error);
    if (isa == nullptr) throw Error(error[0] ? error : "SPARSEPIPE_ISA names no instruction set of this CPU");
    std::unique_ptr<Kernel> kernel = op.family->make(ort, node, *isa);
    agree(op, node);
    kernel->where = where;
    *out = kernel.release();
  });
}

abi::Status* compute(void* kernel, abi::KernelContext* context) {
  auto& k = *static_cast<Kernel*>(kernel);
  return guarded(k.ort, k.where, [&] { k.compute(Call(k.ort, context)); });
}

// The output may take the memory of the residual: every number of it is read before it is written, by one thread.
template <int kResidual>
std::size_t residual_inplace(int** inputs, int** outputs) {
  *inputs = new (std::nothrow) int[1]{kResidual};
  *outputs = new (std::nothrow) int[1]{0};
  if (*inputs != nullptr && *outputs != nullptr) return 1;
  delete[] *inputs;
  delete[] *outputs;
  *inputs = *outputs = nullptr;
  return 0;
}

void release_inplace(int* inputs, int* outputs) {
  delete[] inputs;
  delete[] outputs;
}

Op describe(const Family& family, const char* activation, const char* suffix, bool residual) {
  Op op{};
  op.version = abi::kApiVersion;
  op.name = [](const abi::CustomOp* o) { return static_cast<const Op*>(o)->text.c_str(); };
  op.execution_provider = [](const abi::CustomOp*) -> const char* { return nullptr; };
  op.input_count = [](const abi::CustomOp* o) { return static_cast<const Op*>(o)->family->types.size(); };
  op.input_type = [](const abi::CustomOp* o, std::size_t i) { return static_cast<const Op*>(o)->family->types[i]; };
  op.input_characteristic = [](const abi::CustomOp* o, std::size_t i) {
    return static_cast<int>(i < static_cast<const Op*>(o)->family->required ? abi::kRequired : abi::kOptional);
  };
  op.input_memory_type = [](const abi::CustomOp*, std::size_t) { return 0; };
  op.output_count = [](const abi::CustomOp*) -> std::size_t { return 1; };
  op.output_type = [](const abi::CustomOp* o, std::size_t) { return static_cast<const Op*>(o)->family->output; };
  op.output_characteristic = [](const abi::CustomOp*, std::size_t) { return static_cast<int>(abi::kRequired); };
  op.variadic_input_min_arity = [](const abi::CustomOp*) { return 0; };
  op.variadic_input_homogeneity = [](const abi::CustomOp*) { return 0; };
  op.variadic_output_min_arity = [](const abi::CustomOp*) { return 0; };
  op.variadic_output_homogeneity = [](const abi::CustomOp*) { return 0; };
  op.create_kernel_v2 = create;
  op.compute_v2 = compute;
  op.destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.start_version = [](const abi::CustomOp*) { return 1; };
  op.end_version = [](const abi::CustomOp*) { return 0x7fffffff; };
  if (residual) {
    op.may_inplace = family.residual == kQResidual           ? residual_inplace<kQResidual>
                     : family.residual == kSeparableResidual ? residual_inplace<kSeparableResidual>
                                                             : residual_inplace<kResidual>;
    op.release_may_inplace = release_inplace;
  }
  op.text = std::string(family.name) + (residual ? "Add" : "") + suffix + family.last;
  op.family = &family;
  op.activation = activation;
  op.residual = residual;
  return op;
}

// Each for uint8 and for int8 tensors: onnxruntime chooses by the type of the inputs.
const std::vector<Family>& quantized_families() {
  static const std::vector<Family> families = [] {
    std::vector<Family> made;
    for (int type : {abi::kUint8, abi::kInt8}) {
      std::vector<int> types{type, abi::kFloat, type, abi::kInt8, abi::kUndefined, abi::kFloat, abi::kFloat, type,
                             abi::kInt32};
      types.insert(types.end(), {type, abi::kFloat, type, abi::kFloat, type});
      made.push_back({"SparseQLinear", types, 8, type, make_sparse_qlinear, kQResidual});
      made.push_back({"SparseQConv", types, 8, type, make_sparse_qconv, kQResidual});
      const std::vector<int> dense{type, abi::kFloat, type, abi::kInt8, abi::kFloat, abi::kFloat, type, abi::kInt32};
      made.push_back({"QDepthwiseConv", dense, 7, type, make_qdepthwise_conv, 0});
      made.push_back({"QMaxPool", {type}, 1, type, make_qmax_pool, 0});
      made.push_back({"QLookup", {type, type}, 2, type, make_qlookup, 0});
    }
    return made;
  }();
  return families;
}

// A file has one fallback body per operator name, so each set of fused steps has a name.
std::vector<Op> all_operators() {
  using abi::kFloat, abi::kUndefined;
  static const Family conv{"SparseConv", {kFloat, kFloat, kUndefined, kFloat, kFloat}, 3, kFloat, make_sparse_conv, kResidual};
  static const Family linear{"SparseLinear", {kFloat, kFloat, kUndefined, kFloat, kFloat}, 3, kFloat, make_sparse_linear, kResidual};
  static const Family depthwise{"DepthwiseConv", {kFloat, kFloat, kFloat}, 2, kFloat, make_depthwise_conv, 0};
  static const Family stem{"StemConv", {kFloat, kFloat, kFloat}, 2, kFloat, make_stem_conv, 0};
  static const Family pooled{"StemConv", {kFloat, kFloat, kFloat}, 2, kFloat, make_pooled_stem_conv, 0, "MaxPool"};
  static const Family separable{"SparseSeparableConv", {kFloat, kFloat, kFloat, kFloat, kUndefined, kFloat, kFloat}, 5, kFloat,
                                make_sparse_separable_conv, kSeparableResidual};
  const std::pair<const char*, const char*> of_conv[] = {
      {"none", ""}, {"relu", "Relu"}, {"clip", "Clip"}, {"hardswish", "HardSwish"}, {"silu", "Silu"}};
  const std::pair<const char*, const char*> of_linear[] = {
      {"none", ""}, {"relu", "Relu"}, {"clip", "Clip"}, {"gelu", "Gelu"}};
  std::vector<Op> ops;
  for (const auto& [activation, suffix] : of_conv) {
    for (bool residual : {false, true}) ops.push_back(describe(conv, activation, suffix, residual));
    for (const Family* family : {&depthwise, &stem, &pooled}) ops.push_back(describe(*family, activation, suffix, false));
    for (const auto& [first, infix] : of_conv) {
      for (bool residual : {false, true}) {
        // A session takes 50 us for each operator, so only what networks have: a sum at the end has no activation, and
        // two activations are the same.
        if (*suffix && (residual || (*infix && std::strcmp(infix, suffix) != 0))) continue;
        ops.push_back(describe(separable, activation, suffix, residual));
        ops.back().depthwise_activation = first;
        ops.back().text.insert(std::strlen("SparseSeparable"), infix);
      }
    }
  }
  for (const auto& [activation, suffix] : of_linear) {
    for (bool residual : {false, true}) ops.push_back(describe(linear, activation, suffix, residual));
  }
  for (const Family& family : quantized_families()) {
    for (const auto& [activation, suffix] : {of_conv[0], of_conv[1], of_conv[2]}) {
      if (family.types.size() <= 2 && *suffix) continue;  // poolings and tables have no activation
      ops.push_back(describe(family, activation, suffix, false));
      if (family.residual) ops.push_back(describe(family, activation, suffix, true));
    }
  }
  return ops;
}

}  // namespace
}  // namespace sparsepipe

extern "C" __attribute__((visibility("default"))) sparsepipe::abi::Status* RegisterCustomOps(
    sparsepipe::abi::SessionOptions* options, const sparsepipe::abi::ApiBase* base) {
  using namespace sparsepipe;
  abi::Api* table = base->get_api(abi::kApiVersion);
  if (table == nullptr) {
    // An older table still starts with CreateStatus.
    abi::Api* oldest = base->get_api(1);
    if (oldest == nullptr) return nullptr;
    const auto create_status = reinterpret_cast<abi::Status* (*)(int, const char*)>(oldest[0]);
    const std::string message = std::string("sparsepipe's kernels need onnxruntime ") + abi::kOldestRuntime +
                                " or newer; this is onnxruntime " + base->version_string();
    return create_status(abi::kFail, message.c_str());
  }
  const abi::Functions ort(table);
  // The domain outlives the sessions that use it, so it is made once and never released.
  static std::mutex mutex;
  static abi::Domain* domain = nullptr;
  return guarded(ort, "sparsepipe", [&] {
    const std::lock_guard<std::mutex> lock(mutex);
    if (domain == nullptr) {
      // Below this version onnxruntime refuses the newer struct; it does not read the fields at its end either.
      const bool inplace = base->get_api(abi::kInplaceVersion) != nullptr;
      static auto& ops = *new std::vector<Op>(all_operators());
      for (Op& op : ops) op.version = inplace ? abi::kInplaceVersion : abi::kApiVersion;
      abi::Domain* made = nullptr;
      check(ort, ort.create_domain("sparsepipe", &made));
      for (const Op& op : ops) check(ort, ort.domain_add(made, &op));
      domain = made;
    }
    check(ort, ort.add_domain(options, domain));
  });
}
