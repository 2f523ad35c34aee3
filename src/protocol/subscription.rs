//! Subscription ids (NIP-01): chosen by the client, one name space a connection.

use std::fmt;
use std::sync::Arc;

/// Longest subscription id, in characters (NIP-01).
pub const SUBSCRIPTION_ID_CHARS_MAX: usize = 64;

/// A subscription id: 1 to 64 characters of the client's choice.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SubscriptionId(Arc<str>);

impl SubscriptionId {
    /// Checks the length that NIP-01 sets; characters count, not bytes.
    pub fn new(id: &str) -> Option<Self> {
        let fits = !id.is_empty() && id.chars().nth(SUBSCRIPTION_ID_CHARS_MAX).is_none();
        fits.then(|| SubscriptionId(id.into()))
    }

    /// The id as the client wrote it.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for SubscriptionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Length in characters at both ends, with one and with four bytes a character (T23).
    #[test]
    fn t23_subscription_id_length_counts_characters() {
        assert!(SubscriptionId::new("").is_none());
        for character in ["x", "🛷"] {
            assert!(SubscriptionId::new(&character.repeat(64)).is_some());
            assert!(SubscriptionId::new(&character.repeat(65)).is_none());
        }
    }
}
