// What a kernel keeps between calls.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <mutex>
#include <utility>
#include <vector>

namespace sparsepipe {

// The plans of a kernel that were used last, and the weights laid out for them. A plan is for one shape of the input and
// one number of threads and is small; a weight, which takes the memory and most of the time, serves all plans that read
// it alike (`Plan::weight`). Both are immutable once they are in here.
template <typename Plan, typename Weight>
class PlanCache {
 public:
  using Key = std::vector<std::int64_t>;

  // What all weights may take where they are more than `kLeastWeights`: twice what the weight would, dense.
  static constexpr std::size_t most_bytes(std::size_t dense_bytes) { return 2 * dense_bytes; }

  // `make` returns what has this key; it runs without the lock, so that calls of other shapes do not wait for it.
  template <typename Make>
  std::shared_ptr<const Plan> plan(const Key& key, const Make& make) {
    return get(plans_, key, make);
  }
  template <typename Make>
  std::shared_ptr<const Weight> weight(const Key& layout, const Make& make) {
    return get(weights_, layout, make);
  }

 private:
  static constexpr std::size_t kLeastWeights = 4;
  static constexpr std::size_t kMostPlans = 64;

  template <typename T>
  struct Entry {
    Key key;
    std::shared_ptr<const T> value;
  };
  template <typename T>
  using Entries = std::vector<Entry<T>>;  // the one that was used last at the end

  template <typename T>
  static std::shared_ptr<const T> find(Entries<T>& entries, const Key& key) {
    const auto found = std::find_if(entries.rbegin(), entries.rend(), [&](const Entry<T>& e) { return e.key == key; });
    if (found == entries.rend()) return nullptr;
    std::rotate(found.base() - 1, found.base(), entries.end());
    return entries.back().value;
  }

  template <typename T, typename Make>
  std::shared_ptr<const T> get(Entries<T>& entries, const Key& key, const Make& make) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (std::shared_ptr<const T> found = find(entries, key)) return found;
    }
    std::shared_ptr<const T> made = std::make_shared<const T>(make());
    const std::lock_guard<std::mutex> lock(mutex_);
    if (std::shared_ptr<const T> found = find(entries, key)) return found;  // another thread was faster
    entries.push_back({key, made});
    drop();
    return made;
  }

  bool are_large() const {
    std::size_t bytes = 0;
    for (const Entry<Weight>& entry : weights_) bytes += entry.value->bytes();
    return weights_.size() > kLeastWeights && bytes > most_bytes(weights_.back().value->dense_bytes());
  }

  void drop() {
    while (plans_.size() > kMostPlans || (plans_.size() > 1 && are_large())) {
      const std::shared_ptr<const Weight> weight = plans_.front().value->weight;
      plans_.erase(plans_.begin());
      const auto reads = [&](const Entry<Plan>& entry) { return entry.value->weight == weight; };
      if (std::any_of(plans_.begin(), plans_.end(), reads)) continue;
      const auto is_it = [&](const Entry<Weight>& entry) { return entry.value == weight; };
      weights_.erase(std::remove_if(weights_.begin(), weights_.end(), is_it), weights_.end());
    }
  }

  std::mutex mutex_;
  Entries<Plan> plans_;
  Entries<Weight> weights_;
};

}  // namespace sparsepipe
