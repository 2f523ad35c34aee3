//! sledge: a Nostr relay and sync engine.
pub mod cli;
pub mod config;
pub mod error;
pub mod protocol;
pub mod relay;
pub mod server;
pub mod store;
