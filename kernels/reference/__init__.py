"""What each op computes, in plain torch: the specification that kernels are tried against."""
