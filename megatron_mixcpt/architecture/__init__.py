"""What a model is, before there is one: shapes, where each tensor lies on a grid, first values, FLOPs."""
