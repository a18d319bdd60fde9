// A small sound bundle in a folder of its own, which the tests then spoil. Its files are just bytes.
#pragma once

#include <gtest/gtest.h>

#include <filesystem>
#include <map>
#include <string>

#include "error.hpp"
#include "json.hpp"

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

  /// Write the manifest `document` with its digest made right: what an attacker can write.
  void forge(const Json& document) const;
  /// Write a file inside the bundle and nothing else.
  void put(const std::string& name, const std::string& content) const;
  Json document;  // of the sound manifest, without digest

 private:
  fs::path around_, path_;
  std::map<std::string, std::string> files_;
};

std::string slurp(const fs::path& path);

/// What `function` throws; fails where it throws nothing, or a message of more than one line.
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

/// Expect that `function` throws an Error of that status whose message holds `text`.
template <typename Function>
void expect_error(vp_status status, const std::string& text, const Function& function) {
  const Error error = error_of(function);
  EXPECT_EQ(error.status(), status) << error.what();
  EXPECT_NE(std::string(error.what()).find(text), std::string::npos) << "found: " << error.what() << "\nwanted: " << text;
}

}  // namespace vp::testing
