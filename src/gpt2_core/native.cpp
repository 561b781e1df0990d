// One step of GPT-2 on a CPU: one token for each row, as one call. See native.py.
//
// Every weight is read once, in the order in which it lies in memory, by as many threads as are asked for; they wait for
// each other by spinning, so that a stage that takes ten microseconds is not followed by a wait of fifty. Vectors are
// GCC's and Clang's own type, which each processor gets in its own width; only products of whole numbers are written for
// AVX-512 besides.
//
// Letters: R rows, C model width, H heads, D head width, S columns of the cache, K inputs and N outputs of a product.

#include <math.h>
#include <stdint.h>
#include <string.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <new>
#include <thread>
#include <vector>

#include <sched.h>
#include <unistd.h>

#if defined(__AVX512VNNI__) || defined(__AVXVNNI__)
#include <immintrin.h>
#endif

#if defined(__clang__) || defined(__GNUC__)
typedef float Floats __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t Ints __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint32_t Words __attribute__((vector_size(64), aligned(4), may_alias));
typedef uint16_t Halves __attribute__((vector_size(32), aligned(2), may_alias));
#else
#error "a compiler with vector extensions is needed: GCC or Clang"
#endif

enum Kind { FLOAT32 = 0, BFLOAT16 = 1, INT8 = 2 };
enum Activation { GELU_TANH = 0, GELU_ERF = 1, RELU = 2, SILU = 3, TANH = 4, GELU_SIGMOID = 5 };

static const int LANES = 16;     // floats in a vector, and outputs that are computed together
static const int MOST_ROWS = 8;  // rows of a product that are computed together
static const int MOST_THREADS = 1023;
static const int SPINS = 20000;  // turns of waiting before the processor is offered to others

// What a product multiplies with. ``values`` are in groups of 16 outputs: [N / 16][K][16], or whole numbers, of which four
// inputs stand together, [N / 16][K / 4][16][4]. Behind the last output and input there are zeros.
struct Weight {
    const void *values;
    const float *scales;     // (N,), of whole numbers that are multiplied with others from -127 to 127
    const int32_t *offsets;  // (N,), what the products come out too large, as 128 is added to those others
    const float *bias;       // (N,)
    int64_t outputs, inputs, padded;
};

struct Norm {
    const float *gain, *bias;
    float epsilon;
};

struct Layer {
    Norm first, second;
    Weight attention, projection, inner, outer;
    int64_t heads;
    float scale;
};

struct Model {
    const Layer *layers;
    int64_t count, width, head_width, kind, activation;
    Norm last;
    Weight head;
};

struct Step {
    int64_t rows;
    float *stream;       // (R, C), the embedded tokens; overwritten
    float *cache;        // keys and values of all layers
    int64_t layer_stride, row_stride, head_stride;  // of the cache, in numbers
    int64_t column;      // where the new keys and values go
    const uint8_t *seen; // (R, column + 1), or null where all columns are seen
    float *logits;       // (R, V)
    int64_t threads;
};

// The threads of an OpenMP library that somebody else uses already (its interface for GCC), or nulls. Threads of two
// libraries would wait for work on the same processors, and waiting is spinning.
struct OpenMP {
    void (*parallel)(void (*work)(void *), void *about, unsigned threads, unsigned flags);
    int (*thread)(void);
    int (*threads)(void);
};

// -- threads ----------------------------------------------------------------------------------------------------------

static inline void breathe(int turn) {
    if (turn > SPINS) {
        sched_yield();
    } else {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#elif defined(__aarch64__)
        asm volatile("yield");
#endif
    }
}

class Barrier {
public:
    void wait(int count) {
        if (count == 1) return;
        const unsigned turn = turn_.load(std::memory_order_acquire);
        if (waiting_.fetch_add(1, std::memory_order_acq_rel) == count - 1) {
            waiting_.store(0, std::memory_order_relaxed);
            turn_.store(turn + 1, std::memory_order_release);
            return;
        }
        for (int i = 0; turn_.load(std::memory_order_acquire) == turn; i++) breathe(i);
    }

private:
    std::atomic<int> waiting_{0};
    std::atomic<unsigned> turn_{0};
};

// Numbers between the stages of a step, and those of each thread.
struct Room {
    std::vector<float> qkv, found, inner;
};
struct OwnRoom {
    std::vector<float> normed, scores;
    std::vector<uint8_t> rounded;
    std::vector<float> largest;
};

