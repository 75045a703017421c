// The operators that the library registers.
#pragma once

#include <memory>
#include <string>

#include "ops/support.h"
#include "ops/window.h"

namespace sparsepipe {

// A node's kernel. Immutable but for caches with locks of their own: onnxruntime calls it from many threads.
class Kernel {
 public:
  virtual ~Kernel() = default;
  virtual void compute(const Call& call) = 0;

  abi::Functions ort;
  std::string where;  // operator and node name, in front of every error

  explicit Kernel(const abi::Functions& functions) : ort(functions) {}
};

std::unique_ptr<Kernel> make_sparse_conv(const abi::Functions& ort, const Node& node, const kernels::Isa& isa);
// A dense convolution, float32 W [out, in, *kernel] of the window, by the kernels of SparseConv.
std::unique_ptr<Kernel> make_full_conv(const abi::Functions& ort, const Node& node, const kernels::Isa& isa,
                                       const Window& window, const Tensor& weight);
std::unique_ptr<Kernel> make_sparse_separable_conv(const abi::Functions& ort, const Node& node, const kernels::Isa& isa);
std::unique_ptr<Kernel> make_depthwise_conv(const abi::Functions& ort, const Node& node, const kernels::Isa& isa);
std::unique_ptr<Kernel> make_stem_conv(const abi::Functions& ort, const Node& node, const kernels::Isa& isa);
std::unique_ptr<Kernel> make_pooled_stem_conv(const abi::Functions& ort, const Node& node, const kernels::Isa& isa);
std::unique_ptr<Kernel> make_sparse_linear(const abi::Functions& ort, const Node& node, const kernels::Isa& isa);
// For int8.
std::unique_ptr<Kernel> make_sparse_qconv(const abi::Functions& ort, const Node& node, const kernels::Isa& isa);
std::unique_ptr<Kernel> make_qlookup(const abi::Functions& ort, const Node& node, const kernels::Isa& isa);
std::unique_ptr<Kernel> make_qmax_pool(const abi::Functions& ort, const Node& node, const kernels::Isa& isa);
std::unique_ptr<Kernel> make_qdepthwise_conv(const abi::Functions& ort, const Node& node, const kernels::Isa& isa);
std::unique_ptr<Kernel> make_sparse_qlinear(const abi::Functions& ort, const Node& node, const kernels::Isa& isa);

}  // namespace sparsepipe
