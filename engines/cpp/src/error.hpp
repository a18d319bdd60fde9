// The library's only exception; the C API converts it to a status and a line of text.
#pragma once

#include <vp_engine/vp_engine.h>

#include <stdexcept>
#include <string>
#include <string_view>

namespace vp {

/// Message of what was found, what was expected and what to do, like VpError of vp_engines.
class Error : public std::runtime_error {
 public:
  Error(vp_status status, const std::string& found, const std::string& expected = "", const std::string& fix = "")
      : std::runtime_error(found + (expected.empty() ? "" : "; expected " + expected) +
                           (fix.empty() ? "" : "; " + fix)),
        status_(status) {}

  vp_status status() const noexcept { return status_; }

 private:
  vp_status status_;
};

inline Error corrupt(const std::string& found, const std::string& expected = "") {
  return Error(VP_ERROR_BUNDLE_CORRUPT, found, expected, "copy or export the bundle again");
}

/// Untrusted text for use in a message: shortened, without control characters.
std::string printable(std::string_view text, std::size_t limit = 100);

/// `shown` in quotes.
std::string quote(std::string_view text, std::size_t limit = 100);

/// First non-empty line, shortened: messages of other libraries come with stack traces.
std::string first_line(std::string_view text, std::size_t limit = 400);

}  // namespace vp
