// Forward pass of one direction of one layer. Included inside a per-set anonymous namespace.
//
// Chunk by chunk: the input part W x_t + b of some time steps at once into the pre-activation
// buffer (in training that buffer is the saved gates), then the recurrence over those steps, whose
// tiles sum U h_{t-1}, add what the buffer holds and update the cell from registers.

template <typename T>
struct CellState {
  const T* previous;  // c_{t-1} of the row, or null for zeros
  T* current;         // c_t
};

// From pre-activations to gates, c_t and o * tanh(c_t), `lanes` units of one row.
template <typename T>
LSTM_EXT_INLINE void update_cell(Reg<T> i, Reg<T> f, Reg<T> g, Reg<T> o, CellState<T> cell, int64_t unit, int lanes,
                                 T* hidden, T* gates, int64_t hidden_size) {
  using S = Simd<T>;
  const Reg<T> one = S::set1(T(1));
  // A division costs as much as an exponential: i and g share one, o and tanh(c) another. f has its
  // own, since its rounding error is multiplied into c at every step. Gates that meet in c anyway
  // share, so that a NaN spreads no further than in the equations.
  f = one / sigmoid_denominator<T>(f);
  const Reg<T> i_denominator = sigmoid_denominator<T>(i);
  Reg<T> g_numerator, g_denominator;
  tanh_fraction<T>(g, g_numerator, g_denominator);
  const Reg<T> inverse = one / (i_denominator * g_denominator);
  i = g_denominator * inverse;
  g = g_numerator * (i_denominator * inverse);
  Reg<T> c = i * g;
  if (cell.previous) c = S::fma(f, load_lanes<T>(cell.previous + unit, lanes), c);
  store_lanes<T>(cell.current + unit, c, lanes);
  const Reg<T> o_denominator = sigmoid_denominator<T>(o);
  Reg<T> c_numerator, c_denominator;
  tanh_fraction<T>(c, c_numerator, c_denominator);
  const Reg<T> o_inverse = one / (o_denominator * c_denominator);
  o = c_denominator * o_inverse;
  store_lanes<T>(hidden + unit, c_numerator * o_inverse, lanes);
  if (gates) {
    store_lanes<T>(gates + unit, i, lanes);
    store_lanes<T>(gates + hidden_size + unit, f, lanes);
    store_lanes<T>(gates + 2 * hidden_size + unit, g, lanes);
    store_lanes<T>(gates + 3 * hidden_size + unit, o, lanes);
  }
}

template <typename T>
class Forward {
 public:
  Forward(const ForwardParams<T>& params, const ForwardPlan& plan, char* workspace, int worker)
      : p_(params),
        plan_(plan),
        shape_(params.shape),
        steps_(shape_, shape_.reverse),
        team_(worker / plan.grid.hidden_groups),
        member_(worker % plan.grid.hidden_groups),
        rows_(shape_, plan.grid.batch_groups, team_),
        blocks_(share(divide_up(shape_.hidden_size, kLanes), plan.grid.hidden_groups, member_)),
        product_(shape_.hidden_size, blocks_),
        all_workers_(reinterpret_cast<Barrier*>(workspace)),
        team_barrier_(reinterpret_cast<Barrier*>(workspace + kBarrierBytes * (1 + team_))),
        input_panels_(reinterpret_cast<T*>(workspace + plan.input_panels)),
        recurrent_panels_(reinterpret_cast<T*>(workspace + plan.recurrent_panels)),
        bias_(reinterpret_cast<T*>(workspace + plan.bias)),
        projection_panels_(reinterpret_cast<T*>(workspace + plan.projection_panels)),
        buffer_(reinterpret_cast<T*>(workspace + plan.pre_activations) +
                team_ * plan.chunk_rows * 4 * shape_.hidden_size),
        hidden_(reinterpret_cast<T*>(workspace + plan.hidden)),
        input_rows_(reinterpret_cast<const T**>(workspace + plan.row_lists) + worker * 2 * plan.chunk_rows),
        pre_rows_(reinterpret_cast<T**>(workspace + plan.row_lists) + (worker * 2 + 1) * plan.chunk_rows),
        h_rows_(reinterpret_cast<const T**>(workspace + plan.state_lists) + worker * 2 * most_rows(plan)),
        c_rows_(h_rows_ + most_rows(plan)),
        zero_row_(reinterpret_cast<T*>(workspace + plan.zero_rows) + worker * 4 * shape_.hidden_size),
        masked_h_(reinterpret_cast<T*>(workspace + plan.masked_h) + worker * most_rows(plan) * shape_.output_size),
        recurrent_part_(reinterpret_cast<T*>(workspace + plan.recurrent_parts) +
                        team_ * most_rows(plan) * 4 * shape_.hidden_size),
        visible_c_(reinterpret_cast<T*>(workspace + plan.visible_cells) + worker * kNormRows * shape_.hidden_size) {}

