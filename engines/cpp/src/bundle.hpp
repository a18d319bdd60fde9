// Read a bundle with every file verified. Mirrors engines/vp_engines/bundle.py.
#pragma once

#include <functional>
#include <map>
#include <string>

#include "file.hpp"
#include "manifest.hpp"

namespace vp {

struct Bundle {
  Manifest manifest;
  std::map<std::string, SealedFile> contents;  // path inside the bundle -> the very bytes that were hashed
};

/// Verify every file of the bundle at `path` and keep those that `keep` wants (the others are only hashed).
/// Throws Error: VP_ERROR_BUNDLE, VP_ERROR_BUNDLE_CORRUPT or VP_ERROR_BUNDLE_INCOMPATIBLE.
Bundle read_bundle(const std::string& path, const std::function<bool(const std::string& path)>& keep);

namespace testing {
/// Called, where a test sets it, between the listing of a bundle and the reading of its files.
extern std::function<void()> after_listing;
}  // namespace testing

}  // namespace vp
