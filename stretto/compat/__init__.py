"""Ways in from other trainers: Megatron-LM's flags and scripts; what the words of the rest are here (`others`)."""
