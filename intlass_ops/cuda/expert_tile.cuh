// What a tile of a grouped GEMM has, as expert_tiles.cu finds out.
#pragma once

// `count` tokens from `first` on of one expert; none beyond the last tile
struct __align__(16) ExpertTile { int expert, first, count, unused; };
// Tokens that no expert has, whose outputs are 0; and what all are where `ends` cannot be: NaN
constexpr int no_expert = -1, bad_ends = -2;
