// Places in the workspace of what only some backward passes need. Included inside a per-set anonymous namespace.

// Of the extras; null where not needed. B batch rows.
template <typename T>
struct ExtraBuffers {
  T* grad_h = nullptr;           // (B, H): dL/d(o * tanh(c)) of a step
  T* kept_h = nullptr;           // (B, P): of dL/dh_t, what zoneout hands on to h_{t-1}
  T* reset_kept_h = nullptr;     // (B, P): sums of it, for the state that replaced h_{t-1}
  T* masked_h = nullptr;         // (rows of the chunks, P)
  T* grad_input_part = nullptr;  // (rows of the chunks, 4H), as grad_gates
  T* row = nullptr;              // kNormRows + 1 rows of H numbers, of this worker
  // Sums of this worker over a chunk, then over all: of the gradients of the biases (4H), gain_ih (4H), gain_hh (4H),
  // gain_c (H) and bias_c (H), kNormSums * H in all.
  T* chunk_sums = nullptr;
  T* all_sums = nullptr;  // those of worker 0 first
  T* sums = nullptr;      // of this worker, among them

  ExtraBuffers(const BackwardParams<T>& p, const BackwardPlan& plan, char* workspace, int worker) {
    const auto at = [&](int64_t offset) { return reinterpret_cast<T*>(workspace + offset); };
    const int64_t H = p.shape.hidden_size;
    if (!p.options.any()) return;
    grad_h = at(plan.grad_h);
    if (p.options.zoneout_h.active()) {
      kept_h = at(plan.kept_h);
      if (p.grad_reset_h) reset_kept_h = at(plan.reset_kept_h);
    }
    if (p.options.recurrent_mask) masked_h = at(plan.masked_h);
    if (!p.options.norm.gain_ih) return;
    grad_input_part = at(plan.grad_input_part);
    row = at(plan.norm_rows) + worker * (kNormRows + 1) * H;
    chunk_sums = at(plan.norm_sums) + worker * kNormSums * H;
    all_sums = at(plan.norm_sums) + plan.grid.workers() * kNormSums * H;
    sums = all_sums + worker * kNormSums * H;
  }
};

// Of gates that are computed again; null where they were saved.
template <typename T>
struct RebuiltGates {
  T* gates = nullptr;   // (rows of a chunk, 4H)
  T* hidden = nullptr;  // (rows of the chunks, H)
  T* input_panels = nullptr;
  T* recurrent_panels = nullptr;
  T* bias = nullptr;  // (4H), of this worker
  // Of the team's rows of a chunk, for this worker.
  const T** input_rows = nullptr;
  const T** h_rows = nullptr;
  T** gate_rows = nullptr;

  RebuiltGates(const BackwardParams<T>& p, const BackwardPlan& plan, char* workspace, int worker) {
    if (p.gate_values) return;
    const auto at = [&](int64_t offset) { return reinterpret_cast<T*>(workspace + offset); };
    gates = at(plan.rebuilt_gates);
    hidden = at(plan.rebuilt_hidden);
    if (plan.pack) {
      input_panels = at(plan.rebuilt_input_panels);
      recurrent_panels = at(plan.rebuilt_recurrent_panels);
    }
    bias = at(plan.rebuilt_bias) + worker * 4 * p.shape.hidden_size;
    const T** lists = reinterpret_cast<const T**>(workspace + plan.rebuilt_lists) + worker * 3 * plan.chunk_rows;
    input_rows = lists;
    h_rows = lists + plan.chunk_rows;
    gate_rows = const_cast<T**>(lists + 2 * plan.chunk_rows);
  }
};
