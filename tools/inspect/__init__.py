"""`gtcompile inspect`: what a step costs, what is trained and why, as text, HTML, JSON or a graph."""
