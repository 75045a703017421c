// Safe access to what onnxruntime hands a kernel: attributes, constant tensors, inputs, outputs, threads.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <exception>
#include <functional>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "abi/onnxruntime_abi.h"
#include "kernels/kernel.h"

namespace sparsepipe {

// What is wrong with a model or an input. Never leaves the library: guarded() turns it into a Status.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Runs `body` and turns every exception into a Status, with `where` in front of its text.
template <typename F>
abi::Status* guarded(const abi::Functions& ort, const std::string& where, F&& body) noexcept {
  try {
    try {
      body();
      return nullptr;
    } catch (const Error& e) {
      return ort.create_status(abi::kInvalidArgument, (where + ": " + e.what()).c_str());
    } catch (const std::bad_alloc&) {
      return ort.create_status(abi::kFail, (where + ": out of memory").c_str());
    } catch (const std::exception& e) {
      return ort.create_status(abi::kFail, (where + ": " + e.what()).c_str());
    }
  } catch (...) {
    return ort.create_status(abi::kFail, "sparsepipe: out of memory");
  }
}

// Throws Error with the Status's message, and releases it.
void check(const abi::Functions& ort, abi::Status* status);

struct Tensor {
  int type = abi::kUndefined;
  std::vector<std::int64_t> dims;
  const void* data = nullptr;

  // Product of the dimensions; Error where one is negative or the product overflows.
  std::int64_t size() const;
};

// Product of non-negative numbers; Error where it exceeds 2^62.
std::int64_t product(const std::vector<std::int64_t>& dims);
std::string shape_text(const std::vector<std::int64_t>& dims);

// The view of a node at kernel creation.
class Node {
 public:
  Node(const abi::Functions& ort, const abi::KernelInfo* info) : ort_(ort), info_(info) {}

  std::string name() const;
  std::int64_t integer(const char* name, std::optional<std::int64_t> otherwise, std::int64_t low,
                       std::int64_t high) const;
  float real(const char* name, float otherwise) const;
  std::string text(const char* name, const char* otherwise) const;
  // A list of `size` integers within [low, high]; `otherwise` repeated where the attribute is absent.
  std::vector<std::int64_t> integers(const char* name, std::optional<std::size_t> size,
                                     std::optional<std::int64_t> otherwise, std::int64_t low,
                                     std::int64_t high) const;
  bool has_input(std::size_t index) const;
  // A constant input; nothing where the optional input is absent. Error where it is not constant.
  std::optional<Tensor> constant(std::size_t index, const char* name) const;

 private:
  // False where the attribute is absent; Error where it has another type.
  bool present(const char* name, abi::Status* status) const;

  const abi::Functions& ort_;
  const abi::KernelInfo* info_;
};

Tensor tensor_of(const abi::Functions& ort, const abi::Value* value);

// Activation and its limits, as attributes `activation`, `min`, `max` name them, with `prefix` before each.
kernels::Epilogue read_epilogue(const Node& node, const std::vector<std::string>& allowed,
                                const std::string& prefix = "");

// The view of one call.
class Call {
 public:
  Call(const abi::Functions& ort, abi::KernelContext* context) : ort_(ort), context_(context) {}

  std::optional<Tensor> input(std::size_t index) const;  // nothing where it is absent
  float* output(const std::vector<std::int64_t>& dims) const { return static_cast<float*>(output_data(dims)); }
  void* output_data(const std::vector<std::int64_t>& dims) const;
  // task(i) for every i < count, on the threads of the session. An exception of a task is thrown here.
  void parallel(std::size_t count, const std::function<void(std::size_t)>& task) const;

 private:
  const abi::Functions& ort_;
  abi::KernelContext* context_;
};

// Memory aligned to cache lines, zero when allocated, that only ever grows.
class Buffer {
 public:
  // At least `floats` floats; keeps nothing of the content where it has to grow.
  float* at_least(std::size_t floats);
  std::uint8_t* bytes(std::int64_t count) {
    return reinterpret_cast<std::uint8_t*>(at_least(static_cast<std::size_t>(count) / sizeof(float) + 1));
  }

 private:
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  std::unique_ptr<float, Free> data_;
  std::size_t size_ = 0;
};

}  // namespace sparsepipe
