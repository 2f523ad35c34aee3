//! Chats, settings and training data over Nostr events: what is written, how it is dated, and how it merges.
//!
//! In: commands of an app, verified events, answers of relays, the time, random numbers. Out: state, drafts of events,
//! and what to send next. Never touches a socket, a disk, a clock or a random number generator: one seeded simulation
//! can own them all.

pub mod clock;
pub mod draft;
pub mod outbox;
pub mod reconcile;
