// The backward pass with what changes the equations of a step: recurrent dropout, zoneout, layer normalisation.
// Included inside a per-set anonymous namespace, after backward.h.
//
// As in the forward pass, a step is a product whose result goes to memory, and a pass over it: of a member's own units,
// or, with layer normalisation, of whole rows of the team, which its members share.

// The chunk's masked h_{t-1}, each member some of its team's rows.
template <typename T>
void Backward<T>::mask_previous_rows() {
  const int64_t P = shape_.output_size;
  list_previous_rows();
  for (int64_t t = chunk_.begin; t < chunk_.begin + chunk_.count; ++t) {
    const int64_t s = steps_.time(t);
    const int64_t before = row_in_chunk(chunk_, s);
    const Range mine = share(team_rows(s), plan_.grid.hidden_groups, member_);
    for (int64_t row = mine.begin; row < mine.end; ++row) {
      const int64_t b = rows_.batch_row(row);
      const T* const mask = p_.options.recurrent_mask + b * P;
      const T* const h = row_list_[before + b];
      T* const out = chunk_.masked_h + (before + b) * P;
      for_each_piece<T>(P, [&](int64_t k, int lanes) LSTM_EXT_LAMBDA_INLINE {
        store_lanes<T>(out + k, load_lanes<T>(h + k, lanes) * load_lanes<T>(mask + k, lanes), lanes);
      });
    }
  }
  meet_team();
}

template <typename T>
void Backward<T>::extended_step(int64_t s) {
  const int64_t H = shape_.hidden_size;
  const int64_t count = team_rows(s);
  const int64_t continued = smaller(count, team_rows(s - 1));
  if (team_rows(s - 1) > count) initial_state_gradient(s);
  cells_ = cells_of_step(s);
  if (continued > 0) extended_hidden_gradient(s, Range{0, continued}, false);
  if (continued < count) extended_hidden_gradient(s, Range{continued, count}, true);
  if (shape_.projected) {
    meet_team();
    const RowGrid<const T> out = rows_.grid(const_cast<const T*>(grad_hidden(s)), shape_.output_size, 0, count);
    multiply(
        out, count, projection_weight(), hidden_columns_, partial_sums(0, count),
        [](int64_t, int64_t) LSTM_EXT_LAMBDA_INLINE {},
        [](int64_t, int64_t, int, Reg<T>& v) LSTM_EXT_LAMBDA_INLINE { v = S::zero(); },
        [&](int64_t row, int64_t column, const T* sums, int lanes) {
          store_lanes<T>(extras_.grad_h + rows_.batch_row(row) * H + column, S::load(sums), lanes);
        });
  }
  if (normalised()) {
    meet_team();
    const Range mine = share(count, plan_.grid.hidden_groups, member_);
    for (int64_t first = mine.begin; first < mine.end; first += kNormRows) {
      const Range group{first, smaller(first + kNormRows, mine.end)};
      T factors[kNormRows];
      normalise_cells(group, factors);
      for (int64_t row = group.begin; row < group.end; ++row) {
        normalised_cell_gradient(row, row >= continued, extras_.row + (row - first) * H, factors[row - first]);
      }
    }
  } else {
    for (int64_t row = 0; row < count; ++row) extended_cell_gradient(row, row >= continued, hidden_columns_);
  }
  meet_team();
}