  void run() {
    prepare_weights();
    for (int64_t first = 0; first < shape_.steps;) {
      // As many steps as the buffer has rows for.
      int64_t end = first;
      int64_t rows = 0;
      while (end < shape_.steps && rows + team_rows(end) <= plan_.chunk_rows) rows += team_rows(end++);
      if (rows > 0) input_part(first, end, rows);
      int64_t done = 0;
      for (int64_t s = first; s < end; ++s) {
        if (p_.options.any()) {
          extended_step(s, pre_activations(s, done));
        } else {
          step(s, pre_activations(s, done));
        }
        done += team_rows(s);
      }
      first = end;
    }
    final_state();
  }

 private:
  static constexpr int kLanes = Simd<T>::kLanes;

  int lanes_of(int64_t block) const { return product_.lanes_of(block); }
  int64_t most_rows(const ForwardPlan& plan) const { return divide_up(shape_.batch, plan.grid.batch_groups); }
  // Rows of the team in step s.
  int64_t team_rows(int64_t s) const { return rows_.of(steps_.rows_of_step(s)); }
  void meet_team() {
    if (plan_.grid.hidden_groups > 1) team_barrier_->wait(plan_.grid.hidden_groups);
  }

  bool normalised() const { return p_.options.norm.gain_ih != nullptr; }
  // Of all steps, where what pre_activations says is kept; null in inference.
  T* kept_pre_activations() const { return normalised() ? p_.norm_input : p_.gate_values; }

  // Where the pre-activations of step s are, or the normalised W x: in training where it is kept (the
  // pre-activations, where the gates will be), else in the buffer, after those of the `done` rows of
  // the chunk's earlier steps.
  RowGrid<T> pre_activations(int64_t s, int64_t done) const {
    const int64_t gate_row = 4 * shape_.hidden_size;
    const int64_t count = team_rows(s);
    if (T* kept = kept_pre_activations()) {
      return rows_.grid(kept + steps_.rows_before(steps_.time(s)) * gate_row, gate_row, 0, count);
    }
    return {buffer_ + done * gate_row, count * gate_row, gate_row, count};
  }

  // Each member uses the panels of its own units only; the teams share the work of packing them.
  void prepare_weights() {
    const LayerWeights<T>& w = p_.weights;
    const int teams = plan_.grid.batch_groups;
    if (shape_.resets || p_.options.any()) {
      for (int64_t k = 0; k < 4 * shape_.hidden_size; ++k) zero_row_[k] = T(0);
    }
    for (int64_t block = blocks_.begin; block < blocks_.end; ++block) {
      if (block % teams != team_) continue;
      if (plan_.pack_input) {
        pack_gate_panel(w.weight_ih, shape_.hidden_size, shape_.input_size, block,
                        input_panels_ + block * 4 * kLanes * shape_.input_size);
      }
      if (plan_.pack_recurrent) {
        pack_gate_panel(w.weight_hh, shape_.hidden_size, shape_.output_size, block,
                        recurrent_panels_ + block * 4 * kLanes * shape_.output_size);
      }
      for (int gate = 0; gate < 4; ++gate) {
        const int64_t at = gate * shape_.hidden_size + block * kLanes;
        for (int64_t i = at; i < at + lanes_of(block); ++i) {
          bias_[i] = (w.bias_ih ? w.bias_ih[i] : T(0)) + (w.bias_hh ? w.bias_hh[i] : T(0));
        }
      }
    }
    if (shape_.projected) {
      const int64_t blocks = divide_up(shape_.output_size, kLanes);
      const int workers = plan_.grid.workers();
      for (int64_t block = team_ * plan_.grid.hidden_groups + member_; block < blocks; block += workers) {
        const int lanes = static_cast<int>(smaller(shape_.output_size - block * kLanes, kLanes));
        pack_transposed<T>(w.weight_hr + block * kLanes * shape_.hidden_size, lanes, shape_.hidden_size,
                           projection_panels_ + block * kLanes * shape_.hidden_size, kLanes);
      }
    }
    if (teams > 1 || (shape_.projected && plan_.grid.workers() > 1)) all_workers_->wait(plan_.grid.workers());
  }

