// The entry point: registers the operators of domain `sparsepipe`, version 1.
#include <cstring>
#include <mutex>

#include "ops/ops.h"

namespace sparsepipe {
namespace {

using Make = std::unique_ptr<Kernel> (*)(const abi::Functions&, const Node&, const kernels::Isa&);

struct Op : abi::CustomOp {
  const char* text;
  std::size_t inputs, required;
  Make make;
};

abi::Status* create(const abi::CustomOp* self, abi::Api* api, const abi::KernelInfo* info, void** out) {
  const auto& op = *static_cast<const Op*>(self);
  const abi::Functions ort(api);
  std::string where = std::string("sparsepipe.") + op.text;
  return guarded(ort, where, [&] {
    const Node node(ort, info);
    where += " node '" + node.name() + "'";
    char error[200] = "";
    const kernels::Isa* const isa = kernels::select(error, sizeof error);
    if (isa == nullptr) throw Error(error[0] ? error : "SPARSEPIPE_ISA names no instruction set of this CPU");
    std::unique_ptr<Kernel> kernel = op.make(ort, node, *isa);
    kernel->where = where;
    *out = kernel.release();
  });
}

abi::Status* compute(void* kernel, abi::KernelContext* context) {
  auto& k = *static_cast<Kernel*>(kernel);
  return guarded(k.ort, k.where, [&] { k.compute(Call(k.ort, context)); });
}

// The output may take the memory of the residual: every number of it is read before it is written, by one thread.
constexpr int kResidual = 4;

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

Op describe(const char* text, std::size_t inputs, std::size_t required, Make make) {
  Op op{};
  op.version = abi::kApiVersion;
  op.name = [](const abi::CustomOp* o) { return static_cast<const Op*>(o)->text; };
  op.execution_provider = [](const abi::CustomOp*) -> const char* { return nullptr; };
  op.input_count = [](const abi::CustomOp* o) { return static_cast<const Op*>(o)->inputs; };
  op.input_type = [](const abi::CustomOp*, std::size_t i) { return static_cast<int>(i == 2 ? abi::kUndefined : abi::kFloat); };
  op.input_characteristic = [](const abi::CustomOp* o, std::size_t i) {
    return static_cast<int>(i < static_cast<const Op*>(o)->required ? abi::kRequired : abi::kOptional);
  };
  op.input_memory_type = [](const abi::CustomOp*, std::size_t) { return 0; };
  op.output_count = [](const abi::CustomOp*) -> std::size_t { return 1; };
  op.output_type = [](const abi::CustomOp*, std::size_t) { return static_cast<int>(abi::kFloat); };
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
  if (inputs > kResidual) {
    op.may_inplace = residual_inplace;
    op.release_may_inplace = release_inplace;
  }
  op.text = text;
  op.inputs = inputs;
  op.required = required;
  op.make = make;
  return op;
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
  // A file has one fallback body per operator name, so each set of fused steps has a name. The kernel is the same: it
  // goes by the attributes and inputs.
  static Op ops[] = {
      describe("SparseConv", 5, 3, make_sparse_conv),
      describe("SparseConvRelu", 5, 3, make_sparse_conv),
      describe("SparseConvClip", 5, 3, make_sparse_conv),
      describe("SparseConvHardSwish", 5, 3, make_sparse_conv),
      describe("SparseConvSilu", 5, 3, make_sparse_conv),
      describe("SparseConvAdd", 5, 3, make_sparse_conv),
      describe("SparseConvAddRelu", 5, 3, make_sparse_conv),
      describe("SparseConvAddClip", 5, 3, make_sparse_conv),
      describe("SparseConvAddHardSwish", 5, 3, make_sparse_conv),
      describe("SparseConvAddSilu", 5, 3, make_sparse_conv),
      describe("SparseLinear", 4, 3, make_sparse_linear),
      describe("SparseLinearRelu", 4, 3, make_sparse_linear),
      describe("SparseLinearClip", 4, 3, make_sparse_linear),
      describe("SparseLinearGelu", 4, 3, make_sparse_linear),
      describe("DepthwiseConv", 3, 2, make_depthwise_conv),
  };
  // The domain outlives the sessions that use it, so it is made once and never released.
  static std::mutex mutex;
  static abi::Domain* domain = nullptr;
  return guarded(ort, "sparsepipe", [&] {
    const std::lock_guard<std::mutex> lock(mutex);
    if (domain == nullptr) {
      // Below this version onnxruntime refuses the newer struct; it does not read the fields at its end either.
      const bool inplace = base->get_api(abi::kInplaceVersion) != nullptr;
      for (Op& op : ops) op.version = inplace ? abi::kInplaceVersion : abi::kApiVersion;
      abi::Domain* made = nullptr;
      check(ort, ort.create_domain("sparsepipe", &made));
      for (const Op& op : ops) check(ort, ort.domain_add(made, &op));
      domain = made;
    }
    check(ort, ort.add_domain(options, domain));
  });
}
