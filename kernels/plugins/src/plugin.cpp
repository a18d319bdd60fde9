#include "plugin.hpp"

#include "driver.hpp"
#include "run.hpp"

#include <algorithm>
#include <optional>
#include <utility>

namespace vp {
namespace {

using nvinfer1::DataType;

std::optional<Dtype> dtypeOf(DataType type) {
  switch (type) {
    case DataType::kFLOAT:
      return Dtype::kFp32;
    case DataType::kHALF:
      return Dtype::kFp16;
    case DataType::kBF16:
      return Dtype::kBf16;
    case DataType::kINT64:
      return Dtype::kInt64;
    case DataType::kINT32:
      return Dtype::kInt32;
    default:
      return std::nullopt;
  }
}

bool isFloat(DataType type) { return type == DataType::kFLOAT || type == DataType::kHALF || type == DataType::kBF16; }

// First input of a kind; outputs of that kind share its dtype.
std::size_t firstOf(Operator const& op, Type type) {
  auto const found = std::find_if(op.inputs.begin(), op.inputs.end(), [&](Port const& p) { return p.type == type; });
  return static_cast<std::size_t>(found - op.inputs.begin());
}

Tensor tensorOf(nvinfer1::Dims const& dims, DataType type) {
  Tensor made;
  made.dtype = dtypeOf(type).value();
  made.shape.assign(dims.d, dims.d + dims.nbDims);
  return made;
}

// Inputs at one end of the optimization profile.
std::vector<Tensor> tensorsOf(nvinfer1::DynamicPluginTensorDesc const* in, std::int32_t inputs,
                              nvinfer1::Dims nvinfer1::DynamicPluginTensorDesc::*end) {
  std::vector<Tensor> given;
  for (std::int32_t each = 0; each < inputs; ++each) given.push_back(tensorOf(in[each].*end, in[each].desc.type));
  return given;
}

// TensorRT callbacks must not throw: turn exceptions into a log line and an error code.
template <typename Work>
auto guarded(std::string const& who, Work work, decltype(work()) failed) noexcept {
  try {
    return work();
  } catch (std::exception const& error) {
    say(nvinfer1::ILogger::Severity::kERROR, "vp::" + who + ": " + error.what());
  } catch (...) {
    say(nvinfer1::ILogger::Severity::kERROR, "vp::" + who + ": unknown error");
  }
  return failed;
}

}  // namespace

Plugin::Plugin(Operator const& op, Fields fields)
    : op_(op), fields_(std::move(fields)), results_(op.outputs(fields_)) {}

// Pointers in `collection_` are not copied; they are set again on request.
Plugin::Plugin(Plugin const& other) : Plugin(other.op_, other.fields_) { plan_ = other.plan_; }

nvinfer1::IPluginCapability* Plugin::getCapabilityInterface(nvinfer1::PluginCapabilityType type) noexcept {
  switch (type) {
    case nvinfer1::PluginCapabilityType::kCORE:
      return static_cast<nvinfer1::IPluginV3OneCore*>(this);
    case nvinfer1::PluginCapabilityType::kBUILD:
      return static_cast<nvinfer1::IPluginV3OneBuild*>(this);
    case nvinfer1::PluginCapabilityType::kRUNTIME:
      return static_cast<nvinfer1::IPluginV3OneRuntime*>(this);
  }
  return nullptr;
}

nvinfer1::IPluginV3* Plugin::clone() noexcept {
  return guarded(
      op_.type, [&]() -> nvinfer1::IPluginV3* { return new Plugin(*this); }, nullptr);
}

char const* Plugin::getPluginName() const noexcept { return op_.type.c_str(); }

std::int32_t Plugin::getNbOutputs() const noexcept { return static_cast<std::int32_t>(results_.size()); }

std::int32_t Plugin::getOutputDataTypes(DataType* types, std::int32_t, DataType const* given,
                                        std::int32_t) const noexcept {
  for (std::size_t index = 0; index < results_.size(); ++index) {
    switch (results_[index].type) {
      case Type::kFp32:
        types[index] = DataType::kFLOAT;
        break;
      case Type::kInt64:
        types[index] = DataType::kINT64;
        break;
      default:
        types[index] = given[firstOf(op_, results_[index].type)];
    }
  }
  return 0;
}

std::int32_t Plugin::getOutputShapes(nvinfer1::DimsExprs const* inputs, std::int32_t inputCount,
                                     nvinfer1::DimsExprs const*, std::int32_t, nvinfer1::DimsExprs* outputs,
                                     std::int32_t, nvinfer1::IExprBuilder& builder) noexcept {
  return guarded(
      op_.type,
      [&] {
        require(inputCount == static_cast<std::int32_t>(op_.inputs.size()), std::to_string(inputCount) + " inputs",
                std::to_string(op_.inputs.size()));
        for (std::size_t index = 0; index < op_.inputs.size(); ++index) {
          require(inputs[index].nbDims == op_.inputs[index].rank,
                  "input " + std::to_string(index) + " of rank " + std::to_string(inputs[index].nbDims),
                  std::to_string(op_.inputs[index].rank));
        }
        using Operation = nvinfer1::DimensionOperation;
        for (std::size_t index = 0; index < results_.size(); ++index) {
          auto const& shape = results_[index].shape;
          outputs[index].nbDims = static_cast<std::int32_t>(shape.size());
          for (std::size_t axis = 0; axis < shape.size(); ++axis) {
            nvinfer1::IDimensionExpr const* size = nullptr;
            auto const join = [&](Operation how, nvinfer1::IDimensionExpr const* other) {
              size = size == nullptr ? other : builder.operation(how, *size, *other);
            };
            for (auto [tensor, at] : shape[axis].times) join(Operation::kPROD, inputs[tensor].d[at]);
            for (auto [tensor, at] : shape[axis].added) join(Operation::kSUM, inputs[tensor].d[at]);
            if (shape[axis].plus != 0) join(Operation::kSUM, builder.constant(shape[axis].plus));
            outputs[index].d[axis] = size;
          }
        }
        return 0;
      },
      -1);
}

bool Plugin::supportsFormatCombination(std::int32_t position, nvinfer1::DynamicPluginTensorDesc const* tensors,
                                       std::int32_t inputs, std::int32_t) noexcept {
  auto const& asked = tensors[position].desc;
  if (asked.format != nvinfer1::TensorFormat::kLINEAR) return false;
  auto const at = static_cast<std::size_t>(position);
  bool const isInput = position < inputs;
  Type const type = isInput ? op_.inputs[at].type : results_[at - static_cast<std::size_t>(inputs)].type;
  if (type == Type::kFp32) return asked.type == DataType::kFLOAT;
  if (type == Type::kInt64) return asked.type == DataType::kINT64;
  auto const first = firstOf(op_, type);
  return at == first ? isFloat(asked.type) : asked.type == tensors[first].desc.type;
}

std::int32_t Plugin::configurePlugin(nvinfer1::DynamicPluginTensorDesc const* in, std::int32_t inputs,
                                     nvinfer1::DynamicPluginTensorDesc const*, std::int32_t) noexcept {
  return guarded(
      op_.type,
      [&] {
        // Check both ends of the profile, so that unsupported shapes fail before the engine is built.
        auto const sm = currentCapability();
        op_.plan(sm, fields_, tensorsOf(in, inputs, &nvinfer1::DynamicPluginTensorDesc::min));
        op_.plan(sm, fields_, tensorsOf(in, inputs, &nvinfer1::DynamicPluginTensorDesc::max));
        return 0;
      },
      -1);
}

std::size_t Plugin::getWorkspaceSize(nvinfer1::DynamicPluginTensorDesc const* in, std::int32_t inputs,
                                     nvinfer1::DynamicPluginTensorDesc const*, std::int32_t) const noexcept {
  return guarded(
      op_.type,
      [&]() -> std::size_t {
        auto const given = tensorsOf(in, inputs, &nvinfer1::DynamicPluginTensorDesc::max);
        return op_.plan(currentCapability(), fields_, given).workspace;
      },
      0);
}

std::int32_t Plugin::onShapeChange(nvinfer1::PluginTensorDesc const* in, std::int32_t inputs,
                                   nvinfer1::PluginTensorDesc const*, std::int32_t) noexcept {
  return guarded(
      op_.type,
      [&] {
        std::vector<Tensor> given;
        for (std::int32_t each = 0; each < inputs; ++each) given.push_back(tensorOf(in[each].dims, in[each].type));
        plan_ = op_.plan(currentCapability(), fields_, given);
        prepare(plan_);
        return 0;
      },
      -1);
}

std::int32_t Plugin::enqueue(nvinfer1::PluginTensorDesc const*, nvinfer1::PluginTensorDesc const*,
                             void const* const* inputs, void* const* outputs, void* workspace,
                             cudaStream_t stream) noexcept {
  return guarded(
      op_.type,
      [&] {
        run(plan_, inputs, outputs, workspace, stream);
        return 0;
      },
      -1);
}

nvinfer1::IPluginV3* Plugin::attachToContext(nvinfer1::IPluginResourceContext*) noexcept { return clone(); }

nvinfer1::PluginFieldCollection const* Plugin::getFieldsToSerialize() noexcept {
  return guarded(
      op_.type,
      [&]() -> nvinfer1::PluginFieldCollection const* {
        auto const count = op_.fields.size();
        integers_.assign(count, 0), reals_.assign(count, 0), serialised_.clear();
        for (std::size_t index = 0; index < count; ++index) {
          auto const& field = op_.fields[index];
          auto const value = fields_.at(field.name);
          integers_[index] = std::llround(value), reals_[index] = static_cast<float>(value);
          if (field.real) {
            serialised_.emplace_back(field.name.c_str(), &reals_[index], nvinfer1::PluginFieldType::kFLOAT32, 1);
          } else {
            serialised_.emplace_back(field.name.c_str(), &integers_[index], nvinfer1::PluginFieldType::kINT64, 1);
          }
        }
        collection_.nbFields = static_cast<std::int32_t>(count);
        collection_.fields = serialised_.data();
        return &collection_;
      },
      nullptr);
}

}  // namespace vp