class Crew {
public:
    void run(const Model *model, const Step *step, const OpenMP *openmp);

private:
    void call(int hands);
    void make_room(const Model &model, const Step &step, int hands);
    void stay(int thread, uint64_t seen);
    static void take_part(void *crew);

    const OpenMP *openmp_ = nullptr;
    const Model *model_ = nullptr;
    const Step *step_ = nullptr;
    std::mutex one_, mutex_;
    std::condition_variable called_;
    std::atomic<uint64_t> turn_{0};  // which step it is, and in the lowest bits how many threads take part in it
    std::atomic<int> running_{0};
    int started_ = 1;
    Barrier barrier_;
    Room room_;
    std::vector<OwnRoom> own_;
    friend void compute(Crew &, int, int);
};

// -- vectors ----------------------------------------------------------------------------------------------------------

static inline Floats load(const float *from) {
    Floats out;
    memcpy(&out, from, sizeof out);
    return out;
}
static inline void store(float *to, Floats value) { memcpy(to, &value, sizeof value); }
static inline Floats all(float value) { return (Floats){} + value; }

static inline float sum(Floats value) {
    float out = 0;
    for (int width = LANES / 2; width; width /= 2)
        for (int i = 0; i < width; i++) value[i] += value[i + width];
    out = value[0];
    return out;
}

static inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }
static inline Floats smaller(Floats a, Floats b) { return a < b ? a : b; }

static inline Floats from_bfloat16(const uint16_t *from) {
    Halves halves;
    memcpy(&halves, from, sizeof halves);
    Words words = __builtin_convertvector(halves, Words) << 16;
    Floats out;
    memcpy(&out, &words, sizeof out);
    return out;
}

// exp(x): 2 to a whole power times a polynomial on [-ln 2 / 2, ln 2 / 2]; within two units in the last place.
// Source: the Cephes Mathematical Library (Moshier), expf.
static inline Floats exponential(Floats x) {
    x = smaller(larger(x, all(-87.3f)), all(88.3f));
    const Floats magic = all(12582912.0f);  // rounds to a whole number
    Floats whole = (x * 1.44269504f + magic) - magic;
    x = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    Floats y = x * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * x + 8.3334519073e-3f;
    y = y * x + 4.1665795894e-2f;
    y = y * x + 1.6666665459e-1f;
    y = y * x + 5.0000001201e-1f;
    y = y * x * x + x + 1.0f;
    Ints power = (__builtin_convertvector(whole, Ints) + 127) << 23;
    Floats two;
    memcpy(&two, &power, sizeof two);
    return y * two;
}

static inline Floats sigmoid(Floats x) { return 1.0f / (1.0f + exponential(-x)); }

static inline Floats activated(Floats x, int64_t activation) {
    switch (activation) {
    case GELU_TANH:  // (1 + tanh(u)) / 2 is the sigmoid of 2u
        return x * sigmoid(1.5957691216f * (x + 0.044715f * x * x * x));
    case GELU_ERF:
        for (int lane = 0; lane < LANES; lane++) x[lane] *= 0.5f * (1.0f + erff(x[lane] * 0.70710678f));
        return x;
    case RELU:
        return x < 0.0f ? all(0.0f) : x;
    case SILU:
        return x * sigmoid(x);
    case TANH:
        for (int lane = 0; lane < LANES; lane++) x[lane] = tanhf(x[lane]);
        return x;
    case GELU_SIGMOID:
        return x * sigmoid(1.702f * x);
    }
    return x;
}

static void normalise(const float *x, float *out, int64_t count, const Norm &norm) {
    float mean = 0, square = 0;
    int64_t i = 0;
    Floats total = {};
    for (; i + LANES <= count; i += LANES) total += load(x + i);
    mean = sum(total);
    for (; i < count; i++) mean += x[i];
    mean /= count;
    total = (Floats){};
    for (i = 0; i + LANES <= count; i += LANES) {
        Floats centred = load(x + i) - mean;
        total += centred * centred;
    }
    square = sum(total);
    for (; i < count; i++) square += (x[i] - mean) * (x[i] - mean);
    const float scale = 1.0f / sqrtf(square / count + norm.epsilon);
    for (i = 0; i + LANES <= count; i += LANES)
        store(out + i, (load(x + i) - mean) * scale * load(norm.gain + i) + load(norm.bias + i));
    for (; i < count; i++) out[i] = (x[i] - mean) * scale * norm.gain[i] + norm.bias[i];
}

