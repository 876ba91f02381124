"""Private LLM inference on your own GPU hosts: inventory, plan, render, push, verify."""

__version__ = "0.1.0"
