// Entry points of a plugin library for TensorRT, `getCreators` and `setLoggerFinder`, and the plugin creators.
#include "plugin.hpp"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <memory>

namespace vp {
namespace {

using nvinfer1::PluginFieldType;
using Severity = nvinfer1::ILogger::Severity;

nvinfer1::ILoggerFinder* finder = nullptr;

// Value of a field, which must hold one number of any type.
double valueOf(nvinfer1::PluginField const& field) {
  std::string const name = field.name;
  require(field.data != nullptr && field.length == 1,
          "field " + name + " of " + std::to_string(field.length) + " values", "one value");
  switch (field.type) {
    case PluginFieldType::kINT8:
      return *static_cast<std::int8_t const*>(field.data);
    case PluginFieldType::kINT16:
      return *static_cast<std::int16_t const*>(field.data);
    case PluginFieldType::kINT32:
      return *static_cast<std::int32_t const*>(field.data);
    case PluginFieldType::kINT64:
      return static_cast<double>(*static_cast<std::int64_t const*>(field.data));
    case PluginFieldType::kFLOAT32:
      return *static_cast<float const*>(field.data);
    case PluginFieldType::kFLOAT64:
      return *static_cast<double const*>(field.data);
    default:
      throw Refused("field " + name + " of type " + std::to_string(static_cast<int>(field.type)) +
                    "; expected a whole number or a float32");
  }
}

// Checks that all fields of the operator are given, no others, and each within its limits.
Fields read(Operator const& op, nvinfer1::PluginFieldCollection const* given) {
  Fields found;
  for (std::int32_t index = 0; given != nullptr && index < given->nbFields; ++index) {
    auto const& each = given->fields[index];
    require(each.name != nullptr, "a field without a name", "a name");
    std::string const name = each.name;
    // ONNX parsers pass on the attributes that selected the plugin.
    if (name == "plugin_namespace" || name == "plugin_version") continue;
    auto const known = std::find_if(op.fields.begin(), op.fields.end(), [&](Field const& f) { return f.name == name; });
    require(known != op.fields.end(), "a field " + name, "only those of " + op.type);
    auto const value = valueOf(each);
    require(known->real || value == std::floor(value), name + " = " + std::to_string(value), "a whole number");
    // Also false for NaN.
    require(value >= known->low && value <= known->high, name + " = " + std::to_string(value),
            std::to_string(known->low) + " to " + std::to_string(known->high));
    found[name] = value;
  }
  for (Field const& field : op.fields) {
    require(found.count(field.name) == 1, "no field " + field.name, "one of this name, exactly as vp-export writes it");
  }
  return found;
}

class Creator final : public nvinfer1::IPluginCreatorV3One {
 public:
  explicit Creator(Operator const& op) : op_(op) {
    for (Field const& field : op_.fields) {
      fields_.emplace_back(field.name.c_str(), nullptr,
                           field.real ? PluginFieldType::kFLOAT32 : PluginFieldType::kINT64, 1);
    }
    collection_.nbFields = static_cast<std::int32_t>(fields_.size());
    collection_.fields = fields_.data();
  }

  nvinfer1::IPluginV3* createPlugin(char const* name, nvinfer1::PluginFieldCollection const* given,
                                    nvinfer1::TensorRTPhase) noexcept override {
    try {
      return new Plugin(op_, read(op_, given));
    } catch (std::exception const& error) {
      say(Severity::kERROR, "vp::" + op_.type + " (" + (name == nullptr ? "" : name) + "): " + error.what());
      return nullptr;
    }
  }
  nvinfer1::PluginFieldCollection const* getFieldNames() noexcept override { return &collection_; }
  char const* getPluginName() const noexcept override { return op_.type.c_str(); }
  char const* getPluginVersion() const noexcept override { return kVersion; }
  char const* getPluginNamespace() const noexcept override { return kNamespace; }

 private:
  Operator const& op_;
  std::vector<nvinfer1::PluginField> fields_;
  nvinfer1::PluginFieldCollection collection_{};
};

}  // namespace

void say(Severity severity, std::string const& line) noexcept {
  nvinfer1::ILogger* logger = finder == nullptr ? nullptr : finder->findLogger();
  if (logger != nullptr) {
    logger->log(severity, line.c_str());
  } else {
    std::fprintf(stderr, "%s\n", line.c_str());
  }
}

}  // namespace vp

#define VP_EXPORT __attribute__((visibility("default")))

extern "C" {

// Called by TensorRT's registry when it loads the library (IPluginRegistry::loadLibrary, trtexec --dynamicPlugins).
VP_EXPORT nvinfer1::IPluginCreatorInterface* const* getCreators(std::int32_t& count) {
  static std::vector<std::unique_ptr<vp::Creator>> const owned = [] {
    std::vector<std::unique_ptr<vp::Creator>> made;
    for (auto const& op : vp::operators()) made.push_back(std::make_unique<vp::Creator>(op));
    return made;
  }();
  static std::vector<nvinfer1::IPluginCreatorInterface*> const all = [] {
    std::vector<nvinfer1::IPluginCreatorInterface*> made;
    for (auto const& each : owned) made.push_back(each.get());
    return made;
  }();
  count = static_cast<std::int32_t>(all.size());
  return all.data();
}

VP_EXPORT void setLoggerFinder(nvinfer1::ILoggerFinder* given) { vp::finder = given; }

}  // extern "C"
