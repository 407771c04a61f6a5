/* The C interface of the kernels, mirrored by src/backend/cuda/ffi.rs.
 *
 * Every launcher queues its work on `stream`, waits for nothing, allocates nothing, may be captured into a graph, and
 * returns a cudaError_t (0: queued). Matrices are row-major; a stride counts numbers from row to row. Rows begin at
 * multiples of 16 bytes. Pointers are device pointers unless a comment says otherwise. `[n]` is an array of n.
 */
#ifndef KVSHARD_H
#define KVSHARD_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

typedef struct CUstream_st *kv_stream;

/* What activations, weights, keys and values are stored in; sums are f32. */
enum { KV_BF16 = 0, KV_F16 = 1 };

/* Non-linearities. */
enum {
  KV_SILU = 0,
  KV_GELU_TANH = 1,
  KV_GELU = 2,
  KV_CLAMPED_SWIGLU = 3 /* of gates: g / (1 + e^(-1.702 g)) * (u + 1), g = min(gate, limit), u = clamp(up, +-limit) */
};

/* How an attention's scores are made, beside q·k. */
typedef struct {
  float scale;         /* Scores are multiplied by it. */
  float softcap;       /* 0: none; else score = softcap * tanh(score / softcap), before the mask. */
  int32_t window;      /* 0: causal only; else a query at i sees key j iff j <= i and i - j < window. */
  const float *alibi;  /* [heads] slopes: score += slope * (j - i); null: none. */
  const float *sinks;  /* [heads] logits that take part in the softmax without a value; null: none. */
} kv_scores;

/* Keys and values of one layer, and who may read which. */
typedef struct {
  const void *keys;       /* [slots][kv_heads * head_dim] */
  const void *values;     /* [slots][kv_heads * head_dim] */
  const uint32_t *slots;  /* [lanes][slots_stride] the slot of each position of a lane */
  int64_t slots_stride;
} kv_cache;

/* ---- attend_decode.cu: one query a row, split over the keys ---- */

/* A row that feeds one token. */
typedef struct {
  int32_t token;   /* Its row in q and out. */
  int32_t lane;
  int32_t kv_len;  /* Keys up to and including its own: position + 1. */
  int32_t pad;
} kv_decode_row;

typedef struct {
  const void *q;      /* [tokens][q_stride] rotated queries: the first heads * head_dim numbers of a row */
  int64_t q_stride;
  void *out;          /* [tokens][out_stride] the first heads * head_dim numbers of a row */
  int64_t out_stride;
  kv_cache cache;
  kv_scores scores;
  const kv_decode_row *rows;  /* [max_rows], of which the first *n_rows count */
  const int32_t *n_rows;
  int32_t max_rows;           /* Known when the kernel is captured; *n_rows is never above it. */
  int32_t heads, kv_heads, head_dim;
  const int32_t *plan;        /* As kv_plan_decode left it for the same rows, window and kv_heads. */
  void *workspace;            /* kv_attend_decode_workspace_bytes, zeroed once; shared by all layers */
  int32_t dtype;
} kv_attend_decode_params;

typedef struct {
  const kv_decode_row *rows;
  const int32_t *n_rows;
  int32_t max_rows;
  int32_t window;
  int32_t heads, kv_heads, head_dim;
  int32_t *plan;  /* [kv_plan_decode_ints(max_rows)] */
} kv_plan_decode_params;

int32_t kv_plan_decode_ints(int32_t max_rows);
int64_t kv_attend_decode_workspace_bytes(int32_t max_rows, int32_t heads, int32_t kv_heads, int32_t head_dim);
/* How the rows' keys are cut among blocks; once a step for each window. */
int kv_plan_decode(const kv_plan_decode_params *params, kv_stream stream);
/* Begins to read keys while the kernel before it still runs. So that one may write nothing that is read here but q and the
 * row's own last key and value: all other keys, the rows, the slots and the plan must be older. Plan, rows and workspace
 * begin at multiples of 16 bytes. */
int kv_attend_decode(const kv_attend_decode_params *params, kv_stream stream);

/* ---- attend_prefill.cu, attend_prefill_sm90.cu: runs of queries ---- */

/* A row that feeds a run of tokens. */
typedef struct {
  int32_t token;  /* Its first row in q and out. */
  int32_t n;      /* Tokens fed. */
  int32_t start;  /* Position of the first. */
  int32_t lane;
} kv_prefill_row;

/* A part of a row's queries, for every KV head. */
typedef struct {
  int32_t row;    /* In `rows`. */
  int32_t first;  /* First query of the tile, from the row's first. */
} kv_prefill_tile;

