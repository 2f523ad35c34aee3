//! The client: an app's events on this device, and on the relays that are to have them.
//!
//! Here so far: [`link`] (one relay's socket), [`dial`] (how it is reached), [`keys`] (who signs), [`clock`] and
//! [`backoff`] (time and chance). Never uses the server: a relay on this machine is reached like any other.

pub mod backoff;
pub mod cache;
mod catchup;
pub mod clock;
pub mod dial;
pub mod journal;
pub mod keys;
pub mod link;
pub mod links;
pub mod outbox;
pub mod profile;
pub mod reconcile;
pub mod routing;
pub mod session;
pub mod status;
