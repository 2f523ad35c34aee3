//! sledge: a Nostr relay and sync engine.

pub mod store;
