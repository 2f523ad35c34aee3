//! sledge: a Nostr relay and sync engine.
pub mod config;
pub mod protocol;
pub mod store;
