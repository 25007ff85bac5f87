"""Into other libraries' models. Nothing here is imported unless asked for by name."""
