"""One video on several GPUs: what each rank has, and what ranks tell each other."""
