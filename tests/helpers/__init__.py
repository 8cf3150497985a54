"""What tests share: small environments, policies, batches and references."""
