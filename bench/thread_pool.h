// Threads that stay between calls, so that starting them is not measured.
#pragma once

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "cpu/parallel.h"

namespace skvq::bench {

// One pool per process, because `Parallel` carries a plain function and no state.
class ThreadPool {
 public:
  static ThreadPool& instance() {
    static ThreadPool pool;
    return pool;
  }
  ~ThreadPool() { resize(1); }

  // Threads that work on a call, the caller included.
  void resize(int threads) {
    {
      const std::lock_guard lock(mutex_);
      stop_ = true;
    }
    wake_.notify_all();
    for (std::thread& worker : workers_) worker.join();
    workers_.clear();
    stop_ = false;
    for (int i = 1; i < threads; ++i) workers_.emplace_back([this, seen = generation_] { work(seen); });
  }

  static void run(std::int64_t count, void* closure, cpu::Parallel::Body body) {
    instance().run_all(count, closure, body);
  }

 private:
  void run_all(std::int64_t count, void* closure, cpu::Parallel::Body body) {
    {
      const std::lock_guard lock(mutex_);
      count_ = count;
      closure_ = closure;
      body_ = body;
      next_ = 0;
      busy_ = static_cast<int>(workers_.size());
      ++generation_;
    }
    wake_.notify_all();
    take();
    std::unique_lock lock(mutex_);
    done_.wait(lock, [this] { return busy_ == 0; });
  }

  void take() {
    for (std::int64_t i = next_++; i < count_; i = next_++) body_(closure_, i);
  }

  void work(std::uint64_t seen) {
    for (;;) {
      {
        std::unique_lock lock(mutex_);
        wake_.wait(lock, [&] { return stop_ || generation_ != seen; });
        if (stop_) return;
        seen = generation_;
      }
      take();
      {
        const std::lock_guard lock(mutex_);
        --busy_;
      }
      done_.notify_one();
    }
  }

  std::vector<std::thread> workers_;
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::atomic<std::int64_t> next_{0};
  std::int64_t count_ = 0;
  void* closure_ = nullptr;
  cpu::Parallel::Body body_ = nullptr;
  std::uint64_t generation_ = 0;
  int busy_ = 0;
  bool stop_ = false;
};

inline constexpr cpu::Parallel kPool{ThreadPool::run};

}  // namespace skvq::bench
