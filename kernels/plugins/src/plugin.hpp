// The operators as TensorRT plugins (IPluginV3); one class implements every operator type.
#pragma once

#include "operator.hpp"

#include <NvInfer.h>

#include <string>
#include <vector>

namespace vp {

constexpr char const* kVersion = "1";
constexpr char const* kNamespace = "vp";

// Writes a line to TensorRT's log, or to stderr if there is none.
void say(nvinfer1::ILogger::Severity severity, std::string const& line) noexcept;

class Plugin final : public nvinfer1::IPluginV3,
                     public nvinfer1::IPluginV3OneCore,
                     public nvinfer1::IPluginV3OneBuild,
                     public nvinfer1::IPluginV3OneRuntime {
 public:
  // `fields` must be complete and checked.
  Plugin(Operator const& op, Fields fields);
  Plugin(Plugin const& other);
  Plugin& operator=(Plugin const&) = delete;

  // IPluginV3
  nvinfer1::IPluginCapability* getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept override;
  nvinfer1::IPluginV3* clone() noexcept override;

  // IPluginV3OneCore
  char const* getPluginName() const noexcept override;
  char const* getPluginVersion() const noexcept override { return kVersion; }
  char const* getPluginNamespace() const noexcept override { return kNamespace; }

  // IPluginV3OneBuild
  std::int32_t getNbOutputs() const noexcept override;
  std::int32_t getOutputDataTypes(nvinfer1::DataType* types, std::int32_t outputs, nvinfer1::DataType const* given,
                                  std::int32_t inputs) const noexcept override;
  std::int32_t getOutputShapes(nvinfer1::DimsExprs const* inputs, std::int32_t inputCount,
                               nvinfer1::DimsExprs const* shapeInputs, std::int32_t shapeInputCount,
                               nvinfer1::DimsExprs* outputs, std::int32_t outputCount,
                               nvinfer1::IExprBuilder& builder) noexcept override;
  bool supportsFormatCombination(std::int32_t position, nvinfer1::DynamicPluginTensorDesc const* tensors,
                                 std::int32_t inputs, std::int32_t outputs) noexcept override;
  std::int32_t configurePlugin(nvinfer1::DynamicPluginTensorDesc const* in, std::int32_t inputs,
                               nvinfer1::DynamicPluginTensorDesc const* out, std::int32_t outputs) noexcept override;
  std::size_t getWorkspaceSize(nvinfer1::DynamicPluginTensorDesc const* in, std::int32_t inputs,
                               nvinfer1::DynamicPluginTensorDesc const* out,
                               std::int32_t outputs) const noexcept override;

  // IPluginV3OneRuntime
  std::int32_t onShapeChange(nvinfer1::PluginTensorDesc const* in, std::int32_t inputs,
                             nvinfer1::PluginTensorDesc const* out, std::int32_t outputs) noexcept override;
  std::int32_t enqueue(nvinfer1::PluginTensorDesc const* inDesc, nvinfer1::PluginTensorDesc const* outDesc,
                       void const* const* inputs, void* const* outputs, void* workspace,
                       cudaStream_t stream) noexcept override;
  nvinfer1::IPluginV3* attachToContext(nvinfer1::IPluginResourceContext* context) noexcept override;
  nvinfer1::PluginFieldCollection const* getFieldsToSerialize() noexcept override;

 private:
  Operator const& op_;
  Fields fields_;
  std::vector<Result> results_;
  Plan plan_;  // for the shapes of the last onShapeChange
  // Storage returned by getFieldsToSerialize.
  std::vector<std::int64_t> integers_;
  std::vector<float> reals_;
  std::vector<nvinfer1::PluginField> serialised_;
  nvinfer1::PluginFieldCollection collection_{};
};

}  // namespace vp
