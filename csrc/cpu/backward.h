// Backward pass of one direction of one layer. Included inside a per-set anonymous namespace.
//
// Reverse time loop per batch slice: a tile of dh_t = dL/dh_t + dgates_{t+1} U becomes, in its
// epilogue, the gate gradients of step t. Chunk by chunk of time, while its gate gradients are in
// cache, follow the products over all its steps: the input gradient and the weight gradients.

template <typename T>
class Backward {
 public:
  Backward(const BackwardParams<T>& params, const BackwardPlan& plan, char* workspace, int worker)
      : p_(params),
        plan_(plan),
        shape_(params.shape),
        steps_(shape_, !shape_.reverse),
        worker_(worker),
        team_(worker / plan.grid.hidden_groups),
        member_(worker % plan.grid.hidden_groups),
        rows_(shape_, plan.grid.batch_groups, team_),
        hidden_blocks_(share(divide_up(shape_.hidden_size, kLanes), plan.grid.hidden_groups, member_)),
        hidden_columns_(columns_of(shape_.hidden_size)),
        output_columns_(columns_of(shape_.output_size)),
        all_workers_(reinterpret_cast<Barrier*>(workspace)),
        team_barrier_(reinterpret_cast<Barrier*>(workspace + kBarrierBytes * (1 + team_))),
        input_panels_(reinterpret_cast<T*>(workspace + plan.input_panels)),
        recurrent_panels_(reinterpret_cast<T*>(workspace + plan.recurrent_panels)),
        projection_panels_(reinterpret_cast<T*>(workspace + plan.projection_panels)),
        partial_sums_(reinterpret_cast<T*>(workspace + plan.partial_sums)),
        grad_gates_(reinterpret_cast<T*>(workspace + plan.grad_gates)),
        grad_hidden_(reinterpret_cast<T*>(workspace + plan.grad_hidden)),
        outer_products_(reinterpret_cast<T*>(workspace + plan.outer_products)),
        row_list_(reinterpret_cast<const T**>(workspace + plan.row_lists) + worker * plan.chunk_rows),
        zero_row_(reinterpret_cast<T*>(workspace + plan.zero_rows) + worker * plan.gate_row),
        gate_rows_(reinterpret_cast<const T**>(workspace + plan.state_lists) +
                   worker * divide_up(shape_.batch, plan.grid.batch_groups)),
        reset_gates_(p_.grad_reset_h ? reinterpret_cast<T*>(workspace + plan.reset_gates) : nullptr),
        extras_(params, plan, workspace, worker),
        rebuilt_(params, plan, workspace, worker) {}

  void run() {
    prepare_weights();
    for (int64_t first = 0; first < shape_.steps; first += chunk_.count) {
      before_ = chunk_;
      chunk_ = chunk_from(first);
      if (p_.options.recurrent_mask) mask_previous_rows();
      if (!p_.gate_values) rebuild_gates();
      for (int64_t s = first; s < first + chunk_.count; ++s) {
        if (p_.options.any()) {
          extended_step(s);
        } else {
          step(s);
        }
      }
      if (first + chunk_.count == shape_.steps) {
        initial_state_gradient(shape_.steps);
        reset_state_gradient();
      }
      if (normalised()) add_norm_sums();
      // One meeting a chunk is enough with two buffers: whoever writes the next chunk but one has
      // met everybody after they had read this one.
      if (plan_.grid.workers() > 1) all_workers_->wait(plan_.grid.workers());
      if (p_.grad_input.data) input_gradient();
      weight_gradients();
    }
    if (normalised()) norm_gradients();
  }

 private:
  using S = Simd<T>;
  static constexpr int kLanes = S::kLanes;

  // Steps first ... first + count - 1 of the time loop, which are the times begin ... begin + count - 1,
  // and where their gradients are kept, in the order of time: those of the pre-activations and, with a
  // projection, of the projected h_t.
  struct Chunk {
    int64_t first = 0, count = 0, begin = 0, rows = 0;
    T* grad_gates = nullptr;
    T* grad_hidden = nullptr;
    // Of the extras, else null: with layer normalisation dL/d(W x), where grad_gates is dL/d(U h); and the masked
    // h_{t-1}.
    T* grad_input_part = nullptr;
    T* masked_h = nullptr;
    T* hidden = nullptr;  // o * tanh(c_t), where it is computed again
  };

