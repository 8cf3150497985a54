"""Growing trees: policy x environment x expansion."""
