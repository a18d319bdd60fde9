// Compiled kernels, as described by the index of `python -m vp_kernels.aot` (docs/aot.md), and their selection.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace vp {

enum class Dtype { kFp32, kFp16, kBf16, kInt64, kInt32 };

// Size of one value in bytes.
constexpr std::size_t bytesOf(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFp16:
    case Dtype::kBf16:
      return 2;
    case Dtype::kInt64:
      return 8;
    default:
      return 4;
  }
}

// Sizes used in grids and limits, named as in the index's `shapes`.
struct Symbols {
  std::int64_t B{}, N{}, H{}, d{}, K{}, E{}, D{}, n{}, k{}, R{}, rows{};
};

// Compile-time argument of a kernel that distinguishes variants. Flags are 0 and 1.
struct Constant {
  std::string_view name;
  std::int64_t value;
};

// Supported range of one size, inclusive.
struct Range {
  std::int64_t Symbols::*symbol;
  std::string_view name;
  std::int64_t low, high;
};

enum class ParameterKind { kPointer, kInt32, kFloat, kHidden };

struct Parameter {
  std::string_view name;
  ParameterKind kind;
  int divisibleBy;  // guaranteed to the compiled code
};

template <typename T>
struct Span {
  T const* first{};
  std::size_t count{};
  T const* begin() const { return first; }
  T const* end() const { return first + count; }
};

struct Entry {
  std::string_view op, variant, kernel, entry;
  int sm;  // compute capability, 90 for 9.0
  Dtype dtype;
  Span<Constant> constants;
  Span<Range> shapes;
  Span<Parameter> parameters;
  std::int64_t (*grid[3])(Symbols const&);
  unsigned threads, shared;
  bool raiseLimit;  // `shared` exceeds the default limit of a launch
  unsigned char const* cubin;
  std::size_t cubinSize;
};

// All kernels in this library, generated from the index by embed.py.
Span<Entry> entries();

// Requested kernel and constants. An empty kernel name matches any kernel with these constants.
struct Query {
  std::string_view op, kernel;
  Dtype dtype;
  std::vector<Constant> constants;
};

// Describes what was found and what was expected, for a log.
struct Refused : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The kernel for a compute capability. Throws Refused, listing what is available.
Entry const& find(int sm, Query const& query, Symbols const& sizes);

// Compile-time argument of a kernel; must exist.
std::int64_t constantOf(Entry const& entry, std::string_view name);

char const* nameOf(Dtype dtype);

}  // namespace vp
