#include "json.hpp"

#include <charconv>
#include <set>
#include <stdexcept>
#include <vector>

#include "error.hpp"

namespace vp {
namespace {

/// SAX checks for duplicate keys, which the parsed document would not show, and for nesting too deep to traverse.
class Guard {
 public:
  bool operator()(int depth, Json::parse_event_t event, Json& parsed) {
    using Event = Json::parse_event_t;
    if ((event == Event::object_start || event == Event::array_start || event == Event::value) &&
        depth >= kMaxJsonDepth) {
      throw std::invalid_argument("is nested too deeply; expected at most " + std::to_string(kMaxJsonDepth) +
                                  " levels");
    }
    if (event == Event::object_start) keys_.emplace_back();
    if (event == Event::object_end) keys_.pop_back();
    if (event == Event::key && !keys_.back().insert(parsed.get_ref<const std::string&>()).second) {
      throw std::invalid_argument("cannot be read as JSON (a key is given twice in one object)");
    }
    return true;
  }

 private:
  std::vector<std::set<std::string>> keys_;
};

/// Python's repr of a float: shortest round-trip digits, with an exponent below 1e-4 and from 1e16 on.
std::string float_text(double value) {
  char buffer[40];
  const auto end = std::to_chars(buffer, buffer + sizeof buffer, value, std::chars_format::scientific).ptr;
  const std::string_view text(buffer, static_cast<std::size_t>(end - buffer));  // [-]d[.ddd]e+dd
  const auto e = text.find('e');
  const int exponent = std::stoi(std::string(text.substr(e + 1)));
  const bool negative = text[0] == '-';
  std::string digits;
  for (const char letter : text.substr(0, e)) {
    if (letter >= '0' && letter <= '9') digits += letter;
  }
  std::string out = negative ? "-" : "";
  if (exponent < -4 || exponent >= 16) return std::string(text);  // Python also writes at least two exponent digits
  if (exponent < 0) return out + "0." + std::string(static_cast<std::size_t>(-exponent - 1), '0') + digits;
  const auto whole = static_cast<std::size_t>(exponent) + 1;
  if (digits.size() <= whole) return out + digits + std::string(whole - digits.size(), '0') + ".0";
  return out + digits.substr(0, whole) + "." + digits.substr(whole);
}

void write(const Json& value, std::size_t indent, std::string& out) {
  if (value.is_number_float()) {
    out += float_text(value.get<double>());
  } else if (!value.is_structured() || value.empty()) {
    out += value.dump();  // UTF-8 unescaped, with Python's escape sequences
  } else {
    const bool object = value.is_object();
    const std::string line = "\n" + std::string(indent + 2, ' ');
    const char* separator = object ? "{" : "[";
    for (auto item = value.begin(); item != value.end(); ++item) {  // sorted by bytes, hence by code points
      out += separator + line;
      if (object) out += Json(item.key()).dump() + ": ";
      write(*item, indent + 2, out);
      separator = ",";
    }
    out += "\n" + std::string(indent, ' ') + (object ? "}" : "]");
  }
}

}  // namespace

Json parse_json(std::string_view text) {
  if (text.substr(0, 3) == "\xef\xbb\xbf") throw std::invalid_argument("cannot be read as JSON (a byte order mark)");
  Json document;
  try {
    document = Json::parse(text.begin(), text.end(), Guard());
  } catch (const Json::exception& error) {
    // drop the number in "[json.exception.parse_error.101] parse error at ..."
    const std::string message = error.what();
    throw std::invalid_argument("cannot be read as JSON (" + printable(message.substr(message.find(']') + 2), 200) +
                                ")");
  }
  if (!document.is_object()) throw std::invalid_argument("holds no object; expected a JSON object");
  return document;
}

std::string canonical_json(const Json& document) {
  std::string out;
  write(document, 0, out);
  return out + "\n";
}

}  // namespace vp
