"""Say before anything is deployed whether it fits and how many users it carries. All pure."""
