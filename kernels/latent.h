/* The C interface of latent attention, mirrored by src/backend/cuda/latent.rs. Conventions as in kvshard.h.
 *
 * A row of the cache is [latent | turned key], kv_rank + rope_dim numbers; queries are absorbed, so that scores are their
 * products with whole rows and values are the latents (DeepSeek-V2, arXiv 2405.04434, section 2.1).
 */
#ifndef KVSHARD_LATENT_H
#define KVSHARD_LATENT_H

#include "kvshard.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ---- store_latent.cu ---- */

typedef struct {
  const void *queries;     /* [tokens][queries_stride] of each head nope_dim, then rope_dim numbers */
  int64_t queries_stride;
  void *absorbed;          /* [tokens][absorbed_stride] of each head kv_rank, then rope_dim numbers: these are written */
  int64_t absorbed_stride;
  const void *latents;     /* [tokens][latents_stride] kv_rank, then rope_dim numbers */
  int64_t latents_stride;
  const void *norm_weight; /* [kv_rank] */
  float eps;
  const float *angles;     /* [tokens][rope_dim / 2][2] cosine, sine */
  const int32_t *stores;   /* [tokens] slot, or -1 */
  void *cache;             /* [slots][kv_rank + rope_dim] */
  int32_t tokens;
  int32_t heads, nope_dim, rope_dim, kv_rank;
  int32_t dtype;
} kv_store_latent_params;

/* Turns the queries' rope parts into `absorbed`; norms latents, turns keys, stores both. */
int kv_store_latent(const kv_store_latent_params *params, kv_stream stream);

/* ---- attend_latent.cu: one query a row ---- */

typedef struct {
  const void *q;           /* [tokens][q_stride] absorbed queries, of each head kv_rank + rope_dim numbers */
  int64_t q_stride;
  void *out;               /* [tokens][out_stride] of each head kv_rank numbers */
  int64_t out_stride;
  const void *cache;       /* [slots][kv_rank + rope_dim] */
  const uint32_t *slots;   /* [lanes][slots_stride] the slot of each position of a lane */
  int64_t slots_stride;
  const kv_decode_row *rows;
  const int32_t *n_rows;
  int32_t max_rows;        /* Known when the kernel is captured; *n_rows is never above it. */
  int32_t heads, kv_rank, rope_dim;
  int32_t window;          /* As in kv_scores. */
  float scale;
  int32_t only_last_is_new; /* 1: the kernel queued just before wrote no cached row but each row's own last. */
  const int32_t *plan;     /* As kv_plan_latent left it for the same rows and window. */
  void *workspace;         /* kv_attend_latent_workspace_bytes, zeroed once; shared by all layers */
  int32_t dtype;
} kv_attend_latent_params;

typedef struct {
  const kv_decode_row *rows;
  const int32_t *n_rows;
  int32_t max_rows;
  int32_t window;
  int32_t heads;
  int32_t row_width;       /* kv_rank + rope_dim */
  int32_t *plan;           /* [kv_plan_decode_ints(max_rows)] */
} kv_plan_latent_params;

int64_t kv_attend_latent_workspace_bytes(int32_t max_rows, int32_t heads, int32_t row_width);
/* How the rows' keys are cut among blocks; once a step for each window. */
int kv_plan_latent(const kv_plan_latent_params *params, kv_stream stream);
/* Rows, slots and plan must be older than the kernel queued just before. */
int kv_attend_latent(const kv_attend_latent_params *params, kv_stream stream);

/* ---- attend_latent_prefill.cu: runs of queries ---- */

/* As kv_attend_prefill, with one KV head of head_dim = kv_rank + rope_dim whose keys are the cached rows and whose values
 * are their first kv_rank numbers; `out` has kv_rank numbers for each head. Of the scores' fields scale and window count;
 * cache.values is not read. */
int kv_attend_latent_prefill(const kv_attend_prefill_params *params, int32_t kv_rank, kv_stream stream);

/* ---- linear_heads.cu ---- */

typedef struct {
  const void *weight;       /* [heads][outputs][inputs], rows padded to 8 numbers, zeros */
  const void *x;            /* [rows][x_stride] */
  int64_t x_stride;
  int64_t x_head_stride;    /* From a head's numbers to the next one's. */
  void *out;                /* [rows][out_stride] */
  int64_t out_stride;
  int64_t out_head_stride;
  int32_t rows, heads, outputs, inputs;
  int32_t dtype;
} kv_linear_heads_params;

/* Each head's product with its own weight. */
int kv_linear_heads(const kv_linear_heads_params *params, kv_stream stream);

#ifdef __cplusplus
}
#endif
#endif
