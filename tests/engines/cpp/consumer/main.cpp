// Uses the header from C++, together with std::filesystem: libtorch.so contains its own copy of it, which must not
// interfere.
#include <vp_engine/vp_engine.h>

#include <cstdio>
#include <filesystem>

int main() {
  std::error_code ignored;
  std::filesystem::remove_all("no such folder", ignored);
  std::puts(vp_engine_backends());
  return vp_engine_api_version() == VP_ENGINE_API_VERSION ? 0 : 1;
}