// -- products ---------------------------------------------------------------------------------------------------------

// The share of a thread of so many things, in pieces of LANES.
static inline void share(int64_t count, int thread, int hands, int64_t &first, int64_t &stop) {
    const int64_t pieces = (count + LANES - 1) / LANES;
    first = pieces * thread / hands * LANES;
    stop = pieces * (thread + 1) / hands * LANES;
    if (first > count) first = count;
    if (stop > count) stop = count;
}

// What is multiplied, as the kind of product has it: rows of ``padded`` numbers, with zeros behind the last.
struct Inputs {
    const float *numbers;     // (R, padded)
    const uint8_t *rounded;   // (R, padded), 128 stands for 0
    const float *largest;     // (R,)
    int64_t padded;
};

static Inputs prepared(const float *x, int64_t stride, int64_t rows, const Weight &weight, int64_t kind, OwnRoom &own) {
    const int64_t K = weight.inputs, padded = weight.padded;
    Inputs out = {nullptr, nullptr, nullptr, padded};
    if (kind != INT8) {
        if (stride == padded && K == padded) {
            out.numbers = x;
            return out;
        }
        for (int64_t r = 0; r < rows; r++) {
            if (own.normed.data() + r * padded != x + r * stride)
                memmove(own.normed.data() + r * padded, x + r * stride, K * sizeof(float));
            memset(own.normed.data() + r * padded + K, 0, (padded - K) * sizeof(float));
        }
        out.numbers = own.normed.data();
        return out;
    }
    const Floats magic = all(12582912.0f);
    for (int64_t r = 0; r < rows; r++) {
        const float *from = x + r * stride;
        uint8_t *to = own.rounded.data() + r * padded;
        float largest = 1e-30f;
        int64_t i = 0;
        Floats most = all(largest);
        for (; i + LANES <= K; i += LANES) {
            Floats value = load(from + i);
            most = larger(most, larger(value, -value));
        }
        for (int lane = 0; lane < LANES; lane++) largest = most[lane] > largest ? most[lane] : largest;
        for (; i < K; i++) largest = fabsf(from[i]) > largest ? fabsf(from[i]) : largest;
        // One number that is none makes all of the row none, as a product in floating point would.
        Floats whole = {};
        for (i = 0; i + LANES <= K; i += LANES) whole += load(from + i) * 0.0f;
        float none = sum(whole);
        for (; i < K; i++) none += from[i] * 0.0f;
        own.largest[r] = largest + none;
        const float scale = 127.0f;
        for (i = 0; i + LANES <= K; i += LANES) {
            Floats value = (load(from + i) / largest * scale + magic) - magic;
            Ints ints = __builtin_convertvector(value, Ints) + 128;
            for (int lane = 0; lane < LANES; lane++) to[i + lane] = (uint8_t)ints[lane];
        }
        for (; i < K; i++) to[i] = (uint8_t)(lrintf(from[i] / largest * scale) + 128);
        memset(to + K, 128, padded - K);
    }
    out.rounded = own.rounded.data();
    out.largest = own.largest.data();
    return out;
}

// R rows times one group of 16 outputs. Each sum is made in two parts, of every other input: the same two whatever R is, so
// that a row comes out the same in any company.
template <int R> static inline void times(const float *w, int64_t K, const float *x, Floats (&out)[R]) {
    Floats even[R] = {}, odd[R] = {};
    for (int64_t k = 0; k < K; k += 2) {
        const Floats first = load(w + k * LANES), second = load(w + (k + 1) * LANES);
        for (int r = 0; r < R; r++) {
            even[r] += first * x[r * K + k];
            odd[r] += second * x[r * K + k + 1];
        }
    }
    for (int r = 0; r < R; r++) out[r] = even[r] + odd[r];
}

template <int R> static inline void times(const uint16_t *w, int64_t K, const float *x, Floats (&out)[R]) {
    Floats even[R] = {}, odd[R] = {};
    for (int64_t k = 0; k < K; k += 2) {
        const Floats first = from_bfloat16(w + k * LANES), second = from_bfloat16(w + (k + 1) * LANES);
        for (int r = 0; r < R; r++) {
            even[r] += first * x[r * K + k];
            odd[r] += second * x[r * K + k + 1];
        }
    }
    for (int r = 0; r < R; r++) out[r] = even[r] + odd[r];
}

