// Interface of an engine backend: open from verified content, run a batch. One file in backends/ per engine.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "file.hpp"
#include "manifest.hpp"

namespace vp {

class Runner {
 public:
  Runner() = default;
  Runner(const Runner&) = delete;
  Runner& operator=(const Runner&) = delete;
  virtual ~Runner() = default;

  /// Run one batch; thread-safe. Buffers are in the manifest's order and of matching sizes.
  /// A null output is skipped. Throws Error.
  virtual void run(const std::vector<const void*>& inputs, std::int64_t batch, const std::vector<void*>& outputs) = 0;
};

struct OpenRequest {
  const Manifest& manifest;
  const Variant& variant;
  std::map<std::string, SealedFile> contents;  // verified files of the variant
  int threads = 0;                             // 0: the runtime's default
  int runners = 1;
};

using OpenFunction = std::unique_ptr<Runner> (*)(OpenRequest request);

#ifdef VP_ENGINE_AOTI
std::unique_ptr<Runner> open_aoti(OpenRequest request);
#endif
#ifdef VP_ENGINE_TENSORRT
std::unique_ptr<Runner> open_tensorrt(OpenRequest request);
#endif

/// A requirement as text; "" if it is absent or not a string.
std::string requirement(const Variant& variant, const char* name);

/// Shape of a tensor for a batch size.
std::vector<std::int64_t> shape_of(const Tensor& tensor, std::int64_t batch);

std::size_t bytes_of(const Tensor& tensor, std::int64_t batch);

}  // namespace vp
