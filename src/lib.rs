//! sledge: a Nostr relay and sync engine.
pub mod protocol;
pub mod store;
