#include "error.hpp"

#include <cstdio>

namespace vp {

std::string printable(std::string_view text, std::size_t limit) {
  std::string out;
  for (const char letter : text.substr(0, limit)) {
    const auto code = static_cast<unsigned char>(letter);
    if (code < 0x20 || code >= 0x7f) {
      char escape[5];
      std::snprintf(escape, sizeof escape, "\\x%02x", static_cast<unsigned>(code));
      out += escape;
    } else {
      out += letter;
    }
  }
  return out + (text.size() > limit ? "..." : "");
}

std::string quote(std::string_view text, std::size_t limit) { return "'" + printable(text, limit) + "'"; }

std::string first_line(std::string_view text, std::size_t limit) {
  const auto start = text.find_first_not_of(" \t\r\n");
  if (start == std::string_view::npos) return "no message";
  text.remove_prefix(start);
  return printable(text.substr(0, text.find_first_of("\r\n")), limit);
}

}  // namespace vp
