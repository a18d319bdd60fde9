// A small valid bundle in a folder of its own, for tests to modify. Its files are arbitrary bytes.
#pragma once

#include <gtest/gtest.h>

#include <filesystem>
#include <map>
#include <string>

#include "error.hpp"

namespace vp::testing {

namespace fs = std::filesystem;

class Sample {
 public:
  explicit Sample(const std::string& engine = "aoti");
  Sample(const Sample&) = delete;
  Sample& operator=(const Sample&) = delete;
  ~Sample();

  /// A folder beside the bundle, removed with it.
  const fs::path& around() const { return around_; }
  const fs::path& path() const { return path_; }
  const std::map<std::string, std::string>& files() const { return files_; }

  /// The manifest after a JSON patch (RFC 6902), with a correct digest, as an attacker can write.
  std::string patched(const std::string& patch) const;
  void forge(const std::string& patch) const { put("manifest.json", patched(patch)); }
  /// Patch that adds a file to the list.
  static std::string listing(const std::string& path, const std::string& content);
  /// Write a file inside the bundle and nothing else.
  void put(const std::string& name, const std::string& content) const;

 private:
  fs::path around_, path_;
  std::map<std::string, std::string> files_;
  std::string document_;  // the valid manifest, without digest
};

/// {"op": "replace"} or "add" of one member; `value` is JSON. The pointer is that of RFC 6901.
std::string set(const std::string& pointer, const std::string& value);
std::string drop(const std::string& pointer);
/// `text` as a JSON string.
std::string text(const std::string& content);

std::string slurp(const fs::path& path);

/// Message of the error thrown by `function`; fails if there is none, or it has more than one line.
template <typename Function>
Error error_of(const Function& function) {
  try {
    function();
  } catch (const Error& error) {
    EXPECT_EQ(std::string(error.what()).find('\n'), std::string::npos) << error.what();
    EXPECT_LT(std::string(error.what()).size(), 900U);
    return error;
  }
  ADD_FAILURE() << "nothing was thrown";
  return Error(VP_OK, "nothing");
}

/// Expect `function` to throw an Error with this status and a message that contains `text`.
template <typename Function>
void expect_error(vp_status status, const std::string& text, const Function& function) {
  const Error error = error_of(function);
  EXPECT_EQ(error.status(), status) << error.what();
  EXPECT_NE(std::string(error.what()).find(text), std::string::npos)
      << "found: " << error.what() << "\nwanted: " << text;
}

}  // namespace vp::testing
