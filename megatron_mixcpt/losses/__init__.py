"""What is minimised: objectives over one micro-batch's logits."""
