#include "branch_bound.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "convexify.hpp"
#include "dispatch.hpp"
#include "enumerate.hpp"
#include "local_search.hpp"

namespace fastprune {
namespace {

constexpr double kInf = std::numeric_limits<double>::infinity();

// Measured on 32 to 48 variables: below this many subsets, going through them is cheaper than bounding.
constexpr double kLeafSubsets = 300;
// A subtree larger than this many nodes gets a relaxation of its own ...
constexpr int kProbeNodes = 512;
// ... and, with that, is cut into subtrees for the queue after this many.
constexpr int kSubtreeNodes = 16384;
// Beyond this many queued subtrees memory counts more than order: search depth first only.
constexpr std::size_t kMaxQueued = 50000;
constexpr int kDescentSteps = 200;
constexpr int kConvergedSteps = 4000;
constexpr int kRootRounds = 6;
constexpr int kSubtreeRounds = 2;

bool later(const Subtree& a, const Subtree& b) {
    return a.lower > b.lower;
}

struct Node {
    Subset in;
    Subset open;
    int open_count = 0;
    int q = 0;
    double lower = -kInf;
    std::vector<double> numbers;  // y, gradient, open, each one stride long

    double* y() { return numbers.data(); }
    double* gradient(int stride) { return numbers.data() + stride; }
    double* open_mask(int stride) { return numbers.data() + 2 * static_cast<std::ptrdiff_t>(stride); }
};

// Depth-first search below one subtree with one relaxation.
class DepthFirst {
  public:
    DepthFirst(const SearchContext& context, const Subtree& root)
        : context_(context), relaxation_(root.relaxation), stride_(relaxation_->stride()) {
        Node node;
        node.in = root.in;
        node.open = root.open;
        node.open_count = root.open.size();
        node.q = context.problem.k() - root.in.size();
        node.lower = root.lower;
        node.numbers.assign(3 * static_cast<std::size_t>(stride_), 0.0);
        std::copy(root.y.begin(), root.y.end(), node.numbers.begin());
        relaxation_->gradient_at(node.y(), node.gradient(stride_));
        for (int c = 0; c < relaxation_->size(); ++c) {
            if (node.open.contains(variable(c))) node.open_mask(stride_)[c] = 1.0;
        }
        stack_.push_back(std::move(node));
        depth_ = 1;
    }

    // True when the subtree is done; false after max_nodes, or when others need work, or on stop.
    bool run(int max_nodes, bool share) {
        int visited = 0;
        while (depth_ > 0) {
            if (visited % 64 == 63) {
                if (context_.queue.stopped()) break;
                if (share && visited > 256 && context_.queue.hungry()) break;
            }
            if (visited >= max_nodes) break;
            ++visited;
            visit();
        }
        context_.nodes.fetch_add(static_cast<std::uint64_t>(visited), std::memory_order_relaxed);
        return depth_ == 0;
    }

    // Hands every node left on the stack to the queue.
    void share_rest() {
        for (std::size_t i = 0; i < depth_; ++i) {
            Node& node = stack_[i];
            Subtree s{relaxation_, node.in, node.open, {node.y(), node.y() + stride_}, node.lower};
            if (context_.queue.stopped()) s.lower = std::max(s.lower, converge(node).lower);
            if (s.lower <= context_.best.cutoff()) context_.queue.push(std::move(s));
        }
        depth_ = 0;
    }

    // Solves the relaxation of the root node to the end (before run()).
    DescentResult converge_root() { return converge(stack_[0]); }
    const double* root_y() { return stack_[0].y(); }

  private:
    int variable(int c) const { return relaxation_->variables()[static_cast<std::size_t>(c)]; }

    NodeView view(Node& node) const {
        return {node.y(), node.gradient(stride_), node.open_mask(stride_), node.q};
    }

    DescentResult converge(Node& node) const {
        return instruction_set().solver.descend(relaxation_->view(), view(node), context_.best.cutoff(),
                                                -kInf, kConvergedSteps);
    }

    // Decides variable c (relaxation numbering) and moves the difference of its y to other open variables.
    void decide(Node& node, int c, bool one) const {
        double* y = node.y();
        double* gradient = node.gradient(stride_);
        double* open = node.open_mask(stride_);
        const int i = variable(c);
        open[c] = 0.0;
        node.open.erase(i);
        --node.open_count;
        if (one) {
            node.in.insert(i);
            --node.q;
        }
        double rest = one ? 1.0 - y[c] : y[c];  // what the others give up, or take over
        y[c] = one ? 1.0 : 0.0;
        const double* row_c = relaxation_->view().twice + static_cast<std::ptrdiff_t>(c) * stride_;
        while (rest > 0.0) {
            int other = -1;
            for (int j = 0; j < relaxation_->size(); ++j) {
                if (open[j] == 0.0 || (one ? y[j] <= 0.0 : y[j] >= 1.0)) continue;
                if (other < 0 || (one ? gradient[j] > gradient[other] : gradient[j] < gradient[other]))
                    other = j;
            }
            if (other < 0) break;  // only rounding is left over, or the node is infeasible
            const double room = one ? y[other] : 1.0 - y[other];
            const double move = std::min(rest, room);
            y[other] = one ? (move == room ? 0.0 : y[other] - move) : (move == room ? 1.0 : y[other] + move);
            rest -= move;
            const double* row_o = relaxation_->view().twice + static_cast<std::ptrdiff_t>(other) * stride_;
            const double signed_move = one ? move : -move;
            for (int b = 0; b < stride_; ++b) gradient[b] += signed_move * (row_c[b] - row_o[b]);
        }
    }