  // As many steps as a buffer has rows for; chunks use two buffers in turn.
  Chunk chunk_from(int64_t first) const {
    Chunk c;
    c.first = first;
    while (first + c.count < shape_.steps && c.rows + steps_.rows_of_step(first + c.count) <= plan_.chunk_rows) {
      c.rows += steps_.rows_of_step(first + c.count++);
    }
    c.begin = shape_.reverse ? first : shape_.steps - first - c.count;
    const int64_t at = first == 0 || chunk_.grad_gates != grad_gates_ ? 0 : plan_.chunk_rows;
    c.grad_gates = grad_gates_ + at * plan_.gate_row;
    c.grad_hidden = grad_hidden_ + at * shape_.output_size;
    if (normalised()) c.grad_input_part = extras_.grad_input_part + at * plan_.gate_row;
    if (p_.options.recurrent_mask) c.masked_h = extras_.masked_h + at * shape_.output_size;
    if (!p_.gate_values && shape_.projected) c.hidden = rebuilt_.hidden + at * shape_.hidden_size;
    return c;
  }

  // Gradients of step s of the chunk or of the one before it.
  int64_t row_in_chunk(const Chunk& c, int64_t s) const {
    return steps_.rows_before(steps_.time(s)) - steps_.rows_before(c.begin);
  }
  T* grad_gates(int64_t s) const {
    const Chunk& c = s >= chunk_.first ? chunk_ : before_;
    return c.grad_gates + row_in_chunk(c, s) * plan_.gate_row;
  }
  T* grad_hidden(int64_t s) const { return chunk_.grad_hidden + row_in_chunk(chunk_, s) * shape_.output_size; }
  // Rows of the team in step s.
  int64_t team_rows(int64_t s) const { return rows_.of(steps_.rows_of_step(s)); }
  Range columns_of(int64_t size) const {
    const Range blocks = share(divide_up(size, kLanes), plan_.grid.hidden_groups, member_);
    return {blocks.begin * kLanes, smaller(blocks.end * kLanes, size)};
  }
  void meet_team() {
    if (plan_.grid.hidden_groups > 1) team_barrier_->wait(plan_.grid.hidden_groups);
  }

  RightHandSide<T> recurrent_weight() const {
    return {plan_.pack ? recurrent_panels_ : p_.weights.weight_hh, shape_.output_size, 4 * shape_.hidden_size,
            plan_.pack};
  }
  RightHandSide<T> projection_weight() const {
    return {plan_.pack ? projection_panels_ : p_.weights.weight_hr, shape_.hidden_size, shape_.output_size, plan_.pack};
  }
  RightHandSide<T> input_weight() const {
    return {plan_.pack ? input_panels_ : p_.weights.weight_ih, shape_.input_size, 4 * shape_.hidden_size, plan_.pack};
  }

  void prepare_weights() {
    if (steps_.packed() || shape_.resets || p_.options.any() || !p_.gate_values)
      zero_rows(zero_row_, plan_.gate_row, Range{0, 1});
    zero_reset_gradients();
    if (normalised()) zero_norm_gradients();
    if (!p_.gate_values) prepare_rebuilding();
    if (!plan_.pack) return;
    const int teams = plan_.grid.batch_groups;
    const int64_t gates = 4 * shape_.hidden_size;
    pack_columns(p_.weights.weight_hh, shape_.output_size, gates, output_columns_, team_, teams, recurrent_panels_);
    if (shape_.projected) {
      pack_columns(p_.weights.weight_hr, shape_.hidden_size, shape_.output_size, hidden_columns_, team_, teams,
                   projection_panels_);
    }
    if (p_.grad_input.data) {
      pack_columns(p_.weights.weight_ih, shape_.input_size, gates, Range{0, shape_.input_size}, worker_,
                   plan_.grid.workers(), input_panels_);
    }
    if (teams > 1) all_workers_->wait(plan_.grid.workers());
  }

