#include "run.hpp"

#include "driver.hpp"

#include <array>
#include <limits>

namespace vp {
namespace {

constexpr std::size_t kMostParameters = 32;

union Value {
  std::uint64_t pointer;
  std::int32_t integer;
  float real;
};

[[noreturn]] void broken(Entry const& entry, Parameter const& parameter, std::string const& what) {
  throw Refused("kernel " + std::string(entry.variant) + ": " + std::string(parameter.name) + " " + what);
}

// Argument of a parameter, checked against the guarantees that the compiled code relies on.
Value valueOf(Entry const& entry, Parameter const& parameter, Argument const& argument, void const* const* inputs,
              void* const* outputs, void* workspace) {
  Value value{};
  if (parameter.kind == ParameterKind::kPointer) {
    switch (argument.from) {
      case Argument::From::kInput:
        value.pointer = reinterpret_cast<std::uint64_t>(inputs[argument.which]);
        break;
      case Argument::From::kOutput:
        value.pointer = reinterpret_cast<std::uint64_t>(outputs[argument.which]);
        break;
      case Argument::From::kWorkspace:
        value.pointer = reinterpret_cast<std::uint64_t>(workspace) + argument.which;
        break;
      case Argument::From::kNumber:
        broken(entry, parameter, "is a pointer; given a number");
    }
    // A tensor without elements may be null.
    if (value.pointer % static_cast<unsigned>(parameter.divisibleBy) != 0) {
      broken(entry, parameter, "is not a multiple of " + std::to_string(parameter.divisibleBy) + " bytes");
    }
    return value;
  }
  if (argument.from != Argument::From::kNumber) broken(entry, parameter, "is a number; given a tensor");
  if (parameter.kind == ParameterKind::kFloat) {
    value.real = static_cast<float>(argument.number);
    return value;
  }
  auto const whole = static_cast<std::int64_t>(argument.number);
  if (whole < 0 || whole > std::numeric_limits<std::int32_t>::max()) {
    broken(entry, parameter, "= " + std::to_string(whole) + "; expected 0 to 2147483647");
  }
  if (whole % parameter.divisibleBy != 0) {
    broken(entry, parameter,
           "= " + std::to_string(whole) + " is not a multiple of " + std::to_string(parameter.divisibleBy));
  }
  value.integer = static_cast<std::int32_t>(whole);
  return value;
}

}  // namespace

void prepare(Plan const& plan) {
  for (Call const& call : plan.calls) load(*call.entry);
}

void run(Plan const& plan, void const* const* inputs, void* const* outputs, void* workspace, void* stream) {
  for (Call const& call : plan.calls) {
    Entry const& entry = *call.entry;
    std::array<Value, kMostParameters> values{};
    std::array<void*, kMostParameters> pointers{};
    if (entry.parameters.count > kMostParameters) throw Refused("kernel with too many parameters");
    std::size_t index = 0;
    for (Parameter const& parameter : entry.parameters) {
      if (parameter.kind != ParameterKind::kHidden) {  // Triton's own parameters stay null
        auto const found = call.arguments.find(parameter.name);
        if (found == call.arguments.end()) broken(entry, parameter, "is unknown to this library");
        values[index] = valueOf(entry, parameter, found->second, inputs, outputs, workspace);
      }
      pointers[index] = &values[index];
      ++index;
    }
    unsigned grid[3];
    for (int axis = 0; axis < 3; ++axis) {
      auto const size = entry.grid[axis](call.sizes);
      if (size < 1 || size > (axis == 0 ? 2147483647 : 65535)) {
        throw Refused("a grid of " + std::to_string(size) + " programs for " + std::string(entry.variant));
      }
      grid[axis] = static_cast<unsigned>(size);
    }
    launch(entry, grid, stream, pointers.data());
  }
}

}  // namespace vp
