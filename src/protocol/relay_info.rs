//! The relay information document (NIP-11).

use serde::Serialize;

use super::PublicKey;

/// What a relay tells about itself. Empty texts are left out.
#[derive(Clone, Debug, Default, Serialize)]
pub struct RelayInfo {
    /// Short name for lists.
    pub name: String,
    /// What the relay is for.
    pub description: String,
    /// Wide picture, a URL.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub banner: String,
    /// Square picture, a URL.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub icon: String,
    /// The operator's key, lower-case hex.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub pubkey: String,
    /// The relay's own key.
    #[serde(rename = "self", skip_serializing_if = "Option::is_none")]
    pub relay_key: Option<PublicKey>,
    /// Another way to reach the operator, a URI.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub contact: String,
    /// NIPs that this relay implements, ascending.
    pub supported_nips: Vec<u16>,
    /// Home of the software, a URL.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub software: String,
    /// Version of the software.
    pub version: String,
    /// A URL.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub terms_of_service: String,
    /// Bounds on what clients may send and ask.
    pub limitation: Limitation,
    /// What the sync engine finds here beside the NIPs.
    pub sync: SyncInfo,
}

/// `sync`: what the relay does for the sync engine.
#[derive(Clone, Debug, Default, Serialize)]
pub struct SyncInfo {
    /// Version of the settings slot; see [`slot`](crate::protocol::slot).
    pub slots: u32,
}

/// NIP-11 `limitation`: what is refused or cut beyond these numbers.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Limitation {
    /// Bytes of one WebSocket message.
    pub max_message_length: u64,
    /// Open subscriptions of one connection.
    pub max_subscriptions: u64,
    /// Stored events for one filter, whatever `limit` it names.
    pub max_limit: u64,
    /// Characters of a subscription id.
    pub max_subid_length: u64,
    /// Tags of one event.
    pub max_event_tags: u64,
    /// Characters of one event's content.
    pub max_content_length: u64,
    /// NIP-13 difficulty that events need.
    pub min_pow_difficulty: u8,
    /// Whether nothing works before NIP-42 authentication.
    pub auth_required: bool,
    /// Whether the relay takes money.
    pub payment_required: bool,
    /// Whether only some may write.
    pub restricted_writes: bool,
    /// How far in the past `created_at` may lie, seconds; left out when there is no bound.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub created_at_lower_limit: Option<u64>,
    /// How far in the future `created_at` may lie, seconds; left out when there is no bound.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub created_at_upper_limit: Option<u64>,
    /// Stored events for a filter without `limit`.
    pub default_limit: u64,
}