  void step(int64_t s) {
    const int64_t t = steps_.time(s);
    const int64_t count = team_rows(s);
    // Rows that had a step in this loop before; those after them begin here, at the end of their sequence.
    const int64_t continued = smaller(count, team_rows(s - 1));
    if (team_rows(s - 1) > count) initial_state_gradient(s);
    cells_ = cells_of_step(s);
    for (int begins = 0; begins < 2; ++begins) {  // one place of call: the loops inside are long
      const Range part = begins ? Range{continued, count} : Range{0, continued};
      if (part.begin == part.end) continue;
      if (!shape_.projected) {
        recurrent_gradient(part, begins ? -1 : s - 1, begins ? p_.grad_h_n : nullptr, t,
                           [&](int64_t row, int64_t column, const T* sums, int lanes) {
                             cell_gradient(part.begin + row, begins != 0, column, S::load(sums), lanes);
                           });
      } else {
        const RowGrid<T> out = rows_.grid(grad_hidden(s), shape_.output_size, part.begin, part.end);
        recurrent_gradient(part, begins ? -1 : s - 1, begins ? p_.grad_h_n : nullptr, t,
                           [&](int64_t row, int64_t column, const T* sums, int lanes) {
                             store_lanes<T>(out(row) + column, S::load(sums), lanes);
                           });
      }
    }
    if (shape_.projected) {
      meet_team();
      const RowGrid<const T> out = rows_.grid(const_cast<const T*>(grad_hidden(s)), shape_.output_size, 0, count);
      multiply(
          out, count, projection_weight(), hidden_columns_, partial_sums(0, count),
          [&](int64_t row, int64_t column) LSTM_EXT_LAMBDA_INLINE { prefetch_cell(row, column); },
          [](int64_t, int64_t, int, Reg<T>& v) LSTM_EXT_LAMBDA_INLINE { v = S::zero(); },
          [&](int64_t row, int64_t column, const T* sums, int lanes) {
            cell_gradient(row, row >= continued, column, S::load(sums), lanes);
          });
    }
    meet_team();
  }

  // dL/dh0 = dgates U for the rows whose sequence had its first step in step s - 1.
  void initial_state_gradient(int64_t s) {
    const Range part{team_rows(s), team_rows(s - 1)};
    if (!p_.grad_h0 || part.begin == part.end) return;
    if (p_.options.any()) {
      extended_initial_gradient(part, s - 1);
      return;
    }
    const RowGrid<T> out = rows_.grid(p_.grad_h0, shape_.output_size, part.begin, part.end);
    recurrent_gradient(part, s - 1, nullptr, -1, [&](int64_t row, int64_t column, const T* sums, int lanes) {
      store_lanes<T>(out(row) + column, S::load(sums), lanes);
    });
  }

  // Sums over the steps in which a row's state was replaced: of the gate gradients, of which one product with U makes
  // dL/dh of the state that replaced it, and of dL/dc. Each member has its own units of the team's rows.
  void zero_reset_gradients() {
    if (!p_.grad_reset_c && !reset_gates_) return;
    for (int64_t row = 0; row < rows_.most; ++row) {
      const int64_t b = rows_.batch_row(row);
      for (int64_t unit = hidden_columns_.begin; unit < hidden_columns_.end; ++unit) {
        if (p_.grad_reset_c) p_.grad_reset_c[b * shape_.hidden_size + unit] = T(0);
        if (!reset_gates_) continue;
        for (int gate = 0; gate < 4; ++gate) reset_gates_[b * plan_.gate_row + gate * shape_.hidden_size + unit] = T(0);
      }
      if (!extras_.reset_kept_h) continue;
      for (int64_t k = output_columns_.begin; k < output_columns_.end; ++k) {
        extras_.reset_kept_h[b * shape_.output_size + k] = T(0);
      }
    }
  }
  void reset_state_gradient() {
    if (!reset_gates_) return;
    const Range all{0, rows_.most};
    const RowGrid<T> out = rows_.grid(p_.grad_reset_h, shape_.output_size, all.begin, all.end);
    multiply(
        rows_.grid(const_cast<const T*>(reset_gates_), plan_.gate_row, all.begin, all.end), rows_.most,
        recurrent_weight(), output_columns_, partial_sums(all.begin, all.end),
        [](int64_t, int64_t) LSTM_EXT_LAMBDA_INLINE {},
        [](int64_t, int64_t, int, Reg<T>& v) LSTM_EXT_LAMBDA_INLINE { v = S::zero(); },
        [&](int64_t row, int64_t column, const T* sums, int lanes) {
          Reg<T> sum = S::load(sums);
          const int64_t at = rows_.batch_row(row) * shape_.output_size + column;
          if (p_.options.recurrent_mask) sum = sum * load_lanes<T>(p_.options.recurrent_mask + at, lanes);
          if (extras_.reset_kept_h) sum = sum + load_lanes<T>(extras_.reset_kept_h + at, lanes);
          store_lanes<T>(out(row) + column, sum, lanes);
        });
  }

