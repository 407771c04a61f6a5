/* The C interface of mixtures of experts, mirrored by src/backend/cuda/experts.rs. Conventions as in kvshard.h. */
#ifndef KVSHARD_EXPERTS_H
#define KVSHARD_EXPERTS_H

#include "kvshard.h"

#ifdef __cplusplus
extern "C" {
#endif

/* How experts are chosen and weighed: model::spec::Router. */
enum {
  KV_SOFTMAX_RENORMALISED = 0,
  KV_SOFTMAX = 1,
  KV_SIGMOID = 2,
  KV_SOFTMAX_OF_CHOSEN = 3
};

typedef struct {
  int32_t kind;
  float factor;           /* Multiplies weights; of KV_SOFTMAX and KV_SIGMOID. */
  int32_t groups;         /* Equal groups of experts, 1: no limit; of KV_SOFTMAX and KV_SIGMOID. */
  int32_t groups_used;    /* Of these, used by a row. */
  const void *weight;     /* [n_experts][hidden], rows padded to 8 numbers */
  const void *bias;       /* [n_experts], added to the logits, or null */
  const float *choice_bias; /* [n_experts], added for the choice alone, or null */
} kv_router;

typedef struct {
  kv_router router;
  /* Rows of weights are padded to 8 numbers, zeros. Biases or null. */
  const void *gate_up;      /* [n_experts][2 * width][hidden], the gates first */
  const void *gate_up_bias; /* [n_experts][2 * width] */
  const void *down;         /* [n_experts][hidden][width] */
  const void *down_bias;    /* [n_experts][hidden] */
  int32_t n_experts, n_chosen;
  int32_t hidden, width;
  int32_t activation;       /* of the gates */
  float limit;              /* of KV_CLAMPED_SWIGLU */
  const void *x;            /* [rows][x_stride], zeros from hidden to a multiple of 8 */
  int64_t x_stride;
  void *out;                /* [rows][out_stride] */
  int64_t out_stride;
  int32_t rows;
  int32_t max_rows;         /* that the workspace is for */
  void *workspace;          /* kv_experts_workspace_bytes, zeroed once */
  int32_t dtype;
} kv_experts_params;

/* The most experts that can be chosen from, and that a row can choose. */
enum { KV_MAX_EXPERTS = 512, KV_MAX_CHOSEN = 32 };

int64_t kv_experts_workspace_bytes(int32_t n_experts, int32_t n_chosen, int32_t hidden, int32_t width,
                                   int32_t max_rows);
/* out = sum of w_e * expert_e(x) over the experts that each row chooses, added in the order of choice. */
int kv_experts(const kv_experts_params *params, kv_stream stream);

#ifdef __cplusplus
}
#endif
#endif
