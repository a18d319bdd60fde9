#include "engine.hpp"

#include <algorithm>
#include <array>
#include <string_view>

#include "bundle.hpp"
#include "error.hpp"

namespace vp {
namespace {

struct Backend {
  const char* name;
  OpenFunction open;    // null if not in this build
  const char* missing;  // reason, and what to do
};

constexpr const char* kPython =
    "another engine than the C++ loader runs; export with --engine aoti or trt, or run it from Python";

constexpr std::array<Backend, 5> kBackends = {{
#ifdef VP_ENGINE_AOTI
    {"aoti", open_aoti, ""},
#else
    {"aoti", nullptr,
     "vp_engine was built without libtorch; configure it with -DVP_ENGINE_AOTI=ON where torch is installed"},
#endif
#ifdef VP_ENGINE_TENSORRT
    {"trt", open_tensorrt, ""},
#else
    {"trt", nullptr,
     "vp_engine was built without TensorRT; configure it with -DTENSORRT_ROOT=... where TensorRT is installed"},
#endif
    {"trt-rtx", nullptr, kPython},
    {"ort", nullptr, kPython},
    {"openvino", nullptr, kPython},
}};

OpenFunction usable_backend(const std::string& name) {
  for (const auto& backend : kBackends) {
    if (name != backend.name) continue;
    if (backend.open != nullptr) return backend.open;
    throw Error(VP_ERROR_ENGINE_UNAVAILABLE,
                "the engine '" + name + "' of the bundle cannot run here: " + std::string(backend.missing));
  }
  throw Error(VP_ERROR_BUNDLE_INCOMPATIBLE, "the bundle is for the engine " + quote(name), "aoti or trt",
              "upgrade vp_engine");
}

struct Dtype {
  vp_dtype dtype;
  const char* name;
};

constexpr std::array<Dtype, 7> kDtypes = {{{VP_FLOAT32, "float32"},
                                           {VP_FLOAT64, "float64"},
                                           {VP_FLOAT16, "float16"},
                                           {VP_BFLOAT16, "bfloat16"},
                                           {VP_INT32, "int32"},
                                           {VP_INT64, "int64"},
                                           {VP_UINT8, "uint8"}}};

std::string dtype_name(vp_dtype dtype) {
  for (const auto& known : kDtypes) {
    if (known.dtype == dtype) return known.name;
  }
  return "number " + std::to_string(static_cast<int>(dtype));
}

vp_tensor_info info_of(const Tensor& tensor, const char* what) {
  const bool fits = !tensor.shape.empty() && tensor.shape.size() <= VP_MAX_RANK && tensor.shape[0] == -1 &&
                    std::find(tensor.shape.begin() + 1, tensor.shape.end(), -1) == tensor.shape.end();
  if (!fits || tensor.dtype != "float32") {
    throw Error(VP_ERROR_BUNDLE_INCOMPATIBLE,
                std::string("the ") + what + " " + quote(tensor.name) + " is " + printable(tensor.dtype, 20) +
                    " with " + std::to_string(tensor.shape.size()) + " axes",
                "float32, 1 to 8 axes, and the first one alone dynamic", "upgrade vp_engine");
  }
  vp_tensor_info info{tensor.name.c_str(), VP_FLOAT32, tensor.shape.size(), {}};
  std::copy(tensor.shape.begin(), tensor.shape.end(), info.shape);
  return info;
}

std::string wanted(const Tensor& tensor) {
  std::string axes;
  for (std::size_t i = 0; i < tensor.shape.size(); ++i) {
    const auto axis = tensor.shape[i] < 0 ? printable(tensor.axes[i], 20) : std::to_string(tensor.shape[i]);
    axes += (i == 0 ? "" : ", ") + axis;
  }
  return tensor.dtype + " of shape [" + axes + "]";
}

/// Index of a caller's tensor in `tensors`.
std::size_t index_of(const std::vector<Tensor>& tensors, const char* name, std::size_t position, const char* what) {
  const auto found = name == nullptr ? tensors.begin() + static_cast<std::ptrdiff_t>(std::min(position, tensors.size()))
                                     : std::find_if(tensors.begin(), tensors.end(),
                                                    [&](const Tensor& tensor) { return tensor.name == name; });
  if (found != tensors.end()) return static_cast<std::size_t>(found - tensors.begin());
  std::string names;
  for (const auto& tensor : tensors) names += (names.empty() ? "" : ", ") + quote(tensor.name);
  throw Error(VP_ERROR_INPUT,
              std::string("there is no ") + what + " " + (name == nullptr ? std::to_string(position) : quote(name)),
              names, "describe the engine to see its names");
}

bool aligned(const void* data) { return reinterpret_cast<std::uintptr_t>(data) % alignof(float) == 0; }

}  // namespace

std::string requirement(const Variant& variant, const char* name) {
  const auto found = variant.requirements.find(name);
  return found != variant.requirements.end() ? found->second : "";
}

std::vector<std::int64_t> shape_of(const Tensor& tensor, std::int64_t batch) {
  auto shape = tensor.shape;
  shape.at(0) = batch;
  return shape;
}

std::size_t bytes_of(const Tensor& tensor, std::int64_t batch) {
  std::size_t bytes = sizeof(float);
  for (const auto axis : shape_of(tensor, batch)) {
    if (__builtin_mul_overflow(bytes, static_cast<std::size_t>(axis), &bytes)) {
      throw Error(VP_ERROR_INPUT, "a batch of " + std::to_string(batch), "one that fits into memory", "split it");
    }
  }
  return bytes;
}

}  // namespace vp