typedef struct {
  const void *q;
  int64_t q_stride;
  void *out;
  int64_t out_stride;
  kv_cache cache;
  kv_scores scores;
  const kv_prefill_row *rows;    /* [n_rows] */
  const kv_prefill_tile *tiles;  /* [n_tiles], those with the most work first */
  int32_t n_tiles;
  int32_t heads, kv_heads, head_dim;
  int32_t dtype;
} kv_attend_prefill_params;

/* Queries of a tile, for these heads on this device; the host cuts rows into tiles by it. */
int32_t kv_prefill_tile_tokens(int32_t heads, int32_t kv_heads, int32_t head_dim);
int kv_attend_prefill(const kv_attend_prefill_params *params, kv_stream stream);

/* ---- linear.cu: products of few rows, bound by the reading of the weights ---- */

/* What becomes of product = scale · x · weightᵀ. */
enum {
  KV_STORE = 0,   /* out = product + bias */
  KV_ADD = 1,     /* out += product + bias: the residual stream */
  KV_GATE = 2,    /* out = activation(first half of the outputs) * second half; out has outputs / 2 columns */
  KV_ACTIVATE = 3 /* out = activation(product + bias) */
};

typedef struct {
  const void *weight;  /* [outputs][inputs] */
  const void *bias;    /* [outputs] or null */
  const void *x;       /* [rows][x_stride] */
  int64_t x_stride;
  void *out;           /* [rows][out_stride] of the dtype, or of f32 where out_f32 */
  int64_t out_stride;
  int32_t rows, outputs, inputs;
  int32_t epilogue;    /* KV_STORE, KV_ADD, KV_GATE, KV_ACTIVATE */
  int32_t activation;  /* of KV_GATE and KV_ACTIVATE */
  float scale;
  float limit;         /* of KV_CLAMPED_SWIGLU */
  int32_t out_f32;     /* with KV_STORE only */
  int32_t variant;     /* which of the shapes' tilings: 0 .. kv_linear_variants() - 1, chosen by measurement */
  void *workspace;     /* kv_linear_workspace_bytes, zeroed once */
  int32_t dtype;
} kv_linear_params;

/* Tilings to choose from for such a product; 0 where this kernel does not serve it. */
int32_t kv_linear_variants(int32_t rows, int32_t outputs, int32_t inputs, int32_t epilogue, int32_t dtype);
int64_t kv_linear_workspace_bytes(void);
int kv_linear(const kv_linear_params *params, kv_stream stream);

/* ---- sample.cu: the choice of tokens ---- */

/* How a lane's tokens are chosen: backend::step::SamplingParams. */
typedef struct {
  uint64_t seed;
  float temperature, top_p, typical_p, repetition_penalty, frequency_penalty;
  float watermark_gamma, watermark_delta; /* gamma 0: no watermark */
  uint32_t top_k;
  uint32_t top_n;
  uint32_t draw;      /* 0: greedy */
  uint32_t penalised; /* whether counts and context_len are kept */
  uint32_t pad;
} kv_sampling;

/* A row of logits to choose from. */
typedef struct {
  int32_t lane;       /* −1: nothing to choose; no result is written */
  uint32_t position;  /* Absolute position of the token to be chosen. */
  uint32_t previous;  /* The token before it. */
  int32_t result;     /* Where its result goes. */
} kv_draft;

/* What was chosen. Followed, in another array, by top_n alternatives. */
typedef struct {
  uint32_t id;
  float logprob;
  uint32_t failed;  /* 1: the logits are no distribution; the id is 0 then */
  uint32_t n_top;   /* alternatives written */
} kv_choice;

typedef struct {
  uint32_t id;
  float logprob;
} kv_alternative;

enum { KV_MAX_TOP_N = 100 };

typedef struct {
  float *logits;             /* [rows][stride]; scratch afterwards */
  int64_t stride;
  int32_t vocab;
  int32_t max_rows;          /* rows with a draft */
  const kv_draft *drafts;    /* [max_rows] */
  const kv_sampling *lanes;  /* [lanes] */
  uint32_t *counts;          /* [lanes][vocab] occurrences in prompt and output; of penalised lanes */
  uint32_t *context_lens;    /* [lanes] tokens counted */
  uint32_t *lane_last;       /* [lanes] takes the chosen id */
  kv_choice *choices;        /* by kv_draft.result; pinned host memory, mapped */
  kv_alternative *tops;      /* [..][KV_MAX_TOP_N], by result; pinned host memory, mapped */
  void *workspace;           /* kv_sample_workspace_bytes(max_rows, vocab), zeroed once */
} kv_sample_params;

