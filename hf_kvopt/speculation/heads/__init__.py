"""Draft heads: small networks over the target's hidden states that propose its next tokens."""