  // The team's own place for sums that wait, wide enough for both products of a step (P <= H).
  RowGrid<T> partial_sums(int64_t begin, int64_t end) const {
    return rows_.grid(partial_sums_, shape_.hidden_size, begin, end);
  }

  // dL/dh for some of the team's rows and this member's columns: from the output at time t, if t >= 0,
  // from h_n, if given, and from the gate gradients of step `later`, if >= 0.
  template <typename Finish>
  LSTM_EXT_INLINE void recurrent_gradient(Range part, int64_t later, const T* grad_h_n, int64_t t, Finish&& finish) {
    const int64_t P = shape_.output_size;
    const int64_t count = part.end - part.begin;
    const bool from_output = t >= 0 && p_.grad_output.data;
    const RowGrid<const T> grad_output =
        rows_.grid(from_output ? steps_.at(p_.grad_output, t) : nullptr, p_.grad_output.stride_b, part.begin, part.end);
    const RowGrid<const T> grad_final = rows_.grid(grad_h_n, P, part.begin, part.end);
    const auto start = [&](int64_t row, int64_t column, int lanes, Reg<T>& v) LSTM_EXT_LAMBDA_INLINE {
      v = grad_output.data ? load_lanes<T>(grad_output.data + row * grad_output.inner_step + column, lanes) : S::zero();
      if (grad_final.data) v = v + load_lanes<T>(grad_final.data + row * grad_final.inner_step + column, lanes);
    };
    RightHandSide<T> weight = recurrent_weight();
    if (later < 0) weight.depth = 0;
    RowGrid<const T> gates =
        rows_.grid(const_cast<const T*>(later < 0 ? nullptr : grad_gates(later)), plan_.gate_row, part.begin, part.end);
    const uint8_t* resets = later < 0 ? nullptr : steps_.resets_at(steps_.time(later));
    if (rows_.any(resets, part.begin, part.end)) {
      for (int64_t row = 0; row < count; ++row) {
        const bool cut = resets[rows_.batch_row(part.begin + row)] != 0;
        gate_rows_[row] = cut ? zero_row_ : gates.data + row * gates.inner_step;
      }
      gates.each = gate_rows_;
    }
    multiply(
        gates, count, weight, output_columns_, partial_sums(part.begin, part.end),
        [&](int64_t row, int64_t column) LSTM_EXT_LAMBDA_INLINE {
          if (!shape_.projected && t >= 0) prefetch_cell(part.begin + row, column);
        },
        start, finish);
  }

  // What cell_gradient reads and writes in a step; row 0 of the batch.
  struct StepCells {
    const T* gates;
    const T* cells;
    const T* previous;      // c_{t-1}, in the direction of the forward pass, of the rows that have one
    int64_t previous_rows;  // the others have c0
    const T* grad_output;
    const T* grad_cells;        // or null
    const T* grad_gate_values;  // or null
    T* grad_gates;
    const uint8_t* resets;  // or null
    int64_t rows_before;    // the step, in arrays (T, B, n)
    T* grad_input_part;     // with layer normalisation
  };
  StepCells cells_of_step(int64_t s) const {
    const int64_t H = shape_.hidden_size;
    const int64_t t = steps_.time(s);
    const int64_t at = steps_.rows_before(t);
    const int64_t before = s + 1 < shape_.steps ? steps_.rows_before(steps_.time(s + 1)) : 0;
    return {p_.gate_values ? p_.gate_values + at * 4 * H : rebuilt_.gates + row_in_chunk(chunk_, s) * 4 * H,
            p_.cells + at * H,
            p_.cells + before * H,
            steps_.rows_of_step(s + 1),
            p_.grad_output.data ? steps_.at(p_.grad_output, t) : nullptr,
            p_.grad_cells ? p_.grad_cells + at * H : nullptr,
            p_.grad_gate_values ? p_.grad_gate_values + at * 4 * H : nullptr,
            grad_gates(s),
            steps_.resets_at(t),
            at,
            normalised() ? chunk_.grad_input_part + row_in_chunk(chunk_, s) * plan_.gate_row : nullptr};
  }
  LSTM_EXT_INLINE bool is_reset(int64_t b) const { return cells_.resets && cells_.resets[b] != 0; }
  // c_{t-1} of a batch row; null for zeros.
  LSTM_EXT_INLINE const T* previous_cell(int64_t b) const {
    if (is_reset(b)) return p_.reset_state.c ? p_.reset_state.c + b * shape_.hidden_size : nullptr;
    if (b < cells_.previous_rows) return cells_.previous + b * shape_.hidden_size;
    return p_.c0 ? p_.c0 + b * shape_.hidden_size : nullptr;
  }

