"""How a tensor is quantized: grids, products, layers, bit-widths as data."""
