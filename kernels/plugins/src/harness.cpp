// Drives a plugin without TensorRT: finds creators, creates plugins and runs them as an engine would.
//
// Called through ctypes by the tests and benchmarks/gpu. Functions return 0 on success; otherwise `harnessError` holds
// the reason. A "node" is one plugin instance.
#include <NvInfer.h>

#include <dlfcn.h>

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

using namespace nvinfer1;

std::string error, logged;

struct Log final : ILogger {
  void log(Severity, char const* line) noexcept override { logged += std::string(line) + "\n"; }
} log_;

struct Finder final : ILoggerFinder {
  ILogger* findLogger() override { return &log_; }
} finder;

// Constant sizes as IExprBuilder represents them.
struct Number final : IDimensionExpr, apiv::VDimensionExpr {
  explicit Number(std::int64_t given) : value(given) { mImpl = this; }
  bool isConstant() const override { return true; }
  std::int64_t getConstantValue() const override { return value; }
  bool isSizeTensor() const override { return false; }
  std::int64_t value;
};

struct Builder final : IExprBuilder, apiv::VExprBuilder {
  Builder() { mImpl = this; }
  IDimensionExpr const* constant(std::int64_t value) override {
    made.push_back(std::make_unique<Number>(value));
    return made.back().get();
  }
  IDimensionExpr const* operation(DimensionOperation how, IDimensionExpr const& a, IDimensionExpr const& b) override {
    auto const x = a.getConstantValue(), y = b.getConstantValue();
    switch (how) {
      case DimensionOperation::kSUM:
        return constant(x + y);
      case DimensionOperation::kPROD:
        return constant(x * y);
      default:
        throw std::runtime_error("an operation that this harness does not know");
    }
  }
  IDimensionExpr const* declareSizeTensor(std::int32_t, IDimensionExpr const&, IDimensionExpr const&) override {
    return nullptr;
  }
  std::vector<std::unique_ptr<Number>> made;
};

template <typename T>
T* part(IPluginV3* plugin, PluginCapabilityType type) {
  return static_cast<T*>(plugin->getCapabilityInterface(type));
}

struct Library {
  void* handle{};
  IPluginCreatorInterface* const* creators{};
  std::int32_t count{};
} library;

IPluginCreatorV3One* creatorAt(std::int32_t index) {
  return static_cast<IPluginCreatorV3One*>(library.creators[index]);
}

int failed(std::string const& why) {
  error = why;
  return 1;
}

}  // namespace

// A tensor: dtype as nvinfer1::DataType, sizes, data pointer.
struct HarnessTensor {
  std::int32_t type, rank;
  std::int64_t sizes[8];
  void* data;
};

namespace {

PluginTensorDesc descOf(HarnessTensor const& tensor) {
  PluginTensorDesc made{};
  made.type = static_cast<DataType>(tensor.type);
  made.format = TensorFormat::kLINEAR;
  made.dims.nbDims = tensor.rank;
  for (int axis = 0; axis < tensor.rank; ++axis) made.dims.d[axis] = tensor.sizes[axis];
  return made;
}

DynamicPluginTensorDesc rangeOf(HarnessTensor const& tensor) {
  auto const desc = descOf(tensor);
  return {desc, desc.dims, desc.dims, desc.dims};
}

std::vector<DynamicPluginTensorDesc> rangesOf(HarnessTensor const* tensors, std::int32_t count) {
  std::vector<DynamicPluginTensorDesc> made;
  for (std::int32_t each = 0; each < count; ++each) made.push_back(rangeOf(tensors[each]));
  return made;
}

}  // namespace

