// A libcuda.so.1 for machines without a GPU: checks calls of the driver and forwards every launch.
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

namespace {

struct Kernel {
  void const* image;
  std::string name;
  int dynamicShared;
};

using OnLaunch = int (*)(void const* image, char const* name, unsigned const* grid, unsigned threads, unsigned shared,
                         int raisedTo, void* stream, void** parameters);

OnLaunch onLaunch = nullptr;
int capability = 90, failing = 0, loads = 0, shared = 232448;
std::vector<std::unique_ptr<Kernel>> kernels;

constexpr int kInvalidValue = 1, kInvalidImage = 200, kNotFound = 500;

}  // namespace

extern "C" {

// Functions for the tests.
void fakeOnLaunch(OnLaunch given) { onLaunch = given; }
void fakeDevice(int sm) { capability = sm; }
void fakeShared(int bytes) { shared = bytes; }
void fakeFailure(int code) { failing = code; }
int fakeLoads() { return loads; }

// Driver functions.
int cuInit(unsigned) { return 0; }
int cuGetErrorName(int error, char const** name) {
  *name = error == 719 ? "CUDA_ERROR_LAUNCH_FAILED" : error == kInvalidImage ? "CUDA_ERROR_INVALID_IMAGE" : nullptr;
  return *name == nullptr;
}
int cuCtxGetDevice(int* device) {
  *device = 0;
  return 0;
}
int cuDeviceGetAttribute(int* value, int which, int) {
  switch (which) {
    case 75:
      *value = capability / 10;
      return 0;
    case 76:
      *value = capability % 10;
      return 0;
    case 97:
      *value = shared;
      return 0;
    default:
      return kInvalidValue;
  }
}
int cuLibraryLoadData(void** library, void const* image, void*, void**, unsigned, void*, void**, unsigned) {
  if (std::memcmp(image,
                  "\x7f"
                  "ELF",
                  4) != 0)
    return kInvalidImage;
  ++loads;
  *library = const_cast<void*>(image);
  return 0;
}
int cuLibraryGetKernel(void** kernel, void* library, char const* name) {
  if (std::strlen(name) == 0) return kNotFound;
  kernels.push_back(std::make_unique<Kernel>(Kernel{library, name, 0}));
  *kernel = kernels.back().get();
  return 0;
}
int cuKernelSetAttribute(int attribute, int value, void* kernel, int) {
  if (attribute != 8) return kInvalidValue;
  static_cast<Kernel*>(kernel)->dynamicShared = value;
  return 0;
}
int cuLaunchKernel(void* kernel, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned, unsigned,
                   unsigned shared, void* stream, void** parameters, void** extra) {
  if (failing != 0) return failing;
  if (extra != nullptr || onLaunch == nullptr) return kInvalidValue;
  auto const& known = *static_cast<Kernel*>(kernel);
  unsigned const grid[3] = {x, y, z};
  return onLaunch(known.image, known.name.c_str(), grid, threads, shared, known.dynamicShared, stream, parameters);
}
}
