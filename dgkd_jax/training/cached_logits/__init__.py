"""The teacher's logits of every training batch, stored once and read instead of running the teacher."""