vp_engine::vp_engine(const std::string& path, const vp_engine_options& options)
    : variant_(options.variant == nullptr ? "reduced" : options.variant) {
  using vp::Error;
  const std::string folder(vp::variant_folder(variant_));
  if (folder.empty()) throw Error(VP_ERROR_INPUT, "variant " + vp::quote(variant_), "reduced or dense");
  if (options.threads < 0) throw Error(VP_ERROR_INPUT, "threads " + std::to_string(options.threads), "0 or more");
  if (options.runners < 0 || options.runners > 64) {
    throw Error(VP_ERROR_INPUT, "runners " + std::to_string(options.runners), "0 to 64");
  }
  const bool load = options.verify_only == 0;
  auto bundle = vp::read_bundle(path, [&](const std::string& name) { return load && name.rfind(folder, 0) == 0; });
  manifest_ = std::move(bundle.manifest);
  const auto chosen = manifest_.variants.find(variant_);
  if (chosen == manifest_.variants.end()) {
    throw Error(VP_ERROR_BUNDLE_INCOMPATIBLE, path + " holds no dense baseline", "the variant 'reduced'",
                "export again without --no-dense to have one");
  }
  for (const auto& tensor : manifest_.inputs) input_infos_.push_back(vp::info_of(tensor, "input"));
  for (const auto& tensor : manifest_.outputs) output_infos_.push_back(vp::info_of(tensor, "output"));
  for (const auto& name : manifest_.classes) class_names_.push_back(name.c_str());
  json_ = vp::summary(manifest_, variant_);
  if (!load) return;
  const auto open = vp::usable_backend(manifest_.engine);
  runner_ =
      open({manifest_, chosen->second, std::move(bundle.contents), options.threads, std::max(1, options.runners)});
}

void vp_engine::describe(vp_description& description) const {
  description = {};
  description.name = manifest_.name.c_str();
  description.format_version = manifest_.format_version.c_str();
  description.digest = manifest_.digest.c_str();
  description.engine = manifest_.engine.c_str();
  description.precision = manifest_.precision.c_str();
  description.device = manifest_.device.c_str();
  description.variant = variant_.c_str();
  description.min_batch = manifest_.batch ? manifest_.batch->min : 1;
  description.max_batch = manifest_.batch ? manifest_.batch->max : 0;
  description.input_count = input_infos_.size();
  description.inputs = input_infos_.data();
  description.output_count = output_infos_.size();
  description.outputs = output_infos_.data();
  description.class_count = class_names_.size();
  description.classes = class_names_.data();
  description.json = json_.c_str();
}

void vp_engine::check_batch(std::int64_t batch) const {
  if (batch < 1) throw vp::Error(VP_ERROR_INPUT, "a batch of " + std::to_string(batch) + " images", "1 or more");
  const auto& sizes = manifest_.batch;
  if (sizes && (batch < sizes->min || batch > sizes->max)) {
    throw vp::Error(VP_ERROR_INPUT, "the batch has " + std::to_string(batch) + " images",
                    std::to_string(sizes->min) + " to " + std::to_string(sizes->max),
                    "split it, or export with another --max-batch");
  }
}

