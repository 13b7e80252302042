"""What people run beside the method, for example `python -m tools.report runs/grpo`."""