int64_t kv_sample_workspace_bytes(int32_t max_rows, int32_t vocab);
/* Chooses a token a row, counts it in penalised lanes, and lets the lane take it as its last. */
int kv_sample(const kv_sample_params *params, kv_stream stream);

typedef struct {
  const float *logits;      /* [rows][stride] */
  int64_t stride;
  int32_t vocab;
  int32_t rows;
  const uint32_t *targets;  /* [rows] ids */
  float *logprobs;          /* [rows]; NaN where a row holds NaN, +inf, or nothing but -inf; pinned host memory, mapped */
} kv_target_logprobs_params;

/* Log-probabilities of given ids under raw logits. */
int kv_target_logprobs(const kv_target_logprobs_params *params, kv_stream stream);

typedef struct {
  const uint32_t *tokens;  /* [n] prompt */
  int32_t n;
  int32_t lane;
  uint32_t *counts;        /* [lanes][vocab] */
  uint32_t *context_lens;  /* [lanes] */
  int32_t vocab;
} kv_count_prompt_params;

/* Begins a penalised lane's counts with its prompt. */
int kv_count_prompt(const kv_count_prompt_params *params, kv_stream stream);

/* ---- step.cu: lanes, and the arrays of the step under way ---- */

/* A row of a step. */
typedef struct {
  int32_t lane;         /* −1: padding of a captured bucket */
  uint32_t start;       /* Position of the first token fed. */
  uint32_t store_from;  /* Keys and values of positions below it are not stored again. */
  int32_t token;        /* Its first token in the step. */
  int32_t prompt;       /* Where its tokens begin in the prompt tokens; −1: it feeds what the lane sampled last. */
} kv_row;

/* A request that takes a lane. */
typedef struct {
  int32_t lane;
  int32_t n_slots;
  int32_t slots;       /* Where its slots begin in the staged numbers. */
  uint32_t prompt_len;
  kv_sampling sampling;
} kv_lane_start;

/* What the base of the frequencies is multiplied by beyond `original` tokens is a growth ^ (d / (d - 2)): */
enum {
  KV_GROWS_WITH_SEQUENCE = 0, /* factor * len / original - (factor - 1), len of prompt and output */
  KV_GROWS_WITH_PROMPT = 1    /* 2^ceil(log2(len / original) + 1) - 1, len of the prompt */
};

/* A rotary embedding: which frequencies a position turns by, and the angles of a step. */
typedef struct {
  const float *usual;  /* [half] of sequences up to `original` tokens */
  const float *longer; /* [half] beyond, or null: there the base grows */
  float *angles;       /* [max_tokens][half][2] cosine, sine */
  double base;
  double factor;       /* of KV_GROWS_WITH_SEQUENCE */
  uint32_t original;   /* 2^32 - 1 where the length does not matter */
  int32_t growth;
  int32_t half;        /* pairs that turn */
  float amplitude;     /* Multiplies cosine and sine. */
} kv_rotary;

enum { KV_MAX_ROTARIES = 4 };

typedef struct {
  const kv_lane_start *starts; /* [n], staged */
  const uint32_t *staged;      /* slots of all of them */
  int32_t n;
  uint32_t *slots;             /* [lanes][slots_stride] */
  int64_t slots_stride;
  uint32_t *prompt_lens;       /* [lanes] */
  uint32_t *lane_last;         /* [lanes] */
  kv_sampling *lanes;          /* [lanes] */
} kv_start_lanes_params;

int kv_start_lanes(const kv_start_lanes_params *params, kv_stream stream);

typedef struct {
  int32_t decode;               /* 1: each row feeds one token and samples; drafts and decode rows are made here */
  int32_t max_tokens;           /* tokens, or the rows of the bucket */
  const kv_row *rows;
  const int32_t *n_rows;        /* of a decode step */
  const uint32_t *token_rows;   /* [tokens] the row of each, unless a decode step */
  const uint32_t *prompt;       /* prompt tokens fed */
  const uint32_t *lane_last;    /* [lanes] */
  const uint32_t *prompt_lens;  /* [lanes] */
  const uint32_t *slots;        /* [lanes][slots_stride] */
  int64_t slots_stride;
  kv_rotary rotaries[KV_MAX_ROTARIES];
  int32_t n_rotaries;
  const uint32_t *finished;     /* steps finished so far: a decode step's results go to its parity's half */
  int32_t max_results;          /* results of one step */
  uint32_t *tokens;             /* [max_tokens] ids */
  uint32_t *positions;          /* [max_tokens] */
  int32_t *stores;              /* [max_tokens] slot, or −1 */
  kv_decode_row *decode_rows;   /* [max_tokens], of a decode step */
  kv_draft *drafts;             /* of a decode step: [max_tokens]; else their `previous` is set from the tokens */
  uint32_t *sampled_tokens;     /* [sampled rows] the token whose logits are sampled; made here for a decode step */
  int32_t n_drafts;             /* unless a decode step */
} kv_lay_out_params;

