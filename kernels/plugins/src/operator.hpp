// The operators, independent of TensorRT: inputs, outputs, and the kernels launched for given shapes.
#pragma once

#include "entry.hpp"

#include <cmath>
#include <functional>
#include <map>
#include <string>
#include <string_view>
#include <vector>

namespace vp {

using Shape = std::vector<std::int64_t>;

struct Tensor {
  Dtype dtype{};
  Shape shape;
};

// Attributes of a node, complete once the node is created.
using Fields = std::map<std::string, double, std::less<>>;

// Value passed for one kernel parameter.
struct Argument {
  enum class From { kInput, kOutput, kWorkspace, kNumber } from;
  std::size_t which{};  // index of an input or output, or byte offset in the workspace
  double number{};
};

inline Argument input(std::size_t which) { return {Argument::From::kInput, which, 0}; }
inline Argument output(std::size_t which) { return {Argument::From::kOutput, which, 0}; }
template <typename T>
Argument number(T value) {
  return {Argument::From::kNumber, 0, static_cast<double>(value)};
}
// Stands in for an optional tensor: the kernel never reads it, but its parameter is a pointer.
inline Argument absent() { return input(0); }

// One launch. Names are those of the kernel's parameters in the index.
struct Call {
  Entry const* entry{};
  Symbols sizes;
  std::map<std::string_view, Argument> arguments;
};

// Work of a node at given shapes: launches in order, and the scratch memory they share.
struct Plan {
  std::vector<Call> calls;
  std::size_t workspace{};  // bytes

  // Reserves scratch memory, aligned like device memory, so that every `divisibleBy` holds.
  Argument scratch(std::size_t values, Dtype dtype) {
    auto const at = workspace;
    workspace = (workspace + values * bytesOf(dtype) + 255) / 256 * 256;
    return {Argument::From::kWorkspace, at, 0};
  }
};

// Dtype of an input or output: fixed, that of the tokens (x, qkv), or that of match_merge's metric. The latter two are
// fp32, fp16 or bf16.
enum class Type { kTokens, kMetric, kFp32, kInt64 };

struct Port {
  Type type;
  int rank;
};

// One size of an output: a product of input sizes (input, axis), plus constants and further sizes.
struct Size {
  std::vector<std::pair<int, int>> times;
  std::int64_t plus{};
  std::vector<std::pair<int, int>> added{};
};

struct Result {
  Type type;
  std::vector<Size> shape;
};

struct Field {
  std::string name;
  bool real;  // float32, else integer
  double low, high;
};

// An operator type of domain `vp`, e.g. "MatchMergeSize".
struct Operator {
  std::string type;
  std::vector<Field> fields;
  std::vector<Port> inputs;
  // Outputs; their sizes may depend on the attributes.
  std::function<std::vector<Result>(Fields const&)> outputs;
  // Launches at given shapes on a compute capability. Throws Refused if no kernel supports them.
  std::function<Plan(int sm, Fields const&, std::vector<Tensor> const&)> plan;
};

// All operator types, in a fixed order.
std::vector<Operator> const& operators();

// One file per operator.
void addAttention(std::vector<Operator>& to);
void addGatherNorm(std::vector<Operator>& to);
void addSelect(std::vector<Operator>& to);
void addMergeRows(std::vector<Operator>& to);
void addMatchMerge(std::vector<Operator>& to);
void addDensityMerge(std::vector<Operator>& to);

// Launch of merge_rows, also the second half of match_merge. `arguments` without the sizes.
Call mergeRows(int sm, Tensor const& x, std::int64_t rows, std::int64_t sources, bool hasSourceWeight,
               bool hasKeepWeight, std::map<std::string_view, Argument> arguments);

// Helpers for output sizes.
inline Size same(int tensor, int axis) { return {{{tensor, axis}}, 0, {}}; }
inline Size fixed(double value) { return {{}, std::llround(value), {}}; }

constexpr std::int64_t kMaxTokens = 1024;
constexpr double kMaxCount = 1 << 20;
constexpr double kLargest = 3e38;  // float32

inline Field count(char const* name, double low = 0, double high = kMaxCount) { return {name, false, low, high}; }

inline std::int64_t at(Fields const& fields, char const* name) { return std::llround(fields.find(name)->second); }

inline std::int64_t cdiv(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Formats a shape as "[8, 197, 384]".
std::string text(Shape const& shape);

// Throws Refused for an unsupported shape.
inline void require(bool holds, std::string const& found, std::string const& expected) {
  if (!holds) throw Refused(found + "; expected " + expected);
}

}  // namespace vp
