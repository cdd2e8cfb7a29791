"""What a person sees: progress while a run goes on, and the table at its end."""
