//! The operator's pass: a secret of this process that stands for the right to read and write everything.
//!
//! Whoever may open the control socket is given it, and shows it when he opens a connection; so the operator's commands
//! see through a running relay what they see in a stopped one.

use sha2::{Digest, Sha256};

/// The secret. Has no `Debug`, so that it gets into no log.
pub struct Pass([u8; 32]);

impl Pass {
    /// A pass of these bytes, which nobody must be able to guess.
    pub fn new(random: [u8; 32]) -> Self {
        Pass(random)
    }

    /// As it is shown: 64 hex digits.
    pub fn text(&self) -> String {
        faster_hex::hex_string(&self.0)
    }

    /// Whether an `Authorization` header shows it. Hashes are compared, so the time it takes tells nothing about the secret.
    pub fn is_shown_by(&self, authorization: &[u8]) -> bool {
        Sha256::digest(authorization) == Sha256::digest(self.header().as_bytes())
    }

    /// The `Authorization` header that shows it.
    pub fn header(&self) -> String {
        header(&self.text())
    }
}

/// The `Authorization` header for a pass in text.
pub fn header(text: &str) -> String {
    format!("Bearer {text}")
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Only the whole secret counts.
    #[test]
    fn only_the_whole_pass_counts() {
        let pass = Pass::new([7; 32]);
        assert!(pass.is_shown_by(header(&pass.text()).as_bytes()));
        for wrong in ["", "Bearer ", "Bearer 07", &pass.text(), &header(&Pass::new([8; 32]).text())] {
            assert!(!pass.is_shown_by(wrong.as_bytes()), "{wrong}");
        }
    }
}
