#include "pool.h"

#include <unistd.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>

namespace moqa {
namespace {

constexpr int LOOKS = 500;  // some ten microseconds

void relax() {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
}

class Pool {
  public:
    void run(int threads, int items, const std::function<void(int)>& work) {
        const std::lock_guard<std::mutex> one_caller(callers_);
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            for (; workers_ < threads - 1; ++workers_) std::thread([this, id = workers_] { serve(id); }).detach();
            work_ = &work;
            items_ = items;
            next_ = 0;
            helpers_ = threads - 1;
            open_ = true;
            ++round_;
        }
        start_.notify_all();
        take();
        {
            const std::lock_guard<std::mutex> lock(mutex_);
            open_ = false;  // a helper that wakes only now is not waited for
        }
        // others are at their last items: sleeping would take longer than they do, unless they lost their core
        for (int look = 0; look < LOOKS && active_ > 0; ++look) relax();
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [this] { return active_ == 0; });
    }

  private:
    void take() {
        for (int item; (item = next_.fetch_add(1, std::memory_order_relaxed)) < items_;) (*work_)(item);
    }

    void serve(int id) {
        for (long seen = 0;;) {
            std::unique_lock<std::mutex> lock(mutex_);
            start_.wait(lock, [&] { return open_ && round_ != seen && id < helpers_; });
            seen = round_;
            ++active_;
            lock.unlock();
            take();
            lock.lock();
            if (--active_ == 0) done_.notify_one();
        }
    }

    std::mutex callers_, mutex_;
    std::condition_variable start_, done_;
    const std::function<void(int)>* work_ = nullptr;
    std::atomic<int> next_{0};
    std::atomic<int> active_{0};
    int items_ = 0, helpers_ = 0, workers_ = 0;
    long round_ = 0;
    bool open_ = false;
};

// A child of fork has no threads of its parent: it gets a pool of its own. Pools are never destroyed, since their
// threads may outlive the end of main.
Pool& pool() {
    static std::mutex mutex;
    static Pool* current = nullptr;
    static pid_t owner = 0;
    const std::lock_guard<std::mutex> lock(mutex);
    if (current == nullptr || owner != getpid()) {
        current = new Pool();
        owner = getpid();
    }
    return *current;
}

}  // namespace

void parallel(int threads, int items, const std::function<void(int)>& work) {
    threads = threads < items ? threads : items;
    if (threads > 1) return pool().run(threads, items, work);
    for (int item = 0; item < items; ++item) work(item);
}

}  // namespace moqa