// dgates U of step `later` for some of the team's rows and this member's columns, zeros if `later` < 0, times the mask
// of recurrent dropout, to finish(row, column, values, lanes).
template <typename T>
template <typename Finish>
void Backward<T>::recurrent_product(Range part, int64_t later, Finish&& finish) {
  const int64_t P = shape_.output_size;
  RightHandSide<T> weight = recurrent_weight();
  if (later < 0) weight.depth = 0;
  const RowGrid<const T> gates =
      rows_.grid(const_cast<const T*>(later < 0 ? nullptr : grad_gates(later)), plan_.gate_row, part.begin, part.end);
  const uint8_t* const resets = later < 0 ? nullptr : steps_.resets_at(steps_.time(later));
  RowGrid<const T> rows = gates;
  if (rows_.any(resets, part.begin, part.end)) {
    for (int64_t row = 0; row < part.end - part.begin; ++row) {
      const bool cut = resets[rows_.batch_row(part.begin + row)] != 0;
      gate_rows_[row] = cut ? zero_row_ : gates(row);
    }
    rows.each = gate_rows_;
  }
  multiply(
      rows, part.end - part.begin, weight, output_columns_, partial_sums(part.begin, part.end),
      [](int64_t, int64_t) LSTM_EXT_LAMBDA_INLINE {},
      [](int64_t, int64_t, int, Reg<T>& v) LSTM_EXT_LAMBDA_INLINE { v = S::zero(); },
      [&](int64_t row, int64_t column, const T* sums, int lanes) {
        Reg<T> v = S::load(sums);
        if (p_.options.recurrent_mask) {
          const int64_t b = rows_.batch_row(part.begin + row);
          v = v * load_lanes<T>(p_.options.recurrent_mask + b * P + column, lanes);
        }
        finish(row, column, v, lanes);
      });
}

// dL/dh_t before zoneout, of rows of step s that begin there in this loop, or that do not.
template <typename T>
void Backward<T>::extended_hidden_gradient(int64_t s, Range part, bool begins) {
  const int64_t P = shape_.output_size;
  const StepOptions<T>& options = p_.options;
  recurrent_product(part, begins ? -1 : s - 1, [&](int64_t row, int64_t column, Reg<T> v, int lanes) {
    const int64_t b = rows_.batch_row(part.begin + row);
    const int64_t at = b * P + column;
    if (cells_.grad_output) v = v + load_lanes<T>(cells_.grad_output + b * p_.grad_output.stride_b + column, lanes);
    if (begins && p_.grad_h_n) v = v + load_lanes<T>(p_.grad_h_n + at, lanes);
    if (extras_.kept_h) {
      if (!begins) v = v + load_lanes<T>(extras_.kept_h + at, lanes);
      const uint8_t* flags = options.zoneout_h.keep ? options.zoneout_h.keep + cells_.rows_before * P + at : nullptr;
      Reg<T> kept = kept_gradient<T>(v, flags, options.zoneout_h.share, lanes);
      if (is_reset(b)) {
        if (T* sum = extras_.reset_kept_h) store_lanes<T>(sum + at, load_lanes<T>(sum + at, lanes) + kept, lanes);
        kept = S::zero();
      }
      store_lanes<T>(extras_.kept_h + at, kept, lanes);
    }
    store_lanes<T>(shape_.projected ? grad_hidden(s) + at : extras_.grad_h + at, v, lanes);
  });
}

// dL/dh0 of rows whose sequence had its first step in step `first_step`.
template <typename T>
void Backward<T>::extended_initial_gradient(Range part, int64_t first_step) {
  const RowGrid<T> out = rows_.grid(p_.grad_h0, shape_.output_size, part.begin, part.end);
  recurrent_product(part, first_step, [&](int64_t row, int64_t column, Reg<T> v, int lanes) {
    const int64_t at = rows_.batch_row(part.begin + row) * shape_.output_size + column;
    if (extras_.kept_h) v = v + load_lanes<T>(extras_.kept_h + at, lanes);
    store_lanes<T>(out(row) + column, v, lanes);
  });
}

