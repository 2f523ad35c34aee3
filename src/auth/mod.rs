//! Who is at the other end of a connection, and what follows from it: authentication (NIP-42, NIP-98) and the read gate.
//!
//! In: an `AUTH` event, the challenge that the connection was sent, the time. Out: proven keys, or the answer that the
//! client is owed. Pure: no clock, disk, socket or randomness; all of them come in as arguments.

pub mod authority;
pub mod challenge;
pub mod gate;
pub mod http;
pub mod pass;
pub mod session;

pub use authority::Authority;
pub use challenge::Challenge;
pub use gate::Gate;
pub use pass::Pass;
pub use session::Session;
