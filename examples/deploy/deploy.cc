// Run an exported file in onnxruntime with the kernel library, from C++.
//
//     deploy model.universal.onnx libsparsepipe_ops.so
//
// The inputs are made up. Prints the name, shape and Adler-32 checksum of each output, as deploy.py does. Needs
// onnxruntime 1.17 or newer; Linux and macOS (on Windows paths are wide strings). With the header of the C++ API,
// onnxruntime_cxx_api.h, the registration is `options.RegisterCustomOpsLibrary(path)`.
#include <onnxruntime_c_api.h>

#include <cstdint>
#include <cstdio>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

const OrtApi* ort = nullptr;

void check(OrtStatus* status) {
  if (status == nullptr) return;
  const std::string message = ort->GetErrorMessage(status);
  ort->ReleaseStatus(status);
  throw std::runtime_error(message);
}

// What `make` writes through its last argument, released with `release`.
template <class T, class Release, class Make>
std::unique_ptr<T, Release> own(Release release, Make make) {
  T* made = nullptr;
  check(make(&made));
  return {made, release};
}

std::string name_of(OrtStatus* (ORT_API_CALL* get)(const OrtSession*, size_t, OrtAllocator*, char**) NO_EXCEPTION,
                    const OrtSession* session, std::size_t index) {
  OrtAllocator* allocator = nullptr;
  check(ort->GetAllocatorWithDefaultOptions(&allocator));
  char* text = nullptr;
  check(get(session, index, allocator, &text));
  const std::string name = text;
  check(ort->AllocatorFree(allocator, text));
  return name;
}

std::vector<std::int64_t> shape_of(const OrtTensorTypeAndShapeInfo* info) {
  ONNXTensorElementDataType type{};
  check(ort->GetTensorElementType(info, &type));
  if (type != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) throw std::runtime_error("an input or output is not float32");
  std::size_t rank = 0;
  check(ort->GetDimensionsCount(info, &rank));
  std::vector<std::int64_t> shape(rank);
  check(ort->GetDimensions(info, shape.data(), rank));
  return shape;
}

std::uint32_t adler32(const unsigned char* data, std::size_t size) {
  std::uint32_t a = 1, b = 0;
  for (std::size_t i = 0; i < size; ++i) {
    a = (a + data[i]) % 65521;
    b = (b + a) % 65521;
  }
  return b << 16 | a;
}

struct Input {
  std::string name;
  std::vector<std::int64_t> shape;
  std::vector<float> data;
  std::unique_ptr<OrtValue, decltype(OrtApi::ReleaseValue)> value;
};

Input make_input(const OrtSession* session, std::size_t index, const OrtMemoryInfo* memory) {
  Input input{name_of(ort->SessionGetInputName, session, index), {}, {}, {nullptr, ort->ReleaseValue}};
  const auto type = own<OrtTypeInfo>(
      ort->ReleaseTypeInfo, [&](OrtTypeInfo** out) { return ort->SessionGetInputTypeInfo(session, index, out); });
  const OrtTensorTypeAndShapeInfo* info = nullptr;
  check(ort->CastTypeInfoToTensorInfo(type.get(), &info));
  if (info == nullptr) throw std::runtime_error("an input is not a tensor");
  input.shape = shape_of(info);
  std::size_t count = 1;
  for (std::int64_t& size : input.shape) {
    if (size < 0) size = 1;  // a free dimension becomes 1
    count *= static_cast<std::size_t>(size);
  }
  for (std::size_t i = 0; i < count; ++i) input.data.push_back(static_cast<float>(i % 255 / 255.0));
  OrtValue* value = nullptr;
  check(ort->CreateTensorWithDataAsOrtValue(memory, input.data.data(), count * sizeof(float), input.shape.data(),
                                            input.shape.size(), ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, &value));
  input.value.reset(value);
  return input;
}

void run(const char* model, const char* library) {
  const auto env =
      own<OrtEnv>(ort->ReleaseEnv, [](OrtEnv** out) { return ort->CreateEnv(ORT_LOGGING_LEVEL_WARNING, "deploy", out); });
  const auto options = own<OrtSessionOptions>(ort->ReleaseSessionOptions,
                                              [](OrtSessionOptions** out) { return ort->CreateSessionOptions(out); });
  check(ort->SetIntraOpNumThreads(options.get(), 1));
  check(ort->RegisterCustomOpsLibrary_V2(options.get(), library));  // this is all that a deployment adds
  const auto session = own<OrtSession>(ort->ReleaseSession, [&](OrtSession** out) {
    return ort->CreateSession(env.get(), model, options.get(), out);
  });
  const auto memory = own<OrtMemoryInfo>(ort->ReleaseMemoryInfo, [](OrtMemoryInfo** out) {
    return ort->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, out);
  });

  std::size_t input_count = 0, output_count = 0;
  check(ort->SessionGetInputCount(session.get(), &input_count));
  check(ort->SessionGetOutputCount(session.get(), &output_count));
  std::vector<Input> inputs;
  std::vector<std::string> outputs;
  for (std::size_t i = 0; i < input_count; ++i) inputs.push_back(make_input(session.get(), i, memory.get()));
  for (std::size_t i = 0; i < output_count; ++i) outputs.push_back(name_of(ort->SessionGetOutputName, session.get(), i));

  std::vector<const char*> input_names, output_names;
  std::vector<const OrtValue*> values;
  for (const Input& input : inputs) {
    input_names.push_back(input.name.c_str());
    values.push_back(input.value.get());
  }
  for (const std::string& name : outputs) output_names.push_back(name.c_str());
  std::vector<OrtValue*> results(output_count);
  check(ort->Run(session.get(), nullptr, input_names.data(), values.data(), input_count, output_names.data(),
                 output_count, results.data()));

  for (std::size_t i = 0; i < output_count; ++i) {
    const std::unique_ptr<OrtValue, decltype(OrtApi::ReleaseValue)> result(results[i], ort->ReleaseValue);
    const auto info = own<OrtTensorTypeAndShapeInfo>(
        ort->ReleaseTensorTypeAndShapeInfo,
        [&](OrtTensorTypeAndShapeInfo** out) { return ort->GetTensorTypeAndShape(result.get(), out); });
    std::string shape;
    std::size_t bytes = sizeof(float);
    for (const std::int64_t size : shape_of(info.get())) {
      shape += (shape.empty() ? "" : "x") + std::to_string(size);
      bytes *= static_cast<std::size_t>(size);
    }
    void* data = nullptr;
    check(ort->GetTensorMutableData(result.get(), &data));
    std::printf("%s %s %08x\n", output_names[i], shape.c_str(), adler32(static_cast<const unsigned char*>(data), bytes));
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) {
    std::fprintf(stderr, "usage: deploy MODEL LIBRARY\n");
    return 2;
  }
  ort = OrtGetApiBase()->GetApi(17);
  if (ort == nullptr) {
    std::fprintf(stderr, "needs onnxruntime 1.17 or newer; this is %s\n", OrtGetApiBase()->GetVersionString());
    return 1;
  }
  try {
    run(argv[1], argv[2]);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
