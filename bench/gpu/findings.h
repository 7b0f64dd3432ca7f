// What checks found: a line each while they run, JSON at the end.
#pragma once

#include <cstdio>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "json.h"

namespace skvq::bench {

class Findings {
 public:
  // `after` is called when one is added, to write what is known so far.
  void on_add(std::function<void()> after) { after_ = std::move(after); }

  // `detail`: what was compared, or the first difference.
  void add(const std::string& name, bool ok, const std::string& detail, const Json& figures = {}) {
    std::printf("%-6s %-44s %s\n", ok ? "ok" : "FAILED", name.c_str(), detail.c_str());
    std::fflush(stdout);
    failed_ += ok ? 0 : 1;
    all_.push_back(Json().add("name", name).add("ok", ok).add("detail", detail).add("figures", figures));
    if (after_) after_();
  }
  void skip(const std::string& name, const std::string& reason) {
    std::printf("%-6s %-44s %s\n", "-", name.c_str(), reason.c_str());
    all_.push_back(Json().add("name", name).add("skipped", reason));
  }
  const std::vector<Json>& all() const { return all_; }
  int failed() const { return failed_; }
  int count() const { return static_cast<int>(all_.size()); }

 private:
  std::vector<Json> all_;
  int failed_ = 0;
  std::function<void()> after_;
};

// Counts cases and remembers the first one that is wrong.
class Tally {
 public:
  template <class... Words>
  void check(bool right, const Words&... words) {
    ++cases_;
    if (right) return;
    if (wrong_++ == 0) first_ = concat(words...);
  }
  bool ok() const { return wrong_ == 0 && cases_ > 0; }
  std::string text() const {
    return wrong_ == 0 ? concat(cases_, " cases") : concat(wrong_, " of ", cases_, " cases wrong, first: ", first_);
  }
  Json figures() const { return Json().add("cases", cases_).add("wrong", wrong_); }

 private:
  long cases_ = 0, wrong_ = 0;
  std::string first_;
};

}  // namespace skvq::bench
