"""Pure decisions: settings and probe in, plan out. Nothing here imports pyinfra."""
