//! Chats, settings and training data over Nostr events: what is written, how it is dated, how it merges, and how two
//! sides find out what they lack.
//!
//! In: commands of an app, verified events, answers of relays, the time, random numbers. Out: state, drafts of events,
//! and what to send next. Never touches a socket, a disk, a clock or a random number generator: one seeded simulation
//! can own them all.

pub mod chat;
pub mod cipher;
pub mod clock;
pub mod collections;
pub mod draft;
pub mod fields;
pub mod nip44;
pub mod outbox;
pub mod reconcile;
pub mod settings;
pub mod shape;
pub mod slots;
#[cfg(test)]
pub(crate) mod testing;
pub mod training;

pub use collections::{Absorbed, Collections};
