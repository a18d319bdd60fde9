// Read a bundle, verifying every file. Mirrors engines/vp_engines/bundle.py.
#pragma once

#include <functional>
#include <map>
#include <string>

#include "file.hpp"
#include "manifest.hpp"

namespace vp {

struct Bundle {
  Manifest manifest;
  std::map<std::string, SealedFile> contents;  // path inside the bundle -> the bytes that were hashed
};

/// Verify every file of the bundle at `path` and keep those selected by `keep` (the others are only hashed).
/// Throws Error: VP_ERROR_BUNDLE, VP_ERROR_BUNDLE_CORRUPT or VP_ERROR_BUNDLE_INCOMPATIBLE.
Bundle read_bundle(const std::string& path, const std::function<bool(const std::string& path)>& keep);

namespace testing {
/// Test hook, called between listing a bundle and reading its files.
extern std::function<void()> after_listing;
}  // namespace testing

}  // namespace vp