  // Fetches what cell_gradient will read; a row of the team.
  LSTM_EXT_INLINE void prefetch_cell(int64_t row, int64_t unit) const {
    const int64_t H = shape_.hidden_size;
    const int64_t b = rows_.batch_row(row);
    const T* gates = cells_.gates + b * 4 * H + unit;
#pragma GCC unroll 4
    for (int gate = 0; gate < 4; ++gate) __builtin_prefetch(gates + gate * H);
    __builtin_prefetch(cells_.cells + b * H + unit);
    const T* previous = previous_cell(b);
    if (previous) __builtin_prefetch(previous + unit);
    if (cells_.grad_output && !shape_.projected) {
      __builtin_prefetch(cells_.grad_output + b * p_.grad_output.stride_b + unit);
    }
  }

  // The gate gradients of one row of the team and `lanes` units, from dL/dh before the projection.
  // `begins`: this is the first step of the loop that the row has.
  LSTM_EXT_INLINE void cell_gradient(int64_t row, bool begins, int64_t unit, Reg<T> grad_h, int lanes) {
    const int64_t H = shape_.hidden_size;
    const int64_t b = rows_.batch_row(row);
    const Reg<T> one = S::set1(T(1));
    const T* gates = cells_.gates + b * 4 * H + unit;
    const Reg<T> i = load_lanes<T>(gates, lanes);
    const Reg<T> f = load_lanes<T>(gates + H, lanes);
    const Reg<T> g = load_lanes<T>(gates + 2 * H, lanes);
    const Reg<T> o = load_lanes<T>(gates + 3 * H, lanes);
    const Reg<T> tanh_c = tanh<T>(load_lanes<T>(cells_.cells + b * H + unit, lanes));
    const T* previous = previous_cell(b);

    T* running = p_.grad_c + b * H + unit;
    Reg<T> grad_c = !begins       ? load_lanes<T>(running, lanes)
                    : p_.grad_c_n ? load_lanes<T>(p_.grad_c_n + b * H + unit, lanes)
                                  : S::zero();
    grad_c = S::fma(grad_h * o, one - tanh_c * tanh_c, grad_c);
    if (cells_.grad_cells) grad_c = grad_c + load_lanes<T>(cells_.grad_cells + b * H + unit, lanes);
    T* out = cells_.grad_gates + b * plan_.gate_row + unit;
    const Reg<T> c_previous = previous ? load_lanes<T>(previous + unit, lanes) : S::zero();
    Reg<T> grad_i = grad_c * g, grad_f = grad_c * c_previous, grad_g = grad_c * i, grad_o = grad_h * tanh_c;
    if (cells_.grad_gate_values) {
      const T* values = cells_.grad_gate_values + b * 4 * H + unit;
      grad_i = grad_i + load_lanes<T>(values, lanes);
      grad_f = grad_f + load_lanes<T>(values + H, lanes);
      grad_g = grad_g + load_lanes<T>(values + 2 * H, lanes);
      grad_o = grad_o + load_lanes<T>(values + 3 * H, lanes);
    }
    store_lanes<T>(out, grad_i * (i * (one - i)), lanes);
    store_lanes<T>(out + H, grad_f * (f * (one - f)), lanes);
    store_lanes<T>(out + 2 * H, grad_g * (one - g * g), lanes);
    store_lanes<T>(out + 3 * H, grad_o * (o * (one - o)), lanes);
    store_lanes<T>(running, grad_c * f, lanes);
    if (is_reset(b)) cut_gradient(b, unit, lanes, running, out);
  }

