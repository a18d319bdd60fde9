// AOTInductor packages (.pt2), run by the libtorch of torch's wheel. The only file with torch's headers: they are slow.
#include <ATen/Parallel.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/ops/from_blob.h>
#include <c10/core/InferenceMode.h>
#include <c10/util/Exception.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>
#include <torch/headeronly/version.h>

#include <cstring>
#include <mutex>
#include <utility>

#include "../backend.hpp"
#include "../error.hpp"
#include "../machine.hpp"

namespace vp {
namespace {

/// Reason why a package with these requirements cannot be loaded here; empty if it can.
std::string mismatches(const Variant& variant) {
  std::string reasons;
  const auto add = [&](const std::string& reason) { reasons += (reasons.empty() ? "" : "; ") + reason; };
  const auto compare = [&](const char* name, const std::string& here) {
    const auto required = requirement(variant, name);
    if (required != here) add(std::string(name) + " " + printable(required, 40) + ", here " + here);
  };
  // The generated code calls torch's C shim, which is stable within a minor release.
  const auto built = requirement(variant, "torch");
  if (version_numbers(built, 2) != version_numbers(TORCH_VERSION, 2)) {
    add("torch " + printable(built, 40) + ", here " + TORCH_VERSION);
  }
  compare("platform", platform());
  if (requirement(variant, "device") == "cuda") {
    compare("compute_capability", gpu_capability());
    const long version = at::detail::getCUDAHooks().versionCUDART();
    compare("cuda", std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10));
  }
  const auto flags = cpu_flags();
  std::string missing;
  for (const auto& flag : variant.cpu_flags) {
    if (flags.count(flag) == 0) missing += " " + printable(flag, 20);
  }
  if (!missing.empty()) add("a CPU with" + missing.substr(0, 200));
  return reasons;
}

class AotiRunner : public Runner {
 public:
  AotiRunner(const OpenRequest& request, const SealedFile& package, bool cuda)
      : inputs_(request.manifest.inputs),
        outputs_(request.manifest.outputs),
        device_(cuda ? at::kCUDA : at::kCPU),
        // The package is unpacked into a folder of this process (0700), removed with the loader. `false`: torch guards
        // its list of free models by a lock, so concurrent runs are safe.
        loader_(package.path(), "model", false, static_cast<std::size_t>(request.runners), -1) {}

  void run(const std::vector<const void*>& inputs, std::int64_t batch, const std::vector<void*>& outputs) override {
    try {
      // OpenMP's thread count is per calling thread: set it on threads that are new to torch.
      at::internal::lazy_init_num_threads();
      const c10::InferenceMode no_gradients;
      std::vector<at::Tensor> batches;
      for (std::size_t i = 0; i < inputs.size(); ++i) {
        // A view of the caller's memory, which the model only reads.
        batches.push_back(
            at::from_blob(const_cast<void*>(inputs[i]), shape_of(inputs_[i], batch), at::kFloat).to(device_));
      }
      const auto results = enter(std::move(batches));
      if (results.size() != outputs_.size()) {
        throw corrupt("the engine gave " + std::to_string(results.size()) + " outputs",
                      std::to_string(outputs_.size()));
      }
      for (std::size_t i = 0; i < outputs.size(); ++i) {
        if (outputs[i] != nullptr) copy(results[i], outputs_[i], batch, outputs[i]);
      }
    } catch (const c10::Error& error) {
      throw Error(VP_ERROR_INTERNAL, std::string("the engine failed: ") + first_line(error.what_without_backtrace()));
    }
  }

 private:
  /// Runs torch, the first time exclusively. The first run folds constants: that thread holds a model and waits
  /// for all others to leave, which in turn wait for a model. With more threads than models this deadlocks
  /// (pytorch/pytorch#181941). A fixed torch does not help: a package contains this code of the torch that built it.
  std::vector<at::Tensor> enter(std::vector<at::Tensor>&& batches) {
    std::vector<at::Tensor> results;
    bool first = false;
    std::call_once(folded_, [&] {
      first = true;
      results = loader_.boxed_run(std::move(batches));
    });
    return first ? std::move(results) : loader_.boxed_run(std::move(batches));
  }

  static void copy(const at::Tensor& result, const Tensor& spec, std::int64_t batch, void* out) {
    if (result.scalar_type() != at::kFloat || result.sizes() != at::IntArrayRef(shape_of(spec, batch))) {
      throw corrupt("the engine gave another type or shape for the output " + quote(spec.name),
                    "what the manifest says");
    }
    const auto plain = result.to(at::kCPU).contiguous();
    std::memcpy(out, plain.const_data_ptr(), plain.nbytes());
  }

  const std::vector<Tensor> inputs_, outputs_;
  const at::Device device_;
  torch::inductor::AOTIModelPackageLoader loader_;
  std::once_flag folded_;
};

}  // namespace

std::unique_ptr<Runner> open_aoti(OpenRequest request) {
  const bool cuda = requirement(request.variant, "device") == "cuda";
  if (cuda && !(at::detail::getCUDAHooks().hasCUDA() && at::detail::getCUDAHooks().getNumGPUs() > 0)) {
    throw Error(VP_ERROR_ENGINE_UNAVAILABLE, "this bundle was compiled for a GPU and torch finds none here", "",
                "run it on the GPU that it was made for");
  }
  if (const auto reasons = mismatches(request.variant); !reasons.empty()) {
    throw Error(VP_ERROR_BUNDLE_INCOMPATIBLE, "this bundle was compiled for another machine: " + reasons, "",
                "export it again here");
  }
  if (request.threads > 0) at::set_num_threads(request.threads);
  try {
    return std::make_unique<AotiRunner>(request, request.contents.at(request.variant.artefact), cuda);
  } catch (const std::exception& error) {  // includes c10::Error
    const auto* torch_error = dynamic_cast<const c10::Error*>(&error);
    const std::string message = torch_error != nullptr ? torch_error->what_without_backtrace() : error.what();
    throw corrupt("torch cannot load " + quote(request.variant.artefact) + ": " + first_line(message));
  }
}

}  // namespace vp