std::size_t vp_engine::output_bytes(std::size_t index, std::int64_t batch) const {
  if (index >= manifest_.outputs.size()) {
    throw vp::Error(VP_ERROR_INPUT, "output " + std::to_string(index),
                    "below " + std::to_string(manifest_.outputs.size()));
  }
  check_batch(batch);
  return vp::bytes_of(manifest_.outputs[index], batch);
}

/// Check one input completely; returns its batch size.
std::int64_t vp_engine::check_input(const vp_input& input, std::size_t index) const {
  const auto& spec = manifest_.inputs[index];
  const auto refuse = [&](const std::string& found, const std::string& fix = "") {
    throw vp::Error(VP_ERROR_INPUT, "input " + vp::quote(spec.name) + " " + found, vp::wanted(spec), fix);
  };
  if (input.dtype != VP_FLOAT32) refuse("has dtype " + vp::dtype_name(input.dtype), "convert it to float32");
  const std::size_t rank = std::min<std::size_t>(input.rank, VP_MAX_RANK);
  std::string shape;
  for (std::size_t i = 0; i < rank; ++i) shape += (i == 0 ? "" : ", ") + std::to_string(input.shape[i]);
  bool fits = input.rank == spec.shape.size() && input.shape[0] > 0;
  for (std::size_t i = 1; fits && i < rank; ++i) fits = input.shape[i] == spec.shape[i];
  if (!fits) refuse("has shape [" + shape + (input.rank > rank ? ", ..." : "") + "]");
  check_batch(input.shape[0]);
  const auto bytes = vp::bytes_of(spec, input.shape[0]);
  if (input.bytes != bytes) {
    throw vp::Error(VP_ERROR_INPUT, "input " + vp::quote(spec.name) + " has " + std::to_string(input.bytes) + " bytes",
                    std::to_string(bytes) + " for the shape [" + shape + "]");
  }
  if (input.data == nullptr || !vp::aligned(input.data)) refuse("is at a null or unaligned address");
  return input.shape[0];
}

void vp_engine::run(const vp_input* inputs, std::size_t input_count, const vp_output* outputs,
                    std::size_t output_count) {
  using vp::Error;
  if (!runner_) throw Error(VP_ERROR_INPUT, "this engine was opened with verify_only", "", "open it without");
  if (input_count != manifest_.inputs.size() || inputs == nullptr) {
    throw Error(VP_ERROR_INPUT, std::to_string(inputs == nullptr ? 0 : input_count) + " inputs",
                std::to_string(manifest_.inputs.size()));
  }
  std::vector<const void*> data(manifest_.inputs.size());
  std::int64_t batch = 0;
  for (std::size_t i = 0; i < input_count; ++i) {
    const auto index = vp::index_of(manifest_.inputs, inputs[i].name, i, "input");
    const auto size = check_input(inputs[i], index);
    if (data[index] != nullptr || (i > 0 && size != batch)) {
      throw Error(VP_ERROR_INPUT,
                  "input " + vp::quote(manifest_.inputs[index].name) + " is given twice or has a batch of its own",
                  "each input once, all of one batch");
    }
    data[index] = inputs[i].data;
    batch = size;
  }
  std::vector<void*> results(manifest_.outputs.size());
  for (std::size_t i = 0; i < output_count; ++i) {
    if (outputs == nullptr) throw Error(VP_ERROR_INPUT, "no outputs", "an array of vp_output");
    const auto index = vp::index_of(manifest_.outputs, outputs[i].name, i, "output");
    const auto& spec = manifest_.outputs[index];
    const auto bytes = vp::bytes_of(spec, batch);
    if (outputs[i].dtype != VP_FLOAT32 || outputs[i].bytes != bytes || !vp::aligned(outputs[i].data) ||
        outputs[i].data == nullptr || results[index] != nullptr) {
      throw Error(VP_ERROR_INPUT,
                  "the buffer of output " + vp::quote(spec.name) + " is " + vp::dtype_name(outputs[i].dtype) + " of " +
                      std::to_string(outputs[i].bytes) + " bytes" +
                      (outputs[i].data == nullptr ? " at a null address" : "") +
                      (results[index] != nullptr ? " and given twice" : ""),
                  vp::wanted(spec) + ", " + std::to_string(bytes) + " bytes for " + std::to_string(batch) + " images");
    }
    results[index] = outputs[i].data;
  }
  const std::shared_lock<std::shared_mutex> running(runs_);
  runner_->run(data, batch, results);
}