int kv_lay_out(const kv_lay_out_params *params, kv_stream stream);

typedef struct {
  kv_row *rows;                     /* of a decode step: the next one's positions */
  const int32_t *n_rows;
  int32_t max_rows;                 /* 0: not a decode step */
  uint32_t *finished;               /* steps finished so far */
  volatile uint32_t *host_finished; /* the same, where the host reads it: pinned and mapped */
} kv_finish_params;

/* The end of a step: what the host may read now is there. */
int kv_finish(const kv_finish_params *params, kv_stream stream);

/* ---- rows.cu: rows taken by number, and what is done to each number of a row ---- */

typedef struct {
  const void *table;          /* [table_rows][table_stride] */
  int64_t table_stride;
  const uint32_t *wanted;     /* [rows] */
  int32_t rows;
  uint32_t first;             /* number of the table's first row; rows outside it count as zeros */
  uint32_t table_rows;
  void *out;                  /* [rows][out_stride] */
  int64_t out_stride;
  int32_t width;
  int32_t add;                /* 1: out += multiplier * row; 0: out = multiplier * row */
  float multiplier;
  int32_t dtype;
} kv_take_rows_params;

int kv_take_rows(const kv_take_rows_params *params, kv_stream stream);

typedef struct {
  const void *x;       /* [rows][x_stride] */
  int64_t x_stride;
  void *out;           /* [rows][out_stride] */
  int64_t out_stride;
  int32_t rows;
  int32_t width;
  float multiplier;
  int32_t dtype;
} kv_add_rows_params;

/* out += multiplier * x */
int kv_add_rows(const kv_add_rows_params *params, kv_stream stream);

typedef struct {
  float *logits;      /* [rows][stride] */
  int64_t stride;
  int32_t rows;
  int32_t width;
  float multiplier;
  float softcap;      /* 0: none */
} kv_warp_logits_params;

/* logits = softcap * tanh(multiplier * logits / softcap), in place */
int kv_warp_logits(const kv_warp_logits_params *params, kv_stream stream);

typedef struct {
  void *rows_of;      /* [rows][stride] */
  int64_t stride;
  int32_t rows;
  int32_t width;
  int32_t dtype;
} kv_normalise_rows_params;

/* Divides each row by its length, max(|row|, 1e-12), in place. */
int kv_normalise_rows(const kv_normalise_rows_params *params, kv_stream stream);

/* ---- norm.cu ---- */

enum {
  KV_RMS = 0,          /* weight * x / sqrt(mean(x^2) + eps) */
  KV_RMS_ONE_PLUS = 1, /* (1 + weight) * x / sqrt(mean(x^2) + eps) */
  KV_LAYER = 2         /* weight * (x - mean(x)) / sqrt(var(x) + eps) + bias */
};

typedef struct {
  const void *x;      /* [rows][x_stride] */
  int64_t x_stride;
  const void *weight; /* [width] */
  const void *bias;   /* [width] or null; of KV_LAYER */
  void *out;          /* [rows][out_stride] */
  int64_t out_stride;
  int32_t rows;
  int32_t width;
  float eps;
  int32_t kind;
  int32_t add;        /* 1: out += norm(x); 0: out = norm(x) */
  int32_t dtype;
} kv_norm_params;

int kv_norm(const kv_norm_params *params, kv_stream stream);

/* ---- rope_store.cu ---- */

/* The norm of each head's query or key, without a bias. */
typedef struct {
  const void *weight;   /* [head_dim], or [heads][head_dim] */
  int32_t head_stride;  /* head_dim where each head has its own weight; 0 where they share one */
} kv_head_norm;

typedef struct {
  void *qkv;                 /* [tokens][stride] queries, keys, values; queries are turned in place */
  int64_t stride;
  const float *angles;       /* [tokens][rotary_dim / 2][2] */
  const uint32_t *positions; /* [tokens], where log_n */
  const int32_t *stores;     /* [tokens] */
  void *keys;                /* [slots][kv_heads * head_dim] */
  void *values;
  int32_t tokens;
  int32_t heads, kv_heads, head_dim;
  int32_t rotary_dim;        /* numbers of a head that turn, its first; even, 0 for none */
  int32_t normed;            /* 1: heads are normed before they turn, by kind and eps and: */
  kv_head_norm query_norm, key_norm;
  int32_t kind;
  float eps;
  uint32_t log_n;            /* 0: none; else queries at positions p >= log_n are multiplied by ln(p + 1) / ln(log_n) */
  int32_t dtype;
} kv_rope_store_params;

