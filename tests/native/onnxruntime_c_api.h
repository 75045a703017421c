// The part of onnxruntime's C interface that examples/deploy/deploy.cc uses, each function at its place in the table.
// The test compiles the example with this where onnxruntime's own header of the same name is not installed: no wheel
// and no Debian release that this project is tested on has it.
#pragma once
#include <cstddef>
#include <cstdint>

#define ORT_API_CALL
#define NO_EXCEPTION noexcept

struct OrtStatus;
struct OrtEnv;
struct OrtSession;
struct OrtSessionOptions;
struct OrtRunOptions;
struct OrtMemoryInfo;
struct OrtAllocator;
struct OrtValue;
struct OrtTypeInfo;
struct OrtTensorTypeAndShapeInfo;

enum OrtLoggingLevel { ORT_LOGGING_LEVEL_WARNING = 2 };
enum ONNXTensorElementDataType { ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT = 1 };
enum OrtAllocatorType { OrtArenaAllocator = 1 };
enum OrtMemType { OrtMemTypeDefault = 0 };

// Slots first..last of the table, which the example does not use.
#define SLOTS(first, last) void* slots_##first##_to_##last[(last) - (first) + 1]

struct OrtApi {
  SLOTS(0, 1);
  const char* (*GetErrorMessage)(const OrtStatus*) noexcept;
  OrtStatus* (*CreateEnv)(OrtLoggingLevel, const char* name, OrtEnv**) noexcept;
  SLOTS(4, 6);
  OrtStatus* (*CreateSession)(const OrtEnv*, const char* path, const OrtSessionOptions*, OrtSession**) noexcept;
  SLOTS(8, 8);
  OrtStatus* (*Run)(OrtSession*, const OrtRunOptions*, const char* const* input_names, const OrtValue* const* inputs,
                    std::size_t input_count, const char* const* output_names, std::size_t output_count,
                    OrtValue** outputs) noexcept;
  OrtStatus* (*CreateSessionOptions)(OrtSessionOptions**) noexcept;
  SLOTS(11, 23);
  OrtStatus* (*SetIntraOpNumThreads)(OrtSessionOptions*, int) noexcept;
  SLOTS(25, 29);
  OrtStatus* (*SessionGetInputCount)(const OrtSession*, std::size_t*) noexcept;
  OrtStatus* (*SessionGetOutputCount)(const OrtSession*, std::size_t*) noexcept;
  SLOTS(32, 32);
  OrtStatus* (*SessionGetInputTypeInfo)(const OrtSession*, std::size_t, OrtTypeInfo**) noexcept;
  SLOTS(34, 35);
  OrtStatus* (*SessionGetInputName)(const OrtSession*, std::size_t, OrtAllocator*, char**) noexcept;
  OrtStatus* (*SessionGetOutputName)(const OrtSession*, std::size_t, OrtAllocator*, char**) noexcept;
  SLOTS(38, 48);
  OrtStatus* (*CreateTensorWithDataAsOrtValue)(const OrtMemoryInfo*, void* data, std::size_t bytes,
                                               const std::int64_t* shape, std::size_t rank, ONNXTensorElementDataType,
                                               OrtValue**) noexcept;
  SLOTS(50, 50);
  OrtStatus* (*GetTensorMutableData)(OrtValue*, void**) noexcept;
  SLOTS(52, 54);
  OrtStatus* (*CastTypeInfoToTensorInfo)(const OrtTypeInfo*, const OrtTensorTypeAndShapeInfo**) noexcept;
  SLOTS(56, 59);
  OrtStatus* (*GetTensorElementType)(const OrtTensorTypeAndShapeInfo*, ONNXTensorElementDataType*) noexcept;
  OrtStatus* (*GetDimensionsCount)(const OrtTensorTypeAndShapeInfo*, std::size_t*) noexcept;
  OrtStatus* (*GetDimensions)(const OrtTensorTypeAndShapeInfo*, std::int64_t*, std::size_t) noexcept;
  SLOTS(63, 64);
  OrtStatus* (*GetTensorTypeAndShape)(const OrtValue*, OrtTensorTypeAndShapeInfo**) noexcept;
  SLOTS(66, 68);
  OrtStatus* (*CreateCpuMemoryInfo)(OrtAllocatorType, OrtMemType, OrtMemoryInfo**) noexcept;
  SLOTS(70, 75);
  OrtStatus* (*AllocatorFree)(OrtAllocator*, void*) noexcept;
  SLOTS(77, 77);
  OrtStatus* (*GetAllocatorWithDefaultOptions)(OrtAllocator**) noexcept;
  SLOTS(79, 91);
  void (*ReleaseEnv)(OrtEnv*) noexcept;
  void (*ReleaseStatus)(OrtStatus*) noexcept;
  void (*ReleaseMemoryInfo)(OrtMemoryInfo*) noexcept;
  void (*ReleaseSession)(OrtSession*) noexcept;
  void (*ReleaseValue)(OrtValue*) noexcept;
  SLOTS(97, 97);
  void (*ReleaseTypeInfo)(OrtTypeInfo*) noexcept;
  void (*ReleaseTensorTypeAndShapeInfo)(OrtTensorTypeAndShapeInfo*) noexcept;
  void (*ReleaseSessionOptions)(OrtSessionOptions*) noexcept;
  SLOTS(101, 227);
  OrtStatus* (*RegisterCustomOpsLibrary_V2)(OrtSessionOptions*, const char* path) noexcept;
};

struct OrtApiBase {
  const OrtApi* (*GetApi)(std::uint32_t version) noexcept;
  const char* (*GetVersionString)() noexcept;
};

extern "C" const OrtApiBase* OrtGetApiBase() noexcept;
