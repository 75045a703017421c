// What the library asks of onnxruntime, for one node at a time: enough to run its operators where onnxruntime does not
// run. Every tensor is an allocation of exactly its size, so a sanitizer sees any access beyond one.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <variant>
#include <vector>

#include "abi/onnxruntime_abi.h"

namespace sparsepipe::abi {

struct Status {
  std::string message;
};
struct Domain {
  std::vector<const CustomOp*> operators;
};
struct SessionOptions {
  Domain* domain;
};
struct Value {
  int type = kUndefined;
  std::vector<std::int64_t> dims;
  std::shared_ptr<char> data;

  std::size_t size() const {
    std::size_t count = 1;
    for (std::int64_t d : dims) count *= static_cast<std::size_t>(d);
    return count;
  }
  float* floats() const { return reinterpret_cast<float*>(data.get()); }

  template <typename T>
  static Value of(int type, std::vector<std::int64_t> dims, const T* content = nullptr) {
    Value v{type, std::move(dims), nullptr};
    const std::size_t bytes = v.size() * sizeof(T);
    v.data.reset(static_cast<char*>(std::malloc(bytes > 0 ? bytes : 1)), std::free);
    if (content && bytes > 0) std::memcpy(v.data.get(), content, bytes);
    return v;
  }
};
struct TensorInfo : Value {};

using Attribute = std::variant<std::int64_t, float, std::string, std::vector<std::int64_t>>;

struct KernelInfo {
  std::string op, name;
  std::map<std::string, Attribute> attributes;
  std::vector<const Value*> inputs;  // nullptr: left out
  std::vector<bool> constant;
};
struct KernelContext {
  const KernelInfo* info;
  unsigned threads;
  bool inplace;  // the output takes the memory of the last input
  Value output;
  bool in_turn = false;           // tasks are dealt to the threads, so that each works
  mutable std::size_t tasks = 0;  // of the last loop over tasks, 0 where there was none
};

namespace fake {

inline Status* failed(const std::string& message) { return new Status{message}; }

template <typename T>
const T* attribute(const KernelInfo* info, const char* name, Status** status) {
  const auto found = info->attributes.find(name);
  if (found == info->attributes.end()) {
    *status = failed(std::string("No attribute with name:'") + name + "' is defined.");
    return nullptr;
  }
  const T* value = std::get_if<T>(&found->second);
  *status = value ? nullptr : failed("Attribute has another type");
  return value;
}

template <typename T>
Status* single(const KernelInfo* info, const char* name, T* out) {
  Status* status;
  if (const T* value = attribute<T>(info, name, &status)) *out = *value;
  return status;
}

inline Status* text(const std::string& value, char* out, std::size_t* size) {
  const bool fits = out == nullptr || *size >= value.size() + 1;
  if (out && fits) std::memcpy(out, value.c_str(), value.size() + 1);
  *size = value.size() + 1;
  return fits ? nullptr : failed("the buffer is too small");
}

inline Status* attribute_string(const KernelInfo* info, const char* name, char* out, std::size_t* size) {
  Status* status;
  const std::string* value = attribute<std::string>(info, name, &status);
  return value ? text(*value, out, size) : status;
}

inline Status* attribute_ints(const KernelInfo* info, const char* name, std::int64_t* out, std::size_t* size) {
  Status* status;
  const auto* value = attribute<std::vector<std::int64_t>>(info, name, &status);
  if (!value) return status;
  if (out && *size < value->size()) return failed("the buffer is too small");
  if (out) std::memcpy(out, value->data(), value->size() * sizeof(std::int64_t));
  *size = value->size();
  return nullptr;
}

inline Status* constant_input(const KernelInfo* info, std::size_t i, int* is, const Value** value) {
  *is = info->constant[i];
  *value = info->constant[i] ? info->inputs[i] : nullptr;
  return nullptr;
}

inline Status* output(KernelContext* c, std::size_t, const std::int64_t* dims, std::size_t rank, Value** value) {
  if (c->inplace) {
    c->output = *c->info->inputs.back();
    if (c->output.dims != std::vector<std::int64_t>(dims, dims + rank)) return failed("the output has another shape");
  } else {
    c->output = Value::of<float>(kFloat, {dims, dims + rank});
  }
  *value = &c->output;
  return nullptr;
}

inline Status* parallel_for(const KernelContext* c, void (*task)(void*, std::size_t), std::size_t total, std::size_t,
                            void* data) {
  std::atomic<std::size_t> next{0};
  c->tasks = total;
  const auto work = [&](std::size_t thread) {
    // From the end: the caller, whose memory is not new, has the part that begins inside of a tile.
    for (std::size_t i = thread; c->in_turn && i < total; i += c->threads) task(data, total - 1 - i);
    for (std::size_t i; !c->in_turn && (i = next.fetch_add(1)) < total;) task(data, i);
  };
  std::vector<std::thread> helpers;
  for (unsigned t = 1; t < c->threads; ++t) helpers.emplace_back(work, t);
  work(0);
  for (std::thread& helper : helpers) helper.join();
  return nullptr;
}

template <typename F>
void set(void** table, std::size_t slot, F* function) {
  table[slot] = reinterpret_cast<void*>(function);
}

inline Api* api(std::uint32_t) {
  static void* table[275];
  set(table, 0, +[](int, const char* message) { return failed(message); });
  set(table, 2, +[](const Status* s) { return s->message.c_str(); });
  set(table, 26, +[](const char*, Domain** out) -> Status* { return *out = new Domain, nullptr; });
  set(table, 27, +[](Domain* d, const CustomOp* op) -> Status* { return d->operators.push_back(op), nullptr; });
  set(table, 28, +[](SessionOptions* o, Domain* d) -> Status* { return o->domain = d, nullptr; });
  set(table, 51, +[](Value* v, void** out) -> Status* { return *out = v->data.get(), nullptr; });
  set(table, 60, +[](const TensorInfo* v, int* out) -> Status* { return *out = v->type, nullptr; });
  set(table, 61, +[](const TensorInfo* v, std::size_t* out) -> Status* { return *out = v->dims.size(), nullptr; });
  set(table, 62, +[](const TensorInfo* v, std::int64_t* out, std::size_t rank) -> Status* {
    std::memcpy(out, v->dims.data(), rank * sizeof(std::int64_t));
    return nullptr;
  });
  set(table, 65, +[](const Value* v, TensorInfo** out) -> Status* { return *out = new TensorInfo{*v}, nullptr; });
  set(table, 85, single<float>);
  set(table, 86, single<std::int64_t>);
  set(table, 87, attribute_string);
  set(table, 88, +[](const KernelContext* c, std::size_t* n) -> Status* {
    return *n = c->info->inputs.size(), nullptr;
  });
  set(table, 90, +[](const KernelContext* c, std::size_t i, const Value** v) -> Status* {
    return *v = c->info->inputs[i], nullptr;
  });
  set(table, 91, output);
  set(table, 93, +[](Status* s) { delete s; });
  set(table, 99, +[](TensorInfo* info) { delete info; });
  set(table, 163, attribute_ints);
  set(table, 230, +[](const KernelInfo* i, std::size_t* n) -> Status* { return *n = i->inputs.size(), nullptr; });
  set(table, 232, +[](const KernelInfo* info, std::size_t i, char* out, std::size_t* size) {
    return text(info->inputs[i] ? "input" : "", out, size);
  });
  set(table, 244, +[](const KernelInfo* info, char* out, std::size_t* size) { return text(info->name, out, size); });
  set(table, 249, constant_input);
  set(table, 274, parallel_for);
  return table;
}

}  // namespace fake
}  // namespace sparsepipe::abi
