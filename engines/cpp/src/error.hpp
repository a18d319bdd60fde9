// The one exception of the library; the C API turns it into a status and a line of text.
#pragma once

#include <vp_engine/vp_engine.h>

#include <stdexcept>
#include <string>
#include <string_view>

namespace vp {

/// Says what was found, what was expected and what to do, as VpError of vp_engines does.
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

/// A stranger's text for a message: shortened, and with nothing in it that a terminal would act on.
std::string printable(std::string_view text, std::size_t limit = 100);

/// The same in quotes.
std::string quote(std::string_view text, std::size_t limit = 100);

/// The first line with something in it, shortened: other libraries' messages come with stack traces.
std::string first_line(std::string_view text, std::size_t limit = 400);

}  // namespace vp
