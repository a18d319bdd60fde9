// One compiled kernel, as the index of `python -m vp_kernels.aot` describes it (docs/aot.md), and how one is chosen.
#pragma once

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace vp {

enum class Dtype { kFp32, kFp16, kBf16, kInt64, kInt32 };

// Bytes of one value.
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

// The sizes that grids and limits are written in: the names are those of the index's `shapes`.
struct Symbols {
  std::int64_t B{}, N{}, H{}, d{}, K{}, E{}, D{}, n{}, k{}, R{}, rows{};
};

// A compile-time argument of the kernel that tells variants apart. Flags are 0 and 1.
struct Constant {
  std::string_view name;
  std::int64_t value;
};

// What the variant takes of one size, both ends included.
struct Range {
  std::int64_t Symbols::*symbol;
  std::string_view name;
  std::int64_t low, high;
};

enum class ParameterKind { kPointer, kInt32, kFloat, kHidden };

struct Parameter {
  std::string_view name;
  ParameterKind kind;
  int divisibleBy;  // a promise that the compiled code relies on
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
  bool raiseLimit;  // `shared` is above what a launch gets unasked
  unsigned char const* cubin;
  std::size_t cubinSize;
};

// All kernels of this library, generated from the index by embed.py.
Span<Entry> entries();

// What a kernel is asked for; an empty name of the kernel: any that has these constants.
struct Query {
  std::string_view op, kernel;
  Dtype dtype;
  std::vector<Constant> constants;
};

// Says what was found and what was expected, for a log.
struct Refused : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The kernel for a compute capability; throws Refused, which says what there is instead.
Entry const& find(int sm, Query const& query, Symbols const& sizes);

// A compile-time argument of a kernel, which has it.
std::int64_t constantOf(Entry const& entry, std::string_view name);

char const* nameOf(Dtype dtype);

}  // namespace vp