extern "C" {

char const* harnessError() { return error.c_str(); }

// Messages logged by the plugins since the last call.
char const* harnessLog() {
  static std::string said;
  said.swap(logged);
  logged.clear();
  return said.c_str();
}

int harnessOpen(char const* path) {
  library.handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
  if (library.handle == nullptr) return failed(dlerror());
  auto* get =
      reinterpret_cast<IPluginCreatorInterface* const* (*)(std::int32_t&)>(dlsym(library.handle, "getCreators"));
  auto* set = reinterpret_cast<void (*)(ILoggerFinder*)>(dlsym(library.handle, "setLoggerFinder"));
  if (get == nullptr || set == nullptr) return failed("no getCreators or no setLoggerFinder");
  set(&finder);
  library.creators = get(library.count);
  return 0;
}

int harnessCount() { return library.count; }
char const* harnessName(std::int32_t index) { return creatorAt(index)->getPluginName(); }
char const* harnessVersion(std::int32_t index) { return creatorAt(index)->getPluginVersion(); }
char const* harnessNamespace(std::int32_t index) { return creatorAt(index)->getPluginNamespace(); }
char const* harnessKind(std::int32_t index) { return library.creators[index]->getInterfaceInfo().kind; }
int harnessFieldCount(std::int32_t index) { return creatorAt(index)->getFieldNames()->nbFields; }
char const* harnessField(std::int32_t index, std::int32_t at) {
  return creatorAt(index)->getFieldNames()->fields[at].name;
}

// Creates a plugin, or returns null. `values` are 8 bytes each, interpreted by their PluginFieldType.
void* harnessCreate(char const* type, std::int32_t count, char const* const* names, std::int32_t const* types,
                    std::int64_t const* values, std::int32_t length) {
  for (std::int32_t index = 0; index < library.count; ++index) {
    if (std::string(creatorAt(index)->getPluginName()) != type) continue;
    std::vector<PluginField> fields;
    for (std::int32_t each = 0; each < count; ++each) {
      fields.emplace_back(names[each], &values[each], static_cast<PluginFieldType>(types[each]), length);
    }
    PluginFieldCollection const given{count, fields.data()};
    return creatorAt(index)->createPlugin("node", &given, TensorRTPhase::kBUILD);
  }
  error = std::string("no creator of ") + type;
  return nullptr;
}

void harnessDestroy(void* plugin) { delete static_cast<IPluginV3*>(plugin); }

void* harnessClone(void* plugin) { return static_cast<IPluginV3*>(plugin)->clone(); }

// Saves and reloads a plugin: its serialised fields create another one for the runtime phase.
void* harnessSerialised(void* plugin) {
  auto* made = static_cast<IPluginV3*>(plugin);
  auto const* fields = part<IPluginV3OneRuntime>(made, PluginCapabilityType::kRUNTIME)->getFieldsToSerialize();
  std::string const type = part<IPluginV3OneCore>(made, PluginCapabilityType::kCORE)->getPluginName();
  for (std::int32_t index = 0; index < library.count; ++index) {
    if (creatorAt(index)->getPluginName() == type) {
      return creatorAt(index)->createPlugin("node", fields, TensorRTPhase::kRUNTIME);
    }
  }
  return nullptr;
}

// Types and sizes of the plugin's outputs.
int harnessOutputs(void* plugin, std::int32_t inputs, HarnessTensor const* given, std::int32_t* outputs,
                   HarnessTensor* found) {
  auto* build = part<IPluginV3OneBuild>(static_cast<IPluginV3*>(plugin), PluginCapabilityType::kBUILD);
  auto const count = build->getNbOutputs();
  *outputs = count;
  std::vector<DataType> types, made(static_cast<std::size_t>(count));
  Builder builder;
  std::vector<DimsExprs> shapes, results(static_cast<std::size_t>(count));
  for (std::int32_t each = 0; each < inputs; ++each) {
    types.push_back(static_cast<DataType>(given[each].type));
    DimsExprs shape{};
    shape.nbDims = given[each].rank;
    for (int axis = 0; axis < shape.nbDims; ++axis) shape.d[axis] = builder.constant(given[each].sizes[axis]);
    shapes.push_back(shape);
  }
  if (build->getOutputDataTypes(made.data(), count, types.data(), inputs) != 0) return failed("no output types");
  if (build->getOutputShapes(shapes.data(), inputs, nullptr, 0, results.data(), count, builder) != 0) {
    return failed("no output shapes");
  }
  for (std::int32_t each = 0; each < count; ++each) {
    auto const& shape = results[static_cast<std::size_t>(each)];
    found[each].type = static_cast<std::int32_t>(made[static_cast<std::size_t>(each)]);
    found[each].rank = shape.nbDims;
    for (int axis = 0; axis < shape.nbDims; ++axis) found[each].sizes[axis] = shape.d[axis]->getConstantValue();
  }
  return 0;
}

// Whether the plugin supports these types, all linear; `format` is that of the tensor at `position`.
int harnessSupports(void* plugin, std::int32_t position, std::int32_t inputs, std::int32_t outputs,
                    std::int32_t const* types, std::int32_t format) {
  auto* build = part<IPluginV3OneBuild>(static_cast<IPluginV3*>(plugin), PluginCapabilityType::kBUILD);
  std::vector<DynamicPluginTensorDesc> tensors(static_cast<std::size_t>(inputs + outputs));
  for (std::size_t each = 0; each < tensors.size(); ++each) {
    tensors[each].desc.type = static_cast<DataType>(types[each]);
    tensors[each].desc.format = TensorFormat::kLINEAR;
  }
  tensors[static_cast<std::size_t>(position)].desc.format = static_cast<TensorFormat>(format);
  return build->supportsFormatCombination(position, tensors.data(), inputs, outputs) ? 1 : 0;
}

// Workspace size in bytes for these shapes; fails if the plugin does not support them.
int harnessConfigure(void* plugin, std::int32_t inputs, HarnessTensor const* given, std::int32_t outputs,
                     HarnessTensor const* found, std::int64_t* workspace) {
  auto* build = part<IPluginV3OneBuild>(static_cast<IPluginV3*>(plugin), PluginCapabilityType::kBUILD);
  auto const in = rangesOf(given, inputs), out = rangesOf(found, outputs);
  if (build->configurePlugin(in.data(), inputs, out.data(), outputs) != 0) return failed("not configured");
  *workspace = static_cast<std::int64_t>(build->getWorkspaceSize(in.data(), inputs, out.data(), outputs));
  return 0;
}

// Runs once, as an execution context does: attach, set shapes, enqueue.
int harnessRun(void* plugin, std::int32_t inputs, HarnessTensor const* given, std::int32_t outputs,
               HarnessTensor const* found, void* workspace, void* stream) {
  auto* runtime = part<IPluginV3OneRuntime>(static_cast<IPluginV3*>(plugin), PluginCapabilityType::kRUNTIME);
  std::unique_ptr<IPluginV3> attached(runtime->attachToContext(nullptr));
  if (attached == nullptr) return failed("not attached");
  runtime = part<IPluginV3OneRuntime>(attached.get(), PluginCapabilityType::kRUNTIME);
  std::vector<PluginTensorDesc> in, out;
  std::vector<void const*> from;
  std::vector<void*> to;
  for (std::int32_t each = 0; each < inputs; ++each) {
    in.push_back(descOf(given[each]));
    from.push_back(given[each].data);
  }
  for (std::int32_t each = 0; each < outputs; ++each) {
    out.push_back(descOf(found[each]));
    to.push_back(found[each].data);
  }
  if (runtime->onShapeChange(in.data(), inputs, out.data(), outputs) != 0) return failed("shapes refused");
  auto* on = static_cast<cudaStream_t>(stream);
  if (runtime->enqueue(in.data(), out.data(), from.data(), to.data(), workspace, on) != 0) return failed("not run");
  return 0;
}
}