// Four products of whole numbers in each lane, added to what is there.
struct Whole {
#if defined(__AVX512VNNI__)
    __m512i lanes = _mm512_setzero_si512();
    inline void add(const int8_t *w, int32_t x) {
        lanes = _mm512_dpbusd_epi32(lanes, _mm512_set1_epi32(x), _mm512_loadu_si512(w));
    }
#elif defined(__AVXVNNI__)
    __m256i lanes[2] = {_mm256_setzero_si256(), _mm256_setzero_si256()};
    inline void add(const int8_t *w, int32_t x) {
        for (int i = 0; i < 2; i++)
            lanes[i] = _mm256_dpbusd_avx_epi32(lanes[i], _mm256_set1_epi32(x),
                                               _mm256_loadu_si256((const __m256i *)(w + 32 * i)));
    }
#else
    int32_t lanes[LANES] = {};
    inline void add(const int8_t *w, int32_t x) {
        uint8_t parts[4];
        memcpy(parts, &x, sizeof parts);
        for (int lane = 0; lane < LANES; lane++)
            for (int i = 0; i < 4; i++) lanes[lane] += (int32_t)parts[i] * (int32_t)w[lane * 4 + i];
    }
#endif
};

template <int R> static inline void times(const int8_t *w, int64_t K, const uint8_t *x, Ints (&out)[R]) {
    Whole even[R], odd[R];
    for (int64_t k = 0; k < K; k += 8)
        for (int r = 0; r < R; r++) {
            int32_t first, second;
            memcpy(&first, x + r * K + k, sizeof first);
            memcpy(&second, x + r * K + k + 4, sizeof second);
            even[r].add(w + k * LANES, first);
            odd[r].add(w + (k + 4) * LANES, second);
        }
    for (int r = 0; r < R; r++) {
        Ints part;
        memcpy(&out[r], &even[r].lanes, sizeof part);
        memcpy(&part, &odd[r].lanes, sizeof part);
        out[r] += part;
    }
}

// What becomes of the outputs of a product.
struct Outputs {
    float *to;
    int64_t stride;
    bool add;            // to what is there
    int64_t activation;  // or a negative number for none
};

template <int R>
static void product(const Weight &w, int64_t kind, const Inputs &in, int64_t row, const Outputs &out, int64_t n) {
    const int64_t K = w.padded, some = w.outputs - n < LANES ? w.outputs - n : LANES;
    Floats found[R];
    if (kind == INT8) {
        Ints whole[R];
        times<R>((const int8_t *)w.values + n * K, K, in.rounded + row * K, whole);
        Ints offsets;
        memcpy(&offsets, w.offsets + n, sizeof offsets);
        for (int r = 0; r < R; r++)
            found[r] = __builtin_convertvector(whole[r] - offsets, Floats) * load(w.scales + n) * in.largest[row + r];
    } else if (kind == BFLOAT16) {
        times<R>((const uint16_t *)w.values + n * K, K, in.numbers + row * K, found);
    } else {
        times<R>((const float *)w.values + n * K, K, in.numbers + row * K, found);
    }
    const Floats bias = load(w.bias + n);
    for (int r = 0; r < R; r++) {
        float *to = out.to + (row + r) * out.stride + n;
        Floats value = activated(found[r] + bias, out.activation), before = {};
        if (out.add) {
            memcpy(&before, to, some * sizeof(float));
            value += before;
        }
        if (some == LANES)
            store(to, value);
        else
            memcpy(to, &value, some * sizeof(float));
    }
}

// The share of one thread of a product: its groups of outputs, for all rows.
static void product(const Weight &w, int64_t kind, const Inputs &in, int64_t rows, const Outputs &out, int thread,
                    int hands) {
    int64_t first, stop;
    share(w.outputs, thread, hands, first, stop);
    for (int64_t n = first; n < stop; n += LANES)
        for (int64_t row = 0; row < rows; row += MOST_ROWS) switch (rows - row) {
            case 1: product<1>(w, kind, in, row, out, n); break;
            case 2: product<2>(w, kind, in, row, out, n); break;
            case 3: product<3>(w, kind, in, row, out, n); break;
            case 4: product<4>(w, kind, in, row, out, n); break;
            case 5: product<5>(w, kind, in, row, out, n); break;
            case 6: product<6>(w, kind, in, row, out, n); break;
            case 7: product<7>(w, kind, in, row, out, n); break;
            default: product<8>(w, kind, in, row, out, n); break;
            }
}

