#include "fields.hpp"

#include <algorithm>
#include <cmath>

#include "error.hpp"
#include "manifest.hpp"

namespace vp {
namespace {

std::size_t characters(const std::string& text) {  // counts UTF-8 code points
  return static_cast<std::size_t>(
      std::count_if(text.begin(), text.end(), [](char letter) { return (letter & 0xC0) != 0x80; }));
}

const Json kNull;

}  // namespace

void Field::refuse(const std::string& expected) const {
  std::string found = value_.is_structured() ? std::string("an ") + value_.type_name() : value_.dump();
  throw corrupt(std::string(kManifestName) + ": " + printable(where_, 200) + " is " + printable(found, 60), expected);
}

const std::string& Field::text(std::size_t most) const {
  const auto* text = value_.get_ptr<const std::string*>();
  if (text == nullptr || characters(*text) > most) refuse("text of at most " + std::to_string(most) + " characters");
  return *text;
}

const std::string& Field::name() const {
  const auto* text = value_.get_ptr<const std::string*>();
  const auto control = [](char letter) { return static_cast<unsigned char>(letter) < 0x20 || letter == 0x7f; };
  if (text == nullptr || text->empty() || characters(*text) > 200 || std::any_of(text->begin(), text->end(), control)) {
    refuse("1 to 200 characters without control characters");
  }
  return *text;
}

const std::string& Field::one_of(std::initializer_list<std::string_view> words) const {
  const auto* text = value_.get_ptr<const std::string*>();
  if (text == nullptr || std::find(words.begin(), words.end(), *text) == words.end()) {
    std::string expected;
    for (const auto word : words) expected += (expected.empty() ? "" : " or ") + quote(word);
    refuse(expected);
  }
  return *text;
}

const std::string& Field::sha256() const {
  const auto* text = value_.get_ptr<const std::string*>();
  if (text == nullptr || text->size() != 64 || text->find_first_not_of("0123456789abcdef") != std::string::npos) {
    refuse("64 hexadecimal digits");
  }
  return *text;
}

const std::string& Field::path() const {
  const auto* text = value_.get_ptr<const std::string*>();
  if (text == nullptr) refuse("a path");
  if (!safe_path(*text)) {
    throw corrupt(std::string(kManifestName) + ": " + where_ + ": unsafe path " + quote(*text),
                  "a relative path, its parts of letters, digits and _ . + - only");
  }
  return *text;
}

std::int64_t Field::whole(std::int64_t least, std::int64_t most) const {
  const bool fits = value_.is_number_integer() &&
                    !(value_.is_number_unsigned() && value_.get<std::uint64_t>() > static_cast<std::uint64_t>(most));
  const auto number = fits ? value_.get<std::int64_t>() : 0;
  if (!fits || number < least || number > most) {
    refuse("a whole number from " + std::to_string(least) + " to " + std::to_string(most));
  }
  return number;
}

double Field::number() const {
  if (!value_.is_number() || !std::isfinite(value_.get<double>())) refuse("a number");
  return value_.get<double>();
}

std::vector<Field> Field::items(std::size_t least, std::size_t most) const {
  if (!value_.is_array() || value_.size() < least || (most != 0 && value_.size() > most)) {
    const auto range = std::to_string(least) + (most == 0 ? " or more" : " to " + std::to_string(most));
    if (value_.is_array()) {
      throw corrupt(std::string(kManifestName) + ": " + where_ + " has " + std::to_string(value_.size()) + " items",
                    range);
    }
    refuse("a list");
  }
  std::vector<Field> fields;
  for (const auto& item : value_) fields.emplace_back(item, where_ + "." + std::to_string(fields.size()));
  return fields;
}

std::vector<std::string> Field::texts(std::size_t most) const {
  std::vector<std::string> out;
  for (const auto& item : items()) out.push_back(item.text(most));
  return out;
}

Members::Members(const Field& object) : object_(object) {
  if (!object.json().is_object()) object.refuse("an object");
}

std::string Members::below(const std::string& name) const {
  return object_.where().empty() ? name : object_.where() + "." + name;
}

Field Members::need(const char* name) {
  if (!object_.json().contains(name)) {
    throw corrupt(std::string(kManifestName) + ": " + printable(below(name), 200) + " is missing");
  }
  return maybe(name);
}

Field Members::maybe(const char* name) {
  asked_.insert(name);
  const auto found = object_.json().find(name);
  return Field(found == object_.json().end() ? kNull : *found, below(name));
}

void Members::done(bool newer) const {
  if (newer) return;
  for (const auto& member : object_.json().items()) {
    if (asked_.count(member.key()) == 0) {
      throw corrupt(std::string(kManifestName) + ": " + printable(below(member.key()), 200) + " is unknown to format " +
                    std::to_string(kFormatMajor) + "." + std::to_string(kFormatMinor));
    }
  }
}

}  // namespace vp
