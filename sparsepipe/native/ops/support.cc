#include "ops/support.h"

#include <atomic>
#include <cmath>
#include <cstring>
#include <mutex>

namespace sparsepipe {

void check(const abi::Functions& ort, abi::Status* status) {
  if (status == nullptr) return;
  std::string message = ort.error_message(status);
  ort.release_status(status);
  throw Error(message);
}

std::int64_t product(const std::vector<std::int64_t>& dims) {
  std::int64_t size = 1;
  bool zero = false;
  for (std::int64_t d : dims) {
    if (d < 0) throw Error("the shape " + shape_text(dims) + " has a negative dimension");
    zero = zero || d == 0;
    if (!zero && size > (std::int64_t{1} << 62) / d) throw Error("the shape " + shape_text(dims) + " is too large");
    if (!zero) size *= d;
  }
  return zero ? 0 : size;
}

std::string shape_text(const std::vector<std::int64_t>& dims) {
  std::string text = "[";
  for (std::size_t i = 0; i < dims.size(); ++i) text += (i ? ", " : "") + std::to_string(dims[i]);
  return text + "]";
}

std::int64_t Tensor::size() const { return product(dims); }

Tensor tensor_of(const abi::Functions& ort, const abi::Value* value) {
  abi::TensorInfo* info = nullptr;
  check(ort, ort.tensor_info(value, &info));
  const auto release = [&](abi::TensorInfo* p) { ort.release_tensor_info(p); };
  const std::unique_ptr<abi::TensorInfo, decltype(release)> owner(info, release);
  Tensor tensor;
  std::size_t rank = 0;
  check(ort, ort.element_type(info, &tensor.type));
  check(ort, ort.rank(info, &rank));
  tensor.dims.resize(rank);
  check(ort, ort.dims(info, tensor.dims.data(), rank));
  void* data = nullptr;
  check(ort, ort.tensor_data(const_cast<abi::Value*>(value), &data));
  tensor.data = data;
  if (data == nullptr && tensor.size() > 0) throw Error("a tensor has no data");
  return tensor;
}

std::string Node::name() const {
  std::size_t size = 0;
  check(ort_, ort_.node_name(info_, nullptr, &size));
  std::string text(size, '\0');
  check(ort_, ort_.node_name(info_, text.data(), &size));
  while (!text.empty() && text.back() == '\0') text.pop_back();
  return text;
}

bool Node::present(const char* name, abi::Status* status) const {
  if (status == nullptr) return true;
  const std::string message = ort_.error_message(status);
  ort_.release_status(status);
  if (message.find("No attribute") != std::string::npos) return false;
  throw Error("attribute '" + std::string(name) + "': " + message);
}

namespace {
std::string within(const char* name, std::int64_t low, std::int64_t high, std::int64_t value) {
  return "attribute '" + std::string(name) + "' must be within " + std::to_string(low) + " and " +
         std::to_string(high) + ", not " + std::to_string(value);
}
}  // namespace

std::int64_t Node::integer(const char* name, std::optional<std::int64_t> otherwise, std::int64_t low,
                           std::int64_t high) const {
  std::int64_t value = 0;
  if (!present(name, ort_.attribute_int(info_, name, &value))) {
    if (!otherwise) throw Error("attribute '" + std::string(name) + "' is missing");
    return *otherwise;
  }
  if (value < low || value > high) throw Error(within(name, low, high, value));
  return value;
}

float Node::real(const char* name, float otherwise) const {
  float value = 0;
  return present(name, ort_.attribute_float(info_, name, &value)) ? value : otherwise;
}

std::string Node::text(const char* name, const char* otherwise) const {
  std::size_t size = 0;
  if (!present(name, ort_.attribute_string(info_, name, nullptr, &size))) return otherwise;
  std::string value(size, '\0');
  check(ort_, ort_.attribute_string(info_, name, value.data(), &size));
  while (!value.empty() && value.back() == '\0') value.pop_back();
  return value;
}

std::vector<std::int64_t> Node::integers(const char* name, std::optional<std::size_t> wanted,
                                         std::optional<std::int64_t> otherwise, std::int64_t low,
                                         std::int64_t high) const {
  std::size_t size = 0;
  if (!present(name, ort_.attribute_ints(info_, name, nullptr, &size))) {
    if (!otherwise) throw Error("attribute '" + std::string(name) + "' is missing");
    return std::vector<std::int64_t>(wanted.value_or(0), *otherwise);
  }
  if (size > 64) throw Error("attribute '" + std::string(name) + "' has " + std::to_string(size) + " numbers");
  std::vector<std::int64_t> values(size);
  if (size > 0) check(ort_, ort_.attribute_ints(info_, name, values.data(), &size));
  if (wanted && values.size() != *wanted) {
    throw Error("attribute '" + std::string(name) + "' must have " + std::to_string(*wanted) + " numbers, not " +
                std::to_string(values.size()));
  }
  for (std::int64_t value : values) {
    if (value < low || value > high) throw Error(within(name, low, high, value));
  }
  return values;
}

bool Node::has_input(std::size_t index) const {
  std::size_t count = 0;
  check(ort_, ort_.info_input_count(info_, &count));
  if (index >= count) return false;
  std::size_t size = 0;
  check(ort_, ort_.info_input_name(info_, index, nullptr, &size));
  return size > 1;  // the empty name: an optional input left out
}

std::optional<Tensor> Node::constant(std::size_t index, const char* name) const {
  if (!has_input(index)) return std::nullopt;
  int constant = 0;
  const abi::Value* value = nullptr;
  abi::Status* status = ort_.constant_input(info_, index, &constant, &value);
  if (status != nullptr) ort_.release_status(status);
  if (status != nullptr || !constant || value == nullptr) {
    throw Error("input '" + std::string(name) + "' must be a constant (an initializer that no graph input overrides)");
  }
  return tensor_of(ort_, value);
}

kernels::Epilogue read_epilogue(const Node& node, const std::vector<std::string>& allowed, const std::string& prefix) {
  using kernels::Activation;
  const std::pair<const char*, Activation> names[] = {
      {"none", Activation::kNone},           {"relu", Activation::kRelu}, {"clip", Activation::kClip},
      {"hardswish", Activation::kHardSwish}, {"silu", Activation::kSilu}, {"gelu", Activation::kGelu}};
  const std::string attribute = prefix + "activation", low = prefix + "min", high = prefix + "max";
  const std::string wanted = node.text(attribute.c_str(), "none");
  std::string list;
  for (const std::string& name : allowed) {
    list += (list.empty() ? "" : ", ") + name;
    if (name != wanted) continue;
    kernels::Epilogue epilogue{nullptr, Activation::kNone, 0.0f, 0.0f};
    for (const auto& [text, activation] : names) {
      if (wanted == text) epilogue.activation = activation;
    }
    if (epilogue.activation == Activation::kClip) {
      epilogue.low = node.real(low.c_str(), -INFINITY);
      epilogue.high = node.real(high.c_str(), INFINITY);
      if (!(epilogue.low <= epilogue.high)) {
        throw Error("attribute '" + low + "' must not be above '" + high + "'");
      }
    }
    return epilogue;
  }
  throw Error("attribute '" + attribute + "' is '" + wanted.substr(0, 40) + "'; known are " + list);
}

std::optional<Tensor> Call::input(std::size_t index) const {
  std::size_t count = 0;
  check(ort_, ort_.input_count(context_, &count));
  if (index >= count) return std::nullopt;
  const abi::Value* value = nullptr;
  check(ort_, ort_.input(context_, index, &value));
  if (value == nullptr) return std::nullopt;
  return tensor_of(ort_, value);
}

void* Call::output_data(const std::vector<std::int64_t>& dims) const {
  abi::Value* value = nullptr;
  check(ort_, ort_.output(context_, 0, dims.data(), dims.size(), &value));
  if (value == nullptr) throw Error("onnxruntime gave no output");
  void* data = nullptr;
  check(ort_, ort_.tensor_data(value, &data));
  return data;
}

void Call::parallel(std::size_t count, const std::function<void(std::size_t)>& task) const {
  if (count == 0) return;
  if (count == 1) return task(0);
  struct Shared {
    const std::function<void(std::size_t)>& task;
    std::atomic<bool> failed{false};
    std::mutex mutex;
    std::exception_ptr error;
  } shared{task, {}, {}, {}};
  const auto run = [](void* data, std::size_t i) {
    auto& s = *static_cast<Shared*>(data);
    if (s.failed.load(std::memory_order_relaxed)) return;
    try {
      s.task(i);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(s.mutex);
      s.error = std::current_exception();
      s.failed = true;
    }
  };
  check(ort_, ort_.parallel_for(context_, run, count, 0, &shared));
  if (shared.error) std::rethrow_exception(shared.error);
}

float* Buffer::at_least(std::size_t floats) {
#ifdef __SANITIZE_ADDRESS__
  size_ = 0;  // memory of its own and of just the size asked for, each time: any access beyond it is seen
  constexpr std::size_t kRound = 1;
#else
  constexpr std::size_t kRound = 4096;
#endif
  if (floats <= size_) return data_.get();
  if (floats > (std::size_t{1} << 40)) throw std::bad_alloc();
  const std::size_t bytes = (floats * sizeof(float) + kRound - 1) / kRound * kRound;
  data_.reset();
  size_ = 0;
  void* memory = nullptr;
  if (posix_memalign(&memory, 4096, bytes) != 0) throw std::bad_alloc();
  std::memset(memory, 0, bytes);
  data_.reset(static_cast<float*>(memory));
  size_ = bytes / sizeof(float);
  return data_.get();
}

}  // namespace sparsepipe
