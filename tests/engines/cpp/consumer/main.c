/* Runs a bundle on a batch of ones and prints its first score: consumer BUNDLE */
#include <stdio.h>
#include <stdlib.h>
#include <vp_engine/vp_engine.h>

static int failed(vp_status status) {
  if (status != VP_OK) fprintf(stderr, "error: %s\n", vp_engine_last_error());
  return status != VP_OK;
}

int main(int argc, char** argv) {
  vp_engine* engine = NULL;
  vp_description description;
  vp_input input = {NULL, VP_FLOAT32, 0, {0}, NULL, 0};
  vp_output output = {NULL, VP_FLOAT32, NULL, 0};
  size_t count = 1, i;
  float *images, *scores;
  if (argc != 2 || failed(vp_engine_open(argv[1], NULL, &engine))) return 2;
  if (failed(vp_engine_describe(engine, &description))) return 2;
  input.rank = description.inputs[0].rank;
  for (i = 0; i < input.rank; ++i) {
    input.shape[i] = i == 0 ? 1 : description.inputs[0].shape[i];
    count *= (size_t)input.shape[i];
  }
  if (failed(vp_engine_output_bytes(engine, 0, 1, &output.bytes))) return 2;
  input.bytes = count * sizeof(float);
  images = malloc(input.bytes);
  scores = malloc(output.bytes);
  if (images == NULL || scores == NULL) return 2;
  for (i = 0; i < count; ++i) images[i] = 1.0f;
  input.data = images;
  output.data = scores;
  if (failed(vp_engine_run(engine, &input, 1, &output, 1))) return 2;
  printf("%.6f\n", (double)scores[0]);
  vp_engine_close(engine);
  free(images);
  free(scores);
  return 0;
}