  // dL/dc_t of what comes after the cell in time, and of where a loss sees it.
  LSTM_EXT_INLINE Reg<T> state_gradient(int64_t b, bool begins, int64_t unit, int lanes) const {
    const int64_t H = shape_.hidden_size;
    Reg<T> grad_c = !begins       ? load_lanes<T>(p_.grad_c + b * H + unit, lanes)
                    : p_.grad_c_n ? load_lanes<T>(p_.grad_c_n + b * H + unit, lanes)
                                  : S::zero();
    if (cells_.grad_cells) grad_c = grad_c + load_lanes<T>(cells_.grad_cells + b * H + unit, lanes);
    return grad_c;
  }
  // Where a loss sees the gates themselves.
  LSTM_EXT_INLINE void add_gate_value_gradients(Reg<T> (&grads)[4], int64_t b, int64_t unit, int lanes) const {
    if (!cells_.grad_gate_values) return;
    const T* values = cells_.grad_gate_values + b * 4 * shape_.hidden_size + unit;
#pragma GCC unroll 4
    for (int gate = 0; gate < 4; ++gate) {
      grads[gate] = grads[gate] + load_lanes<T>(values + gate * shape_.hidden_size, lanes);
    }
  }

  // The gradients of the state before the step belong to the one that replaced it.
  void cut_gradient(int64_t b, int64_t unit, int lanes, T* grad_c, const T* gates) {
    const int64_t H = shape_.hidden_size;
    if (p_.grad_reset_c) {
      T* sum = p_.grad_reset_c + b * H + unit;
      store_lanes<T>(sum, load_lanes<T>(sum, lanes) + load_lanes<T>(grad_c, lanes), lanes);
    }
    store_lanes<T>(grad_c, S::zero(), lanes);
    if (!reset_gates_) return;
    for (int gate = 0; gate < 4; ++gate) {
      T* sum = reset_gates_ + b * plan_.gate_row + gate * H + unit;
      store_lanes<T>(sum, load_lanes<T>(sum, lanes) + load_lanes<T>(gates + gate * H, lanes), lanes);
    }
  }

