#include "machine.hpp"

#include <dlfcn.h>
#include <sys/utsname.h>

#include <cctype>
#include <fstream>
#include <memory>
#include <sstream>

namespace vp {

std::string platform() {
  utsname names{};
  if (::uname(&names) != 0) return "unknown";
  std::string text = std::string(names.sysname) + "-" + names.machine;
  for (auto& letter : text) letter = static_cast<char>(std::tolower(static_cast<unsigned char>(letter)));
  return text;
}

std::set<std::string> cpu_flags() {
  std::ifstream file("/proc/cpuinfo");
  std::string line;
  while (std::getline(file, line)) {
    if (line.rfind("flags", 0) != 0 && line.rfind("Features", 0) != 0) continue;
    std::istringstream words(line.substr(line.find(':') + 1));
    std::set<std::string> flags;
    for (std::string word; words >> word;) flags.insert(word);
    return flags;
  }
  return {};
}

std::string gpu_capability() {
  const std::unique_ptr<void, int (*)(void*)> driver(::dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL), ::dlclose);
  if (!driver) return "";
  // POSIX guarantees that a pointer from dlsym can be cast to a function.
  const auto init = reinterpret_cast<int (*)(unsigned)>(::dlsym(driver.get(), "cuInit"));
  const auto get = reinterpret_cast<int (*)(int*, int)>(::dlsym(driver.get(), "cuDeviceGet"));
  const auto attribute = reinterpret_cast<int (*)(int*, int, int)>(::dlsym(driver.get(), "cuDeviceGetAttribute"));
  if (init == nullptr || get == nullptr || attribute == nullptr) return "";
  int device = 0, major = 0, minor = 0;
  // 75 and 76 are CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR; every call returns 0 on success.
  if (init(0) != 0 || get(&device, 0) != 0 || attribute(&major, 75, device) != 0 ||
      attribute(&minor, 76, device) != 0) {
    return "";
  }
  return std::to_string(major) + "." + std::to_string(minor);
}

std::vector<int> version_numbers(std::string_view version, std::size_t parts) {
  std::vector<int> numbers;
  while (numbers.size() < parts && !version.empty() && version[0] >= '0' && version[0] <= '9') {
    std::size_t end = 0;
    int number = 0;
    for (; end < version.size() && end < 9 && version[end] >= '0' && version[end] <= '9'; ++end) {
      number = 10 * number + (version[end] - '0');
    }
    numbers.push_back(number);
    if (end >= version.size() || version[end] != '.') break;
    version.remove_prefix(end + 1);
  }
  return numbers;
}

}  // namespace vp