// -- the step ---------------------------------------------------------------------------------------------------------

// What one head of one row sees: (D,) from a query and all columns.
static void attend(const float *q, const float *keys, const float *values, int64_t columns, int64_t D, float scale,
                   const uint8_t *seen, float *scores, float *out) {
    float highest = -INFINITY;
    for (int64_t s = 0; s < columns; s++) {
        if (seen && !seen[s]) continue;
        Floats total = {};
        float rest = 0;
        int64_t d = 0;
        for (; d + LANES <= D; d += LANES) total += load(q + d) * load(keys + s * D + d);
        for (; d < D; d++) rest += q[d] * keys[s * D + d];
        scores[s] = (sum(total) + rest) * scale;
        if (!(scores[s] <= highest)) highest = scores[s];  // a nan stays
    }
    float whole = 0;
    for (int64_t s = 0; s < columns; s += LANES) {
        const int64_t some = columns - s < LANES ? columns - s : LANES;
        Floats value = all(-INFINITY);
        memcpy(&value, scores + s, some * sizeof(float));
        value = exponential(value - highest) + (value - highest) * 0.0f;
        memcpy(scores + s, &value, some * sizeof(float));
    }
    for (int64_t s = 0; s < columns; s++)
        if (!seen || seen[s]) whole += scores[s];
    for (int64_t d = 0; d < D; d++) out[d] = 0;
    for (int64_t s = 0; s < columns; s++) {
        if (seen && !seen[s]) continue;
        const float weight = scores[s];
        int64_t d = 0;
        for (; d + LANES <= D; d += LANES) store(out + d, load(out + d) + weight * load(values + s * D + d));
        for (; d < D; d++) out[d] += weight * values[s * D + d];
    }
    for (int64_t d = 0; d < D; d++) out[d] /= whole;
}

void compute(Crew &crew, int thread, int hands) {
    const Model &model = *crew.model_;
    const Step &step = *crew.step_;
    OwnRoom &own = crew.own_[thread];
    const int64_t R = step.rows, C = model.width, D = model.head_width, columns = step.column + 1;
    float *x = step.stream;
    std::vector<float> &normed = own.normed;
    auto norm = [&](const Norm &norm, const Weight &weight) {
        for (int64_t r = 0; r < R; r++) {
            normalise(x + r * C, normed.data() + r * weight.padded, C, norm);
            memset(normed.data() + r * weight.padded + C, 0, (weight.padded - C) * sizeof(float));
        }
        return prepared(normed.data(), weight.padded, R, weight, model.kind, own);
    };
    for (int64_t i = 0; i < model.count; i++) {
        const Layer &layer = model.layers[i];
        const int64_t H = layer.heads, wide = 3 * H * D, inner = layer.inner.outputs;
        float *qkv = crew.room_.qkv.data(), *found = crew.room_.found.data(), *hidden = crew.room_.inner.data();
        product(layer.attention, model.kind, norm(layer.first, layer.attention), R, {qkv, wide, false, -1},
                thread, hands);
        crew.barrier_.wait(hands);
        for (int64_t task = R * H * thread / hands; task < R * H * (thread + 1) / hands; task++) {
            const int64_t row = task / H, head = task % H;
            const float *q = qkv + row * wide + head * D;
            float *keys = step.cache + 2 * i * step.layer_stride + row * step.row_stride + head * step.head_stride;
            float *values = keys + step.layer_stride;
            memcpy(keys + step.column * D, q + H * D, D * sizeof(float));
            memcpy(values + step.column * D, q + 2 * H * D, D * sizeof(float));
            attend(q, keys, values, columns, D, layer.scale, step.seen ? step.seen + row * columns : nullptr,
                   own.scores.data(), found + row * H * D + head * D);
        }
        crew.barrier_.wait(hands);
        Inputs in = prepared(found, H * D, R, layer.projection, model.kind, own);
        product(layer.projection, model.kind, in, R, {x, C, true, -1}, thread, hands);
        crew.barrier_.wait(hands);
        product(layer.inner, model.kind, norm(layer.second, layer.inner), R,
                {hidden, inner, false, model.activation}, thread, hands);
        crew.barrier_.wait(hands);
        in = prepared(hidden, inner, R, layer.outer, model.kind, own);
        product(layer.outer, model.kind, in, R, {x, C, true, -1}, thread, hands);
        crew.barrier_.wait(hands);
    }
    product(model.head, model.kind, norm(model.last, model.head), R,
            {step.logits, model.head.outputs, false, -1}, thread, hands);
}

