// What this machine is, as the requirements of a bundle name it (engines/vp_engines/backends/aoti.py, tensorrt.py).
#pragma once

#include <set>
#include <string>
#include <string_view>
#include <vector>

namespace vp {

/// "linux-x86_64".
std::string platform();

/// The processor's instruction sets, as /proc/cpuinfo spells them; empty where Linux does not tell.
std::set<std::string> cpu_flags();

/// Compute capability of the first GPU, as "8.9"; "" where there is no GPU or no driver. Asks the driver library only.
std::string gpu_capability();

/// The first `parts` leading numbers of a version: "2.11.0+cu130" -> {2, 11}.
std::vector<int> version_numbers(std::string_view version, std::size_t parts);

}  // namespace vp