// As cell_gradient, for some units of a row.
template <typename T>
void Backward<T>::extended_cell_gradient(int64_t row, bool begins, Range units) {
  const int64_t H = shape_.hidden_size;
  const int64_t b = rows_.batch_row(row);
  const StepOptions<T>& options = p_.options;
  const Reg<T> one = S::set1(T(1));
  const T* const previous = previous_cell(b);
  const uint8_t* const kept_c = options.zoneout_c.keep ? options.zoneout_c.keep + (cells_.rows_before + b) * H : nullptr;
  const T* const gates = cells_.gates + b * 4 * H;
  T* const out = cells_.grad_gates + b * plan_.gate_row;
  for (int64_t unit = units.begin; unit < units.end; unit += kLanes) {
    const int lanes = static_cast<int>(smaller(units.end - unit, kLanes));
    const Reg<T> i = load_lanes<T>(gates + unit, lanes);
    const Reg<T> f = load_lanes<T>(gates + H + unit, lanes);
    const Reg<T> g = load_lanes<T>(gates + 2 * H + unit, lanes);
    const Reg<T> o = load_lanes<T>(gates + 3 * H + unit, lanes);
    const Reg<T> c_previous = previous ? load_lanes<T>(previous + unit, lanes) : S::zero();
    const Reg<T> tanh_c = tanh<T>(S::fma(f, c_previous, i * g));
    const Reg<T> grad_h = load_lanes<T>(extras_.grad_h + b * H + unit, lanes);
    Reg<T> grad_c = state_gradient(b, begins, unit, lanes);
    Reg<T> kept = S::zero();
    if (options.zoneout_c.active()) kept = kept_gradient<T>(grad_c, kept_c ? kept_c + unit : nullptr, options.zoneout_c.share, lanes);
    grad_c = S::fma(grad_h * o, one - tanh_c * tanh_c, grad_c);
    Reg<T> grads[4] = {grad_c * g, grad_c * c_previous, grad_c * i, grad_h * tanh_c};
    add_gate_value_gradients(grads, b, unit, lanes);
    store_lanes<T>(out + unit, grads[0] * (i * (one - i)), lanes);
    store_lanes<T>(out + H + unit, grads[1] * (f * (one - f)), lanes);
    store_lanes<T>(out + 2 * H + unit, grads[2] * (one - g * g), lanes);
    store_lanes<T>(out + 3 * H + unit, grads[3] * (o * (one - o)), lanes);
    T* const running = p_.grad_c + b * H + unit;
    store_lanes<T>(running, S::fma(grad_c, f, kept), lanes);
    if (is_reset(b)) cut_gradient(b, unit, lanes, running, out + unit);
  }
}

// N(c_t) of some rows, at most kNormRows, to extras_.row.
template <typename T>
void Backward<T>::normalise_cells(Range group, T* factors) {
  const int64_t H = shape_.hidden_size;
  T* visible[kNormRows];
  for (int64_t row = group.begin; row < group.end; ++row) {
    const int64_t b = rows_.batch_row(row);
    const T* const previous = previous_cell(b);
    const T* const gates = cells_.gates + b * 4 * H;
    T* const out = visible[row - group.begin] = extras_.row + (row - group.begin) * H;
    for_each_piece<T>(H, [&](int64_t unit, int lanes) LSTM_EXT_LAMBDA_INLINE {
      Reg<T> c = load_lanes<T>(gates + unit, lanes) * load_lanes<T>(gates + 2 * H + unit, lanes);
      if (previous) c = S::fma(load_lanes<T>(gates + H + unit, lanes), load_lanes<T>(previous + unit, lanes), c);
      store_lanes<T>(out + unit, c, lanes);
    });
  }
  normalise<T>(visible, group.end - group.begin, H, factors);
}

