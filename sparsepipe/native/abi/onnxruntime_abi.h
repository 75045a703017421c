// The part of onnxruntime's C interface that a custom operator needs, and no more.
//
// The interface is append-only: OrtApi is a table of function pointers whose slots never move, and
// OrtCustomOp is a struct that only grows at its end. The comment of each slot names the API version
// (onnxruntime 1.N has API N) in which it appeared; kApiVersion is the newest of them.
#pragma once

#include <cstddef>
#include <cstdint>

namespace sparsepipe::abi {

constexpr std::uint32_t kApiVersion = 17;
constexpr const char* kOldestRuntime = "1.17";
constexpr std::uint32_t kInplaceVersion = 18;  // of an operator whose output may take the memory of an input

// Opaque handles.
struct Status;
struct SessionOptions;
struct Domain;
struct Value;
struct TensorInfo;
struct KernelInfo;
struct KernelContext;
using Api = void* const;  // element of the table

struct ApiBase {
  Api* (*get_api)(std::uint32_t version);
  const char* (*version_string)();
};

enum ErrorCode : int { kOk = 0, kFail = 1, kInvalidArgument = 2, kNotImplemented = 9 };
enum ElementType : int { kUndefined = 0, kFloat = 1, kUint8 = 2, kInt8 = 3, kUint16 = 4, kInt32 = 6 };
enum Characteristic : int { kRequired = 0, kOptional = 1 };

struct CustomOp {
  std::uint32_t version;
  void* (*create_kernel)(const CustomOp*, Api*, const KernelInfo*);
  const char* (*name)(const CustomOp*);
  const char* (*execution_provider)(const CustomOp*);
  int (*input_type)(const CustomOp*, std::size_t);
  std::size_t (*input_count)(const CustomOp*);
  int (*output_type)(const CustomOp*, std::size_t);
  std::size_t (*output_count)(const CustomOp*);
  void (*compute)(void* kernel, KernelContext*);
  void (*destroy)(void* kernel);
  int (*input_characteristic)(const CustomOp*, std::size_t);
  int (*output_characteristic)(const CustomOp*, std::size_t);
  int (*input_memory_type)(const CustomOp*, std::size_t);             // API 13
  int (*variadic_input_min_arity)(const CustomOp*);                   // API 14
  int (*variadic_input_homogeneity)(const CustomOp*);                 // API 14
  int (*variadic_output_min_arity)(const CustomOp*);                  // API 14
  int (*variadic_output_homogeneity)(const CustomOp*);                // API 14
  Status* (*create_kernel_v2)(const CustomOp*, Api*, const KernelInfo*, void** kernel);  // API 16
  Status* (*compute_v2)(void* kernel, KernelContext*);                // API 16
  Status* (*infer_output_shape)(const CustomOp*, void* context);      // API 17
  int (*start_version)(const CustomOp*);                              // API 17
  int (*end_version)(const CustomOp*);                                // API 17
  std::size_t (*may_inplace)(int** inputs, int** outputs);            // API 18
  void (*release_may_inplace)(int* inputs, int* outputs);             // API 18
  std::size_t (*alias)(int** inputs, int** outputs);                  // API 18
  void (*release_alias)(int* inputs, int* outputs);                   // API 18
};
#if UINTPTR_MAX == 0xffffffffffffffffu
static_assert(offsetof(CustomOp, create_kernel_v2) == 136 && offsetof(CustomOp, end_version) == 168 &&
                  offsetof(CustomOp, may_inplace) == 176,
              "OrtCustomOp must match onnxruntime's layout");
#endif

// Slots of OrtApi, as typed functions. A Status* of nullptr means success.
struct Functions {
  Status* (*create_status)(int, const char*);                                                   // slot 0, API 1
  const char* (*error_message)(const Status*);                                                  // slot 2, API 1
  Status* (*create_domain)(const char*, Domain**);                                              // slot 26, API 1
  Status* (*domain_add)(Domain*, const CustomOp*);                                              // slot 27, API 1
  Status* (*add_domain)(SessionOptions*, Domain*);                                              // slot 28, API 1
  Status* (*tensor_data)(Value*, void**);                                                       // slot 51, API 1
  Status* (*element_type)(const TensorInfo*, int*);                                             // slot 60, API 1
  Status* (*rank)(const TensorInfo*, std::size_t*);                                             // slot 61, API 1
  Status* (*dims)(const TensorInfo*, std::int64_t*, std::size_t);                               // slot 62, API 1
  Status* (*tensor_info)(const Value*, TensorInfo**);                                           // slot 65, API 1
  Status* (*attribute_float)(const KernelInfo*, const char*, float*);                           // slot 85, API 1
  Status* (*attribute_int)(const KernelInfo*, const char*, std::int64_t*);                      // slot 86, API 1
  Status* (*attribute_string)(const KernelInfo*, const char*, char*, std::size_t*);             // slot 87, API 1
  Status* (*input_count)(const KernelContext*, std::size_t*);                                   // slot 88, API 1
  Status* (*input)(const KernelContext*, std::size_t, const Value**);                           // slot 90, API 1
  Status* (*output)(KernelContext*, std::size_t, const std::int64_t*, std::size_t, Value**);    // slot 91, API 1
  void (*release_status)(Status*);                                                              // slot 93, API 1
  void (*release_tensor_info)(TensorInfo*);                                                     // slot 99, API 1
  Status* (*attribute_ints)(const KernelInfo*, const char*, std::int64_t*, std::size_t*);       // slot 163, API 10
  Status* (*info_input_count)(const KernelInfo*, std::size_t*);                                 // slot 230, API 14
  Status* (*info_input_name)(const KernelInfo*, std::size_t, char*, std::size_t*);             // slot 232, API 14
  Status* (*node_name)(const KernelInfo*, char*, std::size_t*);                                 // slot 244, API 15
  Status* (*constant_input)(const KernelInfo*, std::size_t, int*, const Value**);               // slot 249, API 15
  Status* (*parallel_for)(const KernelContext*, void (*)(void*, std::size_t), std::size_t, std::size_t,
                          void*);                                                               // slot 274, API 17

  explicit Functions(Api* api) {
    load(api, 0, create_status);
    load(api, 2, error_message);
    load(api, 26, create_domain);
    load(api, 27, domain_add);
    load(api, 28, add_domain);
    load(api, 51, tensor_data);
    load(api, 60, element_type);
    load(api, 61, rank);
    load(api, 62, dims);
    load(api, 65, tensor_info);
    load(api, 85, attribute_float);
    load(api, 86, attribute_int);
    load(api, 87, attribute_string);
    load(api, 88, input_count);
    load(api, 90, input);
    load(api, 91, output);
    load(api, 93, release_status);
    load(api, 99, release_tensor_info);
    load(api, 163, attribute_ints);
    load(api, 230, info_input_count);
    load(api, 232, info_input_name);
    load(api, 244, node_name);
    load(api, 249, constant_input);
    load(api, 274, parallel_for);
  }

 private:
  template <typename F>
  static void load(Api* api, std::size_t slot, F& function) {
    function = reinterpret_cast<F>(api[slot]);
  }
};

}  // namespace sparsepipe::abi
