"""What the trained networks do: measures over a whole split, from sums that add up over batches and devices."""
