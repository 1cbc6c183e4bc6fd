"""Many runs of one question: arms, learning rates and seeds, what each learned and forgot, and what follows."""
