//! sledge: a Nostr relay and sync engine.