  // pre = W x + b for the `rows` rows of steps first ... end - 1 and the units of this member.
  void input_part(int64_t first, int64_t end, int64_t rows) {
    const int64_t gate_row = 4 * shape_.hidden_size;
    RowGrid<const T> input;
    RowGrid<T> pre;
    if (!steps_.packed()) {
      const int64_t direction = shape_.reverse ? -1 : 1;
      const int64_t t = steps_.time(first);
      input = rows_.grid(steps_.at(p_.input, t), p_.input.stride_b, 0, rows_.most);
      input.outer_step = direction * p_.input.stride_t;
      pre = pre_activations(first, 0);
      pre.outer_step = kept_pre_activations() ? direction * shape_.batch * gate_row : rows_.most * gate_row;
    } else {
      int64_t n = 0;
      for (int64_t s = first; s < end; ++s) {
        const RowGrid<const T> from =
            rows_.grid(steps_.at(p_.input, steps_.time(s)), p_.input.stride_b, 0, team_rows(s));
        const RowGrid<T> to = pre_activations(s, n);
        for (int64_t row = 0; row < from.rows; ++row, ++n) {
          input_rows_[n] = from(row);
          pre_rows_[n] = to(row);
        }
      }
      input.each = input_rows_;
      pre.each = pre_rows_;
    }
    product_.multiply(rows, input, shape_.input_size, p_.weights.weight_ih, plan_.pack_input ? input_panels_ : nullptr,
                      pre, normalised() ? zero_row_ : bias_);
    if (normalised()) normalise_input_part(rows, pre);
  }

  void step(int64_t s, const RowGrid<T>& pre) {
    const int64_t t = steps_.time(s);
    const int64_t count = pre.rows;
    // Rows that were there in the step before; those after them begin now.
    const int64_t continued = smaller(count, team_rows(s - 1));
    RowGrid<T> hidden = rows_.grid(steps_.at(p_.output, t), p_.output.stride_b, 0, count);
    if (shape_.projected) {
      const int64_t H = shape_.hidden_size;
      hidden = rows_.grid(p_.hidden ? p_.hidden + steps_.rows_before(t) * H : hidden_, H, 0, count);
    }
    for (int begins = 0; begins < 2; ++begins) {  // one place of call: the loops inside are long
      const Range part = begins ? Range{continued, count} : Range{0, continued};
      if (part.begin < part.end) recurrence(s, part, begins != 0, pre, hidden);
    }
    meet_team();
    if (shape_.projected) {
      project(t, hidden);
      meet_team();
    }
  }

  // pre += U h_{t-1}, then the cell update, for rows of the team that go on or that begin.
  void recurrence(int64_t s, Range part, bool begins, const RowGrid<T>& pre_rows, const RowGrid<T>& hidden) {
    const int64_t H = shape_.hidden_size;
    const int64_t P = shape_.output_size;
    const int64_t t = steps_.time(s);
    const int64_t before = begins ? 0 : steps_.time(s - 1);
    RowGrid<const T> h = begins ? rows_.grid(p_.h0, P, part.begin, part.end)
                                : rows_.grid(const_cast<const T*>(steps_.at(p_.output, before)), p_.output.stride_b,
                                             part.begin, part.end);
    const T* const c_start = begins ? p_.c0 : p_.cells ? p_.cells + steps_.rows_before(before) * H : p_.c_n;
    const RowGrid<const T> c_previous = rows_.grid(c_start, H, part.begin, part.end);
    const RowGrid<T> c_current =
        rows_.grid(p_.cells ? p_.cells + steps_.rows_before(t) * H : p_.c_n, H, part.begin, part.end);
    RowGrid<T> pre = pre_rows;
    pre.data = pre_rows(part.begin);
    const int64_t count = part.end - part.begin;
    const uint8_t* resets = steps_.resets_at(t);
    const bool replaced = rows_.any(resets, part.begin, part.end);
    int64_t h_size = h.data ? P : 0;
    if (replaced) {
      for (int64_t row = 0; row < count; ++row) {
        const int64_t b = rows_.batch_row(part.begin + row);
        const bool reset = resets[b] != 0;
        const T* other_h = p_.reset_state.h ? p_.reset_state.h + b * P : zero_row_;
        h_rows_[row] = reset ? other_h : h.data ? h.data + row * h.inner_step : zero_row_;
        const T* other_c = p_.reset_state.c ? p_.reset_state.c + b * H : nullptr;
        c_rows_[row] = reset ? other_c : c_previous.data ? c_previous.data + row * c_previous.inner_step : nullptr;
      }
      h.each = h_rows_;
      h_size = P;
    }
    const auto cell = [&](int64_t row, int64_t block, Reg<T> i, Reg<T> f, Reg<T> g, Reg<T> o) LSTM_EXT_LAMBDA_INLINE {
      const T* previous = replaced          ? c_rows_[row]
                          : c_previous.data ? c_previous.data + row * c_previous.inner_step
                                            : nullptr;
      const CellState<T> state{previous, c_current.data + row * c_current.inner_step};
      update_cell<T>(i, f, g, o, state, block * kLanes, lanes_of(block),
                     hidden.data + (part.begin + row) * hidden.inner_step,
                     p_.gate_values ? pre.data + row * pre.inner_step : nullptr, H);
    };
    if (plan_.pack_recurrent) {
      product_.multiply_panels(count, h, h_size, recurrent_panels_, pre, static_cast<const T*>(nullptr),
                               [&](int64_t row, int64_t block, auto& tile) LSTM_EXT_LAMBDA_INLINE {
                                 constexpr int R = sizeof(tile.acc) / sizeof(tile.acc[0]);
#pragma GCC unroll 6
                                 for (int r = 0; r < R; ++r) {
                                   cell(row + r, block, tile.acc[r][0], tile.acc[r][1], tile.acc[r][2], tile.acc[r][3]);
                                 }
                                 return true;
                               });
    } else {
      if (h_size > 0) product_.dot_gates(p_.weights.weight_hh, h_size, count, h, static_cast<const T*>(nullptr), pre);
      for (int64_t row = 0; row < count; ++row) {
        for (int64_t block = blocks_.begin; block < blocks_.end; ++block) {
          const T* at = pre(row) + block * kLanes;
          const int n = lanes_of(block);
          cell(row, block, load_lanes<T>(at, n), load_lanes<T>(at + H, n), load_lanes<T>(at + 2 * H, n),
               load_lanes<T>(at + 3 * H, n));
        }
      }
    }
  }

