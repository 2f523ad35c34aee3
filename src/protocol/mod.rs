//! The Nostr protocol as plain values: events, filters, messages and the rules that decide between events.
//!
//! Pure: nothing here knows a socket, a disk, a clock, randomness or a task. What time it is comes in as an argument.

pub mod bytes;
pub mod event;
pub mod filter;
pub mod hll;
pub mod item;
pub mod kind;
pub mod label;
pub mod message;
pub mod nip06;
pub mod nip19;
pub mod pow;
pub mod relay_info;
pub mod relay_message;
pub mod slot;
pub mod subscription;
pub mod supersede;
pub mod tag;
#[cfg(test)]
pub(crate) mod testing;
pub mod verify;
pub mod visibility;

pub use bytes::{EventId, PublicKey, Signature};
pub use event::{Event, Fields};
pub use filter::Filter;
pub use kind::Kind;
pub use subscription::SubscriptionId;
pub use tag::{Tag, TagLetter, Tags};
pub use verify::Verified;
pub use visibility::Visibility;
