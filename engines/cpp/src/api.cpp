// Boundary of the C API: converts handles and exceptions to pointers and status codes.
#include <algorithm>
#include <array>
#include <cstring>
#include <exception>
#include <new>
#include <string>
#include <string_view>

#include "engine.hpp"
#include "error.hpp"

namespace {

// Fixed size, so that running out of memory can be reported too.
thread_local std::array<char, 2048> last_error{};

void remember(std::string_view text) noexcept {
  const auto size = std::min(text.size(), last_error.size() - 1);
  for (std::size_t i = 0; i < size; ++i) {
    const auto code = static_cast<unsigned char>(text[i]);
    last_error[i] = code < 0x20 || code == 0x7f ? ' ' : text[i];  // one line, whatever a path in it contains
  }
  last_error[size] = '\0';
}

template <typename Function>
vp_status guarded(const Function& function) noexcept {
  try {
    function();
    return VP_OK;
  } catch (const vp::Error& error) {
    remember(error.what());
    return error.status();
  } catch (const std::bad_alloc&) {
    remember("out of memory; use a smaller batch, or a machine with more");
  } catch (const std::exception& error) {
    remember(std::string_view(error.what()).substr(0, std::string_view(error.what()).find('\n')));
  } catch (...) {
    remember("an unknown failure");
  }
  return VP_ERROR_INTERNAL;
}

template <typename... Pointers>
void need(Pointers... pointers) {
  if ((... || (pointers == nullptr))) {
    throw vp::Error(VP_ERROR_INPUT, "a null pointer was passed", "an engine and a place for the answer");
  }
}

vp_engine_options checked(const vp_engine_options* given) {
  vp_engine_options options = VP_ENGINE_OPTIONS_INIT;
  if (given == nullptr) return options;
  if (given->struct_size < sizeof options) {  // larger for a newer header, whose further members are unknown here
    throw vp::Error(VP_ERROR_INPUT, "options with struct_size " + std::to_string(given->struct_size),
                    std::to_string(sizeof options), "start from VP_ENGINE_OPTIONS_INIT");
  }
  return *given;
}

}  // namespace

int vp_engine_api_version(void) { return VP_ENGINE_API_VERSION; }

const char* vp_engine_backends(void) {
#if defined(VP_ENGINE_AOTI) && defined(VP_ENGINE_TENSORRT)
  return "aoti,trt";
#elif defined(VP_ENGINE_AOTI)
  return "aoti";
#elif defined(VP_ENGINE_TENSORRT)
  return "trt";
#else
  return "";
#endif
}

vp_status vp_engine_open(const char* path, const vp_engine_options* options, vp_engine** engine) {
  if (engine != nullptr) *engine = nullptr;
  return guarded([&] {
    need(path, engine);
    *engine = new vp_engine(path, checked(options));
  });
}

vp_status vp_engine_describe(const vp_engine* engine, vp_description* description) {
  return guarded([&] {
    need(engine, description);
    engine->describe(*description);
  });
}

vp_status vp_engine_output_bytes(const vp_engine* engine, size_t index, int64_t batch, size_t* bytes) {
  return guarded([&] {
    need(engine, bytes);
    *bytes = engine->output_bytes(index, batch);
  });
}

vp_status vp_engine_run(vp_engine* engine, const vp_input* inputs, size_t input_count, const vp_output* outputs,
                        size_t output_count) {
  return guarded([&] {
    need(engine);
    engine->run(inputs, input_count, outputs, output_count);
  });
}

void vp_engine_close(vp_engine* engine) {
  if (engine == nullptr) return;
  guarded([&] {
    engine->drain();
    delete engine;
  });
}

const char* vp_engine_last_error(void) { return last_error.data(); }

int vp_engine_exit_code(vp_status status) {
  if (status == VP_OK) return 0;
  return status == VP_ERROR_ENGINE_UNAVAILABLE || status == VP_ERROR_INTERNAL ? 3 : 2;
}