  // h_t = W_hr (o * tanh(c_t)), the members sharing the output columns.
  void project(int64_t t, const RowGrid<T>& hidden) {
    const Range blocks = share(divide_up(shape_.output_size, kLanes), plan_.grid.hidden_groups, member_);
    const RowGrid<T> out = rows_.grid(steps_.at(p_.output, t), p_.output.stride_b, 0, hidden.rows);
    for (int64_t block = blocks.begin; block < blocks.end; ++block) {
      const int lanes = static_cast<int>(smaller(shape_.output_size - block * kLanes, kLanes));
      const T* panel = projection_panels_ + block * kLanes * shape_.hidden_size;
      for_each_row_tile(hidden.rows, [&](int64_t row, auto height) LSTM_EXT_LAMBDA_INLINE {
        constexpr int R = height();
        const T* a[R];
        for (int r = 0; r < R; ++r) a[r] = hidden(row + r);
        Tile<T, R, 1> tile;
        tile.zero();
        accumulate_rows(tile, a, panel, kLanes, shape_.hidden_size);
        for (int r = 0; r < R; ++r) {
          store_lanes<T>(out(row + r) + block * kLanes, tile.acc[r][0], lanes);
        }
      });
    }
  }

  // In forward_extras.h.
  void extended_step(int64_t s, const RowGrid<T>& pre);
  void list_previous_states(int64_t s, int64_t count);
  void normalise_input_part(int64_t rows, const RowGrid<T>& pre);
  void keep_part_of_h(int64_t t, const RowGrid<T>& h);

  void final_state() {
    // The last step ended with a meeting of the team, so all columns are there.
    if (member_ != 0) return;
    const int64_t H = shape_.hidden_size;
    const int64_t P = shape_.output_size;
    for (int64_t s = 0; s < shape_.steps; ++s) {
      const int64_t t = steps_.time(s);
      // The rows that do not go on; in the reverse direction all do, to the end.
      for (int64_t row = team_rows(s + 1); row < team_rows(s); ++row) {
        const int64_t b = rows_.batch_row(row);
        copy(steps_.at(p_.output, t) + b * p_.output.stride_b, P, p_.h_n + b * P);
        if (p_.cells) copy(p_.cells + (steps_.rows_before(t) + b) * H, H, p_.c_n + b * H);
      }
    }
  }

  const ForwardParams<T>& p_;
  const ForwardPlan& plan_;
  const LayerShape& shape_;
  const Steps steps_;
  const int64_t team_, member_;
  const TeamRows rows_;
  const Range blocks_;  // blocks of kLanes hidden units of this member
  GateProduct<T> product_;
  Barrier* all_workers_;
  Barrier* team_barrier_;
  T* input_panels_;
  T* recurrent_panels_;
  T* bias_;
  T* projection_panels_;
  T* buffer_;
  T* hidden_;
  const T** input_rows_;  // of the chunk, of packed data
  T** pre_rows_;
  const T** h_rows_;  // of the team's rows in a step in which one of them is replaced
  const T** c_rows_;
  T* zero_row_;
  // Of the extras: the masked h_{t-1} of the team's rows, their U h_{t-1} where it is not kept, and kNormRows rows
  // of c_t as layer normalisation shows it to h_t.
  T* masked_h_;
  T* recurrent_part_;
  T* visible_c_;
};

template <typename T>
void forward(const ForwardParams<T>& params, const ForwardPlan& plan, char* workspace, int worker) {
  Forward<T>(params, plan, workspace, worker).run();
}
