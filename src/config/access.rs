//! `[access]`: who may read and write.

use serde::{Deserialize, Serialize};

use super::KindRange;

/// `[access]`
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Access {
    /// Kinds that only their authors and the keys in their `p` tags may read, after authentication (NIP-42).
    pub private_kinds: Vec<KindRange>,
    /// Whether a client must authenticate before it may read anything.
    pub auth_required_to_read: bool,
    /// Whether a client must authenticate before it may publish anything.
    pub auth_required_to_write: bool,
}