// As extended_cell_gradient, of a row with layer normalisation, and of what it normalises; `visible` is N(c_t), and
// `factor` what it was multiplied by:
// of y = N(x) = (x - mean) * r it is dx = r * (dy - mean(dy) - y * mean(dy * y)).
template <typename T>
void Backward<T>::normalised_cell_gradient(int64_t row, bool begins, const T* visible, T factor) {
  const int64_t H = shape_.hidden_size;
  const int64_t b = rows_.batch_row(row);
  const int64_t place = cells_.rows_before + b;
  const StepOptions<T>& options = p_.options;
  const LayerNorm<T>& norm = p_.options.norm;
  const Reg<T> one = S::set1(T(1));
  const T* const previous = previous_cell(b);
  const uint8_t* const kept_c = options.zoneout_c.keep ? options.zoneout_c.keep + place * H : nullptr;
  const T* const gates = cells_.gates + b * 4 * H;
  const T* const of_input = p_.norm_input + place * 4 * H;
  const T* const of_h = p_.norm_recurrent + place * 4 * H;
  const T* const grad_h = extras_.grad_h + b * H;
  T* const grad_visible = extras_.row + kNormRows * H;
  T* const grad_bias = extras_.chunk_sums;
  T* const grad_gain_ih = grad_bias + 4 * H;
  T* const grad_gain_hh = grad_gain_ih + 4 * H;
  T* const grad_gain_c = grad_gain_hh + 4 * H;
  T* const grad_bias_c = grad_gain_c + H;
  const auto add = [](T* sum, Reg<T> v, int lanes)
                       LSTM_EXT_LAMBDA_INLINE { store_lanes<T>(sum, load_lanes<T>(sum, lanes) + v, lanes); };

  const Reg<T> factor_c = S::set1(factor);
  T* const out_h = cells_.grad_gates + b * plan_.gate_row;
  T* const out_input = cells_.grad_input_part + b * plan_.gate_row;
  Reg<T> sum = S::zero(), product = S::zero();
  for_each_piece<T>(H, [&](int64_t unit, int lanes) LSTM_EXT_LAMBDA_INLINE {
    const Reg<T> y = load_lanes<T>(visible + unit, lanes);
    const Reg<T> gain = load_lanes<T>(norm.gain_c + unit, lanes);
    const Reg<T> shift = norm.bias_c ? load_lanes<T>(norm.bias_c + unit, lanes) : S::zero();
    const Reg<T> tanh_c = tanh<T>(S::fma(gain, y, shift));
    const Reg<T> o = load_lanes<T>(gates + 3 * H + unit, lanes);
    const Reg<T> dh = load_lanes<T>(grad_h + unit, lanes);
    const Reg<T> grad = dh * o * (one - tanh_c * tanh_c);
    add(grad_gain_c + unit, grad * y, lanes);
    add(grad_bias_c + unit, grad, lanes);
    const Reg<T> scaled = grad * gain;
    store_lanes<T>(grad_visible + unit, scaled, lanes);
    store_lanes<T>(out_h + 3 * H + unit, dh * tanh_c, lanes);  // dL/do waits here
    sum = sum + scaled;
    product = S::fma(scaled, y, product);
  });
  const Reg<T> mean_c = sum_of_lanes<T>(sum) / S::set1(static_cast<T>(H));
  const Reg<T> slope_c = sum_of_lanes<T>(product) / S::set1(static_cast<T>(H));

  Reg<T> sum_input = S::zero(), product_input = S::zero(), sum_h = S::zero(), product_h = S::zero();
  for_each_piece<T>(H, [&](int64_t unit, int lanes) LSTM_EXT_LAMBDA_INLINE {
    const Reg<T> i = load_lanes<T>(gates + unit, lanes);
    const Reg<T> f = load_lanes<T>(gates + H + unit, lanes);
    const Reg<T> g = load_lanes<T>(gates + 2 * H + unit, lanes);
    const Reg<T> o = load_lanes<T>(gates + 3 * H + unit, lanes);
    const Reg<T> c_previous = previous ? load_lanes<T>(previous + unit, lanes) : S::zero();
    const Reg<T> y = load_lanes<T>(visible + unit, lanes);
    Reg<T> grad_c = state_gradient(b, begins, unit, lanes);
    Reg<T> kept = S::zero();
    if (options.zoneout_c.active()) kept = kept_gradient<T>(grad_c, kept_c ? kept_c + unit : nullptr, options.zoneout_c.share, lanes);
    grad_c = S::fma(factor_c, load_lanes<T>(grad_visible + unit, lanes) - mean_c - y * slope_c, grad_c);
    Reg<T> grads[4] = {grad_c * g, grad_c * c_previous, grad_c * i, load_lanes<T>(out_h + 3 * H + unit, lanes)};
    add_gate_value_gradients(grads, b, unit, lanes);
    grads[0] = grads[0] * (i * (one - i));
    grads[1] = grads[1] * (f * (one - f));
    grads[2] = grads[2] * (one - g * g);
    grads[3] = grads[3] * (o * (one - o));
    T* const running = p_.grad_c + b * H + unit;
    store_lanes<T>(running, S::fma(grad_c, f, kept), lanes);
#pragma GCC unroll 4
    for (int gate = 0; gate < 4; ++gate) {
      const int64_t at = gate * H + unit;
      const Reg<T> y_input = load_lanes<T>(of_input + at, lanes);
      const Reg<T> y_h = load_lanes<T>(of_h + at, lanes);
      add(grad_bias + at, grads[gate], lanes);
      add(grad_gain_ih + at, grads[gate] * y_input, lanes);
      add(grad_gain_hh + at, grads[gate] * y_h, lanes);
      const Reg<T> by_input = grads[gate] * load_lanes<T>(norm.gain_ih + at, lanes);
      const Reg<T> by_h = grads[gate] * load_lanes<T>(norm.gain_hh + at, lanes);
      store_lanes<T>(out_input + at, by_input, lanes);
      store_lanes<T>(out_h + at, by_h, lanes);
      sum_input = sum_input + by_input;
      product_input = S::fma(by_input, y_input, product_input);
      sum_h = sum_h + by_h;
      product_h = S::fma(by_h, y_h, product_h);
    }
  });
  const auto through_norm = [&](T* grad, const T* y, T factor, Reg<T> total, Reg<T> weighted) LSTM_EXT_LAMBDA_INLINE {
    const Reg<T> count = S::set1(static_cast<T>(4 * H));
    const Reg<T> mean = sum_of_lanes<T>(total) / count;
    const Reg<T> slope = sum_of_lanes<T>(weighted) / count;
    const Reg<T> scale = S::set1(factor);
    for_each_piece<T>(4 * H, [&](int64_t at, int lanes) LSTM_EXT_LAMBDA_INLINE {
      const Reg<T> v = load_lanes<T>(grad + at, lanes) - mean - load_lanes<T>(y + at, lanes) * slope;
      store_lanes<T>(grad + at, v * scale, lanes);
    });
  };
  through_norm(out_input, of_input, p_.norm_factors[place * 2], sum_input, product_input);
  through_norm(out_h, of_h, p_.norm_factors[place * 2 + 1], sum_h, product_h);
  if (is_reset(b)) {
    for_each_piece<T>(H, [&](int64_t unit, int lanes) LSTM_EXT_LAMBDA_INLINE {
      cut_gradient(b, unit, lanes, p_.grad_c + b * H + unit, out_h + unit);
    });
  }
}

