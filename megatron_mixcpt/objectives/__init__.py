"""What is minimised: Mix-CPT's loss on packed text, preference losses on pairs of answers."""
