// TensorRT engines, using the C++ API of TensorRT 10 and later. Compiled only if TensorRT is found.
// Not yet run: no machine with TensorRT and a GPU was available.
#include <NvInfer.h>
#include <cuda_runtime_api.h>

#include <mutex>
#include <utility>

#include "../backend.hpp"
#include "../error.hpp"
#include "../machine.hpp"

namespace vp {
namespace {

/// Keeps the last error, which TensorRT reports only to a logger, for our message; a library should not print the rest.
class Logger : public nvinfer1::ILogger {
 public:
  void log(Severity severity, const char* message) noexcept override {
    if (severity > Severity::kERROR) return;
    try {
      const std::lock_guard<std::mutex> lock(mutex_);
      last_ = first_line(message);
    } catch (...) {
      // Out of memory: lose the message, not the failure.
    }
  }

  std::string last() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return last_.empty() ? "no message" : last_;
  }

 private:
  std::mutex mutex_;
  std::string last_;
};

void check(cudaError_t code, const char* what) {
  if (code != cudaSuccess) {
    throw Error(VP_ERROR_INTERNAL, std::string(what) + " failed on the GPU: " + cudaGetErrorString(code));
  }
}

class DeviceBuffer {
 public:
  explicit DeviceBuffer(std::size_t bytes) { check(cudaMalloc(&data_, bytes), "taking memory"); }
  DeviceBuffer(DeviceBuffer&& other) noexcept : data_(std::exchange(other.data_, nullptr)) {}
  DeviceBuffer& operator=(DeviceBuffer&&) = delete;
  DeviceBuffer(const DeviceBuffer&) = delete;
  DeviceBuffer& operator=(const DeviceBuffer&) = delete;
  ~DeviceBuffer() { cudaFree(data_); }

  void* data() const noexcept { return data_; }

 private:
  void* data_ = nullptr;
};

class Stream {
 public:
  Stream() { check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "making a stream"); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  ~Stream() { cudaStreamDestroy(stream_); }

