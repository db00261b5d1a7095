// The forward pass with what changes the equations of a step: recurrent dropout, zoneout, layer normalisation. Included
// inside a per-set anonymous namespace, after forward.h.
//
// The sums of a step go to memory, and a pass over them makes the states: of a member's own units, or, with layer
// normalisation, whose statistics are of whole rows, of its share of the team's rows.

// The gates and c_t, from the pre-activations of `lanes` units; returns c_t before zoneout. With `precise`, c_t is as
// near as its products allow: layer normalisation makes small differences of c_t large.
template <typename T>
LSTM_EXT_INLINE Reg<T> gates_and_cell(Reg<T> (&gates)[4], const T* previous, int64_t unit, int lanes, bool precise) {
  using S = Simd<T>;
  const Reg<T> one = S::set1(T(1));
  // Each has its own division, unlike in update_cell, for the same reason.
#pragma GCC unroll 4
  for (int gate = 0; gate < 4; ++gate) {
    if (gate == 2) {
      gates[gate] = precise ? precise_tanh<T>(gates[gate]) : tanh<T>(gates[gate]);
    } else {
      gates[gate] = one / sigmoid_denominator<T>(gates[gate]);
    }
  }
  Reg<T> c = gates[0] * gates[2];
  if (previous) c = S::fma(gates[1], load_lanes<T>(previous + unit, lanes), c);
  return c;
}

// h_{t-1} and c_{t-1} of the team's rows in step s; of c, null for zeros.
template <typename T>
void Forward<T>::list_previous_states(int64_t s, int64_t count) {
  const int64_t H = shape_.hidden_size;
  const int64_t P = shape_.output_size;
  const int64_t continued = smaller(count, team_rows(s - 1));
  const int64_t before = continued > 0 ? steps_.time(s - 1) : 0;
  const T* const cells = p_.cells ? p_.cells + steps_.rows_before(before) * H : p_.c_n;
  const uint8_t* resets = steps_.resets_at(steps_.time(s));
  for (int64_t row = 0; row < count; ++row) {
    const int64_t b = rows_.batch_row(row);
    const bool reset = resets && resets[b] != 0;
    if (reset || row >= continued) {
      const T* h = reset ? p_.reset_state.h : p_.h0;
      const T* c = reset ? p_.reset_state.c : p_.c0;
      h_rows_[row] = h ? h + b * P : zero_row_;
      c_rows_[row] = c ? c + b * H : nullptr;
    } else {
      h_rows_[row] = steps_.at(p_.output, before) + b * p_.output.stride_b;
      c_rows_[row] = cells + b * H;
    }
  }
}

// The chunk's W x become normalised, rows shared by the members of the team.
template <typename T>
void Forward<T>::normalise_input_part(int64_t rows, const RowGrid<T>& pre) {
  meet_team();
  const int64_t gates = 4 * shape_.hidden_size;
  const Range mine = share(rows, plan_.grid.hidden_groups, member_);
  for (int64_t n = mine.begin; n < mine.end; n += kNormRows) {
    const int64_t group = smaller(kNormRows, mine.end - n);
    T* rows_of_group[kNormRows];
    T factors[kNormRows];
    for (int64_t r = 0; r < group; ++r) rows_of_group[r] = pre(n + r);
    normalise<T>(rows_of_group, group, gates, factors);
    for (int64_t r = 0; r < group && p_.norm_input; ++r) {
      p_.norm_factors[(rows_of_group[r] - p_.norm_input) / gates * 2] = factors[r];
    }
  }
}