    // Variables whose other value alone lifts the bound over the cutoff are decided. False if infeasible.
    bool fix_by_reduced_cost(Node& node, const DescentResult& bound, double cutoff) const {
        for (int c = 0; c < relaxation_->size(); ++c) {
            if (node.open_mask(stride_)[c] == 0.0) continue;
            const double reduced = fixing_gradient_[static_cast<std::size_t>(c)] - bound.threshold;
            if (bound.lower_at_y + std::fabs(reduced) > cutoff) decide(node, c, reduced < 0.0);
        }
        return node.q >= 0 && node.q <= node.open_count;
    }

    // Far from integral and steep: deciding it changes the bound of both children most. Of the rules tried
    // (fractionality and curvature, each to several powers) this one left the fewest nodes.
    int choose_branch(Node& node, double threshold) const {
        int best = -1;
        double best_score = -kInf;
        for (int c = 0; c < relaxation_->size(); ++c) {
            if (node.open_mask(stride_)[c] == 0.0) continue;
            const double y = node.y()[c];
            const double f = std::min(y, 1.0 - y);
            double score = std::sqrt(f) * relaxation_->twice(c, c);
            // Among integral values, the one closest to changing.
            if (f <= 1e-9) score = -std::fabs(node.gradient(stride_)[c] - threshold);
            if (score > best_score) {
                best_score = score;
                best = c;
            }
        }
        return best;
    }

    void enumerate_leaf(const Node& node) {
        enumerator_.run(context_.problem, node.in, node.open, node.q, context_.best,
                        context_.queue.stop_flag());
    }

    void visit() {
        Node& node = stack_[depth_ - 1];
        const double cutoff = context_.best.cutoff();
        if (node.lower > cutoff || node.q < 0 || node.q > node.open_count) {
            --depth_;
            return;
        }
        if (!context_.symmetry.trivial() &&
            context_.symmetry.predecessors(node.in, node.open) >= context_.wanted) {
            --depth_;
            return;
        }
        if (binomial(node.open_count, node.q) <= kLeafSubsets) {
            enumerate_leaf(node);
            --depth_;
            return;
        }
        const DescentResult bound =
            instruction_set().solver.descend(relaxation_->view(), view(node), cutoff, cutoff, kDescentSteps);
        if (bound.lower > cutoff) {
            --depth_;
            return;
        }
        node.lower = std::max(node.lower, bound.lower);
        const double* gradient = node.gradient(stride_);
        fixing_gradient_.assign(gradient, gradient + stride_);
        if (!fix_by_reduced_cost(node, bound, cutoff)) {
            --depth_;
            return;
        }
        if (binomial(node.open_count, node.q) <= kLeafSubsets) {
            enumerate_leaf(node);
            --depth_;
            return;
        }
        const int c = choose_branch(node, bound.threshold);
        if (stack_.size() == depth_) stack_.emplace_back();
        // The node becomes the child that rounds against y; the other goes on top and is searched first.
        Node& parent = stack_[depth_ - 1];
        Node& first = stack_[depth_];
        first = parent;
        const bool up = parent.y()[c] >= 0.5;
        decide(first, c, up);
        decide(parent, c, !up);
        ++depth_;
    }