  cudaStream_t get() const noexcept { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

/// Synchronises at the end of a run, even on failure: no copy may outlive the caller's buffers.
struct Idle {
  const Stream& stream;
  ~Idle() { cudaStreamSynchronize(stream.get()); }
};

/// One execution context and one stream, hence one run at a time.
class TensorRtRunner : public Runner {
 public:
  TensorRtRunner(const OpenRequest& request, const void* plan, std::size_t size)
      : inputs_(request.manifest.inputs), outputs_(request.manifest.outputs) {
    if (!request.manifest.batch) throw corrupt("manifest.json: engine.batch is null", "the batch sizes of the engine");
    runtime_.reset(nvinfer1::createInferRuntime(logger_));
    if (runtime_) engine_.reset(runtime_->deserializeCudaEngine(plan, size));
    if (engine_) context_.reset(engine_->createExecutionContext());
    if (!context_) {
      throw corrupt("TensorRT cannot load " + quote(request.variant.artefact) + ": " + logger_.last());
    }
    for (const auto& tensor : inputs_) bind(tensor, nvinfer1::TensorIOMode::kINPUT, request.manifest.batch->max);
    for (const auto& tensor : outputs_) bind(tensor, nvinfer1::TensorIOMode::kOUTPUT, request.manifest.batch->max);
    if (static_cast<std::size_t>(engine_->getNbIOTensors()) != buffers_.size()) {
      throw corrupt("the engine has " + std::to_string(engine_->getNbIOTensors()) + " inputs and outputs",
                    std::to_string(buffers_.size()));
    }
  }

  void run(const std::vector<const void*>& inputs, std::int64_t batch, const std::vector<void*>& outputs) override {
    const std::lock_guard<std::mutex> one_at_a_time(mutex_);
    // The current device is per thread; the engine is on the first one.
    check(cudaSetDevice(0), "choosing the device");
    const Idle idle{stream_};
    for (std::size_t i = 0; i < inputs.size(); ++i) {
      nvinfer1::Dims dims{};
      const auto shape = shape_of(inputs_[i], batch);
      dims.nbDims = static_cast<std::int32_t>(shape.size());
      for (std::size_t axis = 0; axis < shape.size(); ++axis) dims.d[axis] = shape[axis];
      if (!context_->setInputShape(inputs_[i].name.c_str(), dims)) fail();
      check(cudaMemcpyAsync(buffers_[i].data(), inputs[i], bytes_of(inputs_[i], batch), cudaMemcpyHostToDevice,
                            stream_.get()),
            "copying the input");
    }
    if (!context_->enqueueV3(stream_.get())) fail();
    for (std::size_t i = 0; i < outputs.size(); ++i) {
      if (outputs[i] == nullptr) continue;
      check(cudaMemcpyAsync(outputs[i], buffers_[inputs_.size() + i].data(), bytes_of(outputs_[i], batch),
                            cudaMemcpyDeviceToHost, stream_.get()),
            "copying an output");
    }
    check(cudaStreamSynchronize(stream_.get()), "the run");
  }

 private:
  [[noreturn]] void fail() { throw Error(VP_ERROR_INTERNAL, "the engine failed: " + logger_.last()); }

  /// Allocates device memory for a tensor, large enough for any batch.
  void bind(const Tensor& tensor, nvinfer1::TensorIOMode mode, std::int64_t max_batch) {
    const char* name = tensor.name.c_str();
    if (engine_->getTensorIOMode(name) != mode || engine_->getTensorDataType(name) != nvinfer1::DataType::kFLOAT) {
      throw corrupt("the engine has no float32 input or output " + quote(tensor.name), "what the manifest says");
    }
    buffers_.emplace_back(bytes_of(tensor, max_batch));
    if (!context_->setTensorAddress(name, buffers_.back().data())) fail();
  }

  const std::vector<Tensor> inputs_, outputs_;
  std::mutex mutex_;
  // Order of destruction: context before engine, engine before runtime, all before the logger.
  Logger logger_;
  std::unique_ptr<nvinfer1::IRuntime> runtime_;
  std::unique_ptr<nvinfer1::ICudaEngine> engine_;
  Stream stream_;
  std::vector<DeviceBuffer> buffers_;  // inputs, then outputs
  std::unique_ptr<nvinfer1::IExecutionContext> context_;
};

}  // namespace

std::unique_ptr<Runner> open_tensorrt(OpenRequest request) {
  // Compare everything before deserialising: an engine is executable code.
  const std::string gpu = gpu_capability();
  if (gpu.empty()) {
    throw Error(VP_ERROR_ENGINE_UNAVAILABLE, "no NVIDIA GPU with a driver is visible here", "",
                "run it on the GPU that it was made for");
  }
  const auto built = requirement(request.variant, "tensorrt");
  const int version = getInferLibVersion();  // 101401 is 10.14.1
  const std::vector<int> here = {version / 10000, version / 100 % 100, version % 100};
  if (version_numbers(built, 3) != here) {  // an engine is tied to the patch release
    throw Error(VP_ERROR_BUNDLE_INCOMPATIBLE,
                "TensorRT " + std::to_string(here[0]) + "." + std::to_string(here[1]) + "." + std::to_string(here[2]) +
                    " is installed",
                printable(built, 40), "install that version, or export again");
  }
  if (const auto target = requirement(request.variant, "compute_capability"); target != gpu) {
    throw Error(VP_ERROR_BUNDLE_INCOMPATIBLE, "this GPU has compute capability " + gpu, printable(target, 40),
                "export again for this GPU");
  }
  check(cudaSetDevice(0), "choosing the device");
  const auto& content = request.contents.at(request.variant.artefact);
  const MappedFile plan(content.path(), content.size());
  return std::make_unique<TensorRtRunner>(request, plan.data(), plan.size());
}

}  // namespace vp