int kv_rope_store(const kv_rope_store_params *params, kv_stream stream);

/* ---- gate.cu ---- */

typedef struct {
  const void *gate_up; /* [rows][stride] gates, then what they multiply */
  int64_t stride;
  void *out;           /* [rows][out_stride] */
  int64_t out_stride;
  int32_t rows;
  int32_t width;       /* of out */
  int32_t activation;
  float limit;         /* of KV_CLAMPED_SWIGLU */
  int32_t dtype;
} kv_gate_params;

int kv_gate(const kv_gate_params *params, kv_stream stream);

typedef struct {
  void *x;             /* [rows][stride] */
  int64_t stride;
  int32_t rows;
  int32_t width;
  int32_t activation;  /* of one number: not KV_CLAMPED_SWIGLU */
  int32_t dtype;
} kv_activate_params;

/* x = activation(x), in place */
int kv_activate(const kv_activate_params *params, kv_stream stream);

/* ---- collective.cu: ranks of one process, which read and write each other's memory ---- */

enum { KV_MAX_RANKS = 8, KV_MEETING_BLOCKS = 128 };

/* The ranks, as one of them sees them. Arrays by rank have n_ranks entries. */
typedef struct {
  int32_t rank, n_ranks;
  uint32_t *flags[KV_MAX_RANKS]; /* by rank: [KV_MEETING_BLOCKS][KV_MAX_RANKS], zeroed once */
  void *inboxes[KV_MAX_RANKS];   /* by rank: [2][n_ranks][inbox_bytes], filled with 0xff once */
  int64_t inbox_bytes;           /* a multiple of 16 */
  uint32_t *meetings;            /* own: [KV_MEETING_BLOCKS], zeroed once */
  uint32_t *turns;               /* own, zeroed once */
  const uint32_t *aborted;       /* not 0 once a rank has failed: pinned host memory, mapped */
} kv_world;

/* How numbers are summed over the ranks; the sums have the same bits. */
enum {
  KV_ONE_SHOT = 0, /* at most inbox_bytes, and 4 MiB among two ranks, 2 MiB among more */
  KV_TWO_SHOT = 1
};

typedef struct {
  kv_world world;
  const void *parts[KV_MAX_RANKS]; /* by rank: [n] */
  void *sums[KV_MAX_RANKS];        /* by rank: [n]; may be the parts */
  int64_t n;                       /* a multiple of 8 */
  int32_t add;                     /* 1: added to what the sums hold, 0: stored */
  int32_t way;                     /* KV_ONE_SHOT, KV_TWO_SHOT */
  int32_t dtype;
} kv_all_reduce_params;

int kv_all_reduce(const kv_all_reduce_params *params, kv_stream stream);
/* Has the driver load what the collectives run, which it could not while another rank waits in one. */
int kv_load_collectives(int32_t n_ranks, int32_t dtype);

typedef struct {
  kv_world world;
  const float *part;   /* [rows][part_stride] the rank's columns */
  int64_t part_stride;
  float *out;          /* rank 0's: [rows][out_stride] */
  int64_t out_stride;
  int32_t rows;
  int32_t first;       /* column of out where the rank's begin */
  int32_t width;       /* columns of the rank */
  int32_t all_width;   /* of the rank with most columns */
} kv_gather_params;

int kv_gather(const kv_gather_params *params, kv_stream stream);

typedef struct {
  kv_world world;
  const kv_draft *drafts;            /* [n_drafts] */
  int32_t n_drafts;
  uint32_t *lane_last[KV_MAX_RANKS]; /* by rank: [lanes]; those of the drafts are taken from rank 0's */
} kv_share_tokens_params;

int kv_share_tokens(const kv_share_tokens_params *params, kv_stream stream);

/* ---- fill_random.cu: weights that no file holds ---- */

typedef struct {
  void *out;           /* [rows][out_stride] */
  int64_t out_stride;
  int64_t rows, columns;
  int64_t first, row_step, column_step; /* (row, column) is the tensor's number first + row * row_step + ... */
  uint64_t stream;     /* the tensor's */
  float reach;         /* numbers are uniform in +- reach */
  int32_t dtype;
} kv_fill_random_params;

int kv_fill_random(const kv_fill_random_params *params, kv_stream stream);

#ifdef __cplusplus
}
#endif
#endif
