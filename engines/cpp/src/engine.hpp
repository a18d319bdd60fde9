// Implementation of a vp_engine handle.
#pragma once

#include <vp_engine/vp_engine.h>

#include <memory>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <vector>

#include "backend.hpp"

struct vp_engine {
  vp_engine(const std::string& path, const vp_engine_options& options);

  void describe(vp_description& description) const;
  std::size_t output_bytes(std::size_t index, std::int64_t batch) const;
  void run(const vp_input* inputs, std::size_t input_count, const vp_output* outputs, std::size_t output_count);
  /// Wait for runs in progress.
  void drain() { const std::unique_lock<std::shared_mutex> none_runs(runs_); }

 private:
  std::int64_t check_input(const vp_input& input, std::size_t index) const;
  void check_batch(std::int64_t batch) const;

  vp::Manifest manifest_;
  std::string variant_;
  std::string json_;
  std::vector<vp_tensor_info> input_infos_, output_infos_;
  std::vector<const char*> class_names_;
  std::unique_ptr<vp::Runner> runner_;  // null if the bundle was only verified
  std::shared_mutex runs_;              // held shared by each run
};
