//! What the tests share: a signer, a client, a relay a test, the binary, and the rules written down naively.

pub mod binary;
pub mod client;
#[cfg(feature = "postgres")]
pub mod cluster;
pub mod device;
pub mod fake;
pub mod paths;
pub mod proxy;
pub mod reference;
pub mod relay;
pub mod signer;
pub mod stores;

pub use binary::{Binary, Serving};
pub use client::Client;
pub use device::Device;
pub use fake::Fake;
pub use reference::Reference;
pub use relay::Relay;
pub use signer::{Keys, NOW, ids, json_of, verified};
