// What a selective scan is asked to do: the one description that every kernel reads.
// No torch header, no standard library: pointers, strides, sizes. Every field is 64 bits wide, so the caller
// may fill it as an array of 64-bit words in the order below.
#pragma once

#define SCAN_MAX_STATES 256  // N beyond this runs on the reference
#define SCAN_TILE_ROWS 16    // an image is cut into tiles of at most this many rows and columns (CPU);
#define SCAN_TILE_COLS \
    32  // the states at the tile borders are what the forward pass keeps for the backward pass

enum ScanType { scan_float32 = 0, scan_float64 = 1, scan_bfloat16 = 2, scan_float16 = 3 };

struct ScanTensor {
    void* data;           // null: the tensor is absent
    long long type;       // a ScanType
    long long stride[4];  // in elements, for the dimensions named below
};

struct ScanProblem {
    long long batch, height, width, channels, states;  // B, H, W, E, N
    long long compute;                                 // ScanType of the arithmetic: float32 or float64
    long long softplus, reverse;                       // flags
    long long threads;                                 // how many may work
    ScanTensor x, delta_t, delta_l;                    // (B, H, W, E)
    ScanTensor A_t, A_l;                               // (E, N): strides 0 and 1
    ScanTensor B_t, B_l, C;                            // (B, H, W, N)
    ScanTensor D, bias_t, bias_l;                      // (E,): stride 0; may be absent
    ScanTensor y;                                      // (B, H, W, E): written by the forward pass
    ScanTensor h;                                      // (B, H, W, E, N), states contiguous; may be absent
    ScanTensor saved;                                  // states at tile borders; may be absent going forward
    ScanTensor grad_y;  // (B, H, W, E): read by the backward pass; the rest is written by it
    ScanTensor grad_x, grad_delta_t, grad_delta_l, grad_A_t, grad_A_l, grad_B_t, grad_B_l, grad_C;
    ScanTensor grad_D, grad_bias_t, grad_bias_l;  // may be absent
    // States at the sides of a piece of an image, (B, W, E, N) and (B, H, E, N), in the arithmetic's type.
    // Each may be absent; a caller with a whole image leaves these fields out.
    ScanTensor initial_top, initial_left;  // before the first row and column
    ScanTensor bottom, right;              // the last row and column: written by the forward pass
    ScanTensor grad_bottom, grad_right;    // read by the backward pass
    ScanTensor grad_top, grad_left;        // of the states before: written by the backward pass
};
