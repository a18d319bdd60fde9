// Properties of this machine, as named in a bundle's requirements (engines/vp_engines/backends/aoti.py, tensorrt.py).
#pragma once

#include <set>
#include <string>
#include <string_view>
#include <vector>

namespace vp {

/// "linux-x86_64".
std::string platform();

/// Instruction sets of the processor, as spelled in /proc/cpuinfo; empty if Linux does not list them.
std::set<std::string> cpu_flags();

/// Compute capability of the first GPU, as "8.9"; "" without a GPU or driver. Only uses the driver library.
std::string gpu_capability();

/// First `parts` leading numbers of a version: "2.11.0+cu130" -> {2, 11}.
std::vector<int> version_numbers(std::string_view version, std::size_t parts);

}  // namespace vp