    const SearchContext& context_;
    std::shared_ptr<const Relaxation> relaxation_;
    int stride_;
    std::vector<Node> stack_;  // entries past depth_ keep their buffers
    std::size_t depth_ = 0;
    std::vector<double> fixing_gradient_;
    Enumerator enumerator_;
};

// The subset next to the relaxation's solution: its largest entries.
Subset rounded(const Problem& problem, const Subtree& subtree) {
    std::vector<std::pair<double, int>> order;
    for (int c = 0; c < subtree.relaxation->size(); ++c) {
        const int i = subtree.relaxation->variables()[static_cast<std::size_t>(c)];
        order.emplace_back(-subtree.y[static_cast<std::size_t>(c)], i);
    }
    std::sort(order.begin(), order.end());
    Subset s = subtree.in;
    const int q = problem.k() - subtree.in.size();
    for (int c = 0; c < q; ++c) s.insert(order[static_cast<std::size_t>(c)].second);
    return s;
}

// The subtree with the relaxation of that diagonal, solved from y (one entry per open variable).
Subtree relaxed(const SearchContext& context, const Subtree& subtree, const std::vector<double>& diagonal,
                const std::vector<double>& y) {
    Subtree result{make_relaxation(context.problem, subtree.in, subtree.open, diagonal), subtree.in,
                   subtree.open, y, -kInf};
    result.y.resize(static_cast<std::size_t>(result.relaxation->stride()), 0.0);
    DepthFirst probe(context, result);
    result.lower = probe.converge_root().lower;
    std::copy(probe.root_y(), probe.root_y() + y.size(), result.y.begin());
    return result;
}

// Gives the subtree a relaxation fitted to its open variables. The bound is concave in the diagonal, with
// slope y - y^2 at the relaxation's solution y. Each round takes the best diagonal for the mean slope so far,
// and the best point on the way there.
void refit(const SearchContext& context, Subtree& subtree, int rounds) {
    const auto m = static_cast<std::size_t>(subtree.open.size());
    const double mean = static_cast<double>(context.problem.k() - subtree.in.size()) / static_cast<double>(m);
    std::vector<double> y(m, mean);
    std::vector<double> diagonal(m, 0.0);
    if (subtree.relaxation) {
        const std::vector<int>& variables = subtree.relaxation->variables();
        std::size_t at = 0;
        for (std::size_t c = 0; c < variables.size(); ++c) {
            if (!subtree.open.contains(variables[c])) continue;
            y[at] = subtree.y[c];
            diagonal[at++] = subtree.relaxation->diagonal()[c];
        }
    }
    const std::vector<double> h = open_block(context.problem, subtree.open);
    make_feasible(static_cast<int>(m), h, diagonal);
    Subtree fitted = relaxed(context, subtree, diagonal, y);
    if (subtree.relaxation) std::copy_n(fitted.y.begin(), m, y.begin());
    // Keeps every variable worth a little, or the barrier would push its diagonal to minus infinity.
    const double floor = 0.05 * mean * (1.0 - mean);
    std::vector<double> slope(m, 0.0);
    std::vector<double> target = diagonal;
    for (int round = 1; round <= rounds; ++round) {
        improve(context.problem, rounded(context.problem, fitted), context.best);
        if (fitted.lower > context.best.cutoff() || context.queue.stopped()) break;
        std::vector<double> weight(m);
        for (std::size_t i = 0; i < m; ++i) {
            slope[i] += (y[i] * (1.0 - y[i]) - slope[i]) / round;
            weight[i] = std::max(slope[i], floor);
        }
        maximise_diagonal(static_cast<int>(m), h, weight, target);
        for (const double length : {1.0, 0.5, 0.25, 0.125}) {
            std::vector<double> between(m);
            for (std::size_t i = 0; i < m; ++i) between[i] = diagonal[i] + length * (target[i] - diagonal[i]);
            Subtree trial = relaxed(context, subtree, between, y);
            if (length == 1.0) std::copy_n(trial.y.begin(), m, y.begin());
            if (trial.lower > fitted.lower) {
                fitted = std::move(trial);
                diagonal = std::move(between);
                break;
            }
        }
    }
    fitted.lower = std::max(fitted.lower, subtree.lower);
    subtree = std::move(fitted);
}

}  // namespace

void SubtreeQueue::push(Subtree subtree) {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        heap_.push_back(std::move(subtree));
        std::push_heap(heap_.begin(), heap_.end(), later);
        size_ = heap_.size();
        hungry_ = false;
    }
    changed_.notify_one();
}

bool SubtreeQueue::pop(Subtree& subtree) {
    std::unique_lock<std::mutex> lock(mutex_);
    --active_;
    if (active_ == 0 && heap_.empty()) changed_.notify_all();
    while (!stopped_ && heap_.empty() && active_ > 0) {
        hungry_ = true;
        changed_.wait(lock);
    }
    if (stopped_ || heap_.empty()) return false;
    std::pop_heap(heap_.begin(), heap_.end(), later);
    subtree = std::move(heap_.back());
    heap_.pop_back();
    size_ = heap_.size();
    ++active_;
    return true;
}

void SubtreeQueue::stop() {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        stopped_ = true;
    }
    changed_.notify_all();
}

double SubtreeQueue::lowest_bound() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    double lowest = kInf;
    for (const Subtree& s : heap_) lowest = std::min(lowest, s.lower);
    return lowest;
}

Subtree root_subtree(const SearchContext& context) {
    Subtree root;
    for (int i = 0; i < context.problem.n(); ++i) root.open.insert(i);
    root.lower = -kInf;
    refit(context, root, kRootRounds);
    return root;
}

void work(const SearchContext& context) {
    Subtree subtree;
    while (context.queue.pop(subtree)) {
        if (subtree.lower > context.best.cutoff()) continue;
        // Most subtrees are small, or hardly smaller than what their relaxation was fitted to.
        const bool stale = subtree.open.size() + 2 <= subtree.relaxation->size();
        if (stale) {
            DepthFirst probe(context, subtree);
            if (probe.run(kProbeNodes, false)) continue;
            if (context.subtree_diagonals && !context.queue.stopped()) refit(context, subtree, kSubtreeRounds);
            if (subtree.lower > context.best.cutoff()) continue;
        }
        DepthFirst search(context, subtree);
        const int budget =
            context.queue.size() < kMaxQueued ? kSubtreeNodes : std::numeric_limits<int>::max();
        if (!search.run(budget, true)) search.share_rest();
    }
}

}  // namespace fastprune