  // For `rows` rows and `columns`: a * b + start(row, column, lanes), kLanes columns at a time to
  // finish(row, column, sums, lanes). Between blocks of k the sums wait in partial(row)[columns].
  template <typename A, typename Partial, typename Prefetch, typename Start, typename Finish>
  LSTM_EXT_INLINE void multiply(const A& a_row, int64_t rows, const RightHandSide<T>& b, Range columns,
                                const Partial& partial, const Prefetch& prefetch, const Start& start,
                                const Finish& finish) {
    const auto column_block = [&](int64_t column, auto width, int last) LSTM_EXT_LAMBDA_INLINE {
      constexpr int NV = width();
      const bool exact = b.packed || last == kLanes;
      for (int64_t k = 0; k == 0 || k < b.depth; k += kBlockK) {
        const int64_t depth = smaller(kBlockK, b.depth - k);
        for_each_row_tile(rows, [&](int64_t row, auto height) {
          constexpr int R = height();
          Tile<T, R, NV> tile;
          tile.zero();
          const T* a[R];
#pragma GCC unroll 6
          for (int r = 0; r < R; ++r) a[r] = b.depth > 0 ? a_row(row + r) + k : nullptr;
          const bool done = k + depth >= b.depth;
          // What the epilogue reads was written long ago; it arrives while the tile is summed.
          if (done) {
            for (int r = 0; r < R; ++r)
              for (int v = 0; v < NV; ++v) prefetch(row + r, column + v * kLanes);
          }
          const T* panel = b.template at<NV>(column, k);
          const int64_t step = b.template step<NV>();
          if (exact) {
            accumulate_rows(tile, a, panel, step, depth);
          } else {
            accumulate_rows<T, R, NV, true>(tile, a, panel, step, depth, last);
          }
#pragma GCC unroll 6
          for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
            for (int v = 0; v < NV; ++v) {
              const int lanes = v == NV - 1 ? last : kLanes;
              const int64_t at = column + v * kLanes;
              Reg<T> before;
              if (k == 0) {
                start(row + r, at, lanes, before);
              } else {
                before = load_lanes<T>(partial(row + r) + at, lanes);
              }
              tile.acc[r][v] = tile.acc[r][v] + before;
            }
          }
          for (int r = 0; r < R; ++r) {
            for (int v = 0; v < NV; ++v) {
              const int lanes = v == NV - 1 ? last : kLanes;
              const int64_t at = column + v * kLanes;
              if (done) {
                alignas(64) T sums[kLanes];
                S::store(sums, tile.acc[r][v]);
                finish(row + r, at, sums, lanes);
              } else {
                store_lanes<T>(partial(row + r) + at, tile.acc[r][v], lanes);
              }
            }
          }
        });
      }
    };
    for_each_column_block<T>(columns.begin, columns.end, column_block);
  }

  bool normalised() const { return p_.options.norm.gain_ih != nullptr; }
  // dL/d(W x + b) of the chunk, with layer normalisation dL/d(W x).
  const T* input_part_gradient() const { return normalised() ? chunk_.grad_input_part : chunk_.grad_gates; }

  // The chunk's dL/dx = dgates W; workers share the rows.
  void input_gradient() {
    const RowGrid<T> out = steps_.from(p_.grad_input, chunk_.begin);
    const Range mine = share(chunk_.rows, plan_.grid.workers(), worker_);
    constexpr int64_t kRows = 16 * kTileRows;  // rows that pass over a panel while it is in cache
    const RightHandSide<T> weight = input_weight();
    for (int64_t begin = mine.begin; begin < mine.end; begin += kRows) {
      const int64_t rows = smaller(kRows, mine.end - begin);
      multiply(
          RowGrid<const T>{input_part_gradient() + begin * plan_.gate_row, rows * plan_.gate_row, plan_.gate_row, rows},
          rows, weight, Range{0, shape_.input_size},
          [&](int64_t row) LSTM_EXT_LAMBDA_INLINE { return out(begin + row); },
          [](int64_t, int64_t) LSTM_EXT_LAMBDA_INLINE {},
          [&](int64_t row, int64_t column, int lanes, Reg<T>& v) LSTM_EXT_LAMBDA_INLINE {
            v = p_.accumulate_grad_input ? load_lanes<T>(out(begin + row) + column, lanes) : S::zero();
          },
          [&](int64_t row, int64_t column, const T* sums, int lanes) {
            store_lanes<T>(out(begin + row) + column, S::load(sums), lanes);
          });
    }
  }

  // Adds the chunk's part; workers share the rows of the gradients.
  void weight_gradients() {
    const int64_t H = shape_.hidden_size;
    const int64_t P = shape_.output_size;
    const Chunk& chunk = chunk_;
    const Range mine = share(4 * H, plan_.grid.workers(), worker_);
    T* scratch = outer_products_ + worker_ * outer_product_scratch(kLanes, divide_up(4 * H, plan_.grid.workers()));
    if (p_.grad_weight_ih) {
      if (chunk.first == 0) zero_rows(p_.grad_weight_ih, shape_.input_size, mine);
      add_outer_products<T>(input_part_gradient(), plan_.gate_row, chunk.rows, mine, steps_.from(p_.input, chunk.begin),
                            shape_.input_size, p_.grad_weight_ih, scratch);
    }
    if (p_.grad_weight_hh) {
      if (chunk.first == 0) zero_rows(p_.grad_weight_hh, P, mine);
      if (steps_.packed() || shape_.resets || chunk.masked_h) {
        RowGrid<const T> previous{};
        if (chunk.masked_h) {
          previous = {chunk.masked_h, chunk.rows * P, P, chunk.rows};
        } else {
          list_previous_rows();
          previous.each = row_list_;
        }
        add_outer_products<T>(chunk.grad_gates, plan_.gate_row, chunk.rows, mine, previous, P, p_.grad_weight_hh,
                              scratch);
      } else {
        // h_{t-1} is the output of the step before in the layer's direction; of its first step, h0.
        const int64_t B = shape_.batch;
        const bool has_first = chunk.first + chunk.count == shape_.steps;
        const int64_t begin = has_first && !shape_.reverse ? 1 : 0;  // of the steps with an output before
        const int64_t count = chunk.count - (has_first ? 1 : 0);
        const int64_t before = chunk.begin + begin + (shape_.reverse ? 1 : -1);
        if (count > 0) {
          add_outer_products<T>(chunk.grad_gates + begin * B * plan_.gate_row, plan_.gate_row, count * B, mine,
                                steps_.from(p_.output, before), P, p_.grad_weight_hh, scratch);
        }
        if (has_first && p_.h0) {
          add_outer_products<T>(grad_gates(shape_.steps - 1), plan_.gate_row, B, mine, {p_.h0, B * P, P, B}, P,
                                p_.grad_weight_hh, scratch);
        }
      }
    }
    if (p_.grad_bias && !normalised()) {
      if (chunk.first == 0) zero_rows(p_.grad_bias, 1, mine);
      add_columns<T>(chunk.grad_gates, plan_.gate_row, chunk.rows, mine, p_.grad_bias);
    }
    if (p_.grad_weight_hr) {
      const Range projected = share(P, plan_.grid.workers(), worker_);
      if (chunk.first == 0) zero_rows(p_.grad_weight_hr, H, projected);
      add_outer_products<T>(chunk.grad_hidden, P, chunk.rows, projected,
                            {chunk.hidden ? chunk.hidden : p_.hidden + steps_.rows_before(chunk.begin) * H, H, H, 1}, H,
                            p_.grad_weight_hr, scratch);
    }
  }

  // row_list_ = h_{t-1} of every row of the chunk, where it is not the output of the step before throughout.
  void list_previous_rows() {
    int64_t n = 0;
    for (int64_t t = chunk_.begin; t < chunk_.begin + chunk_.count; ++t) {
      const int64_t s = steps_.time(t);
      const int64_t rows = steps_.rows_at(t);
      const int64_t continued = smaller(rows, steps_.rows_of_step(s + 1));
      const T* before = continued > 0 ? steps_.at(p_.output, steps_.time(s + 1)) : nullptr;
      const uint8_t* resets = steps_.resets_at(t);
      for (int64_t b = 0; b < rows; ++b, ++n) {
        const T* start = resets && resets[b] ? p_.reset_state.h : b < continued ? nullptr : p_.h0;
        const bool goes_on = b < continued && !(resets && resets[b]);
        row_list_[n] = goes_on ? before + b * p_.output.stride_b : start ? start + b * shape_.output_size : zero_row_;
      }
    }
  }

  // With what changes the equations of a step: in backward_extras.h.
  void extended_step(int64_t s);
  void extended_hidden_gradient(int64_t s, Range part, bool begins);
  template <typename Finish>
  void recurrent_product(Range part, int64_t later, Finish&& finish);
  void extended_initial_gradient(Range part, int64_t first_step);
  void extended_cell_gradient(int64_t row, bool begins, Range units);
  void normalise_cells(Range group, T* factors);
  void normalised_cell_gradient(int64_t row, bool begins, const T* visible, T factor);
  void mask_previous_rows();
  void add_norm_sums();
  void zero_norm_gradients();
  void norm_gradients();

  // Gates that were not saved: in rebuild.h.
  void prepare_rebuilding();
  void rebuild_gates();

  static void zero_rows(T* matrix, int64_t columns, Range rows) {
    for (int64_t i = rows.begin * columns; i < rows.end * columns; ++i) matrix[i] = T(0);
  }

  const BackwardParams<T>& p_;
  const BackwardPlan& plan_;
  const LayerShape& shape_;
  const Steps steps_;  // of the backward pass, against the direction of the forward pass
  const int64_t worker_, team_, member_;
  const TeamRows rows_;
  const Range hidden_blocks_;   // blocks of kLanes hidden units of this member
  const Range hidden_columns_;  // the units
  const Range output_columns_;  // output features of this member; the same without a projection
  Barrier* all_workers_;
  Barrier* team_barrier_;
  T* input_panels_;
  T* recurrent_panels_;
  T* projection_panels_;
  T* partial_sums_;
  T* grad_gates_;   // gradients of the pre-activations, chunk by chunk
  T* grad_hidden_;  // gradients of the projected h_t, likewise
  T* outer_products_;
  const T** row_list_;
  T* zero_row_;
  const T** gate_rows_;  // of the team's rows in a step after which one of them is cut off
  T* reset_gates_;       // or null
  ExtraBuffers<T> extras_;
  RebuiltGates<T> rebuilt_;
  Chunk chunk_, before_;
  StepCells cells_;
};

template <typename T>
void backward(const BackwardParams<T>& params, const BackwardPlan& plan, char* workspace, int worker) {
  Backward<T>(params, plan, workspace, worker).run();
}