void Crew::stay(int thread, uint64_t seen) {
    for (;;) {
        for (int i = 0; turn_.load(std::memory_order_acquire) == seen && i < SPINS; i++) breathe(0);
        if (turn_.load(std::memory_order_acquire) == seen) {
            std::unique_lock<std::mutex> lock(mutex_);
            called_.wait(lock, [&] { return turn_.load(std::memory_order_acquire) != seen; });
        }
        seen = turn_.load(std::memory_order_acquire);
        const int hands = (int)(seen & MOST_THREADS);
        if (thread < hands) {
            compute(*this, thread, hands);
            running_.fetch_sub(1, std::memory_order_acq_rel);
        }
    }
}

// The step by threads of our own.
void Crew::call(int hands) {
    {
        std::lock_guard<std::mutex> lock(mutex_);
        const uint64_t now = turn_.load();
        for (; started_ < hands; started_++)
            std::thread([this, thread = started_, now] { stay(thread, now); }).detach();
        running_.store(hands - 1);
        turn_.store((now / (MOST_THREADS + 1) + 1) * (MOST_THREADS + 1) | (uint64_t)hands, std::memory_order_release);
    }
    called_.notify_all();
    compute(*this, 0, hands);
    for (int i = 0; running_.load(std::memory_order_acquire) != 0; i++) breathe(i);
}

// The step by threads of OpenMP, which may be fewer than were asked for.
void Crew::take_part(void *crew) {
    Crew &self = *(Crew *)crew;
    compute(self, self.openmp_->thread(), self.openmp_->threads());
}

// All the memory that a step takes, so that no thread has to ask for any.
void Crew::make_room(const Model &model, const Step &step, int hands) {
    int64_t heads = 0, inner = 0, padded = model.head.padded;
    for (int64_t i = 0; i < model.count; i++) {
        const Layer &layer = model.layers[i];
        heads = layer.heads > heads ? layer.heads : heads;
        inner = layer.inner.outputs > inner ? layer.inner.outputs : inner;
        for (const Weight *weight : {&layer.attention, &layer.projection, &layer.inner, &layer.outer})
            padded = weight->padded > padded ? weight->padded : padded;
    }
    room_.qkv.resize(step.rows * 3 * heads * model.head_width);
    room_.found.resize(step.rows * heads * model.head_width);
    room_.inner.resize(step.rows * inner);
    if ((int)own_.size() < hands) own_.resize(hands);
    for (int i = 0; i < hands; i++) {
        own_[i].normed.resize(step.rows * padded);
        own_[i].rounded.resize(step.rows * padded);
        own_[i].largest.resize(step.rows);
        own_[i].scores.resize(step.column + 1 + LANES);
    }
}

void Crew::run(const Model *model, const Step *step, const OpenMP *openmp) {
    std::lock_guard<std::mutex> alone(one_);
    const int wanted = step->threads < 1 ? 1 : step->threads > MOST_THREADS ? MOST_THREADS : (int)step->threads;
    make_room(*model, *step, wanted);
    model_ = model;
    step_ = step;
    openmp_ = openmp;
    if (wanted == 1)
        compute(*this, 0, 1);
    else if (openmp != nullptr && openmp->parallel != nullptr)
        openmp->parallel(take_part, this, (unsigned)wanted, 0);
    else
        call(wanted);
}

extern "C" int gpt2_step(const Model *model, const Step *step, const OpenMP *openmp) {
    // Threads do not survive a fork: a child process gets a crew of its own. That helps with our own threads only: GCC's
    // OpenMP library waits in a child for threads that only its parent has, so native.py gives a child none to work with.
    // (A framework's own operations wait there all the same. And a fork in the very moment in which another thread asks
    // for a crew leaves the child this lock closed.)
    static std::mutex mutex;
    static Crew *crew = nullptr;
    static pid_t owner = 0;
    Crew *mine;
    {
        std::lock_guard<std::mutex> lock(mutex);
        if (crew == nullptr || owner != getpid()) {
            crew = new (std::nothrow) Crew();
            owner = getpid();
        }
        mine = crew;
    }
    if (mine == nullptr) return 1;
    try {
        mine->run(model, step, openmp);
    } catch (...) {  // no memory, or no threads
        return 1;
    }
    return 0;
}