template <typename T>
void Backward<T>::zero_norm_gradients() {
  const Range all{0, kNormSums};
  zero_rows(extras_.chunk_sums, shape_.hidden_size, all);
  zero_rows(extras_.sums, shape_.hidden_size, all);
}

// The chunk's sums are added to those of all: one running sum over all rows would be less exact.
template <typename T>
void Backward<T>::add_norm_sums() {
  const int64_t count = kNormSums * shape_.hidden_size;
  for (int64_t k = 0; k < count; ++k) {
    extras_.sums[k] += extras_.chunk_sums[k];
    extras_.chunk_sums[k] = T(0);
  }
}

// The sums of all workers, who met after their last chunk; each adds up a share.
template <typename T>
void Backward<T>::norm_gradients() {
  const int64_t H = shape_.hidden_size;
  const int64_t count = kNormSums * H;
  const struct {
    T* grad;
    int64_t begin, end;
  } parts[] = {{p_.grad_bias, 0, 4 * H},
               {p_.grad_gain_ih, 4 * H, 8 * H},
               {p_.grad_gain_hh, 8 * H, 12 * H},
               {p_.grad_gain_c, 12 * H, 13 * H},
               {p_.grad_bias_c, 13 * H, 14 * H}};
  const Range mine = share(count, plan_.grid.workers(), worker_);
  for (const auto& part : parts) {
    if (!part.grad) continue;
    for (int64_t k = mine.begin > part.begin ? mine.begin : part.begin; k < smaller(mine.end, part.end); ++k) {
      T sum = 0;
      for (int64_t worker = 0; worker < plan_.grid.workers(); ++worker) sum += extras_.all_sums[worker * count + k];
      part.grad[k - part.begin] = sum;
    }
  }
}