template <typename T>
void Forward<T>::extended_step(int64_t s, const RowGrid<T>& pre) {
  using S = Simd<T>;
  const int64_t H = shape_.hidden_size;
  const int64_t P = shape_.output_size;
  const int64_t t = steps_.time(s);
  const int64_t count = pre.rows;
  const StepOptions<T>& extras = p_.options;
  list_previous_states(s, count);

  RowGrid<const T> h{};
  h.each = h_rows_;
  if (extras.recurrent_mask) {
    for (int64_t row = 0; row < count; ++row) {
      const T* mask = extras.recurrent_mask + rows_.batch_row(row) * P;
      for_each_piece<T>(P, [&](int64_t k, int lanes) LSTM_EXT_LAMBDA_INLINE {
        store_lanes<T>(masked_h_ + row * P + k, load_lanes<T>(h_rows_[row] + k, lanes) * load_lanes<T>(mask + k, lanes),
                       lanes);
      });
    }
    h = {masked_h_, count * P, P, count};
  }
  const T* const panels = plan_.pack_recurrent ? recurrent_panels_ : nullptr;
  RowGrid<T> recurrent{};
  if (normalised()) {
    recurrent = p_.norm_recurrent ? rows_.grid(p_.norm_recurrent + steps_.rows_before(t) * 4 * H, 4 * H, 0, count)
                                  : RowGrid<T>{recurrent_part_, count * 4 * H, 4 * H, count};
    product_.multiply(count, h, P, p_.weights.weight_hh, panels, recurrent, zero_row_);
    meet_team();
  } else {
    product_.multiply(count, h, P, p_.weights.weight_hh, panels, pre, static_cast<const T*>(nullptr));
  }

  RowGrid<T> hidden = rows_.grid(steps_.at(p_.output, t), p_.output.stride_b, 0, count);
  if (shape_.projected) hidden = rows_.grid(p_.hidden ? p_.hidden + steps_.rows_before(t) * H : hidden_, H, 0, count);
  const RowGrid<T> cells = rows_.grid(p_.cells ? p_.cells + steps_.rows_before(t) * H : p_.c_n, H, 0, count);
  const bool zone_h = extras.zoneout_h.active() && !shape_.projected;
  const bool zone_c = extras.zoneout_c.active();
  const LayerNorm<T>& norm = extras.norm;
  const Range my_blocks = normalised() ? Range{0, divide_up(H, kLanes)} : blocks_;
  const auto place_of = [&](int64_t row) { return steps_.rows_before(t) + rows_.batch_row(row); };  // in (T, B, n)
  const auto gate_row = [&](int64_t row) { return p_.gate_values ? p_.gate_values + place_of(row) * 4 * H : pre(row); };
  const auto finish = [&](int64_t row, int64_t unit, int lanes, Reg<T> o, Reg<T> visible) LSTM_EXT_LAMBDA_INLINE {
    Reg<T> new_h = o * tanh<T>(visible);
    if (zone_h) {
      const uint8_t* kept = extras.zoneout_h.keep ? extras.zoneout_h.keep + place_of(row) * P + unit : nullptr;
      new_h = zoned<T>(new_h, load_lanes<T>(h_rows_[row] + unit, lanes), kept, extras.zoneout_h.share, lanes);
    }
    store_lanes<T>(hidden(row) + unit, new_h, lanes);
  };
  const auto cell = [&](int64_t row, T* visible) LSTM_EXT_LAMBDA_INLINE {
    const uint8_t* kept_c = extras.zoneout_c.keep ? extras.zoneout_c.keep + place_of(row) * H : nullptr;
    T* const from_input = pre(row);
    T* const from_h = normalised() ? recurrent(row) : nullptr;
    T* const gates_of_row = gate_row(row);
    const T* const previous = c_rows_[row];
    for (int64_t block = my_blocks.begin; block < my_blocks.end; ++block) {
      const int64_t unit = block * kLanes;
      const int lanes = lanes_of(block);
      Reg<T> gates[4];
#pragma GCC unroll 4
      for (int gate = 0; gate < 4; ++gate) {
        const int64_t at = gate * H + unit;
        gates[gate] = load_lanes<T>(from_input + at, lanes);
        if (normalised()) {
          gates[gate] = S::fma(load_lanes<T>(norm.gain_ih + at, lanes), gates[gate], load_lanes<T>(bias_ + at, lanes));
          gates[gate] = S::fma(load_lanes<T>(norm.gain_hh + at, lanes), load_lanes<T>(from_h + at, lanes), gates[gate]);
        }
      }
      const Reg<T> new_c = gates_and_cell<T>(gates, previous, unit, lanes, normalised());
      const Reg<T> old_c = previous ? load_lanes<T>(previous + unit, lanes) : S::zero();
      const Reg<T> c =
          zone_c ? zoned<T>(new_c, old_c, kept_c ? kept_c + unit : nullptr, extras.zoneout_c.share, lanes) : new_c;
      store_lanes<T>(cells(row) + unit, c, lanes);
      if (p_.gate_values || normalised()) {
#pragma GCC unroll 4
        for (int gate = 0; gate < 4; ++gate) store_lanes<T>(gates_of_row + gate * H + unit, gates[gate], lanes);
      }
      if (normalised()) {
        store_lanes<T>(visible + unit, new_c, lanes);
      } else {
        finish(row, unit, lanes, gates[3], new_c);
      }
    }
  };
  if (!normalised()) {
    for (int64_t row = 0; row < count; ++row) cell(row, nullptr);
  } else {
    const Range mine = share(count, plan_.grid.hidden_groups, member_);
    for (int64_t first = mine.begin; first < mine.end; first += kNormRows) {
      const int64_t group = smaller(kNormRows, mine.end - first);
      T* from_h[kNormRows];
      T* visible[kNormRows];
      T factors[kNormRows];
      for (int64_t r = 0; r < group; ++r) {
        from_h[r] = recurrent(first + r);
        visible[r] = visible_c_ + r * H;
      }
      normalise<T>(from_h, group, 4 * H, factors);
      for (int64_t r = 0; r < group; ++r) {
        if (p_.norm_factors) p_.norm_factors[place_of(first + r) * 2 + 1] = factors[r];
        cell(first + r, visible[r]);
      }
      normalise<T>(visible, group, H, factors);
      for (int64_t r = 0; r < group; ++r) {
        const T* const gates_of_row = gate_row(first + r);
        for_each_piece<T>(H, [&](int64_t unit, int lanes) LSTM_EXT_LAMBDA_INLINE {
          const Reg<T> shift = norm.bias_c ? load_lanes<T>(norm.bias_c + unit, lanes) : S::zero();
          const Reg<T> seen =
              S::fma(load_lanes<T>(norm.gain_c + unit, lanes), load_lanes<T>(visible[r] + unit, lanes), shift);
          finish(first + r, unit, lanes, load_lanes<T>(gates_of_row + 3 * H + unit, lanes), seen);
        });
      }
    }
  }
  meet_team();
  if (shape_.projected) {
    project(t, hidden);
    if (extras.zoneout_h.active()) keep_part_of_h(t, hidden);
    meet_team();
  }
}

// Zoneout of the projected h_t, for the output columns that `project` gives this member.
template <typename T>
void Forward<T>::keep_part_of_h(int64_t t, const RowGrid<T>& hidden) {
  const int64_t P = shape_.output_size;
  const StepOptions<T>& options = p_.options;
  const Range blocks = share(divide_up(P, kLanes), plan_.grid.hidden_groups, member_);
  for (int64_t row = 0; row < hidden.rows; ++row) {
    const int64_t b = rows_.batch_row(row);
    T* const h = steps_.at(p_.output, t) + b * p_.output.stride_b;
    const uint8_t* kept = options.zoneout_h.keep ? options.zoneout_h.keep + (steps_.rows_before(t) + b) * P : nullptr;
    for (int64_t k = blocks.begin * kLanes; k < smaller(blocks.end * kLanes, P); k += kLanes) {
      const int lanes = static_cast<int>(smaller(P - k, kLanes));
      store_lanes<T>(h + k,
                     zoned<T>(load_lanes<T>(h + k, lanes), load_lanes<T>(h_rows_[row] + k, lanes),
                              kept ? kept + k : nullptr, options.zoneout_h.share, lanes),
                     lanes);
    }
  }
}
