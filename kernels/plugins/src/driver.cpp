#include "driver.hpp"

#include <dlfcn.h>

#include <map>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <utility>

namespace vp {
namespace {

// The driver's types and constants (cuda.h). Its ABI is stable, so no CUDA toolkit is needed to build.
using Result = int;
using Device = int;
using Handle = void*;
constexpr int kMajor = 75, kMinor = 76;      // CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, _MINOR
constexpr int kMostSharedAttribute = 97;     // CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
constexpr int kDynamicSharedOfFunction = 8;  // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES

struct Driver {
  Result (*init)(unsigned);
  Result (*errorName)(Result, char const**);
  Result (*contextDevice)(Device*);
  Result (*deviceAttribute)(int*, int, Device);
  // Libraries (CUDA 12) are independent of contexts: a kernel handle is valid in each.
  Result (*libraryLoad)(Handle*, void const*, void*, void**, unsigned, void*, void**, unsigned);
  Result (*libraryKernel)(Handle*, Handle, char const*);
  Result (*kernelSet)(int, int, Handle, Device);
  Result (*launchKernel)(Handle, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, unsigned, Handle, void**,
                         void**);
};

template <typename F>
void take(void* library, char const* name, F& to) {
  to = reinterpret_cast<F>(dlsym(library, name));
  if (to == nullptr) {
    throw Refused(std::string("the NVIDIA driver has no ") + name + "; expected one for CUDA 12 or later");
  }
}

Driver const& driver() {
  static Driver const found = [] {
    void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) throw Refused("no NVIDIA driver here (libcuda.so.1); expected one to run kernels");
    Driver made{};
    take(library, "cuInit", made.init);
    take(library, "cuGetErrorName", made.errorName);
    take(library, "cuCtxGetDevice", made.contextDevice);
    take(library, "cuDeviceGetAttribute", made.deviceAttribute);
    take(library, "cuLibraryLoadData", made.libraryLoad);
    take(library, "cuLibraryGetKernel", made.libraryKernel);
    take(library, "cuKernelSetAttribute", made.kernelSet);
    take(library, "cuLaunchKernel", made.launchKernel);
    if (made.init(0) != 0) throw Refused("the NVIDIA driver finds no device; expected one to run kernels");
    return made;
  }();
  return found;
}

void check(Result result, std::string const& what) {
  if (result == 0) return;
  char const* name = nullptr;
  driver().errorName(result, &name);
  throw Refused(what + ": " + (name == nullptr ? "error " + std::to_string(result) : name));
}

Device currentDevice() {
  Device device{};
  check(driver().contextDevice(&device), "asking for the current device");
  return device;
}

int attribute(int which, Device device) {
  int value{};
  check(driver().deviceAttribute(&value, which, device), "asking what the device can do");
  return value;
}

// Loaded kernels, by device. Never unloaded.
class Loaded {
 public:
  Handle of(Entry const& entry) {
    auto const key = std::make_pair(&entry, currentDevice());
    {
      std::shared_lock<std::shared_mutex> reading(mutex_);
      auto const found = kernels_.find(key);
      if (found != kernels_.end()) return found->second;
    }
    std::unique_lock<std::shared_mutex> writing(mutex_);
    auto const found = kernels_.find(key);  // another thread may have loaded it
    return found != kernels_.end() ? found->second : kernels_.emplace(key, read(entry, key.second)).first->second;
  }

 private:
  static Handle read(Entry const& entry, Device device) {
    std::string const name(entry.variant);
    if (entry.raiseLimit) {
      auto const most = attribute(kMostSharedAttribute, device);
      if (static_cast<int>(entry.shared) > most) {
        throw Refused("kernel " + name + " takes " + std::to_string(entry.shared) +
                      " bytes of shared memory; expected at most the device's " + std::to_string(most));
      }
    }
    Handle library{}, kernel{};
    check(driver().libraryLoad(&library, entry.cubin, nullptr, nullptr, 0, nullptr, nullptr, 0), "loading " + name);
    check(driver().libraryKernel(&kernel, library, std::string(entry.entry).c_str()), "finding " + name);
    if (entry.raiseLimit) {
      check(driver().kernelSet(kDynamicSharedOfFunction, static_cast<int>(entry.shared), kernel, device),
            "giving " + name + " its shared memory");
    }
    return kernel;
  }

  std::shared_mutex mutex_;
  std::map<std::pair<Entry const*, Device>, Handle> kernels_;
};

Loaded& loaded() {
  static Loaded all;
  return all;
}

}  // namespace

int currentCapability() {
  auto const device = currentDevice();
  return 10 * attribute(kMajor, device) + attribute(kMinor, device);
}

void load(Entry const& entry) { loaded().of(entry); }

void launch(Entry const& entry, unsigned const (&grid)[3], void* stream, void** arguments) {
  check(driver().launchKernel(loaded().of(entry), grid[0], grid[1], grid[2], entry.threads, 1, 1, entry.shared, stream,
                              arguments, nullptr),
        "launching " + std::string(entry.variant));
}

}  // namespace vp
