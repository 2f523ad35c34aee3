//! The client: a user's events on this device, and on the relays that are to have them.
//!
//! ```text
//! app        Client: chats, settings, training data; what an app holds
//!  │
//! links      one link to each relay, kept up or visited once
//!  │  │                     and carry from one to the other
//!  │  └ session, catchup      one link at work: make both sides equal, send what is owed, take what comes
//!  │     └ link, dial         one socket: TLS, pings, NIP-42, the relay's clock
//! profile    the order of writing: outbox → cache → collections; what a link is to send next
//!    └ outbox (journal), cache (an embedded store), unwanted (journal), routing, local
//!
//! level             two sides made equal over a link: the same for a profile and for a relay's own store
//! stream, mirrors   a relay's own store made equal with other relays, by the same links: `sledge sync`, `[[mirror]]`
//! ```
//!
//! Reading is local and at once. A write is durable on this device before anything is sent, and stays owed to each relay
//! until that relay has settled it; see [`profile`] for the order, [`crate::sync::outbox`] for the rules, [`catchup`] for
//! how two sides become equal. Never uses the server: a relay on this machine is reached like any other.

pub mod app;
pub mod backoff;
pub mod cache;
pub mod carry;
pub mod catchup;
pub mod clock;
pub mod dial;
pub mod journal;
pub mod keys;
mod level;
pub mod link;
pub mod links;
pub mod local;
pub mod mirrors;
pub mod outbox;
pub mod profile;
pub mod reconcile;
pub mod routing;
pub mod session;
pub mod status;
pub mod stream;
pub mod unwanted;
pub mod wire;

pub use app::{Client, ClientError};
